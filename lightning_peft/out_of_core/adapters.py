"""An adapter folder over a model without weights: injected on the meta device, given its values place by place."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_peft.adapter_files import WEIGHTS, AdapterFolder, read_adapter
from lightning_peft.adapter_layer import AdapterLayer, base_parameters
from lightning_peft.adapter_placement import (
    check_tensors,
    name_in_layer,
    placed,
    placed_tensors,
    refuse_different,
    saved_roots,
    shapes_at,
)
from lightning_peft.errors import (
    AdapterConfigError,
    AdapterMismatchError,
    BaseMismatchError,
    LightningPEFTError,
    MergeError,
)
from lightning_peft.fingerprint import Fingerprint
from lightning_peft.surgery import inject_at


@dataclass
class Stored:
    """One adapter of a folder."""

    name: str
    """Its name in the model."""
    folder: AdapterFolder
    """What the folder holds."""
    tensors: dict[str, Tensor]
    """The tensors that were not taken yet, by ``<module path>.<tensor>``."""

    def finish(self, model: nn.Module) -> None:
        """Refuse tensors that no place took."""
        names = [key for path, _ in base_parameters(model) for key in (path, name_in_layer(path))]
        check_tensors(self.folder, {}, self.tensors, names)


def put_in(model: nn.Module, path: Path, name: str, base: tuple[Fingerprint, Set[str]] | None) -> Stored:
    """Inject the adapter of a folder into ``model``, which is on the meta device and stays so.

    Args:
        model: the base, with other adapters or without.
        path: the folder.
        name: the name it gets.
        base: the fingerprint of the base and what is left out of it, to be compared; None not to.

    Raises:
        AdapterFileError: the folder cannot be read, or is not for this base.
        MergeError: its method cannot be merged.
    """
    folder = read_adapter(path)
    if base is not None:
        refuse_different(model, folder, *base)
    roots = saved_roots(model, folder)
    own, saved = placed_tensors(model, folder, roots)
    injection = replace(placed(model, folder, own, roots), saved=roots)
    if not injection.method.mergeable:
        raise MergeError(f"adapter {name!r} is a {injection.method.name!r} adapter, {injection.method.merge_refusal}")
    with torch.random.fork_rng(devices=[]):
        try:
            inject_at(model, injection, name=name, trainable=False)
        except LightningPEFTError as error:
            raise AdapterMismatchError(f"{str(folder.path)!r} does not fit {type(model).__name__}: {error}") from error
    return Stored(name, folder, own | saved)


@torch.no_grad()
def take_values(stored: Stored, path: str, layer: AdapterLayer) -> None:
    """Give the adapter at ``path`` its values; ``layer`` has the weights of its base in memory."""
    adapter, folder = layer._adapter(stored.name), stored.folder
    copied = stored.tensors.pop(
        f"{path}.base_layer.weight", None
    )  # HF PEFT writes adapted embeddings beside their adapters
    if copied is not None:
        weight = layer.base_layer.get_parameter("weight")
        if copied.shape != weight.shape or not torch.equal(copied.to(weight), weight):
            raise BaseMismatchError(
                f"{str(folder.path / WEIGHTS)!r} holds the weight of {path!r} beside its adapter, and it differs from that of the base"
            )
    adapter.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        adapter.reset_parameters(layer.base_layer)
    adapter.fit_to(shapes_at(path, stored.tensors))
    needed = {f"{path}.{key}": value for key, value in adapter.export_state().items()}
    check_tensors(folder, needed, {key: stored.tensors[key] for key in needed if key in stored.tensors}, ())
    try:
        adapter.import_state({key: stored.tensors.pop(f"{path}.{key}") for key in adapter.export_state()})
    except AdapterConfigError as error:
        raise AdapterMismatchError(f"{str(folder.path / WEIGHTS)!r}, at {path!r}: {error}") from error

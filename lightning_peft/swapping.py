"""Other values for an adapter that stays where it is: hot swapping, also under ``torch.compile``.

No tensor is replaced and no shape or number that a compiled graph has seen changes, so the graph goes on to be used. Adapters of
smaller ranks fit into tensors that were padded for the largest one (:mod:`lightning_peft.arithmetic.padded_ranks`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter_files import read_adapter
from lightning_peft.adapter_layer import adapter_layers, adapters_named
from lightning_peft.arithmetic.low_rank import LowRankAdapter
from lightning_peft.arithmetic.padded_ranks import fitted, pad, paddable
from lightning_peft.arithmetic.trained_bias import BiasAdapter
from lightning_peft.errors import AdapterMismatchError, ConfigError, InjectionError, LightningPEFTError, MergeError
from lightning_peft.injection import Injection, record, records
from lightning_peft.interfaces import Adapter
from lightning_peft.registry import get_registry
from lightning_peft.saved_modules import SavedParameters
from lightning_peft.state import asked_for, fill
from lightning_peft.surgery import new_adapters


def pad_adapter_rank(model: nn.Module, rank: int, *, name: str = "default") -> None:
    """Make room for adapters of up to ``rank`` in the tensors of the adapter ``name``; it acts as before.

    Call this before ``torch.compile`` and before an optimizer is made, since it replaces the parameters. Saving writes the
    rank that is in use.

    Args:
        model: an adapted model.
        rank: the largest rank that will be swapped in, for each slice of a fused projection.
        name: the adapter.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        ConfigError: ``rank`` is not an integer, or smaller than a rank the adapter has.
        InjectionError: an adapter is of a kind that cannot be padded, or has no values yet. The model is unchanged then.
        MergeError: the adapter is merged into the base.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA, adapter_state_dict, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = inject(model, LoRA(rank=1))
        >>> pad_adapter_rank(model, 8)
        >>> model[0].adapters["default"].lora_A.shape, adapter_state_dict(model)["0.lora_A.weight"].shape
        (torch.Size([8, 4]), torch.Size([1, 4]))
    """
    adapters = adapters_named(model, name)
    _refuse_merged(model, name)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise ConfigError(f"pad_adapter_rank needs a rank as an integer, got {rank!r}")
    padded: list[LowRankAdapter] = []
    for path, adapter in adapters.items():
        if isinstance(adapter, (BiasAdapter, SavedParameters)):
            continue  # nothing here has a rank
        if not isinstance(adapter, LowRankAdapter) or not paddable(adapter):
            raise InjectionError(
                f"adapter {name!r} was to be padded to rank {rank}, but at {path!r} it is a {type(adapter).__name__}, which holds its values at "
                "their own rank only; swap adapters of equal shapes"
            )
        if rank < adapter.rank:
            raise ConfigError(f"adapter {name!r} has rank {adapter.rank} at {path!r}, which cannot be padded to {rank}")
        if any(parameter.is_meta for parameter in adapter.parameters()):
            raise InjectionError(
                f"adapter {name!r} is on the meta device at {path!r}; materialise it before padding it"
            )
        padded.append(adapter)
    for adapter in padded:
        pad(adapter, rank)


def swap_adapter(model: nn.Module, path: str | Path, *, name: str = "default", check_base: bool = True) -> Injection:
    """Give the adapter ``name`` the values of the adapter of a folder, without replacing a tensor.

    As strict as :func:`~lightning_peft.state.load_adapter`, and beyond that the folder must have the same method at the same
    places. Low-rank adapters may have another scaling, and where there is room (:func:`pad_adapter_rank`) another rank. What
    is active or trained stays so, and so does the scale. If it is refused, the model is what it was.

    Args:
        model: an adapted model, compiled or not.
        path: a folder written by :func:`~lightning_peft.state.save_adapter` or by HF PEFT.
        name: the adapter whose values are replaced.
        check_base: whether to refuse a base other than the one it was trained on.

    Returns:
        What the adapter is now.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        AdapterFileError: the folder cannot be read.
        AdapterConfigError: its configuration cannot be honoured.
        AdapterMismatchError: its method, places, shapes or values do not fit.
        BaseMismatchError: it was trained on another base.
        MergeError: the adapter is merged into the base.
    """
    here = record(model, name)
    _refuse_merged(model, name)
    folder = read_adapter(path)
    injection, tensors = asked_for(model, folder, check_base=check_base)
    where = f"{str(folder.path)!r} cannot be swapped into adapter {name!r}"
    _refuse_other_kind(where, here, injection)
    family = get_registry().model_families.get(injection.family) or get_registry().resolve_family(model)
    with torch.random.fork_rng():
        try:
            fresh = new_adapters(model, injection, family)
        except LightningPEFTError as error:
            raise AdapterMismatchError(f"{str(folder.path)!r} does not fit {type(model).__name__}: {error}") from error
    fill(model, folder, fresh, tensors, check_base=check_base)
    adapters = adapters_named(model, name)
    if adapters.keys() != fresh.keys():
        odd = sorted(adapters.keys() ^ fresh.keys())
        raise AdapterMismatchError(f"{where}: they have different places, such as {odd[:5]} ({len(odd)})")
    values = {place: _values(adapters[place], fresh[place], f"{where}: at {place!r}") for place in adapters}
    with torch.no_grad():
        for place, adapter in adapters.items():
            for key, tensor in _tensors(adapter).items():
                tensor.copy_(values[place][key])
            if isinstance(adapter, LowRankAdapter) and paddable(adapter):
                other = fresh[place]
                assert isinstance(other, LowRankAdapter)
                adapter.in_file = (other.rank, other.method_scaling)
    records(model)[name] = injection
    return injection


def _refuse_merged(model: nn.Module, name: str) -> None:
    for path, layer in adapter_layers(model).items():
        if name in layer.merged:
            raise MergeError(
                f"adapter {name!r} is merged into the base at {path!r}; call unmerge_adapters(model) before its tensors change"
            )


def _refuse_other_kind(where: str, here: Injection, other: Injection) -> None:
    """Refuse another method, other hyperparameters that adapters act by, or other places."""
    if type(here.method) is not type(other.method):
        raise AdapterMismatchError(f"{where}: it holds {other.method.name!r}, the model {here.method.name!r}")
    ours, theirs = here.method.to_config(), other.method.to_config()
    for field in dataclasses.fields(here.method):  # type: ignore[arg-type]
        if field.name not in here.method.swappable_fields and ours[field.name] != theirs[field.name]:
            raise AdapterMismatchError(
                f"{where}: it has {field.name}={theirs[field.name]!r}, the model {ours[field.name]!r}, which a swap cannot change; load it "
                "under another name="
            )

    def places(injection: Injection) -> dict[str, Any]:
        return {target.path: target.slices for target in injection.targets} | {
            target.path: "in full" for target in injection.saved
        }

    mine, yours = places(here), places(other)
    odd = sorted(path for path in mine.keys() | yours.keys() if mine.get(path) != yours.get(path))
    if odd:
        raise AdapterMismatchError(f"{where}: they have different places, such as {odd[:5]} ({len(odd)})")


def _values(adapter: Adapter, other: Adapter, where: str) -> dict[str, Tensor]:
    """Return the values that the tensors of ``adapter`` need to act as ``other``; nothing is changed."""
    values = _tensors(other)
    if type(adapter) is not type(other):
        raise AdapterMismatchError(f"{where} it needs a {type(other).__name__}, but finds a {type(adapter).__name__}")
    if isinstance(adapter, LowRankAdapter) and isinstance(other, LowRankAdapter):
        if paddable(adapter):
            if other.rank > adapter.rank:
                raise AdapterMismatchError(
                    f"{where} it has rank {other.rank}, and there is room for {adapter.rank}; call pad_adapter_rank(model, {other.rank}) "
                    "before the model is compiled"
                )
            values |= fitted(adapter, other)
        elif not isinstance(adapter, BiasAdapter) and (adapter.rank, adapter.method_scaling) != (
            other.rank,
            other.method_scaling,
        ):
            raise AdapterMismatchError(
                f"{where} it has rank {other.rank} and scaling {other.method_scaling:g}, but a {type(adapter).__name__} of rank "
                f"{adapter.rank} and scaling {adapter.method_scaling:g} takes its own only"
            )
    for key, tensor in _tensors(adapter).items():
        if key not in values or values[key].shape != tensor.shape:
            found = tuple(values[key].shape) if key in values else None
            raise AdapterMismatchError(f"{where} {key!r} has shape {found}, and {tuple(tensor.shape)} is needed")
        if tensor.is_floating_point() and not torch.isfinite(values[key].to(tensor.dtype)).all():
            raise AdapterMismatchError(
                f"{where} {key!r} is not finite in {tensor.dtype} under the scaling that the adapter has here"
            )
    return values


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}

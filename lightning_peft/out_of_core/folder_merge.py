"""``merge_folder``: an adapter folder merged into a model folder that is never loaded.

::

    headers of the shards ── model on the meta device ── adapters injected, their tensors read
                                                              │
    shard ── for each tensor ──┬── of an adapted module ── the module alone gets its weights ── merged ──┬── new shard
                               └── of any other ── copied in small pieces ───────────────────────────────┘

In memory are the adapters and the weights of one module, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_peft.activation import set_active_adapters
from lightning_peft.adapter_layer import AdapterLayer, adapter_layers
from lightning_peft.composition import saved_adapters, stored_scales
from lightning_peft.errors import ConfigError, MergeError
from lightning_peft.field_checks import bytes_in
from lightning_peft.merging import check_mergeable
from lightning_peft.out_of_core.adapters import Stored, put_in, take_values
from lightning_peft.out_of_core.checkpoints import (
    INDEX,
    SINGLE,
    Checkpoint,
    Names,
    checkpoint_fingerprint,
    empty_model,
    open_checkpoint,
    parameter_names,
    take_dtypes,
)
from lightning_peft.out_of_core.tensor_files import DTYPES, Planned, dtype_name, write_tensors
from lightning_peft.scaling import scale_adapters
from lightning_peft.side_files import copy_side_files


def merge_folder(
    base_folder: str | Path,
    adapter_folder: str | Path,
    output: str | Path,
    *,
    max_shard_size: int | str | None = None,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    overwrite: bool = False,
) -> Path:
    """Merge an adapter folder into a model folder of transformers and write a plain model folder, tensor by tensor.

    The result is bit for bit what merging in memory gives. The model is never loaded: next to the adapters there is one adapted
    module in memory. Tokenizer, processor and generation settings are copied. The folder appears when it is whole.

    Args:
        base_folder: a folder with ``config.json`` and safetensors files.
        adapter_folder: folder of one adapter or several, ours or HF PEFT's.
        output: folder to write; new or empty.
        max_shard_size: size at which the weights are cut into files, as a number of bytes or ``"5GB"``; the files of the base if None.
        dtype: floating-point precision to cast to, before the merge; that of each tensor if None.
        check_base: whether to refuse a base other than the one the adapter was trained on, as far as its folder says.
        overwrite: replace the model folder that stands at ``output``.

    Returns:
        The folder.

    Raises:
        ConfigError: an argument is out of its range, or the base is no folder of safetensors files.
        AdapterFileError: a file cannot be read, or does not fit the base; :class:`~lightning_peft.errors.BaseMismatchError` for another base.
        MergeError: the method cannot be merged, the names of the checkpoint do not line up with the parameters of an adapted module, or a
            merged weight would be non-finite.
    """
    if dtype is not None and dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype must be a floating-point precision of 16 to 64 bit, got {dtype}")
    base, target, limit = (
        Path(base_folder),
        Path(output),
        None if max_shard_size is None else bytes_in(max_shard_size, "max_shard_size"),
    )
    _check_output(target, overwrite, [base, Path(adapter_folder)])
    checkpoint = open_checkpoint(base)
    model = empty_model(checkpoint)
    names = parameter_names(model, checkpoint)
    take_dtypes(model, checkpoint, names, dtype)
    expected = checkpoint_fingerprint(model, checkpoint, names) if check_base else None
    stored = [put_in(model, folder, name, expected) for name, folder in saved_adapters(adapter_folder).items()]
    set_active_adapters(model, [one.name for one in stored])
    scales = stored_scales(adapter_folder)
    scale_adapters(model, {one.name: scales[one.name] for one in stored if one.name in scales})
    merge = _Merge(model, checkpoint, names, stored, dtype)
    with _whole(target) as written:
        _write_shards(written, checkpoint, merge, dtype, limit)
        _write_config(base, written, dtype)
        copy_side_files(base, written)
    return target


class _Merge:
    """The merged values of tensors, computed when their turn comes.

    Args:
        model: on the meta device, with adapters.
        checkpoint: its weights.
        names: which tensors are which parameters.
        stored: the adapters, innermost first.
        dtype: what to cast to.
    """

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, names: Names, stored: list[Stored], dtype: torch.dtype | None
    ) -> None:
        self.checkpoint, self.names, self.dtype = checkpoint, names, dtype
        self.adapters = [one.name for one in stored]
        check_mergeable(model, self.adapters)
        self.waiting: dict[str, Tensor] = {}
        layers = adapter_layers(model)
        users: dict[int, list[str]] = {}
        for path, layer in layers.items():
            self._check(path, layer)
            for parameter in layer.base_layer.parameters():
                users.setdefault(id(parameter), []).append(path)
        for one in stored:
            for path, layer in layers.items():
                if one.name in layer.adapters:
                    with self._filled([layer]):
                        take_values(one, path, layer)
            one.finish(model)
        self.groups: dict[str, list[AdapterLayer]] = {}  # tensor -> the layers that are merged together
        for layer in layers.values():
            together = {path for parameter in layer.base_layer.parameters() for path in users[id(parameter)]}
            group = [other for path, other in layers.items() if path in together]
            for parameter in layer.base_layer.parameters():
                for key in names.keys[id(parameter)]:
                    if len(group) > len(self.groups.get(key, ())):
                        self.groups[key] = group

    def _check(self, path: str, layer: AdapterLayer) -> None:
        for name, parameter in layer.base_layer.named_parameters():
            full = f"{path}.{name}"
            keys = self.names.keys[id(parameter)]
            if not keys:
                why = (
                    f"transformers makes it of several tensors such as {self.names.converted[full]!r}"
                    if full in self.names.converted
                    else "it is not among them"
                )
                raise MergeError(
                    f"{full!r} is adapted, but cannot be read from the files of {str(self.checkpoint.folder)!r} as one tensor: {why}. "
                    "Load the base and merge in memory"
                )
            first, *rest = (self.checkpoint.entries[key] for key in keys)
            if any(not torch.equal(first.read(), other.read()) for other in rest):
                raise MergeError(
                    f"{keys} are one parameter of the model, {full!r}, but differ in {str(self.checkpoint.folder)!r}"
                )

    @contextlib.contextmanager
    def _filled(self, layers: list[AdapterLayer]) -> Iterator[dict[int, nn.Parameter]]:
        """Have the weights of ``layers`` in memory for the time of a ``with`` block; gives them by the id of the empty parameter."""
        real: dict[int, nn.Parameter] = {}
        empty: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for layer in layers:
                for module in layer.base_layer.modules():
                    for name, parameter in list(module._parameters.items()):
                        if parameter is None or not parameter.is_meta:
                            continue
                        if id(parameter) not in real:
                            value = self.checkpoint.entries[self.names.keys[id(parameter)][0]].read()
                            value = value.to(self.dtype) if self.dtype and value.is_floating_point() else value
                            real[id(parameter)] = nn.Parameter(value, requires_grad=False)
                        module._parameters[name] = real[id(parameter)]
                        empty.append((module, name, parameter))
            yield real
        finally:
            for module, name, parameter in empty:
                module._parameters[name] = parameter

    def __call__(self, key: str) -> Tensor | None:
        """Return the new value of the tensor ``key``, or None where it stays."""
        group = self.groups.pop(key, None)
        if group is None:
            return self.waiting.pop(key, None)
        with self._filled(group) as real:
            before = {empty: parameter.data_ptr() for empty, parameter in real.items()}
            for layer in group:
                layer.merge(self.adapters, keep_originals=False)
            for empty, parameter in real.items():
                for name in self.names.keys[empty]:
                    self.groups.pop(name, None)
                    if parameter.data_ptr() != before[empty]:
                        self.waiting[name] = parameter.data
        return self.waiting.pop(key, None)


def _write_shards(
    folder: Path, checkpoint: Checkpoint, merge: _Merge, dtype: torch.dtype | None, limit: int | None
) -> None:
    planned: dict[str, Planned] = {}
    for key, entry in checkpoint.entries.items():
        cast = dtype is not None and entry.is_floating_point
        planned[key] = Planned(entry, dtype_name(dtype) if cast and dtype else entry.dtype)
    shards = checkpoint.files if limit is None else _cut(planned, limit)
    for file, keys in shards.items():
        write_tensors(folder / file, [planned[key] for key in keys], merge, checkpoint.metadata or {"format": "pt"})
    if set(shards) == {SINGLE}:
        return
    total = sum(one.size for one in planned.values())
    weight_map = {key: file for file, keys in sorted(shards.items()) for key in sorted(keys)}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cut(planned: dict[str, Planned], limit: int) -> dict[str, list[str]]:
    """Return file name to tensors, so that no file but one of a single tensor is larger than ``limit``."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, one in planned.items():
        if shards[-1] and size + one.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += one.size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    # The widest first, so that every tensor starts at a multiple of its width.
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": sorted(
            keys, key=lambda key: -(DTYPES[planned[key].dtype].itemsize if planned[key].dtype in DTYPES else 1)
        )
        for number, keys in enumerate(shards, start=1)
    }


def _write_config(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    text = (base / "config.json").read_text(encoding="utf-8")
    if dtype is not None:
        config = json.loads(text)
        name = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
        config["dtype"] = name
        text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Give a folder to write, which takes the place of ``target`` when the block ends without an error."""
    place = target.absolute()
    beside = place.with_name(f".{place.name}.partial-{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        if place.exists():
            shutil.rmtree(place)
        beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_output(target: Path, overwrite: bool, inputs: list[Path]) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"the output {str(target)!r} is a file; name a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite or not (target / "config.json").is_file():
        raise ConfigError(
            f"the output {str(target)!r} is not empty; name another folder, or overwrite=True to replace a model folder"
        )
    for source in inputs:
        if target.resolve() in (source.resolve(), *source.resolve().parents):
            raise ConfigError(
                f"the output {str(target)!r} holds {str(source)!r}, which is being merged; name another folder"
            )

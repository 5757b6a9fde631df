"""Merging: adapters folded into the weights of the base, and taken out again bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_peft.activation import active_adapters, alone, met_alone, refuse_permanent
from lightning_peft.adapter_layer import (
    AdapterLayer,
    adapter_layers,
    adapter_names,
    adapters_named,
    base_modules,
    unwrapped,
)
from lightning_peft.arithmetic.row_blocks import Product
from lightning_peft.errors import ConfigError, MergeError
from lightning_peft.in_place_merging import in_shared_memory, merge_in_place, sums_in_place
from lightning_peft.injection import records
from lightning_peft.offloading import fetch_offloaded
from lightning_peft.quantized_layers import is_packed
from lightning_peft.quantized_merging import MergeReport, Quantized, WeightError, dense_dtype, merge_quantized
from lightning_peft.rows import refuse_in_rows
from lightning_peft.sharded_parameters import has_shards, reshard


def merge_adapters(
    model: nn.Module,
    names: Sequence[str] | str | None = None,
    *,
    quantized: Quantized = "refuse",
    keep_originals: bool = True,
    probe: Any = None,
) -> MergeReport:
    """Fold adapters into the weights of the base, in place; :func:`unmerge_adapters` restores the base bit for bit.

    Args:
        model: an adapted model; if FSDP2 shards it, all processes must call this, and each keeps its part of what is merged.
        names: adapters to merge; the active ones that are not merged yet if None.
        quantized: what to do where the base is quantised: ``refuse``; ``dequantize`` puts a weight in the precision of the rest of the
            model there, which loses next to nothing and takes the memory; ``requantize`` quantises the merged weight again with the
            settings it was quantised with, which loses a part of the update.
        keep_originals: keep the weights that are replaced. Without them the merge takes no memory beyond one layer's, and cannot be undone:
            where only products are added, as LoRA's, it happens in the memory of the weights, and what shares that memory outside of ``model`` changes too.
        probe: a batch, as the model takes it (keyword arguments in a mapping, or a tensor), to compare outputs before and after.

    Returns:
        The errors of the weights of quantised layers, and of the outputs where ``probe`` was given.

    Raises:
        AdapterNotFoundError: the model has none of them.
        ConfigError: an argument is out of its range, or an adapter is not active that ``probe`` is to measure.
        MergeError: one is merged already, its method cannot merge, a weight is shared with a module that is not
            adapted (tied embeddings) or quantised, or a merged weight would be non-finite. The model is unchanged then.
        InjectionError: the model is in a block of :func:`~lightning_peft.rows.adapter_rows`, whose rows share the base.
    """
    return merge_weights(model, names, quantized=quantized, keep_originals=keep_originals, probe=probe)


def merge_weights(
    model: nn.Module,
    names: Sequence[str] | str | None = None,
    *,
    quantized: Quantized = "refuse",
    keep_originals: bool = True,
    probe: Any = None,
    in_place: bool = True,
) -> MergeReport:
    """Do what :func:`merge_adapters` does; without ``in_place`` every merged weight is a new tensor, also where the originals are not kept."""
    if quantized not in get_args(Quantized):
        raise ConfigError(f"quantized must be one of {', '.join(get_args(Quantized))}, got {quantized!r}")
    names = chosen_names(model, names)
    check_mergeable(model, names, quantized)
    refuse_in_rows(model, None, f"adapter {names[0]!r} cannot be merged")
    if probe is not None and (idle := [name for name in names if name not in active_adapters(model)]):
        raise ConfigError(
            f"probe compares with the adapted model, but adapter {idle[0]!r} is not active; activate it first"
        )
    refuse_packed_shards(model, names)
    reshard(model)
    fetch_offloaded(model, names)
    expected = None if probe is None else outputs(model, probe)
    layers = adapter_layers(model)
    errors: dict[str, WeightError] = {}
    dtype = dense_dtype(model)
    before = {path: layer.merge_state() for path, layer in layers.items()} if keep_originals else {}
    shared = in_shared_memory(model) if in_place and not keep_originals else set()
    sums = {} if keep_originals else _known_to_go_well(layers, names, quantized, dtype, shared, in_place=in_place)
    try:
        for path, layer in layers.items():
            if path in sums:
                merge_in_place(layer, names, sums[path])
                continue
            error = _merge_layer(layer, names, quantized, dtype, keep_originals)
            if error is not None:
                errors[path] = error
        return MergeReport(errors, *(() if expected is None else _compared(expected, outputs(model, probe))))
    except BaseException:
        for path, merged in before.items():
            layers[path].restore_merge(merged)
        raise


def refuse_packed_shards(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to merge into quantised weights of which each process holds a part.

    Raises:
        MergeError: there is one at a place of ``names``.
    """
    for path, layer in adapter_layers(model).items() if has_shards(model) else ():
        if is_packed(layer.original_base) and any(name in layer.adapters for name in names):
            raise MergeError(
                f"{path!r} is quantised and sharded over processes, and packed weights are not merged into part by part; save the adapter, and merge "
                "its folder with 'lightning-peft merge --out_of_core' into the base in 16 or 32 bit"
            )


def refuse_shards(model: nn.Module, what: str) -> None:
    """Refuse what needs the whole model in one process, where each holds a part.

    Args:
        model: any module.
        what: what cannot be done.

    Raises:
        MergeError: a parameter is sharded.
    """
    if has_shards(model):
        raise MergeError(
            f"{what}: the weights of {type(model).__name__} are sharded over processes, and none holds what is needed; save the adapter with "
            "AdapterCheckpoint, and write the model with 'lightning-peft merge --out_of_core'"
        )


def chosen_names(model: nn.Module, names: Sequence[str] | str | None) -> list[str]:
    """Return the adapters that a merge is about: those named, or the active ones that are not merged yet.

    Raises:
        MergeError: none is named and none is active.
    """
    if names is None:
        merged = {name for layer in adapter_layers(model).values() for name in layer.merged}
        names = [name for name in active_adapters(model) if name not in merged] or active_adapters(model)
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if not names:
        if not adapter_names(model):
            adapters_named(model, "default")  # raises, saying that there are none
        raise MergeError(
            f"no adapter was named and none is active: {type(model).__name__} holds {', '.join(map(repr, adapter_names(model)))}"
        )
    return names


def check_mergeable(model: nn.Module, names: Sequence[str], quantized: Quantized = "refuse") -> None:
    """Refuse what can be seen not to merge without computing anything.

    Raises:
        AdapterNotFoundError: the model has none of ``names``.
        MergeError: a method cannot merge, a weight is shared, or adapters that act alone would be merged over each other.
    """
    for name in names:
        adapters_named(model, name)
        held = records(model).get(name)
        if held is not None and not held.method.mergeable:
            if held.method.merges_quantized and quantized != "refuse":
                continue
            raise MergeError(f"adapter {name!r} is a {held.method.name!r} adapter, {held.method.merge_refusal}")
    _refuse_shared(model, names)
    _refuse_several(model, names)


def _merge_layer(
    layer: AdapterLayer, names: Sequence[str], quantized: Quantized, dtype: torch.dtype, keep_originals: bool
) -> WeightError | None:
    here = any(name in layer.adapters for name in names)
    if here and quantized != "refuse" and is_packed(layer.original_base):
        return merge_quantized(layer, names, quantized, dtype, keep_originals=keep_originals)
    layer.merge(names, keep_originals=keep_originals)
    return None


def _known_to_go_well(
    layers: Mapping[str, AdapterLayer],
    names: Sequence[str],
    quantized: Quantized,
    dtype: torch.dtype,
    shared: Set[int],
    *,
    in_place: bool,
) -> dict[str, list[Product]]:
    """Return what is added to the weights that can be changed in place, by path, after trying out all other merges."""
    sums = {}
    for path, layer in layers.items():
        here = any(name in layer.adapters for name in names) and not is_packed(layer.original_base)
        alone_there = here and id(layer.base_layer._parameters.get("weight")) not in shared
        found = sums_in_place(layer, names) if alone_there and in_place else None
        if found is None:
            _try(layer, names, quantized, dtype)
        else:
            sums[path] = found
    return sums


def _try(layer: AdapterLayer, names: Sequence[str], quantized: Quantized, dtype: torch.dtype) -> None:
    """Merge, and have everything as it was."""
    state = layer.merge_state()
    try:
        _merge_layer(layer, names, quantized, dtype, True)
    finally:
        layer.restore_merge(state)


def unmerge_adapters(model: nn.Module) -> None:
    """Take all merged adapters out of the weights again: the base is bit for bit what it was.

    Raises:
        MergeError: no adapter is merged, or one was merged without keeping the weights it replaced.
    """
    layers = [layer for layer in adapter_layers(model).values() if layer.merged]
    if not layers:
        raise MergeError(f"{type(model).__name__} has no merged adapter to unmerge")
    reshard(model)
    refuse_permanent(model, "taken out")
    for layer in layers:
        layer.unmerge()


@contextlib.contextmanager
def adapters_merged(model: nn.Module, quantized: Quantized = "refuse") -> Iterator[nn.Module]:
    """Have every active adapter merged into the base for the time of a ``with`` block."""
    layers = adapter_layers(model)
    before = {path: layer.merge_state() for path, layer in layers.items()}
    waiting = [name for name in active_adapters(model) if not any(name in state.merged for state in before.values())]
    if waiting:
        merge_adapters(model, waiting, quantized=quantized)
    try:
        yield model
    finally:
        if waiting:
            for path, layer in layers.items():
                layer.restore_merge(before[path])


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> Tensor:
    """Return the logits of ``model`` for a batch, or its output where that is a tensor, in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        found = model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for module, mode in modes:
            module.training = mode
    found = getattr(found, "logits", found)
    found = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor):
        raise ConfigError(f"probe needs a model that returns logits or a tensor, got {type(found).__name__}")
    return found.detach()


def _compared(expected: Tensor, found: Tensor) -> tuple[float, float, float]:
    wide = torch.promote_types(torch.float32, expected.dtype)
    off = (found.to(wide) - expected.to(wide)).abs()
    return off.max().item(), off.mean().item(), expected.abs().max().item()


def _refuse_shared(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to merge into a parameter that another module uses too."""
    users: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        for key, parameter in unwrapped(module).named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append(f"{path}.{key}")
    for path, layer in adapter_layers(model).items():
        if any(name in layer.adapters for name in names):
            for key, parameter in layer.base_layer.named_parameters(recurse=False):
                if len(users[id(parameter)]) > 1 and not _tied(layer, key, names):
                    raise MergeError(
                        f"{path}.{key} is shared by {', '.join(users[id(parameter)])}: merging the adapter into it would change "
                        "the others too. Untie the weights first, or keep the adapter active"
                    )


def _tied(layer: AdapterLayer, key: str, names: Sequence[str]) -> bool:
    """Tell whether the adapters ``names`` here change the parameter ``key`` together with all modules that share it."""
    return all(key in layer._adapter(name).tied_parameters for name in names if name in layer.adapters)


def _refuse_several(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to merge adapters at one place that cannot act together."""
    for path, layer in adapter_layers(model).items():
        if (met := met_alone(layer, dict.fromkeys((*layer.merged, *names)), records(model))) is not None:
            raise MergeError(f"{met.all} are all at {path!r}, but {alone(model, met.one, path)}; merge one of them")

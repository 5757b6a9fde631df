"""Merging: adapters folded into the weights of the base, and taken out again bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_peft.activation import active_adapters, alone
from lightning_peft.adapter_layer import (
    AdapterLayer,
    adapter_layers,
    adapter_names,
    adapters_named,
    base_modules,
    unwrapped,
)
from lightning_peft.errors import MergeError
from lightning_peft.injection import records
from lightning_peft.offloading import fetch_offloaded
from lightning_peft.saved_modules import acts_alone


def merge_adapters(model: nn.Module, names: Sequence[str] | str | None = None) -> None:
    """Fold adapters into the weights of the base, in place; :func:`unmerge_adapters` restores the base bit for bit.

    Args:
        model: an adapted model.
        names: adapters to merge; the active ones that are not merged yet if None.

    Raises:
        AdapterNotFoundError: the model has none of them.
        MergeError: one is merged already, its method cannot merge, a weight is shared with a module that is not
            adapted (tied embeddings) or quantised, or a merged weight would be non-finite. The model is unchanged then.
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
    for name in names:
        adapters_named(model, name)
        held = records(model).get(name)
        if held is not None and not held.method.mergeable:
            raise MergeError(f"adapter {name!r} is a {held.method.name!r} adapter, {held.method.merge_refusal}")
    _refuse_shared(model, names)
    _refuse_several(model, names)
    fetch_offloaded(model, names)
    done: list[tuple[AdapterLayer, tuple[str, ...]]] = []
    try:
        for layer in adapter_layers(model).values():
            before = layer.merged
            layer.merge(names)
            done.append((layer, before))
    except BaseException:
        for layer, before in done:
            layer.unmerge()
            layer.merge(before)
        raise


def unmerge_adapters(model: nn.Module) -> None:
    """Take all merged adapters out of the weights again: the base is bit for bit what it was.

    Raises:
        MergeError: no adapter is merged.
    """
    layers = [layer for layer in adapter_layers(model).values() if layer.merged]
    if not layers:
        raise MergeError(f"{type(model).__name__} has no merged adapter to unmerge")
    for layer in layers:
        layer.unmerge()


@contextlib.contextmanager
def adapters_merged(model: nn.Module) -> Iterator[nn.Module]:
    """Have every active adapter merged into the base for the time of a ``with`` block."""
    before = {path: layer.merged for path, layer in adapter_layers(model).items()}
    waiting = [name for name in active_adapters(model) if not any(name in merged for merged in before.values())]
    if waiting:
        merge_adapters(model, waiting)
    try:
        yield model
    finally:
        if waiting:
            for path, layer in adapter_layers(model).items():
                layer.unmerge()
                layer.merge(before[path])


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
        here = [name for name in dict.fromkeys((*layer.merged, *names)) if name in layer.adapters]
        for name in here if len(here) > 1 else []:
            held = records(model).get(name)
            if acts_alone(layer.adapters[name], held.method if held else None):
                raise MergeError(f"{here} are all at {path!r}, but {alone(model, name, path)}; merge one of them")

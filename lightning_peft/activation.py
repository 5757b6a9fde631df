"""Which adapters act: switch, sum, drop in the first layers, disable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lightning_peft.adapter_layer import AdapterLayer, adapter_layers, adapters_named
from lightning_peft.errors import ConfigError, InjectionError, MergeError
from lightning_peft.injection import Injection, records
from lightning_peft.offloading import fetch_offloaded, send_inactive
from lightning_peft.saved_modules import SavedParameters
from lightning_peft.targets import in_first_layers


def set_active_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make the adapters ``names`` the active ones; where several meet at one place they act one around the other.

    For deltas such as LoRA's that is their sum. Adapters that are not active are not trained. An empty list leaves the
    base alone.

    Raises:
        AdapterNotFoundError: the model has no adapter of one of the names.
        InjectionError: one acts alone where another is, or stands for a module in which another is.
        MergeError: an adapter that is not among them is merged into the base.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    layers = adapter_layers(model)
    left = sorted({name for layer in layers.values() for name in layer.merged} - set(names))
    if left:
        raise MergeError(
            f"adapter {left[0]!r} is merged into the base and would go on acting beside {names}; call unmerge_adapters(model) first"
        )
    for name in names:
        if not any(name in layer.adapters for layer in layers.values()):
            adapters_named(model, name)  # raises, saying what there is
    for path, layer in layers.items() if len(names) > 1 else ():
        if (met := met_alone(layer, names, records(model))) is not None:
            raise InjectionError(
                f"{met.all} are all at {path!r}, but {alone(model, met.one, path)}; activate one of them"
            )
    _refuse_inside_replaced(layers, names)
    before = {name for layer in layers.values() for name in (*layer.active, *layer.merged)}
    fetch_offloaded(model, names)
    for layer in layers.values():
        layer.activate(names)
    send_inactive(model, before)


def _refuse_inside_replaced(layers: Mapping[str, AdapterLayer], names: Sequence[str]) -> None:
    """Refuse adapters in modules that do not run, because an adapter around them stands for the whole."""
    chosen = {path: [name for name in names if name in layer.adapters] for path, layer in layers.items()}
    for path, layer in layers.items():
        for name in chosen[path]:
            if not layer._adapter(name).replaces_base:
                continue
            inside = next((other for other, here in chosen.items() if here and other.startswith(f"{path}.")), None)
            if inside is not None:
                raise InjectionError(
                    f"adapter {chosen[inside][0]!r} is at {inside!r}, inside {path!r}, which does not run while {name!r} stands for it: it would "
                    "neither act nor be trained; give it targets outside, such as attention, or activate one of the two"
                )


class Met(NamedTuple):
    """Adapters at one place that cannot act together."""

    all: list[str]
    """Their names."""
    one: str
    """The first that acts alone."""


def met_alone(layer: AdapterLayer, names: Iterable[str], held: Mapping[str, Injection]) -> Met | None:
    """Return what of ``names`` meets at ``layer`` and cannot act together there; None where all is well.

    Adapters that only listen change nothing, so they stand beside any other. ``held`` has the injections of the model by name.
    """
    here = [name for name in names if name in layer.adapters and not layer._adapter(name).only_listens]
    for name in here if len(here) > 1 else []:
        whole = isinstance(layer.adapters[name], SavedParameters)
        if whole or (name in held and not held[name].method.composable):
            return Met(here, name)
    return None


def alone(model: nn.Module, name: str, path: str) -> str:
    """Say which adapter at ``path`` cannot act beside others there, for messages."""
    if isinstance(adapters_named(model, name)[path], SavedParameters):
        return f"adapter {name!r} trains the module in full (modules_to_save) and acts alone at a place"
    return f"{records(model)[name].method.name!r} acts alone at a place"


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the active adapters of ``model``, the innermost first where they meet."""
    orders = [list(layer.active) for layer in adapter_layers(model).values()]
    present = dict.fromkeys(name for order in orders for name in order)
    left = [
        *(name for name in records(model) if name in present),
        *(name for name in present if name not in records(model)),
    ]
    names: list[str] = []
    while left:  # every place has a part of one order
        after = {name for order in orders for name in [n for n in order if n not in names][1:]}
        names.append(next((name for name in left if name not in after), left[0]))
        left.remove(names[-1])
    return names


def drop_adapters(model: nn.Module, layers: int, *, name: str = "default") -> None:
    """Let the first ``layers`` layers of each stack run without the adapter ``name``, for speed (AdapterDrop at inference).

    ``set_active_adapters(model, name)`` brings them back. What is saved does not change.

    Args:
        model: a model with adapters, of any method.
        layers: how many layers, from the input on; a call with another number replaces the one before.
        name: the adapter, which must be active.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        ConfigError: ``layers`` is not an integer of at least 0.
        InjectionError: the adapter is not active.
    """
    adapters_named(model, name)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 0:
        raise ConfigError(f"drop_adapters needs layers as an integer of at least 0, got {layers!r}")
    active = active_adapters(model)
    if name not in active:
        raise InjectionError(
            f"adapter {name!r} is not active, so no layer can drop it; call set_active_adapters(model, {name!r}) first"
        )
    for path, layer in adapter_layers(model).items():
        here = set(layer.active) - {name} if in_first_layers(path, layers) else {*layer.active, name}
        layer.activate([other for other in active if other in here])


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Let ``model`` be the base, bit for bit, for the time of a ``with`` block; merged adapters are taken out too.

    Raises:
        MergeError: an adapter was merged without keeping the weights it replaced.
    """
    layers = list(adapter_layers(model).values())
    refuse_permanent(model, "disabled")
    merged = [(layer, layer.merge_state()) for layer in layers if layer.merged]
    enabled = [(layer, layer._enabled) for layer in layers]
    for layer, _ in merged:
        layer.unmerge()
    for layer in layers:
        layer.enable(False)
    try:
        yield model
    finally:
        known = {id(layer) for layer, _ in enabled}
        for layer in adapter_layers(model).values():
            if id(layer) not in known:  # it came within the block
                layer.enable(all(was_enabled for _, was_enabled in enabled))
        for layer, was_enabled in enabled:
            layer.enable(was_enabled)
        for layer, state in merged:
            layer.restore_merge(state)


def refuse_permanent(model: nn.Module, what: str) -> None:
    """Refuse to take merged adapters out where the weights they replaced are gone."""
    for path, layer in adapter_layers(model).items():
        if layer.permanent:
            raise MergeError(
                f"adapter {layer.permanent[0]!r} cannot be {what}: it was merged at {path!r} with keep_originals=False, so the weights that "
                "it replaced are gone; load the base again"
            )

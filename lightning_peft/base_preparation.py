"""Letting methods change the base before adapters go in, but for the layers that have to stay as they are.

::

    every layer ── method.prepare(model) ── changed ──┬── of modules that are trained in full                     ┐
                                                      ├── to be adapted by a method that needs it as it was      ├── put back
                                                      ├── holding an adapter that was made over it as it was     ┘
                                                      └── anything else                                             stays changed
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

from torch import nn

from lightning_peft.adapter_layer import AdapterLayer, base_modules, parents_of, put_in_place, unwrapped
from lightning_peft.errors import InjectionError, LightningPEFTWarning
from lightning_peft.families import ModelFamily
from lightning_peft.injection import Injection, all_places, records
from lightning_peft.interfaces import Method
from lightning_peft.saved_modules import SavedParameters, inside
from lightning_peft.walks import forget_walks


def prepare_base(model: nn.Module, injections: Sequence[Injection], family: ModelFamily) -> None:
    """Let the methods of ``injections`` change the base, before any adapter of theirs is made.

    Raises:
        InjectionError: a method changes layers that have to stay as they are, and no others.
    """
    if all(type(injection.method).prepare is Method.prepare for injection in injections):
        return
    # Whatever is not kept must be free to go as soon as it is replaced.
    before = {path: weakref.ref(unwrapped(held)) for path, held in base_modules(model)}
    reasons = _to_keep(model, injections, family)
    kept = {path: unwrapped(held) for path, held in base_modules(model) if path in reasons}
    for injection in injections:
        injection.method.prepare(model)
    forget_walks()
    now = {path: unwrapped(held) for path, held in base_modules(model)}
    changed = {path for path, module in now.items() if path not in before or before[path]() is not module}
    put_back = [path for path in kept if path in changed]
    parents = parents_of(model) if put_back else {}
    for path in put_back:
        put_in_place(kept[path], parents[id(now[path])])
    told = [path for path in put_back if reasons[path]]
    if not told:
        return
    names = ", ".join(sorted(told)[:20]) + (", ..." if len(told) > 20 else "")
    what = f"layers that have to stay as they are: {names} ({len(told)}). The first: {told[0]!r} {reasons[told[0]]}"
    if len(put_back) == len(changed):
        raise InjectionError(
            f"preparing the base of {type(model).__name__} would change only {what}. Give the adapters other targets, or inject all of "
            "them at once into a fresh base with inject_all"
        )
    warnings.warn(
        f"preparing the base of {type(model).__name__} leaves out {what}. Name them in skip= to say that this is wanted",
        LightningPEFTWarning,
        stacklevel=4,
    )


def _to_keep(model: nn.Module, injections: Sequence[Injection], family: ModelFamily) -> dict[str, str]:
    """Return the paths of layers that have to stay as they are, each with the reason; an empty one where that was asked for."""
    reasons: dict[str, str] = {}
    held_records = records(model)
    for injection in injections:
        method = injection.method
        if not method.quantized_base:
            for target in all_places(model, injection, family):
                reasons[target.path] = f"is adapted by {method.name!r}, which does not work over a quantised base"
    roots = [root.path for injection in injections for root in injection.saved]
    for path, held in base_modules(model):
        adapters = list(held.adapters.items()) if isinstance(held, AdapterLayer) else []
        if inside(path, roots) or any(isinstance(adapter, SavedParameters) for _, adapter in adapters):
            reasons[path] = ""
        for name, _ in adapters:
            if path not in reasons and name in held_records and not held_records[name].method.quantized_base:
                reasons[path] = f"holds the adapter {name!r}, which was made over it as it is"
    return reasons

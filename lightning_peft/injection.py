"""What was put into a model: noted on the model itself, by adapter name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lightning_peft.adapter_layer import AdapterLayer, adapters_named
from lightning_peft.errors import AdapterNotFoundError
from lightning_peft.families import ModelFamily
from lightning_peft.interfaces import Method, Target
from lightning_peft.saved_modules import inside

_RECORDS = "_lightning_peft_adapters"
"""Attribute of an adapted model: adapter name to :class:`Injection`."""


@dataclass(frozen=True)
class Injection:
    """What was put into a model under one name."""

    method: Method
    """The method, with its hyperparameters."""
    targets: tuple[Target, ...]
    """The places it adapts."""
    family: str
    """Name of the model family that gave the roles their meaning."""
    saved: tuple[Target, ...] = ()
    """Modules that are trained in full beside the method: those of ``modules_to_save``."""

    @property
    def paths(self) -> list[str]:
        """Module paths of the places."""
        return [target.path for target in self.targets]


def all_places(model: nn.Module, injection: Injection, family: ModelFamily) -> list[Target]:
    """Return all places that the method of ``injection`` adapts: the targets and what the method adds to them."""
    roots = [root.path for root in injection.saved]
    found = injection.method.expand(model, injection.targets, family)
    return [target for target in found if not (target.optional and inside(target.path, roots))]


def records(model: nn.Module) -> dict[str, Injection]:
    """Return what was injected into ``model``, by adapter name."""
    while "_orig_mod" in model._modules:  # what torch.compile hides
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    if _RECORDS not in model.__dict__:
        model.__dict__[_RECORDS] = {}
    found: dict[str, Injection] = model.__dict__[_RECORDS]
    return found


def record(model: nn.Module, name: str) -> Injection:
    """Return what was injected as ``name``.

    Raises:
        AdapterNotFoundError: nothing was.
    """
    adapters_named(model, name)
    if name not in records(model):
        inner = any(name in records(root) for root in adapted_roots(model))
        where = "a part of it: hand over that part" if inner else "a model that this is a part of: hand over that model"
        raise AdapterNotFoundError(
            f"adapter {name!r} lives inside {type(model).__name__}, but was injected into {where}"
        )
    return records(model)[name]


def adapted_roots(module: nn.Module) -> list[nn.Module]:
    """Return every module inside ``module`` (itself included) that :func:`inject` was called on and that holds adapters."""
    return [inner for inner in past_adapters(module) if inner.__dict__.get(_RECORDS)]


def injections(modules: Iterable[nn.Module]) -> dict[str, Injection]:
    """Return what was injected into any of ``modules``, by adapter name."""
    adapted = [module for module in modules if module.__dict__.get(_RECORDS)]
    return {name: injection for module in adapted for name, injection in records(module).items()}


def past_adapters(module: nn.Module) -> list[nn.Module]:
    """Return every module inside ``module`` (itself included) in the order of ``modules()``, but none inside an adapter: these may be hundreds."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        inner = waiting.pop()
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        found.append(inner)
        if isinstance(inner, AdapterLayer):
            waiting.append(inner.base_layer)
        elif inner._modules:
            waiting += [child for child in reversed(inner._modules.values()) if child is not None]
    return found

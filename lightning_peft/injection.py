"""What was put into a model: noted on the model itself, by adapter name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

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


class _Records(dict[str, Injection]):
    """What was injected into one model. All of them count together how often one of them changed."""

    changes: ClassVar[int] = 0

    @override
    def __setitem__(self, name: str, injection: Injection) -> None:
        _Records.changes += 1
        super().__setitem__(name, injection)

    @override
    def __delitem__(self, name: str) -> None:
        _Records.changes += 1
        super().__delitem__(name)

    @override
    def pop(self, *args: Any) -> Any:
        _Records.changes += 1
        return super().pop(*args)

    @override
    def clear(self) -> None:
        _Records.changes += 1
        super().clear()

    @override
    def update(self, *args: Any, **kwargs: Any) -> None:
        _Records.changes += 1
        super().update(*args, **kwargs)


class KnownRoots:
    """Finds what :func:`adapted_roots` does, and walks through the module again only where that may have changed: steps of training ask for it."""

    def __init__(self) -> None:
        self._changes = -1
        self._roots: list[nn.Module] = []
        self._ways: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []

    def of(self, module: nn.Module) -> list[nn.Module]:
        """Return the adapted models inside ``module``.

        It is walked through again after an injection or deletion anywhere, and where another module stands in ``module`` itself or on the way to
        one of those that were found.
        """
        same = self._changes == _Records.changes and len(self._ways) >= len(module._modules)
        if not same or any(held.get(name) is not child for held, name, child in self._ways):
            self._changes, self._roots = _Records.changes, adapted_roots(module)
            self._ways = [
                (module._modules, name, child) for name, child in module._modules.items() if child is not None
            ]
            chosen = {id(root) for root in self._roots}
            for path, inner in module.named_modules():
                if id(inner) in chosen:
                    self._ways += _way(module, path)
        return self._roots


def _way(module: nn.Module, path: str) -> list[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    """Return, for each step from ``module`` to ``path``, the modules there, the name of the next and the next."""
    way = []
    for name in path.split(".") if path else ():
        child = module._modules[name]
        assert child is not None
        way.append((module._modules, name, child))
        module = child
    return way


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
        model.__dict__[_RECORDS] = _Records()
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

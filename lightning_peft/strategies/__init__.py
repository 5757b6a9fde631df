"""Strategies for several processes. They work from ``Trainer(strategy="peft_fsdp")`` and YAML once ``lightning_peft`` is imported.

This module is imported with the package, so it imports nothing heavy itself: the names are registered when Lightning is there, at once
or later.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.strategies.ddp import PEFTDDPStrategy as PEFTDDPStrategy
    from lightning_peft.strategies.fsdp import PEFTFSDPStrategy as PEFTFSDPStrategy

_AWAITED = "lightning.pytorch"

STRATEGIES: dict[str, tuple[str, str, str]] = {
    "peft_ddp": ("ddp", "PEFTDDPStrategy", "DDP for adapted models"),
    "peft_fsdp": ("fsdp", "PEFTFSDPStrategy", "FSDP2 for adapted models"),
}
"""Registered name to the module here, the class, and what it is."""


def register() -> None:
    """Register the strategies with Lightning, now or as soon as it is imported."""
    if _AWAITED in sys.modules and not _being_imported(sys.modules[_AWAITED]):
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _being_imported(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _register() -> None:
    registry: Any = sys.modules[f"{_AWAITED}.strategies"].StrategyRegistry
    for name, (module, kind, description) in STRATEGIES.items():
        if name not in registry:
            registry.register(name, functools.partial(_made, module, kind), description=description)


def _made(module: str, kind: str, **arguments: Any) -> Any:
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(**arguments)


class _Waiting(MetaPathFinder):
    """Stands first among the finders until Lightning is imported, and then steps aside."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find Lightning by way of the other finders, and nothing else."""
        if name != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads a module as another loader does, and registers the strategies after that."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Leave it to the other loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Load the module."""
        self.loader.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        _register()


def __getattr__(name: str) -> Any:
    for module, kind, _ in STRATEGIES.values():
        if kind == name:
            return getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

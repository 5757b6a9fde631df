"""The only file that talks to pluggy: loads plugins, checks what they return, finds things by name.

Built-in and third-party plugins take the same way in. A third-party plugin that fails is reported once, listed as
broken, and never takes anything else down; asking for what it should have provided raises its cause.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pluggy
from torch import nn

from lightning_peft import hookspecs
from lightning_peft.errors import (
    LightningPEFTWarning,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    UnknownNameError,
    did_you_mean,
)
from lightning_peft.interfaces import EvalTask, Exporter, Method, Quantizer
from lightning_peft.targets import GENERIC, ModelFamily

DEFAULT_PLUGINS: tuple[str, ...] = (
    "lightning_peft.plugins.lora",
    "lightning_peft.plugins.quantizers",
    "lightning_peft.plugins.model_families",
    "lightning_peft.plugins.eval_tasks",
    "lightning_peft.plugins.exporters",
)
"""The built-in plugins, in the order they load. A new built-in method is one file and one line here."""

ALLOW_LIST_VARIABLE = "LIGHTNING_PEFT_PLUGINS"
"""Environment variable: comma-separated distributions or entry points that may load; empty means built-ins only."""

_KINDS: dict[str, tuple[str, type]] = {
    # hook: (what it registers, the type of each item)
    "register_methods": ("method", Method),
    "register_quantizers": ("quantizer", Quantizer),
    "register_model_families": ("model family", ModelFamily),
    "register_eval_tasks": ("evaluation task", EvalTask),
    "register_exporters": ("exporter", Exporter),
}


@dataclass
class PluginInfo:
    """One plugin: where it came from, what it gave, or why it is broken."""

    source: str
    """Module path of a built-in, or ``distribution version (entry point)``."""
    builtin: bool = False
    provides: dict[str, list[str]] = field(default_factory=dict)
    """Kind (``method``, ``quantizer``, ...) to names."""
    error: BaseException | None = None
    """Why the plugin is broken, or None."""
    hints: tuple[str, ...] = ()
    """Names the plugin may have provided: of its distribution and entry point."""

    @property
    def names(self) -> list[str]:
        """Every name the plugin provides or was going to provide."""
        return [name for names in self.provides.values() for name in names]


class Registry:
    """What all plugins registered.

    Args:
        entry_points: whether to load third-party plugins. The built-ins always load.

    Raises:
        PluginError: a built-in is wrong.
    """

    def __init__(self, *, entry_points: bool = True) -> None:
        self.plugins: list[PluginInfo] = []
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._items: dict[str, dict[str, Any]] = {kind: {} for kind, _ in _KINDS.values()}
        self._owner: dict[tuple[str, str], str] = {}
        for module in DEFAULT_PLUGINS:
            self._add(importlib.import_module(module), PluginInfo(source=module, builtin=True))
        if entry_points:
            self._load_entry_points()

    # -- asking ----------------------------------------------------------------------------------------------------

    @property
    def methods(self) -> Mapping[str, type[Method]]:
        """Adaptation methods by name."""
        return self._items["method"]

    @property
    def quantizers(self) -> Mapping[str, type[Quantizer]]:
        """Quantizers by name."""
        return self._items["quantizer"]

    @property
    def model_families(self) -> Mapping[str, ModelFamily]:
        """Model families by name."""
        return self._items["model family"]

    @property
    def eval_tasks(self) -> Mapping[str, type[EvalTask]]:
        """Evaluation tasks by name."""
        return self._items["evaluation task"]

    @property
    def exporters(self) -> Mapping[str, type[Exporter]]:
        """Exporters by name."""
        return self._items["exporter"]

    @property
    def broken(self) -> list[PluginInfo]:
        """Plugins that failed to load or failed later."""
        return [plugin for plugin in self.plugins if plugin.error is not None]

    def get(self, kind: str, name: str) -> Any:
        """Return what is registered under ``name``; ``kind`` is ``method``, ``quantizer``, ``model family``, ...

        Raises:
            PluginLoadError: a broken plugin should, or may, have provided it.
            UnknownNameError: nothing provides it.
        """
        items = self._items[kind]
        if name in items:
            return items[name]
        suspects = [p for p in self.broken if name in p.names or name in p.hints or not p.names]
        if suspects:
            causes = "; ".join(f"{p.source}: {_cause(p.error)}" for p in suspects)
            raise PluginLoadError(
                f"{kind} {name!r} is not registered, and these plugins, which may provide it, are broken: {causes}"
            ) from suspects[0].error
        raise UnknownNameError(
            f"unknown {kind} {name!r}{did_you_mean(name, items) or '.'} Registered: {', '.join(sorted(items)) or 'none'}"
        )

    def method(self, name: str) -> type[Method]:
        """Return the method class registered as ``name``."""
        return self.get("method", name)  # type: ignore[no-any-return]

    def method_for_peft_type(self, peft_type: str) -> type[Method]:
        """Return the method that reads and writes HF PEFT's ``peft_type``."""
        for method in self.methods.values():
            if method.peft_type == peft_type:
                return method
        known = sorted(method.peft_type for method in self.methods.values() if method.peft_type)
        raise UnknownNameError(
            f"no registered method reads HF PEFT's type {peft_type!r}{did_you_mean(peft_type, known) or '.'} "
            f"Types that are read: {', '.join(known)}"
        )

    def resolve_family(self, model: nn.Module) -> ModelFamily:
        """Return the family of ``model``; the generic one where no plugin knows it."""
        # In pluggy's order of calling: last registered first, `trylast` at the end.
        for impl in reversed(self._manager.hook.resolve_model_family.get_hookimpls()):
            plugin = self._info(impl.plugin_name)
            if plugin.error is not None:
                continue
            try:
                arguments: dict[str, Any] = {"model": model, "families": dict(self.model_families)}
                family = impl.function(*(arguments[name] for name in impl.argnames))
                if family is not None and not isinstance(family, ModelFamily):
                    raise TypeError(f"resolve_model_family must return a ModelFamily or None, got {family!r}")
            except Exception as error:
                if plugin.builtin:
                    raise
                self._break(plugin, error)
                continue
            if family is not None:
                return family
        return GENERIC

    # -- loading ---------------------------------------------------------------------------------------------------

    def register(self, plugin: object) -> None:
        """Register a plugin of the running program: a module or an object with hook implementations.

        Raises:
            PluginConflictError: a name it registers is taken.
            PluginError: its hooks are wrong.
        """
        source = getattr(plugin, "__name__", None) or type(plugin).__qualname__
        self._add(plugin, PluginInfo(source=str(source)))

    def _load_entry_points(self) -> None:
        allowed = os.environ.get(ALLOW_LIST_VARIABLE)
        names = None if allowed is None else {_normal(name) for name in allowed.split(",") if name.strip()}
        found: dict[tuple[str, str], metadata.EntryPoint] = {}
        for entry_point in metadata.entry_points(group=hookspecs.PROJECT):
            found.setdefault((entry_point.name, entry_point.value), entry_point)
        if names:
            present = {_normal(word) for point in found.values() for word in (_distribution(point)[0], point.name)}
            for name in sorted(names - present):
                warnings.warn(
                    f"{ALLOW_LIST_VARIABLE} names {name!r}, but no installed package has such a plugin",
                    LightningPEFTWarning,
                    stacklevel=2,
                )
        for entry_point in found.values():
            distribution, version = _distribution(entry_point)
            if names is not None and not {_normal(distribution), _normal(entry_point.name)} & names:
                continue
            info = PluginInfo(
                source=f"{distribution} {version} ({entry_point.name} = {entry_point.value})",
                hints=(entry_point.name, distribution, _normal(distribution).removeprefix("lightning-peft-")),
            )
            try:
                self._add(entry_point.load(), info)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a plugin may even call sys.exit() while it is imported
                self._break(info, error)

    def _add(self, plugin: object, info: PluginInfo) -> None:
        """Register ``plugin`` wholly or not at all."""
        if self._manager.is_registered(plugin):
            raise PluginConflictError(f"{info.source} is registered already")
        try:
            self._manager.register(plugin, name=info.source)
            self._manager.check_pending()
            items = self._collect(plugin, info)
        except BaseException as error:
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            if isinstance(error, pluggy.PluginValidationError):
                raise PluginError(f"{info.source}: {error}") from error
            if isinstance(error, ValueError) and not isinstance(error, PluginError):
                raise PluginError(f"{info.source}: {error}") from error
            raise
        for (kind, name), item in items.items():
            self._items[kind][name] = item
            self._owner[kind, name] = info.source
        if info not in self.plugins:
            self.plugins.append(info)

    def _collect(self, plugin: object, info: PluginInfo) -> dict[tuple[str, str], Any]:
        items: dict[tuple[str, str], Any] = {}
        faults: list[PluginError] = []
        for hook_name, (kind, expected) in _KINDS.items():
            impl = next((i for i in getattr(self._manager.hook, hook_name).get_hookimpls() if i.plugin is plugin), None)
            if impl is None:
                continue
            where = f"{info.source}: {hook_name}()"
            for item in _checked(impl.function(), expected, kind, where):
                name = item.name
                info.provides.setdefault(kind, []).append(name)
                if (kind, name) in self._owner or (kind, name) in items:
                    other = self._owner.get((kind, name), info.source)
                    faults.append(
                        PluginConflictError(
                            f"{where} registers the {kind} {name!r}, which {other} has registered already; rename one of them"
                        )
                    )
                items[kind, name] = item
        if faults:
            raise faults[0]
        return items

    def _break(self, info: PluginInfo, error: BaseException) -> None:
        info.error = error
        if info not in self.plugins:
            self.plugins.append(info)
        for kind, names in info.provides.items():
            for name in names:
                if self._owner.get((kind, name)) == info.source:
                    del self._items[kind][name], self._owner[kind, name]
        warnings.warn(
            f"the plugin {info.source} is broken and was left out: {_cause(error)}", LightningPEFTWarning, stacklevel=2
        )

    def _info(self, source: str) -> PluginInfo:
        return next(plugin for plugin in self.plugins if plugin.source == source)


@functools.cache
def get_registry() -> Registry:
    """Return the registry of this process; plugins load at the first call."""
    return Registry()


def _checked(result: Any, expected: type, kind: str, where: str) -> Iterable[Any]:
    """Return what a hook returned as a list, every item checked."""
    if isinstance(result, (str, bytes)) or not isinstance(result, Iterable):
        raise PluginError(f"{where} must return a list, got {result!r}")
    items = list(result)
    for item in items:
        wants_class = expected is not ModelFamily
        fits = isinstance(item, type) and issubclass(item, expected) if wants_class else isinstance(item, expected)
        if not fits:
            raise PluginError(
                f"{where} must return {'subclasses' if wants_class else 'instances'} of {expected.__name__}, got {item!r}"
            )
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
            raise PluginError(f"{where}: the {kind} {item!r} needs a lower-case identifier as its name, found {name!r}")
        abstract = sorted(getattr(item, "__abstractmethods__", ()))
        if abstract:
            raise PluginError(f"{where}: {kind} {name!r} does not implement {', '.join(abstract)}")
        if wants_class and ("__dataclass_fields__" not in vars(item) or not item.__dataclass_params__.frozen):
            raise PluginError(f"{where}: {kind} {name!r} must be decorated with @dataclass(frozen=True, kw_only=True)")
    return items


def _cause(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"


def _distribution(entry_point: metadata.EntryPoint) -> tuple[str, str]:
    return (entry_point.dist.name, entry_point.dist.version) if entry_point.dist else ("unknown distribution", "?")


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")

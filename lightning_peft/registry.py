"""The only file that talks to pluggy: loads plugins, checks what they return, finds things by name.

Built-in and third-party plugins take the same way in. A third-party plugin that fails is reported once, listed as
broken, and never takes anything else down; asking for what it should have provided raises its cause.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import pluggy
from torch import nn

from lightning_peft import hookspecs
from lightning_peft.adapter_formats import AdapterFormat
from lightning_peft.errors import (
    LightningPEFTWarning,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    UnknownNameError,
    did_you_mean,
)
from lightning_peft.families import GENERIC, ModelFamily
from lightning_peft.hf_types import ancestors, claimants, reader
from lightning_peft.interfaces import EvalTask, Exporter, Method, Quantizer
from lightning_peft.plugin_info import PluginInfo, cause_of, distribution_of, normal_name
from lightning_peft.routers import Router

DEFAULT_PLUGINS: tuple[str, ...] = (
    "lightning_peft.plugins.lora",
    "lightning_peft.plugins.qlora",
    "lightning_peft.plugins.dora",
    "lightning_peft.plugins.lora_fa",
    "lightning_peft.plugins.pissa",
    "lightning_peft.plugins.olora",
    "lightning_peft.plugins.loftq",
    "lightning_peft.plugins.lora_plus",
    "lightning_peft.plugins.adalora",
    "lightning_peft.plugins.eva",
    "lightning_peft.plugins.lora_ga",
    "lightning_peft.plugins.bottleneck",
    "lightning_peft.plugins.compacter",
    "lightning_peft.plugins.bitfit",
    "lightning_peft.plugins.norm_tuning",
    "lightning_peft.plugins.prefix_tuning",
    "lightning_peft.plugins.prompt_tuning",
    "lightning_peft.plugins.p_tuning",
    "lightning_peft.plugins.top_layers",
    "lightning_peft.plugins.full",
    "lightning_peft.plugins.vera",
    "lightning_peft.plugins.trainable_tokens",
    "lightning_peft.plugins.moe_upcycling",
    "lightning_peft.plugins.mix_lora",
    "lightning_peft.plugins.lora_mixture",
    "lightning_peft.plugins.routers",
    "lightning_peft.plugins.quantizers",
    "lightning_peft.plugins.model_families",
    "lightning_peft.plugins.perplexity",
    "lightning_peft.plugins.multiple_choice",
    "lightning_peft.plugins.minimal_pairs",
    "lightning_peft.plugins.exact_match",
    "lightning_peft.plugins.token_diversity",
    "lightning_peft.plugins.lm_eval_harness",
    "lightning_peft.plugins.exporters",
    "lightning_peft.plugins.moe_exporters",
    "lightning_peft.plugins.peft_formats",
    "lightning_peft.plugins.loralib_format",
    "lightning_peft.plugins.litgpt_format",
    "lightning_peft.plugins.torchtune_format",
    "lightning_peft.plugins.gguf_format",
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
    "register_routers": ("router", Router),
    "register_adapter_formats": ("adapter format", AdapterFormat),
}
_HOOKS = (*_KINDS, "resolve_model_family")


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
    def routers(self) -> Mapping[str, type[Router]]:
        """Routers of mixtures of experts by name."""
        return self._items["router"]

    @property
    def adapter_formats(self) -> Mapping[str, type[AdapterFormat]]:
        """Formats of adapters of other software by name."""
        return self._items["adapter format"]

    @property
    def broken(self) -> list[PluginInfo]:
        """Plugins that failed to load or failed later."""
        return [plugin for plugin in self.plugins if plugin.error is not None]

    def get(self, kind: str, name: str) -> Any:
        """Return what is registered under ``name``; ``kind`` is ``method``, ``quantizer``, ``model family``, ...

        Raises:
            PluginLoadError: a broken plugin should have provided it; or may have, and no registered name is like it.
            UnknownNameError: nothing provides it.
        """
        if kind not in self._items:
            raise UnknownNameError(f"unknown kind {kind!r}; the kinds are: {', '.join(self._items)}")
        items = self._items[kind]
        if name in items:
            return items[name]
        hint = did_you_mean(name.lower(), items)
        registered = f"{hint or '.'} Registered: {', '.join(sorted(items)) or 'none'}"
        raise self._missing(kind, name.lower(), f"unknown {kind} {name!r}{registered}", bool(hint))

    def method(self, name: str) -> type[Method]:
        """Return the method class registered as ``name``."""
        return self.get("method", name)  # type: ignore[no-any-return]

    def method_for_peft_type(self, peft_type: str, config: Mapping[str, Any] | None = None) -> type[Method]:
        """Return the method that reads HF PEFT's ``peft_type``: the ancestor, or a method below it that claims ``config``."""
        asked = claimants(self.methods.values(), peft_type)
        claimed = [method for method in asked if self._claims(method, config or {})]
        method = reader(self.methods.values(), peft_type, claimed)
        if method is not None:
            return method
        known = sorted({method.peft_type for method in self.methods.values() if method.peft_type})
        hint = did_you_mean(peft_type, known)
        read = f"{hint or '.'} Types that are read: {', '.join(known)}"
        unknown = f"no registered method reads HF PEFT's type {peft_type!r}{read}"
        raise self._missing("method", peft_type.lower(), unknown, bool(hint))

    def _claims(self, method: type[Method], config: Mapping[str, Any]) -> bool:
        """Ask ``method`` whether it reads ``config``; take its plugin out if that fails."""
        try:
            return bool(method.reads_hf_config(config))
        except Exception as error:
            source = self._owner.get(("method", method.name))
            plugin = next((plugin for plugin in self.plugins if plugin.source == source), None)
            if plugin is None or plugin.builtin:
                raise
            self._break(plugin, PluginError(f"{source}: {method.name}.reads_hf_config() raised {cause_of(error)}"))
            return False

    def _missing(self, kind: str, name: str, unknown: str, misspelt: bool) -> PluginError:
        """Return the error for a name nobody registered: ``unknown``, or that a broken plugin provides it."""
        certain = [
            p for p in self.broken if name in p.provides.get(kind, ()) or normal_name(name) in map(normal_name, p.hints)
        ]
        possible = certain or [plugin for plugin in self.broken if not plugin.complete]
        causes = "; ".join(f"{plugin.source}: {plugin.cause}" for plugin in possible)
        if certain or (possible and not misspelt):
            error = PluginLoadError(
                f"{kind} {name!r} is not registered, and plugins that may have it are broken: {causes}"
            )
            error.__cause__ = possible[0].error
            return error
        return UnknownNameError(f"{unknown}. Plugins that may have it are broken: {causes}" if causes else unknown)

    def resolve_family(self, model: nn.Module) -> ModelFamily:
        """Return the family of ``model``; the generic one where no plugin knows it."""
        # In pluggy's order of calling: last registered first, `trylast` at the end. One by one, as any may be broken.
        for impl in reversed(self._manager.hook.resolve_model_family.get_hookimpls()):
            plugin = next(plugin for plugin in self.plugins if plugin.source == impl.plugin_name)
            where = f"{plugin.source}: resolve_model_family()"
            try:
                family = _call(impl, where, model=model, families=dict(self.model_families))
                if family is not None and not isinstance(family, ModelFamily):
                    raise PluginError(f"{where} must return a ModelFamily or None, got {family!r}")
            except (Exception, SystemExit) as error:
                if plugin.builtin:
                    raise
                self._break(plugin, error)
                continue
            if family is not None:
                return family
        return GENERIC

    # -- loading ---------------------------------------------------------------------------------------------------

    def register(self, plugin: object) -> None:
        """Register a plugin of the running program, wholly or not at all: a module or an object with hooks.

        Raises:
            PluginConflictError: it, or a name it registers, is registered already.
            PluginError: its hooks are wrong.
        """
        source = str(getattr(plugin, "__name__", None) or type(plugin).__qualname__)
        if self._manager.is_registered(plugin) or self._manager.has_plugin(source):
            raise PluginConflictError(f"a plugin {source!r} is registered already; register each once, by its own name")
        self._add(plugin, PluginInfo(source=source))

    def _load_entry_points(self) -> None:
        found: dict[tuple[str, ...], metadata.EntryPoint] = {}
        for point in metadata.entry_points(group=hookspecs.PROJECT):
            found.setdefault((normal_name(distribution_of(point)[0]), normal_name(point.name), point.value), point)
        allowed = os.environ.get(ALLOW_LIST_VARIABLE)
        names = None if allowed is None else {normal_name(name) for name in allowed.split(",") if name.strip()}
        for name in sorted((names or set()) - {word for key in found for word in key[:2]}):
            _warn(f"{ALLOW_LIST_VARIABLE} names {name!r}, but no installed package has such a plugin")
        for key, point in sorted(found.items(), key=lambda item: item[0]):  # the order on disk decides nothing
            if names is not None and not names & set(key[:2]):
                continue
            distribution, version = distribution_of(point)
            info = PluginInfo(
                source=f"{distribution} {version} ({point.name} = {point.value})",
                hints=(point.name, distribution, key[0].removeprefix("lightning-peft-")),
            )
            try:
                plugin = point.load()
                if not self._manager.is_registered(plugin):  # a second entry point may name the same module
                    self._add(plugin, info)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a plugin may even call sys.exit() while it is imported
                self._break(info, error)

    def _add(self, plugin: object, info: PluginInfo) -> None:
        """Register ``plugin`` wholly or not at all."""
        self._check_hooks(plugin, info.source)
        try:
            self._manager.register(plugin, name=info.source)
            items = self._collect(plugin, info)
        except BaseException as error:
            if self._manager.has_plugin(info.source):
                self._manager.unregister(name=info.source)
            if isinstance(error, pluggy.PluginValidationError):
                text = str(error).removeprefix(f"Plugin {info.source!r} for ")
                raise PluginError(f"{info.source}: {'; '.join(text.splitlines())}") from error
            raise
        for (kind, name), item in items.items():
            self._items[kind][name] = item
            self._owner[kind, name] = info.source
        self.plugins.append(info)

    def _check_hooks(self, plugin: object, source: str) -> None:
        """Refuse what pluggy lets pass: functions that nobody would call, and wrappers."""
        marked = 0
        for name in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, name)
            hook = (options and options.get("specname")) or name
            fault = None
            if options is None:
                fault = "has the name of a hook but no mark; decorate it with @hookimpl" if name in _HOOKS else None
            elif hook not in _HOOKS and not options.get("optionalhook"):
                hint = did_you_mean(hook, _HOOKS) or "."
                fault = f"implements the unknown hook {hook!r}{hint} The hooks are: {', '.join(_HOOKS)}"
            elif options.get("wrapper") or options.get("hookwrapper"):
                fault = "is a hook wrapper, which would change what other plugins register; make it a plain @hookimpl"
            if fault:
                raise PluginError(f"{source}: {name} {fault}")
            marked += options is not None
        if not marked:
            raise PluginError(f"{source}: no function is marked with @hookimpl. The hooks are: {', '.join(_HOOKS)}")

    def _collect(self, plugin: object, info: PluginInfo) -> dict[tuple[str, str], Any]:
        """Call the hooks of ``plugin`` and return what they registered; nothing is kept yet."""
        items: dict[tuple[str, str], Any] = {}
        conflicts: list[str] = []
        for hook, (kind, expected) in _KINDS.items():
            where = f"{info.source}: {hook}()"
            for impl in getattr(self._manager.hook, hook).get_hookimpls():
                if impl.plugin is not plugin:
                    continue
                for item in _checked(_call(impl, where), expected, kind, where):
                    key, taken = (kind, item.name), f"{where} registers the {kind} {item.name!r}"
                    if key in items:
                        conflicts.append(f"{taken} twice; rename one of them")
                    elif key in self._owner:
                        conflicts.append(
                            f"{taken}, which {self._owner[key]} has registered already; rename one of them"
                        )
                    items[key] = item
                    info.provides.setdefault(kind, []).append(item.name)
        new = [item for (kind, _), item in items.items() if kind == "method"]
        for method in new:
            readers = ancestors([*self.methods.values(), *new], method.peft_type)
            if method in readers and len(readers) > 1:
                names = " and ".join(repr(reader.name) for reader in readers)
                conflicts.append(
                    f"{info.source}: {names} would both read HF PEFT's type {method.peft_type!r}; let one inherit from the other, "
                    "or declare no peft_type"
                )
        info.complete = True
        if conflicts:
            raise PluginConflictError("; ".join(conflicts))
        return items

    def _break(self, info: PluginInfo, error: BaseException) -> None:
        """Take out what a plugin registered, remember why, and tell the user once."""
        info.error = error
        if info not in self.plugins:
            self.plugins.append(info)
        if self._manager.has_plugin(info.source):
            self._manager.unregister(name=info.source)
        for kind, name in [key for key, source in self._owner.items() if source == info.source]:
            del self._items[kind][name], self._owner[kind, name]
        _warn(f"the plugin {info.source} is broken and was left out: {info.cause}")


@functools.cache
def get_registry() -> Registry:
    """Return the registry of this process; plugins load at the first call."""
    return Registry()


def _call(impl: pluggy.HookImpl, where: str, **arguments: Any) -> Any:
    """Call one implementation of a hook with those of ``arguments`` that it takes."""
    try:
        result: Any = impl.function(*(arguments[name] for name in impl.argnames))
        plain = isinstance(result, (str, bytes)) or not isinstance(result, Iterable)
        return result if plain else list(result)  # as a generator may fail too
    except Exception as error:
        raise PluginError(f"{where} raised {cause_of(error)}") from error


def _checked(items: Any, expected: type, kind: str, where: str) -> list[Any]:
    """Return what a hook returned, every item checked."""
    if not isinstance(items, list):
        raise PluginError(f"{where} must return a list, got {items!r}")
    wants_class = expected is not ModelFamily
    for item in items:
        fits = isinstance(item, type) and issubclass(item, expected) if wants_class else isinstance(item, expected)
        if not fits:
            what = "subclasses" if wants_class else "instances"
            raise PluginError(f"{where} must return {what} of {expected.__name__}, got {item!r}")
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
            raise PluginError(f"{where}: the {kind} {item!r} needs a lower-case identifier as its name, found {name!r}")
        abstract = sorted(getattr(item, "__abstractmethods__", ()))
        if abstract:
            raise PluginError(f"{where}: {kind} {name!r} does not implement {', '.join(abstract)}")
        if wants_class and ("__dataclass_params__" not in vars(item) or not item.__dataclass_params__.frozen):
            raise PluginError(f"{where}: {kind} {name!r} must be decorated with @dataclass(frozen=True, kw_only=True)")
    return items


def _warn(message: str) -> None:
    warnings.warn(message, LightningPEFTWarning, stacklevel=3)

"""Plugins through real entry points: good ones load, broken ones are reported once and take nothing else down."""

import importlib
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from torch import nn

from lightning_peft import hookimpl
from lightning_peft.errors import (
    LightningPEFTWarning,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    UnknownNameError,
)
from lightning_peft.families import GENERIC, ModelFamily
from lightning_peft.plugins import lora
from lightning_peft.registry import ALLOW_LIST_VARIABLE, DEFAULT_PLUGINS, Registry, get_registry

ROOT = Path(__file__).parent.parent
SOURCE = "acme-peft 1.2 (turbo = acme_turbo)"
"""What the plugin under test is called, as ``install`` makes it by default."""

IMPORTS = """
from dataclasses import dataclass
from typing import ClassVar
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Method, Quantizer
from lightning_peft.families import ModelFamily
"""


def method(name, decorator="@dataclass(frozen=True, kw_only=True)"):
    """The source of a method class, called after its registry name."""
    return f"""
{decorator}
class {name.title()}(Method):
    name: ClassVar[str] = {name!r}
    def supports(self, module):
        return True
    def adapter(self, module, target):
        raise NotImplementedError
"""


def methods(*names):
    """The source of a plugin with methods."""
    classes = ", ".join(name.title() for name in names)
    return IMPORTS + "".join(map(method, names)) + f"@hookimpl\ndef register_methods():\n    return [{classes}]\n"


def returning(expression, hook="register_methods()"):
    """The source of a plugin with the method ``turbo`` in which a hook returns an expression."""
    return IMPORTS + method("turbo") + f"@hookimpl\ndef {hook}:\n    return {expression}\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a distribution with one module and entry points, as pip would leave it on disk."""
    monkeypatch.delenv(ALLOW_LIST_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = []

    def write(
        code=None, distribution="acme-peft", *, module="acme_turbo", points=("turbo",), version="1.2", site="site"
    ):
        folder = tmp_path / site
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(methods("turbo") if code is None else code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [point if "=" in point else f"{point} = {module}" for point in points]
        (info / "entry_points.txt").write_text("\n".join(["[lightning_peft]", *lines]))
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        made.append(module)
        importlib.invalidate_caches()
        return info

    yield write
    for module in made:
        sys.modules.pop(module, None)


def load_with_one_warning():
    """Load all plugins; return the registry and the text of the single warning."""
    with pytest.warns(LightningPEFTWarning) as caught:
        registry = Registry()
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    return registry, str(caught[0].message)


# -- good plugins ------------------------------------------------------------------------------------------------------


def test_a_third_party_plugin_loads_through_its_entry_point(install):
    install()
    registry = Registry()
    assert registry.method("turbo").__module__ == "acme_turbo"
    plugin = registry.plugins[-1]
    assert (plugin.source, plugin.provides, plugin.builtin, plugin.error) == (
        SOURCE,
        {"method": ["turbo"]},
        False,
        None,
    )
    assert registry.broken == []


@pytest.mark.parametrize(
    ("hook", "kind", "base", "verbs"),
    [
        ("register_methods", "method", "Method", ("supports", "adapter")),
        ("register_quantizers", "quantizer", "Quantizer", ("quantize", "dequantized")),
        ("register_eval_tasks", "evaluation task", "EvalTask", ("evaluate",)),
        ("register_exporters", "exporter", "Exporter", ("export",)),
        ("register_routers", "router", "Router", ("route",)),
        ("register_model_families", "model family", None, ()),
    ],
)
def test_every_noun_can_come_from_a_third_party(hook, kind, base, verbs, install):
    lines = ["name: ClassVar[str] = 'turbo'", *(f"{verb} = lambda self, *arguments: None" for verb in verbs)]
    made = f"from lightning_peft import {base}\n@dataclass(frozen=True, kw_only=True)\nclass Turbo({base}):\n    "
    code = made + "\n    ".join(lines) if base else "Turbo = ModelFamily(name='turbo')"
    install(f"{IMPORTS}{code}\n@hookimpl\ndef {hook}():\n    return (Turbo,)\n")
    registry = Registry()
    assert registry.get(kind, "turbo") is sys.modules["acme_turbo"].Turbo
    assert registry.plugins[-1].provides == {kind: ["turbo"]}


def test_the_built_ins_come_first_and_can_be_had_alone(install):
    install()
    registry = Registry(entry_points=False)
    assert [plugin.source for plugin in registry.plugins] == list(DEFAULT_PLUGINS)
    assert all(plugin.builtin and plugin.complete for plugin in registry.plugins)
    assert "acme_turbo" not in sys.modules


def test_an_entry_point_may_name_an_object_in_a_module(install):
    code = (
        IMPORTS
        + method("turbo")
        + "class P:\n    @hookimpl\n    def register_methods(self):\n        return [Turbo]\nplugin = P()\n"
    )
    install(code, points=["turbo = acme_turbo:plugin"])
    assert "turbo" in Registry().methods


def test_the_same_distribution_twice_on_the_path_loads_once(install):
    install(version="1.1", site="later")
    install(version="1.2", site="sooner")
    registry = Registry()
    assert [plugin.source for plugin in registry.plugins if not plugin.builtin] == [SOURCE]


def test_two_entry_points_to_one_module_load_it_once(install):
    install(points=["turbo", "alias"])
    registry = Registry()
    assert len([plugin for plugin in registry.plugins if not plugin.builtin]) == 1
    assert "turbo" in registry.methods


def test_a_distribution_without_metadata_still_loads(install):
    (install() / "METADATA").unlink()
    registry = Registry()
    assert "turbo" in registry.methods
    assert registry.plugins[-1].source == "a distribution without METADATA ? (turbo = acme_turbo)"


def test_a_hook_under_another_name_is_called_and_so_is_a_second_one(install):
    more = method("nitro") + "@hookimpl(specname='register_methods')\ndef more():\n    yield Nitro\n"
    install(methods("turbo") + more)
    assert {"turbo", "nitro"} <= set(Registry().methods)


def test_a_hook_of_another_version_may_be_marked_optional(install):
    install(methods("turbo") + "@hookimpl(optionalhook=True)\ndef register_of_the_future():\n    return [1]\n")
    assert "turbo" in Registry().methods


def test_the_registry_of_the_process_is_made_once():
    assert get_registry() is get_registry()


# -- broken plugins ----------------------------------------------------------------------------------------------------

FAULTS = {
    # what is wrong: (source, the cause that is reported)
    "a missing import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    "a syntax error": ("def broken(:", r"SyntaxError: .*acme_turbo.py, line 1"),
    "sys.exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "a BaseException": ("class Stop(BaseException): pass\nraise Stop('no more')", "Stop: no more"),
    "an error that cannot be shown": (
        "class Odd(Exception):\n    def __str__(self):\n        raise ValueError\nraise Odd",
        r"Odd: \(its message cannot be shown\)",
    ),
    "no hook at all": ("x = 1", "no function is marked with @hookimpl. The hooks are: register_methods, "),
    "a hook without the mark": (
        methods("turbo") + "def register_quantizers():\n    return []\n",
        "register_quantizers has the name of a hook but no mark; decorate it with @hookimpl",
    ),
    "a wrong signature": (
        returning("[Turbo]", "register_methods(registry)"),
        r"hook 'register_methods'; hookimpl definition: register_methods\(registry\); Argument\(s\) {'registry'} are declared in the hookimpl but can not be found",
    ),
    "a misspelt hook": (
        returning("[Turbo]", "register_method()"),
        "register_method implements the unknown hook 'register_method'; did you mean 'register_methods'",
    ),
    "an unknown hook": (
        returning("[Turbo]", "on_fit_start()"),
        "unknown hook 'on_fit_start'. The hooks are: register_methods, .*resolve_model_family",
    ),
    "a misspelt specname": (
        methods("turbo") + "@hookimpl(specname='register_quantisers')\ndef mine():\n    return []\n",
        "mine implements the unknown hook 'register_quantisers'; did you mean 'register_quantizers'",
    ),
    "a new-style wrapper": (
        IMPORTS + "@hookimpl(wrapper=True)\ndef register_methods():\n    return (yield)\n",
        "register_methods is a hook wrapper, which would change what other plugins register; make it a plain @hookimpl",
    ),
    "an old-style wrapper": (
        IMPORTS + "@hookimpl(hookwrapper=True)\ndef register_methods():\n    yield\n",
        "register_methods is a hook wrapper",
    ),
    "a hook that raises": (returning("1 / 0"), r"register_methods\(\) raised ZeroDivisionError: division by zero"),
    "a hook that exits": (returning("exit(3)"), "SystemExit: 3"),
    "a generator that raises": (returning("(1 / n for n in [0])"), r"register_methods\(\) raised ZeroDivisionError"),
    "a later hook that raises": (
        methods("turbo") + "@hookimpl\ndef register_quantizers():\n    import no_such_module_anywhere\n",
        r"register_quantizers\(\) raised ModuleNotFoundError",
    ),
    "None": (returning("None"), r"register_methods\(\) must return a list, got None"),
    "a string": (returning("'turbo'"), r"register_methods\(\) must return a list, got 'turbo'"),
    "a class outside a list": (returning("Turbo"), r"must return a list, got <class 'acme_turbo.Turbo'>"),
    "an instance": (returning("[Turbo()]"), r"must return subclasses of Method, got Turbo\(\)"),
    "a class that is no method": (returning("[dict]"), "must return subclasses of Method, got <class 'dict'>"),
    "a quantizer for a method": (returning("[Turbo]", "register_quantizers()"), "must return subclasses of Quantizer, got"),
    "a class for a family": (returning("[ModelFamily]", "register_model_families()"), "must return instances of ModelFamily"),
    "an abstract method": (
        IMPORTS + "@dataclass(frozen=True, kw_only=True)\nclass Turbo(Method):\n    name = 'turbo'\n"
        "@hookimpl\ndef register_methods():\n    return [Turbo]\n",
        "method 'turbo' does not implement adapter, supports",
    ),
    "no dataclass": (
        IMPORTS + method("turbo", decorator="") + "@hookimpl\ndef register_methods():\n    return [Turbo]\n",
        r"method 'turbo' must be decorated with @dataclass\(frozen=True, kw_only=True\)",
    ),
    "not frozen": (
        IMPORTS + method("turbo", decorator="@dataclass") + "@hookimpl\ndef register_methods():\n    return [Turbo]\n",
        r"method 'turbo' must be decorated with @dataclass\(frozen=True, kw_only=True\)",
    ),
    "no name": (
        methods("turbo").replace("name: ClassVar[str] = 'turbo'", "pass"),
        "needs a lower-case identifier as its name, found None",
    ),
    "a bad name": (methods("turbo").replace("'turbo'", "'Turbo-2'"), "needs a lower-case identifier as its name, found 'Turbo-2'"),
    "a name that is no string": (methods("turbo").replace("'turbo'", "3"), "needs a lower-case identifier as its name, found 3"),
    "a name that is taken": (
        methods("turbo", "lora"),
        r"registers the method 'lora', which lightning_peft.plugins.lora has registered already; rename one of them",
    ),
    "a name twice": (returning("[Turbo, Turbo]"), r"registers the method 'turbo' twice; rename one of them"),
    "an attribute that is not there": (None, "AttributeError: module 'acme_turbo' has no attribute 'plugin'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_plugin_is_reported_once_and_takes_nothing_else_down(fault, install):
    code, cause = FAULTS[fault]
    install(methods("before"), "aaa-peft", module="aaa_before", points=["before"])
    install(methods("zafter"), "zzz-peft", module="zzz_after", points=["after"])
    if code is None:
        install(points=["turbo = acme_turbo:plugin"])
    else:
        install(code)
    source = SOURCE.replace("acme_turbo)", "acme_turbo:plugin)") if code is None else SOURCE
    registry, message = load_with_one_warning()
    assert message.startswith(f"the plugin {source} is broken and was left out: ")
    assert re.search(cause, message)
    assert message.count(source) == 1
    assert [plugin.source for plugin in registry.broken] == [source]
    assert {"before", "zafter"} <= set(registry.methods)
    assert set(Registry(entry_points=False).methods) <= set(registry.methods)
    assert registry.method("lora") is lora.LoRA
    with pytest.raises(PluginLoadError, match=cause) as caught:
        registry.method("turbo")
    assert source in str(caught.value)
    assert caught.value.__cause__ is registry.broken[0].error
    with pytest.raises(UnknownNameError, match=r"unknown method 'lorra'; did you mean 'lora'.*\? Registered: "):
        registry.method("lorra")


def test_an_interrupt_from_the_keyboard_passes(install):
    install("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Registry()


def test_a_broken_plugin_leaves_none_of_its_nouns_and_hooks(install):
    more = "@hookimpl\ndef register_quantizers():\n    return None\n@hookimpl\ndef resolve_model_family(model):\n    return 1\n"
    install(methods("turbo") + more)
    registry, _ = load_with_one_warning()
    assert "turbo" not in registry.methods
    assert registry.resolve_family(nn.Linear(2, 2)) is GENERIC
    with pytest.raises(PluginLoadError, match=r"register_quantizers\(\) must return a list, got None"):
        registry.method("turbo")


def test_two_plugins_of_one_name_conflict_whatever_their_order_on_the_path(install):
    for names in (("aaa", "zzz"), ("zzz", "aaa")):
        for name in names:
            install(distribution=f"{name}-peft", module=f"{name}_turbo", site=f"{names[0]}-first-{name}")
        registry, message = load_with_one_warning()
        taken = r"registers the method 'turbo', which aaa-peft 1.2 \(turbo = aaa_turbo\) has registered already"
        assert re.search(rf"zzz-peft 1.2 \(turbo = zzz_turbo\) is broken .*: register_methods\(\) {taken}", message)
        assert registry.method("turbo").__module__ == "aaa_turbo"


def test_the_name_of_a_distribution_is_a_hint_to_what_it_provides(install):
    install("import no_such_module_anywhere", "lightning-peft-lora-acme", module="fa", points=["main"])
    registry, _ = load_with_one_warning()
    for name in ("lora_acme", "main", "lightning_peft_lora_acme"):
        with pytest.raises(
            PluginLoadError, match=rf"method '{name}' is not registered, .*lightning-peft-lora-acme 1.2 \(main = fa\)"
        ):
            registry.method(name)


def test_an_unknown_name_is_a_typo_where_it_resembles_one_and_else_maybe_the_broken_plugins(install):
    install("import no_such_module_anywhere")
    registry, _ = load_with_one_warning()
    with pytest.raises(
        UnknownNameError, match=rf"did you mean 'lora'.* may have it are broken: {re.escape(SOURCE)}: ModuleNotFound"
    ):
        registry.method("lorra")
    with pytest.raises(
        PluginLoadError, match="quantizer 'ternary' is not registered, and plugins that may have it are broken: acme"
    ):
        registry.get("quantizer", "ternary")


def test_a_plugin_whose_names_are_all_known_is_not_suspected_of_others(install):
    install(methods("turbo", "lora"))
    registry, _ = load_with_one_warning()
    with pytest.raises(UnknownNameError, match=r"unknown method 'reft'\. Registered: [\w, ]*$"):
        registry.method("reft")
    with pytest.raises(UnknownNameError, match=r"unknown quantizer 'boost'"):
        registry.get("quantizer", "boost")


def test_an_adapter_file_of_a_broken_plugin_names_the_plugin(install):
    install("import no_such_module_anywhere", points=["ia4"])
    registry, _ = load_with_one_warning()
    with pytest.raises(
        PluginLoadError, match=r"method 'ia4' is not registered, .*\(ia4 = acme_turbo\): ModuleNotFoundError"
    ):
        registry.method_for_peft_type("IA4")
    with pytest.raises(
        UnknownNameError, match=r"no registered method reads HF PEFT's type 'LORAA'; did you mean 'LORA' or 'ADALORA'\?"
    ):
        registry.method_for_peft_type("LORAA")


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_name_in_capitals_is_told_apart_and_explained():
    registry = Registry(entry_points=False)
    with pytest.raises(UnknownNameError, match="unknown method 'LoRA'; did you mean 'lora'"):
        registry.method("LoRA")
    with pytest.raises(UnknownNameError, match=r"unknown quantizer 'xyz'\. Registered: .*nf4"):
        registry.get("quantizer", "xyz")
    with pytest.raises(
        UnknownNameError, match="unknown kind 'methods'; the kinds are: method, quantizer, model family, "
    ):
        registry.get("methods", "lora")


def test_every_kind_can_be_asked_for():
    registry = Registry(entry_points=False)
    kinds = {
        "method": registry.methods,
        "quantizer": registry.quantizers,
        "model family": registry.model_families,
        "evaluation task": registry.eval_tasks,
        "exporter": registry.exporters,
        "router": registry.routers,
    }
    for kind, items in kinds.items():
        assert items
        assert all(registry.get(kind, name) is item and item.name == name for name, item in items.items())
    assert registry.method_for_peft_type("LORA") is lora.LoRA


# -- the allow-list ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "loaded"),
    [
        (None, {"turbo", "nitro"}),
        ("", set()),
        (" , ", set()),
        ("acme-peft", {"turbo"}),
        ("Acme_Peft", {"turbo"}),
        ("nitro", {"nitro"}),
        ("nitro, acme.peft,", {"turbo", "nitro"}),
    ],
)
def test_the_allow_list_decides_what_loads(allowed, loaded, install, monkeypatch):
    install()
    install(methods("nitro"), "other", module="other_nitro", points=["nitro"])
    if allowed is not None:
        monkeypatch.setenv(ALLOW_LIST_VARIABLE, allowed)
    registry = Registry()
    assert {"turbo", "nitro"} & set(registry.methods) == loaded
    assert "lora" in registry.methods
    imported = {"turbo": "acme_turbo", "nitro": "other_nitro"}
    assert {name for name, module in imported.items() if module in sys.modules} == loaded


def test_a_name_on_the_allow_list_that_is_not_installed_is_reported(install, monkeypatch):
    install()
    monkeypatch.setenv(ALLOW_LIST_VARIABLE, "acme-peft,acme-pfet")
    registry, message = load_with_one_warning()
    assert message == "LIGHTNING_PEFT_PLUGINS names 'acme-pfet', but no installed package has such a plugin"
    assert "turbo" in registry.methods


def test_a_plugin_that_may_not_load_is_not_even_reported(install, monkeypatch):
    install("raise RuntimeError")
    monkeypatch.setenv(ALLOW_LIST_VARIABLE, "")
    assert Registry().broken == []


# -- resolve_model_family ----------------------------------------------------------------------------------------------


class Llama(nn.Module):
    config = types.SimpleNamespace(model_type="llama")


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ("1 / 0", r"resolve_model_family\(\) raised ZeroDivisionError"),
        ("'llama'", "must return a ModelFamily or None, got 'llama'"),
        ("[families['llama']]", "must return a ModelFamily or None, got "),
        ("exit(1)", "SystemExit: 1"),
    ],
)
def test_a_plugin_that_fails_when_it_is_called_is_left_out_then(answer, cause, install):
    family = "@hookimpl\ndef register_model_families():\n    return [ModelFamily(name='acme')]\n"
    install(methods("turbo") + family + f"@hookimpl\ndef resolve_model_family(model, families):\n    return {answer}\n")
    registry = Registry()
    assert "turbo" in registry.methods
    with pytest.warns(LightningPEFTWarning, match=cause) as caught:
        assert registry.resolve_family(Llama()).name == "llama"
    assert len(caught) == 1
    assert SOURCE in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.resolve_family(nn.Linear(2, 2)) is GENERIC
    assert [plugin.source for plugin in registry.broken] == [SOURCE]
    for kind, name in (("method", "turbo"), ("model family", "acme")):
        with pytest.raises(PluginLoadError, match=cause):
            registry.get(kind, name)
    with pytest.raises(UnknownNameError, match="unknown method 'reft'"):
        registry.method("reft")


def resolver(name, answer, **options):
    """A plugin of the running program that answers ``resolve_model_family`` and keeps what it was asked."""

    class Resolver:
        __name__ = name
        asked = []  # noqa: RUF012

        @hookimpl(**options)
        def resolve_model_family(self, model, families):
            self.asked.append((type(model).__name__, "llama" in families))
            families.clear()
            return answer

    return Resolver()


def test_third_parties_answer_before_the_built_in_and_the_last_registered_first():
    registry = Registry(entry_points=False)
    first, last = ModelFamily(name="first"), ModelFamily(name="last")
    early, late = resolver("early", first), resolver("late", last)
    assert registry.resolve_family(Llama()).name == "llama"
    registry.register(early)
    assert registry.resolve_family(Llama()) is first
    registry.register(late)
    assert registry.resolve_family(Llama()) is last
    assert early.asked == late.asked == [("Llama", True)]
    registry.register(resolver("urgent", first, tryfirst=True))
    registry.register(resolver("modest", last, trylast=True))
    assert registry.resolve_family(Llama()) is first
    assert "llama" in registry.model_families


def test_none_leaves_the_answer_to_the_next_plugin():
    registry = Registry(entry_points=False)
    registry.register(resolver("shy", None))
    assert registry.resolve_family(Llama()).name == "llama"
    assert registry.resolve_family(nn.Linear(2, 2)) is GENERIC


def test_a_hook_gets_the_arguments_that_it_names():
    registry = Registry(entry_points=False)
    plugin = types.ModuleType("named")
    exec("def resolve_model_family(families):\n    return families['llama']", plugin.__dict__)
    plugin.resolve_model_family = hookimpl(plugin.resolve_model_family)
    registry.register(plugin)
    assert registry.resolve_family(nn.Linear(2, 2)) is registry.model_families["llama"]


def test_a_fault_of_a_built_in_is_not_hidden():
    registry = Registry(entry_points=False)
    model = types.SimpleNamespace(config=types.SimpleNamespace(model_type=[]))
    with pytest.raises(
        PluginError, match=r"plugins.model_families: resolve_model_family\(\) raised TypeError: unhashable"
    ):
        registry.resolve_family(model)
    assert registry.broken == []


# -- plugins of the running program ------------------------------------------------------------------------------------


def module_from(code, name="at_home"):
    plugin = types.ModuleType(name)
    sys.modules[name] = plugin  # dataclasses look a class up by its module
    try:
        exec(code, plugin.__dict__)
    finally:
        del sys.modules[name]
    return plugin


def test_a_plugin_of_the_running_program_is_registered_as_it_is():
    registry = Registry(entry_points=False)
    registry.register(module_from(methods("turbo")))
    assert registry.method("turbo").__module__ == "at_home"
    assert registry.plugins[-1].source == "at_home"
    with pytest.raises(
        PluginConflictError, match="a plugin 'at_home' is registered already; register each once, by its own name"
    ):
        registry.register(module_from(methods("nitro")))


def snapshot(registry):
    hooks = {
        name: list(caller.get_hookimpls()) for name, caller in vars(registry._manager.hook).items() if name[0] != "_"
    }
    items = {kind: dict(items) for kind, items in registry._items.items()}
    return hooks, items, dict(registry._owner), list(registry.plugins), registry._manager.get_plugins()


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (
            methods("turbo", "lora"),
            PluginConflictError,
            "^at_home: .*'lora', which lightning_peft.plugins.lora has registered",
        ),
        (returning("[Turbo, Turbo]"), PluginConflictError, "^at_home: .*'turbo' twice"),
        (returning("None"), PluginError, r"^at_home: register_methods\(\) must return a list, got None"),
        (returning("1 / 0"), PluginError, r"^at_home: register_methods\(\) raised ZeroDivisionError: division by zero"),
        (returning("exit(0)"), SystemExit, "0"),
        (
            methods("turbo") + "@hookimpl\ndef register_quantizers(x):\n    return []\n",
            PluginError,
            "^at_home: .*Argument",
        ),
        (
            methods("turbo") + "@hookimpl\ndef register_quantizer():\n    return []\n",
            PluginError,
            "^at_home: .*unknown hook",
        ),
        ("", PluginError, "^at_home: no function is marked"),
    ],
)
def test_after_a_failed_registration_nothing_is_left(code, error, message):
    registry = Registry(entry_points=False)
    before = snapshot(registry)
    with pytest.raises(error, match=message):
        registry.register(module_from(code))
    assert snapshot(registry) == before
    registry.register(module_from(methods("turbo")))
    assert "turbo" in registry.methods


def test_a_plugin_is_registered_once_and_none_is_not_a_plugin():
    registry = Registry(entry_points=False)
    plugin = module_from(methods("turbo"))
    registry.register(plugin)
    with pytest.raises(PluginConflictError, match="a plugin 'at_home' is registered already"):
        registry.register(plugin)
    with pytest.raises(PluginError, match="NoneType: no function is marked with @hookimpl"):
        registry.register(None)


# -- nothing happens at import -----------------------------------------------------------------------------------------


def test_plugins_load_when_the_registry_is_first_asked_for(install):
    site = install("raise SystemExit('loaded')").parent
    code = (
        "import sys, lightning_peft\n"
        "print(sorted({'transformers', 'bitsandbytes', 'peft', 'torch', 'pluggy', 'lightning_peft.registry', 'acme_turbo'} & set(sys.modules)))\n"
        "from lightning_peft.registry import Registry\n"
        "Registry(entry_points=False)\n"
        "print(sorted({'transformers', 'bitsandbytes', 'peft', 'lightning', 'acme_turbo'} & set(sys.modules)))\n"
        "print(len(lightning_peft.get_registry().broken))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment, cwd=ROOT, check=True
    )
    assert run.stdout.split("\n") == ["[]", "[]", "1", ""]

"""``docs/hooks.md`` says what is so: every hook with its exact arguments, and examples that register."""

import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import hookspecs, inject, save_adapter
from lightning_peft.moe.routing import TopKRouter
from lightning_peft.registry import ALLOW_LIST_VARIABLE, Registry

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hooks.md").read_text()
HOOKS = {
    name: function
    for name, function in vars(hookspecs).items()
    if inspect.isfunction(function) and hasattr(function, f"{hookspecs.PROJECT}_spec")
}


def section(hook):
    found = re.search(rf"^### {hook}$(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/hooks.md has no section '### {hook}'"
    return found.group(1)


@pytest.fixture
def example():
    """Return a function that makes the plugin in the example of a hook."""
    made = []

    def make(hook):
        (code,) = re.findall(r"```python\n(.*?)```", section(hook), re.DOTALL)
        plugin = types.ModuleType(f"example_of_{hook}")
        sys.modules[plugin.__name__] = plugin
        made.append(plugin.__name__)
        exec(code, plugin.__dict__)
        return plugin

    yield make
    for name in made:
        del sys.modules[name]


def test_the_hooks_are_found():
    assert len(HOOKS) == 8


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented_with_its_exact_signature(hook):
    signature = inspect.signature(HOOKS[hook])
    parameters = ", ".join(str(parameter) for parameter in signature.parameters.values()).replace("'", "")
    written = f"{hook}({parameters}) -> {signature.return_annotation}".replace("'", "")
    assert f"\n`{written}`\n" in section(hook)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_table_names_a_hook_with_its_arguments_and_links_to_it(hook):
    arguments = ", ".join(inspect.signature(HOOKS[hook]).parameters)
    assert f"| [`{hook}({arguments})`](#{hook}) |" in PAGE


def test_nothing_else_is_documented_as_a_hook():
    assert re.findall(r"^### (\w+)$", PAGE, re.MULTILINE) == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_says_when_it_is_called_and_whether_the_first_result_counts(hook):
    text = " ".join(section(hook).split())
    assert re.search("Called (once, when the registry is made|whenever roles must be given a meaning)", text)
    first = bool(getattr(HOOKS[hook], f"{hookspecs.PROJECT}_spec")["firstresult"])
    assert ("**The first result counts.**" in section(hook)) == first


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_implemented_by_a_built_in(hook):
    implementations = getattr(Registry(entry_points=False)._manager.hook, hook).get_hookimpls()
    assert any(impl.plugin.__name__.startswith("lightning_peft.plugins.") for impl in implementations)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_has_a_test(hook):
    others = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert any(re.search(rf"\b{hook}\b", path.read_text()) for path in others)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_a_hook_is_a_plugin_that_implements_it(hook, example):
    registry, plugin = Registry(entry_points=False), example(hook)
    registry.register(plugin)
    assert any(impl.plugin is plugin for impl in getattr(registry._manager.hook, hook).get_hookimpls())
    assert hook == "resolve_model_family" or registry.plugins[-1].provides


def test_the_entry_point_group_and_the_variable_are_those_of_the_code():
    assert f"[project.entry-points.{hookspecs.PROJECT}]" in PAGE
    assert f"`{ALLOW_LIST_VARIABLE}`" in PAGE


# -- what the examples do ----------------------------------------------------------------------------------------------


def test_the_example_of_a_method_and_of_an_exporter_work(example, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), torch.randn(3, 4)
    before = model(x).detach()
    inject(model, example("register_methods").NormShift(), ["1"])
    assert torch.equal(model(x), before)
    model[1].adapters["default"].shift.data.fill_(2.0)
    assert torch.allclose(model(x), before + 2.0)
    example("register_exporters").PlainTensors().export(model, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tensors.safetensors"]
    save_adapter(model, tmp_path / "adapter")


def test_the_example_of_a_quantizer_rounds_to_one_byte(example):
    torch.manual_seed(0)
    linear, quantizer = nn.Linear(16, 8), example("register_quantizers").Int8()
    packed = quantizer.quantize(linear)
    assert packed.packed.dtype == torch.int8
    step = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    assert ((quantizer.dequantized(packed) - linear.weight).abs() <= step * 0.501).all()
    assert quantizer.packs(packed)
    assert not quantizer.packs(linear)
    x = torch.randn(3, 16)
    assert torch.allclose(packed(x), linear(x), atol=0.05)


def test_the_example_of_a_router_routes_as_top_k_does(example):
    logits, mask = torch.randn(6, 4), torch.tensor([True] * 5 + [False])
    found = example("register_routers").Tempered(temperature=0.5).route(logits, mask=mask)
    wanted = TopKRouter().route(logits / 0.5, mask=mask)
    assert torch.equal(found.experts, wanted.experts)
    assert torch.allclose(found.weights, wanted.weights)
    assert torch.equal(found.valid, wanted.valid)
    assert torch.equal(found.tokens, wanted.tokens)


def test_the_example_of_a_task_measures(example):
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    assert example("register_eval_tasks").WeightNorm().evaluate(linear) == {"norm": 5.0}


def test_the_examples_of_families_are_found(example):
    class Acme(nn.Module):
        config = types.SimpleNamespace(model_type="acme_text")

    class HomemadeLlama(nn.Module):
        pass

    registry = Registry(entry_points=False)
    for hook in ("register_model_families", "resolve_model_family"):
        registry.register(example(hook))
    assert registry.resolve_family(Acme()).name == "acme"
    assert registry.resolve_family(HomemadeLlama()).name == "llama"
    assert registry.resolve_family(nn.Linear(2, 2)).name == "generic"

"""``CONTRIBUTING.md`` keeps its word: a third party adds a method with no edit, a built-in is one file and one line."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_peft
from lightning_peft import adapters_disabled, inject, load_adapter, merge_adapters, save_adapter
from lightning_peft.errors import ConfigError, MergeError, TargetError
from lightning_peft.interfaces import Slice, Target
from lightning_peft.registry import ALLOW_LIST_VARIABLE, DEFAULT_PLUGINS, Registry, get_registry

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_peft"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
METHOD, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(PROJECT,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
MODULE = "acme_feature_scaling"


# -- a third party -----------------------------------------------------------------------------------------------------


def install(site):
    """Put the example of the page on disk as pip would."""
    name, version = (re.search(rf'^{key} = "(.*)"$', PROJECT, re.MULTILINE).group(1) for key in ("name", "version"))
    group, point, module = re.search(
        r'^\[project\.entry-points\.(\w+)\]\n(\w+) = "(\w+)"$', PROJECT, re.MULTILINE
    ).groups()
    assert module == MODULE
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (site / f"{MODULE}.py").write_text(METHOD)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{point} = {module}\n")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Install the example, let plugins load anew, and return its module."""
    monkeypatch.delenv(ALLOW_LIST_VARIABLE, raising=False)
    install(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    importlib.invalidate_caches()
    get_registry.cache_clear()
    assert "feature_scaling" in get_registry().methods
    yield sys.modules[MODULE]
    get_registry.cache_clear()
    del sys.modules[MODULE]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3, bias=False)).eval()


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))


def trained(example):
    """Return an adapted net, and its losses while it was trained towards one whose outputs are scaled."""
    model, factors = net(), torch.tensor([3.0, -1.0, 0.5])
    with torch.no_grad():
        goal = net()(X) * factors
    inject(model, example.FeatureScaling(strength=0.5), "all_linear")
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.3), []
    for _ in range(80):
        loss = (model(X) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def test_a_third_party_adds_a_method_with_no_edit(example, tmp_path):
    model, losses = trained(example)
    assert losses[-1] < 0.01 * losses[0]
    with adapters_disabled(model):
        assert torch.equal(model(X), net()(X))

    again = net()
    loaded = load_adapter(again, save_adapter(model, tmp_path / "adapter"))
    assert loaded.method == example.FeatureScaling(strength=0.5)
    assert torch.equal(again(X), model(X))

    expected = model(X).detach()
    merge_adapters(model)
    assert torch.allclose(model(X), expected, atol=1e-6)
    factor = 1 + 0.5 * model[0].adapters["default"].s.detach()  # the formula at the top of the example
    assert torch.allclose(model[0].base_layer.weight, net()[0].weight * factor[:, None])
    assert torch.allclose(model[0].base_layer.bias, net()[0].bias * factor)


def test_the_example_says_what_is_wrong(example):
    with pytest.raises(ConfigError, match=r"FeatureScaling strength must be positive, got -1"):
        example.FeatureScaling(strength=-1)
    part = Target(path="attn.qkv", slices=(Slice(role="query", groups=1, width=6, start=0, stop=2),))
    with pytest.raises(TargetError, match=r"cannot adapt a slice of 'attn.qkv'; name the whole module"):
        example.FeatureScaling().adapter(nn.Linear(2, 6), part)
    packed = nn.Linear(2, 2)
    adapter = example.OutputScale(packed, 1.0)
    packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        MergeError, match=r"weight is packed as torch.uint8 and cannot be scaled; unpack the base first"
    ):
        adapter.merged_parameters(packed)


def test_the_test_on_the_page_runs_as_it_stands(tmp_path):
    # All of its cases run in test_example_conformance.py.
    install(tmp_path / "site")
    (tmp_path / "test_feature_scaling.py").write_text(TEST)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop(ALLOW_LIST_VARIABLE, None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "fresh or survive or saved",
        "test_feature_scaling.py",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) >= 5


# -- a built-in --------------------------------------------------------------------------------------------------------


def test_a_built_in_is_one_file_and_one_line():
    files = {path.stem for path in (PACKAGE / "plugins").glob("*.py")} - {"__init__"}
    assert sorted(DEFAULT_PLUGINS) == sorted(f"lightning_peft.plugins.{name}" for name in files)
    naming = {name: set() for name in DEFAULT_PLUGINS}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in naming:
                naming[node.value].add(str(path.relative_to(PACKAGE)))
    assert naming == {name: {"registry.py"} for name in DEFAULT_PLUGINS}


def names_of_methods():
    """Return what a file could know the built-in methods by: their registry names, and the names of their classes."""
    methods = Registry(entry_points=False).methods.values()
    return {method.name for method in methods}, {method.__name__ for method in methods}


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "plugins" and path != PACKAGE / "__init__.py"
    ],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_nothing_outside_of_plugins_knows_a_method(path):
    """No import from the built-in plugins, no use of a method's class, no string that is a method's registry name."""
    names, classes = names_of_methods()
    assert known(path.read_text(), names, classes) == []


def known(source, names, classes):
    """Return the places where a file knows a method. Docstrings, and so the examples in them, do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            words = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            words = [alias.name for alias in node.names]
        else:
            words = []
        imported = any(
            f"{word}.".startswith("lightning_peft.plugins.") or word.split(".")[-1] in classes for word in words
        )
        used = isinstance(node, (ast.Name, ast.Attribute)) and getattr(node, "id", getattr(node, "attr", "")) in classes
        named = isinstance(node, ast.Constant) and node.value in names
        if imported or used or named:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "from lightning_peft.plugins.lora import LowRank",
        "from lightning_peft.plugins import lora",
        "from lightning_peft import LoRA",
        "import lightning_peft.plugins.lora",
        "x = lightning_peft.LoRA()",
        "if method.name == 'lora': pass",
        "isinstance(method, LoRA)",
    ],
)
def test_the_rule_bites(line):
    assert len(known(line, {"lora"}, {"LoRA"})) >= 1


def test_the_rule_lets_examples_and_other_words_pass():
    assert known('def f():\n    """Example: LoRA, "lora"."""\n    return lora_A, "lora_A"', {"lora"}, {"LoRA"}) == []


def test_the_table_of_public_names_is_the_only_other_place():
    homes = {home for home in lightning_peft._HOME.values() if home.startswith("plugins")}
    assert {f"lightning_peft.{home}" for home in homes} <= set(DEFAULT_PLUGINS)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_starts_with_adding_a_method_and_its_links_lead_somewhere():
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE)[0] == "Add a method"
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_commands_on_the_page_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)  ", PAGE, re.MULTILINE)
    assert targets == ["check", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert os.access(ROOT / ".ci" / "run", os.X_OK)

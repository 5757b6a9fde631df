"""The house rules that a machine can check."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_peft

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML itself")

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_peft"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_all_names_are_public_sorted_and_importable():
    assert lightning_peft.__all__ == sorted(lightning_peft.__all__)
    for name in lightning_peft.__all__:
        value = getattr(lightning_peft, name)
        assert not name.startswith("_")
        assert getattr(value, "__doc__", None), name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = lightning_peft.nonsense


def test_a_type_checker_sees_the_names_that_are_imported_late():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"lightning_peft.{home}" for name, home in lightning_peft._HOME.items()}


def test_importing_the_package_loads_none_of_the_heavy_libraries_and_no_plugin():
    code = "import sys, lightning_peft; print(sorted({'torch', 'transformers', 'bitsandbytes', 'lightning', 'peft', 'pluggy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == "[]"


def test_transformers_and_bitsandbytes_are_loaded_when_something_needs_them_not_before():
    code = (
        "import sys, torch; from lightning_peft import ForgettingEvaluation, LoRA, NF4, PEFTModule, inject, get_registry; get_registry();"
        "inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRA(rank=1));"
        "print(sorted({'transformers', 'bitsandbytes', 'peft', 'lm_eval', 'datasets'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100).stdout
    # torchmetrics, which lightning needs, looks into transformers by itself where it is installed.
    assert "bitsandbytes" not in out
    assert "peft" not in out
    assert "lm_eval" not in out
    assert "datasets" not in out


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_idea_and_a_function_fits_a_screen(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, f"{path.name}:{node.lineno} {node.name}"
    assert path.stem not in ("utils", "helpers", "common", "base", "core")


def test_nothing_is_unpickled_or_evaluated_anywhere():
    forbidden = {"eval", "exec", "pickle", "yaml.load"}
    for path in SOURCES:
        if path.parent.name == "testing":  # the conformance suite pickles, in memory, what it made itself
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden, f"{path}:{node.lineno}"
                if (
                    ast.unparse(node.func) == "torch.load"
                ):  # in one place, where nothing but tensors comes out of a pickle
                    assert path.name == "weight_files.py"
                    assert "weights_only=True" in [ast.unparse(word) for word in node.keywords]
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "dill", "cloudpickle"}, path


def test_every_public_class_and_function_says_what_it_is():
    for path in SOURCES:
        module = importlib.import_module(
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        )
        assert module.__doc__, path


def test_every_error_is_raised_or_derived_from_and_drawn_in_the_tree():
    from lightning_peft import errors

    drawing = errors.__doc__
    used = "".join(path.read_text() for path in SOURCES if path.name != "errors.py")
    for name, value in vars(errors).items():
        if isinstance(value, type) and value.__module__ == errors.__name__:
            assert name in drawing
            assert re.search(rf"\b{name}\(|\b{name},|except .*{name}", used) or value.__subclasses__(), name


def test_the_withdrawn_versions_of_lightning_are_below_the_minimum():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    minimums = dict(
        re.match(r"([\w-]+).*?>=([\d.]+)", line.replace("[signatures]", "")).groups()
        for line in project["dependencies"]
    )
    assert minimums["lightning"] == "2.6.6"
    assert minimums["torch"] == "2.10"
    assert minimums["transformers"] == "5.3"
    assert project["requires-python"] == ">=3.10"
    assert not any(line.startswith("peft") for line in project["dependencies"])


def test_every_direct_dependency_has_an_exact_version_in_the_constraints():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    named = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = {re.match(r"[\w-]+", line).group().lower().replace("_", "-") for line in named} - {"lightning-peft"}
    assert names <= pinned

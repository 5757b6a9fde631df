"""The table of what methods can do: declared by the classes, verified by the conformance suite, and the same in the documentation."""

import ast
import re
from pathlib import Path

from lightning_peft import get_registry
from lightning_peft.cli import main
from lightning_peft.cli.capabilities import CAPABILITIES
from lightning_peft.interfaces import Method

ROOT = Path(__file__).parents[1]


def builtin_methods():
    return {name: m for name, m in get_registry().methods.items() if m.__module__.startswith("lightning_peft.")}


def conforming():
    """Return the names of classes that a subclass of the conformance suite in tests/plugins has as its method."""
    found = set()
    for file in (ROOT / "tests" / "plugins").glob("test_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(getattr(b, "id", "") == "MethodConformance" for b in node.bases):
                for line in node.body:
                    if isinstance(line, ast.Assign) and line.targets[0].id == "method":
                        call = line.value.func
                        found.add(call.id if isinstance(call, ast.Name) else call.value.id)
    return found


def test_every_method_is_verified_by_the_conformance_suite():
    missing = {method.__name__ for method in builtin_methods().values()} - conforming()
    assert not missing


def test_the_suite_reads_every_capability():
    suite = "".join(file.read_text() for file in (ROOT / "lightning_peft" / "testing").glob("*.py"))
    for capability in CAPABILITIES:
        assert re.search(rf'need\("{capability}"\)|method\.{capability}\b', suite), capability
        assert isinstance(getattr(Method, capability), bool)


def test_the_documentation_shows_what_the_program_prints(capsys):
    assert main(["methods", "--markdown"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    ours = {f"`{name}`" for name in builtin_methods()}
    wanted = [*printed[:2], *(line for line in printed[2:] if line.split(" | ")[0].removeprefix("| ") in ours)]
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    held = re.search(r"<!-- capabilities: [^>]* -->\n(.*?)\n?<!-- end of capabilities -->", text, re.DOTALL)
    assert held[1].splitlines() == wanted, (
        "run lightning-peft methods --markdown and put its table into docs/methods.md"
    )


def test_every_row_says_yes_or_no_to_every_capability(capsys):
    main(["methods", "--markdown"])
    for line in capsys.readouterr().out.strip().splitlines()[2:]:
        cells = line.strip("| ").split(" | ")
        assert len(cells) == 3 + len(CAPABILITIES)
        assert set(cells[2:-1]) <= {"yes", "no"}

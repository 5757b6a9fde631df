"""What the documentation shows runs, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "__main__"})
        shown = re.findall(r"^print\(.*?\) +# (.*)$", block, re.MULTILINE)
        printed = capsys.readouterr().out
        assert all(line in printed for line in shown), (shown, printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_commands_of_the_readme_are_in_the_makefile_and_the_program():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for name in ("quickstart", "test"):
        assert f"make {name}" in readme
        assert re.search(rf"^{name}:", makefile, re.MULTILINE)
    for config in re.findall(r"examples/[\w/.-]+", readme):
        assert (ROOT / config).exists(), config


def test_every_method_has_a_section_and_each_of_its_fields_is_in_it():
    import dataclasses

    from lightning_peft import get_registry

    text = (ROOT / "docs" / "methods.md").read_text()
    for method in get_registry().methods.values():
        if method.__module__.startswith("lightning_peft."):
            section = re.search(rf"^## {method.__name__}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
            assert section, method.__name__
            for field in dataclasses.fields(method):
                assert f"`{field.name}`" in section.group(1), field.name

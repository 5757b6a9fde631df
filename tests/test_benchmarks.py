"""``benchmarks/run.py``: one command, one JSON, one Markdown table."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(paired, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmarks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks_run", module)
    spec.loader.exec_module(module)
    return module


def test_one_script_runs_and_both_files_are_there(run, tmp_path, capsys):
    # The allocator as it is, so that one process is enough.
    assert run.main(["--only", "peers", "--quick", "--allocator", "asis", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "measurements.json").read_text())
    assert written["failed"] == {}
    arms = {row["arm"] for row in written["rows"]["peers"]}
    assert {"HF PEFT", "HF PEFT again", "ours"} <= arms
    assert all(row["ms"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in written["rows"]["peers"])
    page = (tmp_path / "measurements.md").read_text()
    assert written["machine"] in page
    assert page in capsys.readouterr().out
    assert page.count("\n| one linear of 64") == len(written["rows"]["peers"])
    for package, version in written["peers"].items():
        assert f"* {run.PEERS[package]}: {version or 'not installed'}" in page
    assert written["peers"]["peft"]


def test_a_script_that_fails_is_named_and_the_rest_is_written(run, tmp_path, capsys, monkeypatch):
    commands = []

    def fails(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 2, stderr="Traceback\nValueError: no such shape\n")

    monkeypatch.setattr(run.subprocess, "run", fails)
    arguments = ["--only", "peers", "sizes", "--device", "cuda", "--output", str(tmp_path), "--", "--rounds", "7"]
    monkeypatch.setattr(run, "machine", lambda device: f"a machine with {device}")
    assert run.main(arguments) == 1
    written = json.loads((tmp_path / "measurements.json").read_text())
    assert set(written["failed"]) == {"peers", "sizes"}
    assert "ended with 2: ['ValueError: no such shape']" in (tmp_path / "measurements.md").read_text()
    assert "no such shape" in capsys.readouterr().err
    assert all(command[-2:] == ["--rounds", "7"] and "cuda" in command for command in commands)


def test_every_script_that_is_there_takes_the_common_options(run):
    for name in run.SCRIPTS:
        file = FOLDER / f"{name}.py"
        if not file.exists():
            continue
        source = file.read_text()
        assert "from paired import" in source, name
        assert "publish(" in source, name
        options = [word for word in run.SCRIPTS[name].quick.split() if word.startswith("--") and word != "--rounds"]
        for option in options:
            assert option in source or f"{option.removeprefix('--')}=" in source or f'"{option[2:]}"' in source, (
                name,
                option,
            )

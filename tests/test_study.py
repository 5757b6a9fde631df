"""The study of learning and forgetting, small: a run, what is not run again, and the report."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[1] / "examples" / "studies" / "learning_vs_forgetting"


@pytest.fixture
def modules(monkeypatch):
    """``study.py`` and ``report.py``."""
    monkeypatch.syspath_prepend(str(STUDY))
    found = []
    for name in ("study", "report"):
        spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
        found.append(importlib.util.module_from_spec(spec))
        monkeypatch.setitem(sys.modules, name, found[-1])
        spec.loader.exec_module(found[-1])
    return found


def test_a_run_is_measured_and_reported_and_not_done_twice(modules, data_dir, tmp_path, monkeypatch, capsys):
    study, report = modules
    for name, small in (
        ("JUDGED_TOKENS", 256),
        ("ANCHOR_TOKENS", 256),
        ("PAIRS_OF_A_KIND", 1),
        ("MEASURED_EVERY", 2),
        ("TRAINED_TOKENS", 4096),
    ):
        monkeypatch.setattr(study, name, small)
    monkeypatch.setenv("LIGHTNING_PEFT_DATA", str(data_dir))
    run = study.Run("stories260k", "e2e", "LoRA r=1", 1e-2)
    study.carry_out(run, tmp_path, steps=4)
    found = json.loads(run.file(tmp_path).read_text())
    assert [point["step"] for point in found["points"]] == [0, 2, 4]
    assert report.learned(found["points"][0]) == report.forgotten(found["points"][0]) == 0  # LoRA starts as the base
    assert report.learned(found["points"][-1]) > 0

    report.write_report([run.file(tmp_path)], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| LoRA r=1 |" in text
    assert f"| {report.learned(found['points'][-1]):.3f} |" in text
    assert (tmp_path / "pareto.png").stat().st_size > 1000

    monkeypatch.setattr(study, "carry_out_all", lambda missing, *_: pytest.fail("ran again") if missing else [])
    monkeypatch.setattr(
        sys, "argv", ["study.py", "--output", str(tmp_path), "--only", "stories260k/e2e/LoRA_r1/lr=0.01"]
    )
    study.main()


def test_every_method_has_runs_and_files_of_their_own(modules):
    study, _ = modules
    runs = list(study.runs())
    assert len({run.file(Path("x")) for run in runs}) == len(runs) == len(study.STUDIES) * 24
    assert {run.method for run in runs} == set(study.METHODS)


def test_what_is_forgotten_at_a_level_is_interpolated_over_runs(modules):
    _, report = modules

    def points(*pairs):
        return {"points": [{"learning": {"mean": a}, "forgetting": {"stories": b}} for a, b in pairs]}

    runs = [points((0, 0), (1, 1), (2, 4)), points((0, 0), (2, 2))]
    assert report.least_forgotten(runs, 1.5) == 1.5
    assert report.least_forgotten(runs[:1], 1.5) == 2.5
    assert report.least_forgotten(runs, 3) is None
    assert report.best(runs) is runs[0]

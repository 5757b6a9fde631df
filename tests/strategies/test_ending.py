"""Processes that were started as scripts are waited for, and killed where they do not end."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lightning_peft import PEFTDDPStrategy, PEFTFSDPStrategy
from lightning_peft.strategies import ending
from lightning_peft.strategies.ending import end_others


@pytest.fixture
def started():
    """Return a function that starts a process, which does not outlive the test."""
    made = []

    def start(code):
        made.append(subprocess.Popen([sys.executable, "-c", code]))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


def test_a_process_that_hangs_is_killed_and_one_that_ends_is_not(started):
    hanging, ending_itself = (
        started("import time; time.sleep(600)"),
        started("import time; time.sleep(0.2); raise SystemExit(3)"),
    )
    begun = time.monotonic()
    end_others(SimpleNamespace(procs=[ending_itself, hanging]), patience=5.0)
    assert time.monotonic() - begun < 30
    assert ending_itself.returncode == 3
    assert hanging.returncode == -9


def test_other_launchers_end_their_processes_themselves():
    ended = []
    forked = SimpleNamespace(wait=lambda *args: ended.append("waited"), kill=lambda: ended.append("killed"))
    end_others(SimpleNamespace(procs=[forked]), patience=0.0)
    end_others(None)
    assert ended == []


@pytest.mark.parametrize("kind", [PEFTDDPStrategy, PEFTFSDPStrategy])
def test_a_failed_run_ends_the_others_and_an_interrupted_one_leaves_that_to_lightning(kind, started, monkeypatch):
    monkeypatch.setattr(ending, "PATIENCE", 0.1)
    strategy, hanging = kind(), started("import time; time.sleep(600)")
    strategy._launcher = SimpleNamespace(procs=[hanging])
    strategy.on_exception(KeyboardInterrupt())
    assert hanging.poll() is None
    strategy.on_exception(RuntimeError("timed out"))
    assert hanging.poll() == -9

"""That no process outlives a run that failed.

Lightning ends all processes as soon as one that it started dies. What remains is a process that hangs while the one that started it
gives up: nobody waits for it any longer.
"""

from __future__ import annotations

import subprocess
import time
from typing import Any

PATIENCE = 15.0
"""Seconds in which processes may say what went wrong with them, and end by themselves."""


def end_others(launcher: Any, patience: float | None = None) -> None:
    """Wait for the processes that ``launcher`` started as scripts, if it did, and kill those that do not end."""
    started: list[Any] = list(getattr(launcher, "procs", []))
    until = time.monotonic() + (PATIENCE if patience is None else patience)
    for process in started:
        if isinstance(process, subprocess.Popen):  # launchers of other kinds end their processes themselves
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

"""That no process outlives a run that failed.

Lightning ends all processes as soon as one that it started dies. What remains are processes that hang while the one that started them
gives up or is killed: nobody waits for them any longer.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

PATIENCE = 15.0
"""Seconds in which processes may say what went wrong with them, and end by themselves."""


def end_others(launcher: Any, patience: float | None = None) -> None:
    """Wait for the processes that ``launcher`` started as scripts, if it did, and kill those that do not end."""
    started: list[Any] = list(getattr(launcher, "procs", []))
    until = time.monotonic() + (PATIENCE if patience is None else patience)
    for process in started:
        if isinstance(process, subprocess.Popen):  # those that were forked or spawned are ended by ending_what_starts
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def ending_what_starts() -> Iterator[None]:
    """End the processes that were forked or spawned within, if they are left by an exception: an interrupt, a timeout, a failed start."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        _end([process for process in multiprocessing.active_children() if process not in before])
        raise


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    until = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if (
            process.is_alive()
        ):  # in a collective that nobody else enters, it does not hear of a signal that Python handles
            process.kill()
            process.join()


def end_with_parent() -> None:
    """Have this process, which was forked or spawned, end by itself soon after the one that started it, even if it hangs.

    On Linux torch interrupts it at once; a process that waits in a collective does not hear that.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(PATIENCE)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, name="ends with its parent", daemon=True).start()

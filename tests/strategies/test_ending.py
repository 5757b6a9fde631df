"""Processes of a run that fails, is interrupted or is killed are waited for, and killed where they do not end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTDDPStrategy, PEFTFSDPStrategy, PEFTModule
from lightning_peft.strategies import ending
from lightning_peft.strategies.ending import end_others
from lightning_peft.testing import tiny_llama, token_batch


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


class Hangs(Callback):
    """Writes the process's number, then waits for what never comes, deaf to signals that Python handles."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        (self.folder / f"{os.getpid()}.pid").touch()
        dist.barrier()
        if trainer.is_global_zero:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            time.sleep(600)
        dist.barrier()


def living(folder):
    """The processes of such a run that live: neither gone nor waiting to be buried."""
    numbers = [int(path.stem) for path in folder.glob("*.pid")]
    return [
        one for one in numbers if os.path.exists(f"/proc/{one}") and " Z " not in Path(f"/proc/{one}/stat").read_text()
    ]


@pytest.fixture
def folder(tmp_path):
    """A folder for the numbers of processes, none of which outlives the test."""
    yield tmp_path
    for number in living(tmp_path):
        os.kill(number, signal.SIGKILL)


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "that never came"
        time.sleep(0.05)


linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/stat"), reason="reads the states of processes, as Linux tells them"
)


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_interrupted_run_ends_the_processes_it_forked(forked, folder, monkeypatch):
    def interrupt(number, frame):
        raise TimeoutError

    monkeypatch.setattr(ending, "PATIENCE", 0.2)
    trainer = forked("ddp", max_steps=1, callbacks=[Hangs(folder)])
    before = signal.signal(signal.SIGUSR1, interrupt)
    main = threading.get_ident()

    def watch():
        until(lambda: len(living(folder)) == 2)
        signal.pthread_kill(main, signal.SIGUSR1)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with pytest.raises(TimeoutError):
            trainer.fit(
                PEFTModule(tiny_llama(), LoRA(rank=1)), DataLoader([token_batch(seed=0, rows=1)], batch_size=None)
            )
    finally:
        watching.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(list(folder.glob("*.pid"))) == 2
    assert living(folder) == []


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_end_when_the_one_that_started_them_is_killed(forked, folder, monkeypatch):
    monkeypatch.setattr(ending, "PATIENCE", 0.2)
    trainer = forked("ddp", max_steps=1, callbacks=[Hangs(folder)])

    def fit():
        trainer.fit(PEFTModule(tiny_llama(), LoRA(rank=1)), DataLoader([token_batch(seed=0, rows=1)], batch_size=None))

    started = multiprocessing.get_context("fork").Process(target=fit)
    started.start()
    try:
        until(lambda: len(living(folder)) == 2)
    finally:
        started.kill()
        started.join()
    until(lambda: living(folder) == [])

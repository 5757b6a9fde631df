"""Runs that are killed, by SIGKILL and at any moment, and resumed in another process, end as if nothing had happened.

A test forks a process that trains and dies, and another one that resumes; a third trains without interruption::

    straight   batch 0 1 2 3 4 5 6 7 8 9 ...                    -> tensors, optimizer, scheduler, losses: the same, bit for bit
    killed     batch 0 1 2 3 (saved) 4 5 6 KILL
    resumed                          4 5 6 7 8 9 ...            -> tensors, optimizer, scheduler, losses
"""

import contextlib
import copy
import gc
import itertools
import os
import random
import signal
import time
import traceback
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, Dataset

from lightning_peft import (
    AdaLoRA,
    AdapterCheckpoint,
    BitFit,
    Bottleneck,
    DoRA,
    LoRA,
    LoRAPlus,
    PEFTModule,
    PrefixTuning,
    VeRA,
)
from lightning_peft import adapter_files as files
from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked and killed")

BATCHES, EPOCHS = 8, 2
LONGEST = 60
"""Seconds after which a process is ended."""
METHODS = {
    "lora": LoRA(rank=2),
    "lora, dropout": LoRA(rank=2, dropout=0.3),
    "dora": DoRA(rank=2),
    "bottleneck": Bottleneck(reduction_factor=8),
    "prefix_tuning": PrefixTuning(num_virtual_tokens=2),
    "adalora": AdaLoRA(init_rank=3, target_rank=2, initial_steps=1, final_steps=1),
    "bitfit": BitFit(add_missing=True),
    "vera": VeRA(rank=4, dropout=0.1),
    "lora_plus": LoRAPlus(rank=2),
}


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    method: str
    dropout: bool = True
    """Dropout in the attention of the base."""
    loader: str = "plain"
    workers: int = 0
    accumulate: int = 1
    precision: str = "32-true"


@dataclass(frozen=True)
class Cell:
    """A run, the batch after which it is saved, and where it is killed."""

    run: Run
    saved: str
    killed: str

    def __str__(self):
        run = self.run
        dropout = "dropout" if run.dropout else "no dropout"
        return (
            f"{run.method}, {dropout}, {run.loader} loader, {run.workers} workers, accumulate {run.accumulate}, {run.precision}, "
            f"saved {self.saved}, killed {self.killed}"
        )


class Rows(Dataset):
    """Rows of tokens, one of which is drawn anew each time a row is read, where ``augment`` asks for it."""

    def __init__(self, augment):
        self.rows = torch.randint(3, 61, (2 * BATCHES, 8), generator=torch.Generator().manual_seed(5))
        self.augment = augment

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index].clone()
        if self.augment:
            row[0] = torch.randint(3, 61, ()) if random.random() < 0.5 else int(np.random.randint(3, 61))
        return row


def make_loader(run):
    # Random numbers that workers draw are those of the uninterrupted run only if the batches before are loaded again.
    rows = Rows(augment=run.loader in ("plain", "generator") or not run.workers)
    how = {"batch_size": 2, "num_workers": run.workers}
    if run.loader == "resumable":
        return ResumableDataLoader(rows, sampler=ResumableSampler(rows, seed=3), **how)
    if run.loader == "torchdata":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(rows, shuffle=True, **how)
    if run.loader == "generator":
        how["generator"] = torch.Generator().manual_seed(7)
    return DataLoader(rows, shuffle=True, **how)


class Losses(Callback):
    """Writes the loss of every batch to a file, in full."""

    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with self.file.open("a") as file:
            file.write(f"{trainer.fit_loop.total_batch_idx} {float(trainer.callback_metrics['train_loss']).hex()}\n")


class SaveAfter(Callback):
    """Saves after one batch, wherever in a window of accumulated gradients that is."""

    def __init__(self, batch, file):
        self.batch, self.file = batch, file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.file)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(Callback):
    """Kills the process at one batch: as it starts, or in the midst of its forward, its backward or what follows."""

    def __init__(self, batch, where):
        self.batch, self.where = batch, where

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 < self.batch:
            return
        if self.where == "between batches":
            die()
        elif self.where == "in forward":
            pl_module.model.model.layers[1].register_forward_hook(die)
        elif self.where == "in backward":
            next(p for p in pl_module.parameters() if p.requires_grad).register_hook(die)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.where == "after the step" and trainer.fit_loop.total_batch_idx >= self.batch:
            die()


def die_in_writing(count):
    """Let the process die halfway through the writing of the ``count``-th checkpoint."""
    fdopen, seen = os.fdopen, []

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            die()

    def opened(handle, *args):
        seen.append(os.readlink(f"/proc/self/fd/{handle}"))
        whole = fdopen(handle, *args)
        return Half(whole) if sum(".last.ckpt." in name for name in seen) == count else whole

    files.os.fdopen = opened


def in_a_process(work, log):
    """Start a process that does ``work``, and return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside the threads of a test runner
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgid(0, 0)  # with its workers, which outlive a kill by seconds
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LONGEST)
        gc.disable()  # it would touch, and so copy, the memory shared with the parent
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded")
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 calls it
        work()
        status = 0
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(status)


def end_of(child, log):
    try:
        _, status = os.waitpid(child, 0)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert status == 0, log.read_text()
    return 0


@pytest.fixture(scope="module")
def train(llama_dir, make_trainer, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(llama_dir)

    def run(what, root, *, seed=1, callbacks=(), ckpt_path=None):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        base = copy.deepcopy(llama)
        for layer in base.model.layers:
            layer.self_attn.attention_dropout = 0.2 if what.dropout else 0.0
        module = PEFTModule(
            base,
            METHODS[what.method],
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        )
        with torch.random.fork_rng():  # the same adapters whatever the seed: runs differ in their random states alone
            torch.manual_seed(0)
            module.configure_model()
        fp16 = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3))
        trainer = make_trainer(
            root,
            max_epochs=EPOCHS,
            limit_val_batches=0,
            accumulate_grad_batches=what.accumulate,
            callbacks=[Losses(root / f"losses-{os.getpid()}"), *callbacks],
            **({"plugins": [fp16]} if what.precision == "16-mixed" else {"precision": what.precision}),
        )
        trainer.fit(module, make_loader(what), ckpt_path=ckpt_path)
        end = {
            "tensors": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "steps": trainer.global_step,
            "scaler": trainer.precision_plugin.state_dict(),
        }
        torch.save(end, root / f"end-{os.getpid()}")

    root = tmp_path_factory.mktemp("warm")  # what is imported here need not be imported in every process
    run(RUNS[0], root, callbacks=[AdapterCheckpoint(root)])
    return run


def outcome(root, child):
    losses = dict(line.split() for line in (root / f"losses-{child}").read_text().splitlines())
    end = root / f"end-{child}"
    return (torch.load(end) if end.exists() else None), losses


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """The end and the losses of a run that nothing interrupts and nothing saves."""
    known = {}

    def get(run):
        if run not in known:
            root = tmp_path_factory.mktemp("straight")
            child = in_a_process(lambda: train(run, root), root / "log")
            assert end_of(child, root / "log") == 0
            known[run] = outcome(root, child)
        return known[run]

    return get


def saving(cell, root):
    if cell.saved == "within a window":
        return [AdapterCheckpoint(root, save_top_k=0), SaveAfter(4, root / "last.ckpt")]
    every = {"every_n_train_steps": 5 if cell.run.accumulate == 1 else 2} if cell.saved == "within an epoch" else {}
    return [AdapterCheckpoint(root, save_last=True, **every)]


KILLS = ["between batches", "in forward", "in backward", "after the step"]
RUNS = [
    Run(*values)
    for values in [
        # method, dropout, loader, workers, accumulate, precision
        ("lora, dropout", True, "plain", 0, 1, "32-true"),
        ("dora", False, "resumable", 0, 1, "bf16-mixed"),
        ("adalora", True, "plain", 2, 1, "32-true"),
        ("vera", True, "torchdata", 2, 1, "bf16-mixed"),
        ("bottleneck", False, "generator", 0, 3, "32-true"),
        ("prefix_tuning", True, "torchdata", 0, 3, "bf16-mixed"),
        ("lora", False, "generator", 2, 3, "32-true"),
        ("lora, dropout", True, "plain", 2, 3, "bf16-mixed"),
        ("lora_plus", True, "resumable", 0, 3, "16-mixed"),
        ("bitfit", True, "resumable", 2, 3, "32-true"),
    ]
]


def cells():
    kills = itertools.cycle(KILLS)
    for run in RUNS:
        for saved in (
            "within an epoch",
            "at the end of an epoch",
            *(["within a window"] if run.accumulate > 1 else []),
        ):
            yield Cell(run, saved, next(kills))
    for run in (RUNS[0], RUNS[3], RUNS[5], RUNS[7]):
        yield Cell(run, "within an epoch", "while it saves")
        yield Cell(run, "within an epoch", "from outside")


CELLS = list(cells())


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_killed_run_resumes_bit_for_bit(cell, train, straight, tmp_path):
    if cell.run.loader == "torchdata":  # here, as a process that is forked cannot skip
        pytest.importorskip("torchdata.stateful_dataloader", reason="needs the StatefulDataLoader of torchdata")
    end, losses = straight(cell.run)
    chance = random.Random(str(cell))
    at = chance.randint(BATCHES + 1, BATCHES * EPOCHS - 1) if "end" in cell.saved else chance.randint(9, 15)
    log = tmp_path / "log"

    def first():
        callbacks = saving(cell, tmp_path)
        if cell.killed == "while it saves":
            die_in_writing(2)
        elif cell.killed != "from outside":
            callbacks.append(Kill(at, cell.killed))
        train(cell.run, tmp_path, callbacks=callbacks)

    killed = in_a_process(first, log)
    if cell.killed == "from outside":
        while (
            not (tmp_path / "last.ckpt").exists()
            and os.waitid(os.P_PID, killed, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        os.kill(killed, signal.SIGKILL)
    assert end_of(killed, log) == signal.SIGKILL
    if cell.killed == "while it saves":
        assert len(list(tmp_path.glob(".last.ckpt.*.tmp"))) == 1
    done = torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"][
        "total"
    ]

    again = replace(cell, killed="not")
    resuming = tmp_path / "last.ckpt" if cell.saved == "within a window" else "last"
    resumed = in_a_process(
        lambda: train(cell.run, tmp_path, seed=99, callbacks=saving(again, tmp_path), ckpt_path=resuming), log
    )
    assert end_of(resumed, log) == 0
    resumed_end, resumed_losses = outcome(tmp_path, resumed)
    assert min(map(int, resumed_losses)) == done["ready"]
    assert 0 < len(resumed_losses) < len(losses)
    assert resumed_losses == {batch: losses[batch] for batch in resumed_losses}
    before = outcome(tmp_path, killed)[1]
    assert before == {batch: losses[batch] for batch in before}
    assert losses.keys() == before.keys() | resumed_losses.keys()
    torch.testing.assert_close(resumed_end, end, rtol=0, atol=0)

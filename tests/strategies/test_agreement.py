"""Processes that are about to train different things all say so, and a process that dies or hangs ends the others."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import lightning_peft.strategies.agreement as agreement
from lightning_peft import Bottleneck, LoRA, PEFTDDPStrategy, PEFTFSDPStrategy, PEFTMixin, VeRA, inject
from lightning_peft.errors import ConfigError
from lightning_peft.sharded_tensors import gathered
from lightning_peft.testing import tiny_llama

BOUND = 60
"""Seconds after which a run that does not end counts as hanging, on a machine that does other work too."""


class Agreed(PEFTMixin, LightningModule):
    """A module whose process says what it makes."""

    def __init__(self, make):
        super().__init__()
        self.model, self.make = None, make

    def configure_model(self):
        if self.model is None:
            self.model = tiny_llama().train()
            self.make(self.model, self.trainer.global_rank)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def method(model, rank):
    inject(model, [LoRA(rank=4), Bottleneck()][rank])


def size(model, rank):
    inject(model, LoRA(rank=[4, 8][rank]))


def places(model, rank):
    inject(model, LoRA(rank=4), [["query", "value"], ["query", "key"]][rank])


def base(model, rank):
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(rank)
    inject(model, LoRA(rank=4))


def name(model, rank):
    inject(model, LoRA(rank=4), name=["one", "two"][rank])


def unfrozen(model, rank):
    inject(model, LoRA(rank=4))
    model.model.norm.weight.requires_grad_(rank == 1)


def version(model, rank):
    real = agreement._version
    agreement._version = lambda package: "0.0.7" if rank == 1 and package == "transformers" else real(package)
    inject(model, LoRA(rank=4))


DIFFERENCES = {
    method: (r"method of 'default': rank 0 has .*lora.*, rank 1 has .*bottleneck",),
    size: (
        r"method of 'default': rank 0 has .*'rank': 4.*, rank 1 has .*'rank': 8",
        r"lora_A.*: rank 0 has .*4, 64.*, rank 1 has .*8, 64",
    ),
    places: (r"places of 'default': rank 0 has .*v_proj.* beside what all have, rank 1 has .*k_proj",),
    base: (r"1 points differ\. base of model 0: rank 0 has .*, rank 1 has",),
    name: (r"method of 'one': rank 0 has .*lora.*, rank 1 has None",),
    unfrozen: (r"trained parameter model\.model\.norm\.weight: rank 0 has None, rank 1 has .*64",),
    version: (r"1 points differ\. version of transformers: rank 0 has .*, rank 1 has '0\.0\.7'",),
}


def telling(kind, folder):
    """Return a strategy that writes what each process says when it refuses."""
    parent = {"ddp": PEFTDDPStrategy, "fsdp": PEFTFSDPStrategy}[kind]

    class Telling(parent):
        def setup(self, trainer):
            try:
                super().setup(trainer)
            except ConfigError as error:
                (folder / str(self.global_rank)).write_text(str(error))
                dist.barrier()
                raise

    return Telling(start_method="fork", timeout=timedelta(seconds=BOUND))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("make", DIFFERENCES, ids=lambda make: make.__name__)
def test_every_process_says_who_differs(run, tmp_path, make, kind):
    begun = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="the 2 processes are about to train different things"):
        run(telling(kind, tmp_path), module=Agreed(make))
    assert time.monotonic() - begun < BOUND
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert said[0] == said[1]
    for message in DIFFERENCES[make]:
        assert re.search(message, said[0]), said[0]


# -- what is drawn at random -------------------------------------------------------------------------------------------


def unseeded(model, rank):
    torch.manual_seed(rank + 5)
    inject(model, LoRA(rank=4, init="gaussian"))
    inject(model, VeRA(rank=4), name="vera")


class Values(Callback):
    """Writes a digest of what each process holds before it trains."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, module):
        whole = gathered(dict(module.state_dict()), keep=True)
        torch.save({name: value.clone() for name, value in whole.items()}, self.folder / f"values{trainer.global_rank}")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_values_drawn_with_other_seeds_are_those_of_the_first_process(run, tmp_path, kind):
    run(kind, module=Agreed(unseeded), steps=1, callbacks=[Values(tmp_path)])
    first, second = (torch.load(tmp_path / f"values{rank}") for rank in range(2))
    model = tiny_llama()
    unseeded(model, 0)
    alone = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert {name.rpartition(".")[2] for name in first} >= {"lora_A", "lora_B"}
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, alone[name]), name


# -- processes that die or hang ----------------------------------------------------------------------------------------


class Trouble(Callback):
    """Ends or stops the second process in the midst of training, and notes who ran."""

    def __init__(self, folder, what):
        self.folder, self.what = folder, what

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        (self.folder / f"pid{os.getpid()}").touch()
        if trainer.global_rank == 1 and batch_idx == 2:
            self.what()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def raises():
    raise RuntimeError("the second process has had enough")


def hangs():
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # Lightning's handler waits for the other process, which is gone by then
    time.sleep(10 * BOUND)


def nobody_is_left(folder):
    pids = [int(path.name.removeprefix("pid")) for path in Path(folder).glob("pid*")]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("what", [killed, raises], ids=lambda what: what.__name__)
def test_a_process_that_dies_ends_the_run(run, tmp_path, kind, what):
    begun = time.monotonic()
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run(kind, callbacks=[Trouble(tmp_path, what)])
    assert time.monotonic() - begun < BOUND
    nobody_is_left(tmp_path)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_that_hangs_ends_the_run_after_the_timeout(run, tmp_path, kind):
    strategy = {"ddp": PEFTDDPStrategy, "fsdp": PEFTFSDPStrategy}[kind]
    begun = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="(?i)timed out|timeout"):
        run(strategy(start_method="fork", timeout=timedelta(seconds=3)), callbacks=[Trouble(tmp_path, hangs)])
    assert time.monotonic() - begun < BOUND
    nobody_is_left(tmp_path)


class Timeouts(Callback):
    """Writes how long each group of processes waits."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, module):
        mesh = getattr(trainer.strategy, "device_mesh", None)
        groups = [dist.group.WORLD, *([mesh.get_group("replicate"), mesh.get_group("shard")] if mesh else [])]
        waits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
        if trainer.is_global_zero:
            torch.save((waits, [dist.get_world_size(group) for group in groups]), self.path)


def test_groups_within_groups_wait_no_longer(run, tmp_path):
    strategy = PEFTFSDPStrategy(start_method="fork", replicate=2, timeout=timedelta(seconds=77))
    run(strategy, devices=4, steps=1, callbacks=[Timeouts(tmp_path / "waits")])
    assert torch.load(tmp_path / "waits") == ([77.0] * 3, [4, 2, 2])


def test_the_group_of_all_waits_as_long_as_it_is_told(run, tmp_path):
    told = PEFTDDPStrategy(start_method="fork", timeout=timedelta(seconds=77))
    run(told, steps=1, callbacks=[Timeouts(tmp_path / "waits")])
    assert torch.load(tmp_path / "waits") == ([77.0], [2])
    for strategy in (PEFTDDPStrategy(), PEFTFSDPStrategy()):
        assert strategy._timeout == timedelta(minutes=30)  # as the page says

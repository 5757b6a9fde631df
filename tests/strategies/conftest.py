"""Runs of a Trainer with any strategy, whose processes are forked: a run of two takes about a second."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, Sampler

from lightning_peft import AdapterCheckpoint, LoRA, PEFTModule
from lightning_peft.sharded_tensors import gathered
from lightning_peft.strategies.ddp import PEFTDDPStrategy
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy
from lightning_peft.testing import tiny_llama, token_batch

STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: PEFTDDPStrategy(start_method="fork"),
    "fsdp": lambda: PEFTFSDPStrategy(start_method="fork"),
    "fsdp folder": lambda: PEFTFSDPStrategy(start_method="fork", save_distributed_checkpoint=True),
    "tensor": lambda: PEFTFSDPStrategy(start_method="fork", tensor_parallel=2),
    "tensor folder": lambda: PEFTFSDPStrategy(start_method="fork", tensor_parallel=2, save_distributed_checkpoint=True),
}


class InTurn(Sampler):
    """Rows r, r + world, ... to rank r, in order: the batches of all ranks are those of one process.

    ``each`` ranks side by side get the same rows, where they share a model.
    """

    def __init__(self, rows, each=1):
        self.rows, self.each = rows, each

    def __iter__(self):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, self.each)
        return iter(range(rank // self.each, self.rows, world // self.each))

    def __len__(self):
        return self.rows // ((dist.get_world_size() if dist.is_initialized() else self.each) // self.each)


class InParts(Sampler):
    """For one process, a batch at a time the rows that each of so many processes would have of it."""

    def __init__(self, rows, batch, parts):
        self.rows, self.batch, self.parts = rows, batch, parts

    def __iter__(self):
        starts = range(0, self.rows, self.batch)
        return iter([row for start in starts for part in range(self.parts) for row in self.of(start, part)])

    def of(self, start, part):
        return range(start + part, start + self.batch, self.parts)

    def __len__(self):
        return self.rows


class Losses(Callback):
    """Writes the mean of the losses of all processes for each batch, and the state of the module at the end, whole."""

    def __init__(self, path):
        self.path, self.losses = path, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone() * trainer.accumulate_grad_batches
        self.losses.append(float(trainer.strategy.reduce(loss)))

    def on_train_end(self, trainer, module):
        state = gathered(
            dict(module.state_dict()), keep=True
        )  # a process that started others has no model to look into
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.losses))
            torch.save({key: value.detach().clone() for key, value in state.items()}, self.path.with_suffix(".pt"))


@dataclass
class Run:
    """What a run was and gave."""

    losses: list[float] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    module: Any = None
    trainer: Any = None


@pytest.fixture
def run(tmp_path):
    """Return a function that trains and returns what came of it."""
    count = [0]

    def fit(
        strategy="single",
        *,
        parts=1,
        method=None,
        model=tiny_llama,
        devices=None,
        steps=4,
        module=None,
        rows=8,
        batches=8,
        resume=None,
        callbacks=(),
        save=None,
        fields=None,
        lr=1e-2,
        val=None,
        data=None,
        shuffle=False,
        **trainer_fields,
    ):
        chosen = STRATEGIES[strategy]() if isinstance(strategy, str) else strategy
        devices = devices or (1 if strategy == "single" else 2)
        seed_everything(0)
        if module is None:
            module = PEFTModule(
                model(),
                method or LoRA(rank=4, init="gaussian"),
                optimizer=lambda p: torch.optim.AdamW(p, lr=lr),
                **(fields or {}),
            )
        data = data or [
            {**{key: value[row] for key, value in batch.items()}, "labels": batch["input_ids"][row]}
            for batch in (token_batch(seed=number, rows=rows) for number in range(batches))
            for row in range(rows)
        ]
        each = getattr(chosen, "tensor_parallel", 1)
        order = {"shuffle": True} if shuffle else {"sampler": InTurn(len(data), each)}
        if parts > 1:
            order = {"sampler": InParts(len(data), rows, parts)}
            trainer_fields["accumulate_grad_batches"] = parts * trainer_fields.get("accumulate_grad_batches", 1)
        loader = DataLoader(data, batch_size=rows // (devices // each) // parts, **order)
        count[0] += 1
        losses = tmp_path / f"losses{count[0]}.json"
        used = [Losses(losses), *callbacks]
        if save is not None or resume is not None:
            folder = save or tmp_path / f"saved{count[0]}"
            used.append(AdapterCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1))
        trainer = Trainer(
            **{
                "accelerator": "cpu", "devices": devices, "strategy": chosen, "max_steps": steps, "logger": False, "callbacks": used,
                "enable_checkpointing": save is not None or resume is not None, "enable_progress_bar": False, "enable_model_summary": False,
                "use_distributed_sampler": shuffle, **trainer_fields,
            }
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside the threads of a test runner
            warnings.filterwarnings("ignore", message=".*os.fork.*")
            warnings.filterwarnings("ignore", message="The dirpath has changed")  # a resumed run writes elsewhere
            trainer.fit(module, loader, val, ckpt_path=resume)
        kept = json.loads(Path(losses).read_text())
        if parts > 1:
            kept = torch.tensor(kept).view(-1, parts).mean(1).tolist()  # in float32, as processes average
        return Run(kept, torch.load(losses.with_suffix(".pt")), module, trainer)

    return fit


@pytest.fixture
def in_turn():
    """Return the sampler that deals rows out to processes in turn."""
    return InTurn


@pytest.fixture
def forked(tmp_path):
    """Return a function that makes a Trainer of two forked processes."""

    def make(strategy, **fields):
        chosen = STRATEGIES[strategy]() if isinstance(strategy, str) else strategy
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Trainer(accelerator="cpu", strategy=chosen, **{"devices": 2, **quiet, **fields})

    return make

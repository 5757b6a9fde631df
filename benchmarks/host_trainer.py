"""What the hooks and callbacks of the library add to a step of the Trainer.

One run goes on with and without them: before each step the module becomes one of the class of the arm, and the Trainer gets its callbacks.
So the arms are a millisecond apart, and the median over some thousand steps tells some microseconds.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from paired import AGAIN, Row, judged
from torch import nn

from lightning_peft import LoRA, PEFTMixin, PEFTModule, ResourceMonitor, inject

WARM_UP = 50
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))


class Plain(LightningModule):
    """What a user writes without the library, around the same adapted model."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Mixed(PEFTMixin, Plain):
    """The same with the hooks of the mixin."""


class Logging(LightningModule):
    """A module like :class:`PEFTModule`, without its hooks."""

    def forward(self, x: Any) -> Any:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(self(*batch[:-1]), batch[-1])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch[-1]))
        return loss


class Alternating:
    """A loader that makes the module what the arm of the next step is."""

    def __init__(self, arms: dict[str, tuple[type, list[Any]]], rounds: int) -> None:
        self.arms, self.rounds = arms, rounds
        self.times: dict[str, list[float]] = {name: [] for name in arms}
        self.module: Any = None
        self.trainer: Any = None
        self.batch = [torch.randn(8, 16), torch.randint(0, 2, (8,))]

    def __len__(self) -> int:
        return (self.rounds + WARM_UP) * len(self.arms) + 1  # the last step ends when the next batch is asked for

    def __iter__(self) -> Iterator[Any]:
        own = self.trainer.callbacks
        for number in range(self.rounds + WARM_UP):
            for name in random.sample(list(self.arms), len(self.arms)):
                kind, callbacks = self.arms[name]
                self.module.__class__, self.trainer.callbacks = kind, [*own, *callbacks]
                start = time.process_time()
                yield self.batch
                taken = time.process_time() - start
                if number >= WARM_UP:
                    self.times[name].append(taken)
        yield self.batch


def measured(case: str, module: Any, arms: dict[str, tuple[type, list[Any]]], rounds: int) -> list[Row]:
    first, *_ = arms
    loader = Alternating({first: arms[first], f"{first} {AGAIN}": arms[first], **arms}, rounds)
    loader.module = module
    loader.trainer = Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=50, **QUIET)
    loader.trainer.fit(module, loader)
    return judged(case, loader.times)


def trainer_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The median is that of one step, and the same for all arms but for what they add."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    plain = Mixed()
    plain.model = net()
    inject(plain.model, LoRA(rank=2), ["0"])
    monitor = ResourceMonitor()
    arms = {
        "Trainer": (Plain, []),
        "Trainer, PEFTMixin": (Mixed, []),
        "Trainer, PEFTMixin, ResourceMonitor": (Mixed, [monitor]),
        "Trainer, a callback that does nothing": (Plain, [Callback()]),
    }
    yield from measured("a step of a tiny linear", plain, arms, args.steps)
    whole = PEFTModule(net(), LoRA(rank=2), ["0"], loss=nn.functional.cross_entropy)
    whole.configure_callbacks = list
    logged = {
        "Trainer, the loss logged": (Logging, []),
        "Trainer, PEFTModule": (PEFTModule, []),
        "Trainer, PEFTModule, ResourceMonitor": (PEFTModule, [monitor]),
    }
    yield from measured("a step of a tiny linear, the loss logged", whole, logged, args.steps)

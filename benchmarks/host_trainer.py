"""What the hooks and callbacks of the library add to a step of the Trainer: the same run with and without them."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from paired import Row, compare
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PEFTMixin, PEFTModule, ResourceMonitor, inject


class Watch(Callback):
    """Notes the CPU time a step takes, once the first hundred are over."""

    def __init__(self, steps: int) -> None:
        self.first, self.steps, self.found = 100, steps, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.found = time.process_time()
        elif batch_idx == self.first + self.steps:
            self.found = (time.process_time() - self.found) / self.steps


def adapted() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    inject(net, LoRA(rank=2), ["0"])
    return net


class Plain(LightningModule):
    """What a user writes without the library, around the same adapted model."""

    logs = False

    def __init__(self) -> None:
        super().__init__()
        self.model = adapted()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        if self.logs:
            self.log("train_loss", loss, prog_bar=True, batch_size=len(y))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Logging(Plain):
    logs = True


class Mixed(PEFTMixin, Plain):
    """The same with the hooks of the mixin."""


def whole() -> LightningModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    return PEFTModule(net, LoRA(rank=2), ["0"], loss=nn.functional.cross_entropy)


def step(make: Callable[[], LightningModule], steps: int, callbacks: Callable[[], list[Callback]]) -> Callable[[], float]:
    data = TensorDataset(torch.randn(8 * (steps + 110), 16), torch.randint(0, 2, (8 * (steps + 110),)))

    def run() -> float:
        watch = Watch(steps)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[watch, *callbacks()], log_every_n_steps=50, **quiet
        )
        trainer.fit(make(), DataLoader(data, batch_size=8))
        return watch.found

    return run


def trainer_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The median is that of one step; both kinds of module log where the one beside them does."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def clock(arm: Callable[[], float]) -> float:
        return arm()

    alone = {
        "Trainer": step(Plain, args.steps, list),
        "Trainer, PEFTMixin": step(Mixed, args.steps, list),
        "Trainer, PEFTMixin, ResourceMonitor": step(Mixed, args.steps, lambda: [ResourceMonitor()]),
    }
    yield from compare("a step of a tiny linear", alone, rounds=args.rounds, clock=clock)
    logged = {
        "Trainer, a module that logs its loss": step(Logging, args.steps, list),
        "Trainer, PEFTModule (its ResourceMonitor too)": step(whole, args.steps, list),
    }
    yield from compare("a step of a tiny linear, logged", logged, rounds=args.rounds, clock=clock)

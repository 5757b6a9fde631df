"""A population of small members on a small Llama, and the run that a member would have alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import PEFTModule
from lightning_peft.testing.toys import tiny_llama, token_batch


def rows(count: int = 24, length: int = 10) -> list[dict[str, Any]]:
    """Rows of which some tokens have no label, in numbers that differ."""
    ids = token_batch(seed=3, rows=count, length=length)["input_ids"] % 16
    labels = ids.clone()
    for row in range(count):
        labels[row, : row % 5] = -100
    return [{"input_ids": one, "labels": label} for one, label in zip(ids, labels, strict=True)]


def loaders(batch_size: int = 3) -> tuple[DataLoader, DataLoader]:
    return DataLoader(rows(), batch_size=batch_size), DataLoader(rows(7), batch_size=3)


@pytest.fixture
def make_loaders():
    return loaders


@pytest.fixture
def adapter_tensors():
    return tensors


def tensors(module: Any, name: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of the adapter ``name``, or of all, by place."""
    return {
        key.replace(".base_layer", "").replace(f".adapters.{name}.", ".adapters.X."): value.detach().clone()
        for key, value in module.state_dict().items()
        if name is None or f".adapters.{name}." in key
    }


@pytest.fixture
def solo(make_trainer, tmp_path):
    """Train a member alone, with PEFTModule, under its seed: ``solo(member, optimizer=..., **trainer options)``."""

    def run(member: Any, *, module_options: dict[str, Any], batch_size: int = 3, **options: Any) -> PEFTModule:
        optimizer = member.optimizer or module_options["optimizer"]
        given = dict(module_options)
        given["optimizer"] = lambda groups: _with_lr(optimizer, groups, member.lr)
        if member.lr_scheduler is not None:
            given["lr_scheduler"] = member.lr_scheduler
        if member.lr_interval is not None:
            given["lr_interval"] = member.lr_interval
        if member.gradient_clip_val is not None:
            options["gradient_clip_val"] = member.gradient_clip_val
        if member.seed is not None:
            torch.manual_seed(member.seed)
        module = PEFTModule(
            tiny_llama(),
            member.method,
            member.targets,
            modules_to_save=member.modules_to_save,
            name=member.name,
            **given,
        )
        make_trainer(tmp_path / "solo", **options).fit(module, *loaders(batch_size))
        return module

    return run


def _with_lr(make: Any, groups: Any, lr: float | None) -> Any:
    optimizer = make(groups)
    for group in optimizer.param_groups if lr is not None else ():
        group["lr"] = lr
    return optimizer

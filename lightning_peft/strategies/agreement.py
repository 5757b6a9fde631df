"""That all processes train the same thing, found out before the first step.

Processes that disagree on a method, a rank or a place wait for each other for ever, or average gradients of different matrices. Each
sends what it is about to train, and each gets to know who differs.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy

from lightning_peft.errors import ConfigError
from lightning_peft.fingerprint import to_json
from lightning_peft.injection import adapted_roots, records


def check_agreement(strategy: ParallelStrategy, module: LightningModule) -> None:
    """Compare what the processes are about to train.

    Raises:
        ConfigError: they differ, on every process, with what differs and where.
    """
    if strategy.world_size < 2 or not dist.is_initialized():
        return
    everybody: list[Any] = [None] * strategy.world_size
    dist.all_gather_object(everybody, statement(module))
    differing = {
        key: {rank: one.get(key) for rank, one in enumerate(everybody)}
        for key in sorted({key for one in everybody for key in one})
        if len({repr(one.get(key)) for one in everybody}) > 1
    }
    if differing:
        shown = "; ".join(
            f"{key}: " + ", ".join(f"rank {rank} has {value!r}" for rank, value in by_rank.items())
            for key, by_rank in list(differing.items())[:4]
        )
        raise ConfigError(
            f"the {strategy.world_size} processes are about to train different things; {len(differing)} points differ. {shown}. Give all "
            "of them the same configuration, seeds for what is drawn at random, and the same installed versions"
        )


def statement(module: LightningModule) -> dict[str, Any]:
    """Return what a process is about to train, as plain values: methods and their fields, places, base, shapes, and versions."""
    found: dict[str, Any] = {
        f"version of {name}": _version(name) for name in ("lightning_peft", "torch", "lightning", "transformers")
    }
    for number, root in enumerate(adapted_roots(module)):
        found[f"base of model {number}"] = to_json(root)
        for name, injection in records(root).items():
            found[f"method of {name!r}"] = f"{injection.method.name} {injection.method.to_config()}"
            found[f"places of {name!r}"] = sorted(target.path for target in injection.targets)
    trained = {name: (list(p.shape), str(p.dtype)) for name, p in module.named_parameters() if p.requires_grad}
    found.update({f"trained parameter {name}": shape for name, shape in trained.items()})
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""That all processes train the same thing, found out before the first step.

Processes that disagree on a method, a rank or a place wait for each other for ever, or average gradients of different matrices. Each
sends what it is about to train, and each gets to know who differs. Values that were drawn at random are those of the first process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_peft.adapter_layer import AdapterLayer
from lightning_peft.errors import ConfigError
from lightning_peft.fingerprint import to_json
from lightning_peft.injection import adapted_roots, records
from lightning_peft.strategies.buffers import moving_buffers

_SHOWN = 4


def check_agreement(strategy: ParallelStrategy, module: LightningModule) -> None:
    """Compare what the processes are about to train.

    Raises:
        ConfigError: they differ, on every process, with what differs and where.
    """
    if strategy.world_size < 2 or not dist.is_initialized():
        return
    everybody: list[Any] = [None] * strategy.world_size
    dist.all_gather_object(everybody, statement(module))
    keys = dict.fromkeys(key for one in everybody for key in one)
    differing = {key: [one.get(key) for one in everybody] for key in keys}
    differing = {key: values for key, values in differing.items() if len(set(map(repr, values))) > 1}
    if differing:
        shown = "; ".join(f"{key}: {_sides(values)}" for key, values in list(differing.items())[:_SHOWN])
        raise ConfigError(
            f"the {strategy.world_size} processes are about to train different things; {len(differing)} points differ. {shown}. Give all "
            "of them the same configuration, the same base, and the same installed versions"
        )


def _sides(values: Sequence[Any]) -> str:
    """Say who has what: of lists only what not all have."""
    common = set.intersection(*(set(v) for v in values)) if all(isinstance(v, list) for v in values) else set()
    sides: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        own = [one for one in value if one not in common] if common else value
        sides.setdefault(repr(own), []).append(rank)
    beside = " beside what all have" if common else ""
    return ", ".join(f"{_ranks(ranks)} {value}{beside}" for value, ranks in sides.items())


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    return f"ranks {', '.join(map(str, ranks[:_SHOWN]))}{' and others' if len(ranks) > _SHOWN else ''} have"


def statement(module: LightningModule) -> dict[str, Any]:
    """Return what a process is about to train, as plain values: methods and their fields, places, base, shapes, and versions."""
    found: dict[str, Any] = {}
    for number, root in enumerate(adapted_roots(module)):
        for name, injection in records(root).items():
            found[f"method of {name!r}"] = f"{injection.method.name} {injection.method.to_config()}"
            found[f"places of {name!r}"] = sorted(target.path for target in injection.targets)
        found[f"base of model {number}"] = to_json(root)["digest"]
    for name in ("lightning_peft", "torch", "lightning", "transformers"):
        found[f"version of {name}"] = _version(name)
    trained = {name: (list(p.shape), str(p.dtype)) for name, p in module.named_parameters() if p.requires_grad}
    found.update({f"trained parameter {name}": shape for name, shape in trained.items()})
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@torch.no_grad()
def share_values(strategy: ParallelStrategy, module: LightningModule) -> None:
    """Give all processes what is trained, and what adapters hold, as the first process has it.

    Processes that were seeded differently, or not at all, draw different initial values.
    """
    if strategy.world_size < 2 or not dist.is_initialized():
        return
    for tensor in _drawn(module):
        here = tensor.detach().to(strategy.root_device).contiguous()
        dist.broadcast(here, src=0)
        tensor.copy_(here)


def _drawn(module: LightningModule) -> Iterator[Tensor]:
    """Yield the tensors of ``module`` that may have been drawn at random, each once; none that is sharded or has no values yet."""
    found: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found += moving_buffers(module)
    for layer in module.modules():
        if isinstance(layer, AdapterLayer):
            found += [*layer.adapters.parameters(), *layer.adapters.buffers()]
    for tensor in {id(tensor): tensor for tensor in found}.values():
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            yield tensor

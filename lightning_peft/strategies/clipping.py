"""The norm of gradients, the same bits however they are spread over processes.

torch rounds a norm for each parameter, and under FSDP2 for each part of one: norms of different layouts differ in their last digits, and so
do all weights after the step. Here powers are summed in float64, over processes too, and the norm is rounded once::

    rank 0   Σ |g|ᵖ of its parts ─┐
    rank 1   Σ |g|ᵖ of its parts ─┴─ Σ in float64 ─▶ the p-th root ─▶ float32

A square of a float32 is exact in float64, and what is lost in the sum is some 2⁻⁵³ of it, far below what float32 shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_peft.errors import ConfigError

_PIECE = 1 << 22
"""So many elements are held in float64 at a time."""


@torch.no_grad()
def gradient_norm(parameters: Tensor | Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of the gradients of all ``parameters`` as one vector: a scalar in float32, the same on every process.

    Of sharded parameters all processes that hold parts must ask. Gradients that are not sharded are taken to be the same everywhere, as
    they are under DDP once they are reduced.

    Args:
        parameters: those without a gradient do not count.
        norm_type: the power; ``inf`` for the largest magnitude.

    Raises:
        ConfigError: ``norm_type`` is not positive, or a gradient is a sum whose parts processes still hold.
    """
    power = float(norm_type)
    if not power > 0:
        raise ConfigError(f"norm_type must be positive or inf, got {norm_type!r}")
    of_layouts: dict[tuple[Any, ...], Tensor] = {}
    for gradient in _gradients(parameters):
        local, groups = _part(gradient)
        here = _powers(local, power)
        before = of_layouts.get(groups)
        of_layouts[groups] = here if before is None else _joined(torch.stack([before, here]), power)
    device = next(iter(of_layouts.values())).device if of_layouts else torch.device("cpu")
    totals = [torch.zeros((), dtype=torch.float64, device=device)]
    for groups, value in of_layouts.items():
        for group in groups:
            dist.all_reduce(value, dist.ReduceOp.MAX if math.isinf(power) else dist.ReduceOp.SUM, group=group)
        totals.append(value.to(device))
    total = _joined(torch.stack(totals), power)
    return (total if math.isinf(power) else total.pow(1 / power)).float()


@torch.no_grad()
def clip_gradients_by_norm(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale the gradients of ``parameters`` so that their norm is ``max_norm`` at most, and return the norm they had.

    It is ``torch.nn.utils.clip_grad_norm_`` with :func:`gradient_norm`: the same bits under DDP and FSDP2. ``peft_ddp`` and ``peft_fsdp``
    clip with it for ``Trainer(gradient_clip_val=...)``.

    Raises:
        ConfigError: as for :func:`gradient_norm`.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = gradient_norm(parameters, norm_type)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in _gradients(parameters):
        local, _ = _part(gradient)
        local.mul_(factor.to(local.device))
    return norm


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _part(gradient: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """Return what this process holds of a gradient, and the groups of processes that hold the other parts."""
    if not isinstance(gradient, DTensor):
        return gradient, ()
    if any(placement.is_partial() for placement in gradient.placements):
        raise ConfigError(f"a gradient {list(gradient.shape)} is not summed over processes yet: {gradient.placements}")
    mesh: Any = gradient.device_mesh
    sharded = [dim for dim, placement in enumerate(gradient.placements) if not placement.is_replicate()]
    return gradient.to_local(), tuple(mesh.get_group(dim) for dim in sharded)


def _powers(local: Tensor, power: float) -> Tensor:
    """Return the sum of the powers of all magnitudes, or the largest one, in float64."""
    if local.is_sparse:
        local = local.coalesce().values()
    found = [local.new_zeros((), dtype=torch.float64)]
    for piece in torch.split(local.flatten(), _PIECE) if local.numel() else ():
        magnitudes = piece.double().abs()
        found.append(magnitudes.max() if math.isinf(power) else magnitudes.pow(power).sum())
    return _joined(torch.stack(found), power)


def _joined(values: Tensor, power: float) -> Tensor:
    return values.max() if math.isinf(power) else values.sum()

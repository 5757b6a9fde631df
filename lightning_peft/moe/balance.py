"""What keeps the load of experts balanced: losses, how they get into any training step, and figures to watch.

For one layer, over the N tokens that are not padding, with f_e = slots of expert e / N and P_e the mean probability of e::

    load balancing    E Σ_e f_e P_e                  Switch Transformers, arXiv:2101.03961; K where balanced, E where collapsed on one
    z                 mean (log Σ_e exp logit_e)²    ST-MoE, arXiv:2202.08906

Pooling layers before the product hides a layer that has collapsed behind one that collapsed on other experts, so each layer has
a loss of its own. It reaches the gradients through :func:`with_auxiliary_loss`: forward changes nothing, and backward adds the
gradient of the loss. So the user's ``training_step`` and its loss stay as they are.

Inside :func:`balanced_over` f, P and N are those of all processes: what is balanced is the load of a step, and not of the few rows that
one process has. Each process gives its part times their number, as gradients are averaged over processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_peft.routers import Assignment

_scale: float | Tensor = 1.0  # not thread-local: backward runs on threads of autograd
_processes = 1  # what gradient checkpointing runs again counts over processes there, too


@contextlib.contextmanager
def loss_scale(scale: float | Tensor) -> Iterator[None]:
    """Multiply auxiliary losses by ``scale`` in backward passes that run inside."""
    global _scale
    before, _scale = _scale, scale
    try:
        yield
    finally:
        _scale = before


@contextlib.contextmanager
def balanced_over(processes: int) -> Iterator[None]:
    """Have losses of forward passes that run inside be those of the tokens of all processes, which must all run them."""
    global _processes
    before, _processes = _processes, processes
    try:
        yield
    finally:
        _processes = before


@torch.no_grad()
def sum_over_processes(values: Tensor) -> tuple[Tensor, int]:
    """Return the sum of ``values`` over the processes that balance together, and how many these are."""
    if _processes == 1:
        return values, 1
    total = values.detach().clone()
    dist.all_reduce(total)
    return total, _processes


@torch.library.custom_op("lightning_peft::loss_scale", mutates_args=())
def _current_scale(gradient: Tensor, like: Tensor) -> Tensor:
    """Return the loss scale in the shape of ``like``.

    A compiler must neither look inside, or it would keep the scale of the time it compiles, nor move it into the forward, which
    is why it takes ``gradient``.
    """
    scale = _scale.to(like.device, like.dtype) if isinstance(_scale, Tensor) else _scale
    return torch.ones_like(like) * scale


@_current_scale.register_fake
def _(gradient: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like)


class _AuxiliaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss.detach())
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (like,) = ctx.saved_tensors
        return gradient, _current_scale(gradient.detach(), like)


def with_auxiliary_loss(weights: Tensor, loss: Tensor) -> Tensor:
    """Return ``weights`` as they are; their backward also runs that of the scalar ``loss``, times the loss scale."""
    result: Tensor = _AuxiliaryLoss.apply(weights, loss)  # type: ignore[no-untyped-call]
    return result


def load_balancing_loss(assignment: Assignment, mask: Tensor | None = None) -> Tensor:
    """Return E Σ_e f_e P_e of one layer, a scalar; K where the load is balanced.

    Args:
        assignment: of the layer.
        mask: which tokens are real (n,), bool; None for all.
    """
    p = assignment.probabilities
    tokens = _count(p, mask)
    mean = (p if mask is None else torch.where(mask[:, None], p, 0.0)).sum(0)  # (experts,)
    counts = torch.cat([assignment.expert_counts().to(p.dtype), tokens[None]])
    counts, processes = sum_over_processes(counts)
    tokens = counts[-1].clamp(min=1)
    return assignment.num_experts * (counts[:-1] / tokens * (mean * processes / tokens)).sum()


def _count(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return how many of ``rows`` (n, ...) are tokens, a scalar."""
    return rows.new_full((), len(rows)) if mask is None else mask.sum().to(rows.dtype)


def z_loss(assignment: Assignment, mask: Tensor | None = None) -> Tensor:
    """Return the mean of log²(Σ exp logits) over the tokens of one layer, a scalar.

    Args:
        assignment: of the layer.
        mask: which tokens are real (n,), bool; None for all.
    """
    squares = torch.logsumexp(assignment.logits, dim=-1).square()  # (n,)
    total = (squares if mask is None else torch.where(mask, squares, 0.0)).sum()
    tokens, processes = sum_over_processes(_count(squares, mask))
    return total * processes / tokens.clamp(min=1)

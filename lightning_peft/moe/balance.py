"""What keeps the load of experts balanced: losses, how they get into any training step, and figures to watch.

For one layer, over the N tokens that are not padding, with f_e = slots of expert e / N and P_e the mean probability of e::

    load balancing    E Σ_e f_e P_e                  Switch Transformers, arXiv:2101.03961; K where balanced, E where collapsed on one
    z                 mean (log Σ_e exp logit_e)²    ST-MoE, arXiv:2202.08906

Pooling layers before the product hides a layer that has collapsed behind one that collapsed on other experts, so each layer has
a loss of its own. It reaches the gradients through :func:`with_auxiliary_loss`: forward changes nothing, and backward adds the
gradient of the loss. So the user's ``training_step`` and its loss stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_peft.routers import Assignment

_scale: float | Tensor = 1.0  # not thread-local: backward runs on threads of autograd


@contextlib.contextmanager
def loss_scale(scale: float | Tensor) -> Iterator[None]:
    """Multiply auxiliary losses by ``scale`` in backward passes that run inside."""
    global _scale
    before, _scale = _scale, scale
    try:
        yield
    finally:
        _scale = before


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
    if mask is None:
        tokens: float | Tensor = max(len(p), 1)
        mean = p.sum(0) / tokens
    else:
        tokens = mask.sum().clamp(min=1)
        mean = torch.where(mask[:, None], p, 0.0).sum(0) / tokens
    share = assignment.expert_counts().to(p.dtype) / tokens
    return assignment.num_experts * (share * mean).sum()


def z_loss(assignment: Assignment, mask: Tensor | None = None) -> Tensor:
    """Return the mean of log²(Σ exp logits) over the tokens of one layer, a scalar.

    Args:
        assignment: of the layer.
        mask: which tokens are real (n,), bool; None for all.
    """
    squares = torch.logsumexp(assignment.logits, dim=-1).square()  # (n,)
    if mask is None:
        return squares.sum() / max(len(squares), 1)
    return torch.where(mask, squares, 0.0).sum() / mask.sum().clamp(min=1)

"""Low-rank experts in front of an activation, expert by expert, in little memory.

For the tokens t of expert e, whose rows lie together once slots are sorted by expert::

    g = G x[t] + s B_e (A_e x[t])        and u in the same way, or u alone in an MLP without a gate
    h = act(g) * u
    hidden[t] += w (h - hidden[t])       as the weights of a token sum to one, this is sum_k w_k h_k, and exactly hidden for equal h
    thin = C_e h                         C: (E, rank, inner), what the experts' down-projections read

Nothing of the size of all slots is kept: backward makes g, u and h again, which costs products of the rank only. The work of one
expert at a time also stays in the cache of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Between = Callable[[Sequence[Tensor]], Tensor]
"""From what the gate, if any, and the up-projection give to the hidden features."""


@dataclass(frozen=True)
class SegmentPlan:
    """What is not differentiated: which rows are whose, and how a row becomes hidden features."""

    tokens: Tensor
    """Token of each slot, sorted by expert (slots,)."""
    sizes: Sequence[int]
    """Slots of each expert."""
    between: Between
    """The activation."""
    scaling: float
    """Factor s of the pairs."""
    dropout: float
    """Probability of dropping a feature that C reads; 0 outside training."""
    padding: Tensor | None
    """Which tokens no expert acts on (n,), bool; None for none."""


def run_segments(
    plan: SegmentPlan,
    hidden: Tensor,
    weights: Tensor,
    low: Tensor,
    down: Tensor,
    bases: Sequence[Tensor],
    ups: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the mixed hidden features (n, inner), and ``thin`` (slots, rank) in sorted order.

    Args:
        plan: the slots.
        hidden: the features without experts, ``plan.between`` of ``bases`` (n, inner).
        weights: of each slot, in sorted order (slots,); those of a token sum to one, or all are zero at padding.
        low: A_e x of each slot, in sorted order (slots, len(bases) * rank).
        down: C (experts, rank, inner).
        bases: what the gate, if any, and the up-projection give (n, inner).
        ups: the B of each of them (experts, rank, inner).
    """
    mixed, thin = _Segments.apply(plan, hidden, weights, low, down, *bases, *ups)
    return mixed, thin


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: SegmentPlan, hidden: Tensor, weights: Tensor, low: Tensor, down: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        bases, ups = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        wide = torch.promote_types(torch.float32, hidden.dtype)
        mixed = hidden.to(wide, copy=True)
        thin = low.new_empty(len(low), down.shape[1])
        kept = _draw(plan, hidden, len(low))
        for expert, rows in _segments(plan.sizes):
            tokens = plan.tokens[rows]
            h = plan.between(_updated(plan, bases, ups, low, expert, rows, tokens))
            change = (h - hidden.index_select(0, tokens)).to(wide)
            mixed.index_add_(0, tokens, change.mul_(weights[rows, None].to(wide)))
            h = h if kept is None else h * kept[rows].to(h.dtype).mul_(1.0 / (1.0 - plan.dropout))
            torch.mm(h.to(thin.dtype), down[expert].t(), out=thin[rows])
        device = hidden.device.type
        ctx.plan, ctx.mixed_precision = plan, (device, torch.is_autocast_enabled(device))
        ctx.autocast_dtype = torch.get_autocast_dtype(device)
        ctx.save_for_backward(hidden, weights, low, down, kept, *rest)
        return mixed.to(hidden.dtype), thin

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mixed: Tensor, thin: Tensor) -> tuple[Tensor | None, ...]:
        plan: SegmentPlan = ctx.plan
        hidden, weights, low, down, kept, *rest = ctx.saved_tensors
        bases, ups = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        g_bases = [torch.zeros_like(base) for base in bases]
        g_ups = [torch.zeros_like(up) for up in ups]
        g_weights, g_low, g_down = (torch.zeros_like(one) for one in (weights, low, down))
        device, enabled = ctx.mixed_precision
        for expert, rows in _segments(plan.sizes):
            tokens = plan.tokens[rows]
            inputs = _updated(plan, bases, ups, low, expert, rows, tokens)
            gradient = mixed.index_select(0, tokens)  # (tokens, inner)
            with torch.enable_grad(), torch.autocast(device, ctx.autocast_dtype, enabled=enabled):
                inputs = [one.requires_grad_() for one in inputs]
                h = plan.between(inputs)
            own = h.detach() - hidden.index_select(0, tokens)
            g_weights[rows] = (own * gradient).sum(-1, dtype=g_weights.dtype)
            gradient = gradient * weights[rows, None].to(gradient.dtype)
            factor = None if kept is None else kept[rows].to(h.dtype).mul_(1.0 / (1.0 - plan.dropout))
            read = h.detach() if factor is None else h.detach() * factor
            torch.mm(thin[rows].t(), read.to(thin.dtype), out=g_down[expert])
            if factor is None:
                gradient.addmm_(thin[rows].to(gradient.dtype), down[expert].to(gradient.dtype))
            else:
                gradient += (thin[rows] @ down[expert]).to(gradient.dtype) * factor
            parts = torch.autograd.grad(h, inputs, gradient)
            for part, base, up, g_up, own_low, g_own in zip(
                parts, g_bases, ups, g_ups, low[rows].chunk(len(ups), 1), g_low[rows].chunk(len(ups), 1), strict=True
            ):
                base.index_add_(0, tokens, part)
                torch.mm(own_low.t(), part, out=g_up[expert]).mul_(plan.scaling)
                g_own.copy_((part @ up[expert].t()).mul_(plan.scaling))
        # The weights of a token sum to one, so that what is mixed does not depend on the features without experts; but at padding.
        g_hidden = None if plan.padding is None else mixed * plan.padding[:, None]
        return None, g_hidden, g_weights, g_low, g_down, *g_bases, *g_ups


def _updated(
    plan: SegmentPlan,
    bases: Sequence[Tensor],
    ups: Sequence[Tensor],
    low: Tensor,
    expert: int,
    rows: slice,
    tokens: Tensor,
) -> list[Tensor]:
    """Return what the projections of one expert give for its tokens (tokens, inner)."""
    each = zip(bases, ups, low[rows].chunk(len(ups), dim=1), strict=True)
    return [base.index_select(0, tokens).addmm_(own, up[expert], alpha=plan.scaling) for base, up, own in each]


def _draw(plan: SegmentPlan, hidden: Tensor, slots: int) -> Tensor | None:
    """Draw which features C reads (slots, inner), bool; None for all."""
    if not plan.dropout:
        return None
    return torch.rand(slots, hidden.shape[1], device=hidden.device) >= plan.dropout


def _segments(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has slots, and where they are."""
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, slice(start, start + size)
        start += size

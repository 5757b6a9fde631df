"""Low-rank experts in front of an activation, expert by expert, in little memory.

Slots are sorted by expert and by choice, so that the rows of an expert lie together. For its tokens t::

    g = G x[t] + s B_e (A_e x[t])        and u in the same way, or u alone in an MLP without a gate
    h = act(g) * u
    thin = C_e h                         C: (E, rank, inner), what the experts' down-projections read

    mixed = h_1 + sum_k w_k (h_k - h_1)  h_k: that of the k-th choice of a token

As the weights of a token sum to one, that is sum_k w_k h_k, and where all h are equal it is h, bit for bit. Nothing of the size of
all slots is kept: backward makes g, u and h again, which costs products of the rank only, and the work of one expert at a time
stays in the cache of a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_peft.moe.between import Between, autocast_of


@dataclass(frozen=True)
class Segments:
    """The slots of a top-k assignment, sorted by expert and within it by choice."""

    tokens: Tensor
    """Token of each slot (slots,)."""
    choices: Tensor
    """Which choice of its token each slot is (slots,)."""
    experts: Tensor
    """Expert of each slot (slots,)."""
    places: Tensor
    """Where the slots of each token are (n * k,)."""
    sizes: Sequence[Sequence[int]]
    """Slots of each expert, of each choice."""

    @classmethod
    def of(cls, chosen: Tensor, number: int) -> Segments:
        """Sort the choices of n tokens, ``chosen`` (n, k), among ``number`` experts. The host waits for the device."""
        n, k = chosen.shape
        experts, order = torch.sort(chosen.t().reshape(-1), stable=True)  # by choice before
        tokens, choices = order % n, order // n
        sizes = torch.bincount(experts * k + choices, minlength=k * number).view(number, k).tolist()
        return cls(tokens, choices, experts, torch.argsort(tokens * k + choices), sizes)

    def __iter__(self) -> Iterator[tuple[int, slice, list[slice]]]:
        """Yield each expert that has rows, its rows, and of which choice which are."""
        start = 0
        for expert, sizes in enumerate(self.sizes):
            stops = list(itertools.accumulate(sizes, initial=start))
            if stops[-1] > start:
                yield expert, slice(start, stops[-1]), [slice(*pair) for pair in itertools.pairwise(stops)]
            start = stops[-1]


@dataclass(frozen=True)
class SegmentPlan:
    """What is not differentiated."""

    segments: Segments
    """Which rows are whose."""
    between: Between
    """The activation."""
    scaling: float
    """Factor s of the pairs."""
    dropout: float
    """Probability of dropping a feature that C reads; 0 outside training."""

    def room(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Return a tensor for each of ``like`` with room for the rows of any expert."""
        largest = max(map(sum, self.segments.sizes))
        return [one.new_empty(largest, one.shape[1]) for one in like]


def run_segments(
    plan: SegmentPlan, weights: Tensor, low: Tensor, down: Tensor, bases: Sequence[Tensor], ups: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the mixed hidden features (n, inner), and ``thin`` (slots, rank) in the order of the segments.

    Args:
        plan: the slots, and how a row becomes hidden features.
        weights: of each choice of each token (n, k). Those of a token sum to one, and their gradient is that along this sum.
        low: A_e x of each slot, in the order of the segments (slots, len(bases) * rank).
        down: C (experts, rank, inner).
        bases: what the gate, if any, and the up-projection give (n, inner).
        ups: the B of each of them (experts, rank, inner).
    """
    mixed, thin = _Segments.apply(plan, weights, low, down, *bases, *ups)  # type: ignore[no-untyped-call]
    return mixed, thin


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: SegmentPlan, weights: Tensor, low: Tensor, down: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        bases, ups = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        thin = low.new_empty(len(low), down.shape[1])
        kept = _draw(plan, bases[0], len(low))
        mixed, room = _Mixed(bases[0], weights), plan.room(bases)
        for expert, rows, by_choice in plan.segments:
            tokens = plan.segments.tokens[rows]
            h = plan.between(_updated(plan, bases, ups, low, expert, rows, tokens, room))
            if h.untyped_storage().data_ptr() == room[0].untyped_storage().data_ptr():
                h = h.clone()  # of an activation that hands its input on; the next expert writes there
            thin[rows] = _read(plan, h, kept, rows).to(thin.dtype) @ down[expert].t()
            for choice, part in enumerate(by_choice):
                own = slice(part.start - rows.start, part.stop - rows.start)
                mixed.add(choice, tokens[own], h[own])
        ctx.plan, ctx.autocast = plan, autocast_of(low.device.type)
        ctx.save_for_backward(weights, low, down, kept, *rest)
        return mixed.result(), thin

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mixed: Tensor, thin: Tensor) -> tuple[Tensor | None, ...]:
        plan: SegmentPlan = ctx.plan
        weights, low, down, kept, *rest = ctx.saved_tensors
        bases, ups = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        g_bases, g_ups = [torch.zeros_like(mixed) for _ in ups], [torch.zeros_like(up) for up in ups]
        g_weights, g_low, g_down = torch.empty_like(weights), torch.empty_like(low), torch.zeros_like(down)
        room, to_gradient = plan.room(bases), plan.room([mixed])[0]
        for expert, rows, _ in plan.segments:
            tokens, choices = plan.segments.tokens[rows], plan.segments.choices[rows]
            again = plan.between.again(_updated(plan, bases, ups, low, expert, rows, tokens, room), ctx.autocast)
            gradient = torch.index_select(mixed, 0, tokens, out=to_gradient[: len(tokens)])  # (tokens, inner)
            own = thin[rows]
            torch.mm(own.t(), _read(plan, again.hidden, kept, rows).to(own.dtype), out=g_down[expert])
            g_weights[tokens, choices] = again.dot(gradient).to(g_weights.dtype)
            gradient *= weights[tokens, choices, None].to(gradient.dtype)
            if kept is None and own.dtype == gradient.dtype:
                gradient.addmm_(own, down[expert])
            else:
                gradient += _read(plan, own @ down[expert], kept, rows).to(gradient.dtype)
            parts = again.pull(gradient)
            lows = zip(low[rows].chunk(len(ups), 1), g_low[rows].chunk(len(ups), 1), strict=True)
            for part, g_base, up, g_up, (own, g_own) in zip(parts, g_bases, ups, g_ups, lows, strict=True):
                g_base.index_add_(0, tokens, part)
                torch.mm(own.t(), part, out=g_up[expert]).mul_(plan.scaling)
                g_own.copy_((part @ up[expert].t()).mul_(plan.scaling))
        return None, g_weights, g_low, g_down, *g_bases, *g_ups


class _Mixed:
    """The hidden features of n tokens, averaged over their choices: h_1 + sum_k w_k (h_k - h_1), in float32 at least."""

    def __init__(self, like: Tensor, weights: Tensor) -> None:
        self.dtype, self.weights = like.dtype, weights
        self.sum = torch.empty_like(like, dtype=torch.promote_types(torch.float32, like.dtype))
        self.later: list[tuple[int, Tensor, Tensor]] = []

    def add(self, choice: int, tokens: Tensor, h: Tensor) -> None:
        """Take the features of one choice of some tokens; they are overwritten later."""
        if choice:
            self.later.append((choice, tokens, h))
        else:
            self.sum.index_copy_(0, tokens, h.to(self.sum.dtype))

    def result(self) -> Tensor:
        """Return the average, when all is added (n, inner)."""
        changes = [
            h.to(self.sum.dtype).sub_(self.sum.index_select(0, tokens)).mul_(self.weights[tokens, choice, None])
            for choice, tokens, h in self.later
        ]
        for (_, tokens, _), change in zip(self.later, changes, strict=True):
            self.sum.index_add_(0, tokens, change)
        return self.sum.to(self.dtype)


def _updated(
    plan: SegmentPlan,
    bases: Sequence[Tensor],
    ups: Sequence[Tensor],
    low: Tensor,
    expert: int,
    rows: slice,
    tokens: Tensor,
    room: Sequence[Tensor],
) -> list[Tensor]:
    """Return what the projections of one expert give for its tokens (tokens, inner), in ``room``."""
    each = zip(bases, ups, low[rows].chunk(len(ups), dim=1), room, strict=True)
    return [
        torch.index_select(base, 0, tokens, out=place[: len(tokens)]).addmm_(own, up[expert], alpha=plan.scaling)
        for base, up, own, place in each
    ]


def _draw(plan: SegmentPlan, base: Tensor, slots: int) -> Tensor | None:
    """Draw which features C reads (slots, inner), bool; None for all."""
    if not plan.dropout:
        return None
    return torch.rand(slots, base.shape[1], device=base.device) >= plan.dropout


def _read(plan: SegmentPlan, h: Tensor, kept: Tensor | None, rows: slice) -> Tensor:
    """Return the hidden features with those zero that dropout drops, and the others larger."""
    return h if kept is None else h * kept[rows] * (1.0 / (1.0 - plan.dropout))

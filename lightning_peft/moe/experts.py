"""The experts of a mixture: E feed-forward networks of one shape, run on the slots of an assignment.

::

    gated    f_e(x) = D_e (act(G_e x + g_e) * (U_e x + u_e)) + d_e        gate_up[e] = [G_e; U_e]
    plain    f_e(x) = D_e act(U_e x + u_e) + d_e                          gate_up[e] = U_e

    y[t] = Σ_{slots of token t} w_slot f_expert(x[t])                     the sum in float32

Slots are sorted by expert, so that an expert's rows lie together. Two ways to multiply them, which agree:

``unbind``
    One expert after the other, whose output and gradients are written to their places among those of all. For the CPU, float64, and
    shapes that the other cannot take.
``grouped_mm``
    ``torch.nn.functional.grouped_mm``: one kernel for all experts, and the host never waits for the device.

An expert without a token gets a gradient of zero, never None. Sums run in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.errors import ConfigError
from lightning_peft.moe.between import Between
from lightning_peft.moe.expert_weights import ExpertWeights, feed_forward
from lightning_peft.moe.one_by_one import one_by_one
from lightning_peft.moe.routing import Assignment
from lightning_peft.moe.segments import compiled_segment_mm

Implementation = Literal["auto", "unbind", "grouped_mm"]
"""How the products of experts run."""


@dataclass(frozen=True)
class SlotOrder:
    """The slots of an assignment sorted by expert, and the way back to the tokens."""

    order: Tensor
    """Slot at each sorted place (slots,)."""
    tokens: Tensor
    """Token at each sorted place (slots,)."""
    experts: Tensor
    """Expert at each sorted place (slots,)."""
    ends: Tensor
    """One past the last sorted place of each expert (experts,), int32."""
    by_token: Tensor
    """Sorted place of each slot in the order of tokens (slots,)."""
    lengths: Tensor | None
    """Slots of each token (n,), where they differ."""
    k: int | None
    """Slots of each token, where it is the same for all."""

    @classmethod
    def of(cls, assignment: Assignment) -> SlotOrder:
        """Sort the slots of ``assignment``."""
        experts, order = torch.sort(assignment.experts, stable=True)
        places = torch.arange(assignment.num_experts, device=experts.device)
        ends = torch.searchsorted(experts, places, right=True, out_int32=True)
        tokens = assignment.tokens.index_select(0, order)
        if assignment.k is not None:
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(len(order), device=order.device)
            return cls(order, tokens, experts, ends, inverse, None, assignment.k)
        lengths = torch.zeros_like(assignment.logits[:, 0], dtype=torch.long)
        lengths = lengths.index_add(0, tokens, torch.ones_like(tokens))
        return cls(order, tokens, experts, ends, torch.argsort(tokens, stable=True), lengths, None)

    def gather(self, x: Tensor) -> Tensor:
        """Return the row of ``x`` (n, d) at each sorted place (slots, d)."""
        if torch.compiler.is_compiling():
            return x.index_select(0, self.tokens)
        rows: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return rows

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's ``rows`` (slots, d), sorted, (n, d), in float32 at least.

        Args:
            rows: one row for each sorted place.
            weights: one weight for each slot, in the order of the assignment (slots,).
        """
        weights = weights.index_select(0, self.order)[:, None]
        wide = torch.promote_types(torch.float32, rows.dtype)
        return self.sum(rows.to(wide) * weights.to(wide))

    def sum(self, rows: Tensor) -> Tensor:
        """Return the sum of each token's ``rows`` (slots, d), sorted, (n, d); always in the same order."""
        if torch.compiler.is_compiling():
            if self.k is not None:
                return self._sum(rows)
            assert self.lengths is not None
            return rows.new_zeros(len(self.lengths), rows.shape[-1]).index_add(0, self.tokens, rows)
        total: Tensor = _Sum.apply(rows, self)  # type: ignore[no-untyped-call]
        return total

    def _sum(self, rows: Tensor) -> Tensor:
        rows = rows.index_select(0, self.by_token)
        if self.k is not None:
            return rows.view(-1, self.k, rows.shape[-1]).sum(1)
        assert self.lengths is not None
        return torch.segment_reduce(rows, "sum", lengths=self.lengths, axis=0, unsafe=True, initial=0.0)


class _Gather(torch.autograd.Function):
    """Rows to slots. Its backward is :class:`_Sum`, where autograd's own would add rows in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: SlotOrder) -> Tensor:
        ctx.slots = slots
        return x.index_select(0, slots.tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(torch.float32, gradient.dtype)
        return ctx.slots.sum(gradient.to(wide)).to(gradient.dtype), None


class _Sum(torch.autograd.Function):
    """Slots to rows. Its backward is :class:`_Gather`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: SlotOrder) -> Tensor:
        ctx.slots = slots
        return slots._sum(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.slots.gather(gradient), None


def run_experts(
    x: Tensor,
    assignment: Assignment,
    weights: ExpertWeights,
    activation: Callable[[Tensor], Tensor],
    *,
    dropout: float = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """Return what the experts make of each token.

    The products run in the dtype of autocast where that is on, else in that of ``x``.

    Args:
        x: the tokens (n, d).
        assignment: which token goes where.
        weights: the weights of the experts.
        activation: elementwise and not random, such as ``torch.nn.functional.silu``.
        dropout: probability with which a hidden feature is dropped.
        implementation: ``unbind``, ``grouped_mm``, or the better one for the device, dtype and shapes.

    Returns:
        (n, d) in the dtype of ``x``; zero for a token without a slot.

    Raises:
        ConfigError: ``grouped_mm`` was asked for and cannot take the dtype or the shapes.
    """
    device = x.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if mixed and x.dtype != torch.float64 else x.dtype
    chosen = _implementation(implementation, x.device, dtype, weights)
    slots = SlotOrder.of(assignment)
    rows = slots.gather(x).to(dtype)  # (slots, d)
    weights = weights.to(dtype)
    between = Between(activation, weights.gated, dropout)
    if chosen == "unbind" and not torch.compiler.is_compiling():
        output = one_by_one(rows, slots.experts, slots.ends.tolist(), weights, between)
    else:  # lengths of segments that only the data tells stay out of a compiled graph
        product = functools.partial(_grouped_mm if chosen == "grouped_mm" else _compiled, ends=slots.ends)
        output = feed_forward(product, rows, slots.experts, weights, between.dropped)
    return slots.combine(output, assignment.weights).to(x.dtype)


def _grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def _compiled(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    product: Tensor = compiled_segment_mm(rows, weights.transpose(1, 2), ends)
    return product


def _implementation(wanted: str, device: torch.device, dtype: torch.dtype, weights: ExpertWeights) -> str:
    if wanted not in ("auto", "unbind", "grouped_mm"):
        raise ConfigError(f"implementation must be 'auto', 'unbind' or 'grouped_mm', got {wanted!r}")
    if wanted == "unbind":
        return wanted
    obstacle = _obstacle(dtype, weights)
    if wanted == "grouped_mm":
        if obstacle:
            raise ConfigError(f"implementation='grouped_mm' was asked for, but {obstacle}; choose 'auto' or 'unbind'")
        return wanted
    fits = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:  # torch 2.13 compiles it in bfloat16 only
        fits = False
    return "grouped_mm" if fits and not obstacle else "unbind"


def _obstacle(dtype: torch.dtype, weights: ExpertWeights) -> str | None:
    """Say why ``grouped_mm`` cannot run, or return None."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not take {dtype}"
    for width in (weights.down.shape[1], weights.down.shape[2], weights.gate_up.shape[1]):
        if width * dtype.itemsize % 16:
            return (
                f"it needs rows of a multiple of 16 bytes, and {width} numbers of {dtype} are {width * dtype.itemsize}"
            )
    return None

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.errors import ConfigError
from lightning_peft.moe.routing import Assignment
from lightning_peft.moe.segments import compiled_segment_mm, segment_linear

Implementation = Literal["auto", "unbind", "grouped_mm"]
"""How the products of experts run."""


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of E experts, stacked; each expert's are (out, in), as in ``nn.Linear``."""

    gate_up: Tensor
    """(experts, 2 * ff, d), the gate above the up-projection; (experts, ff, d) where there is no gate."""
    down: Tensor
    """(experts, d, ff)."""
    gate_up_bias: Tensor | None = None
    """(experts, 2 * ff) or (experts, ff)."""
    down_bias: Tensor | None = None
    """(experts, d)."""
    gated: bool = True
    """Whether there is a gate."""

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights in ``dtype``."""
        up_bias = None if self.gate_up_bias is None else self.gate_up_bias.to(dtype)
        down_bias = None if self.down_bias is None else self.down_bias.to(dtype)
        return ExpertWeights(self.gate_up.to(dtype), self.down.to(dtype), up_bias, down_bias, self.gated)


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
    implementation: Implementation = "auto",
) -> Tensor:
    """Return what the experts make of each token.

    The products run in the dtype of autocast where that is on, else in that of ``x``.

    Args:
        x: the tokens (n, d).
        assignment: which token goes where.
        weights: the weights of the experts.
        activation: elementwise, such as ``torch.nn.functional.silu``.
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
    if chosen == "grouped_mm":
        output = _feed_forward(
            functools.partial(_grouped_mm, ends=slots.ends), rows, slots.experts, weights, activation
        )
    elif torch.compiler.is_compiling():  # lengths of segments that only the data tells stay out of the graph
        output = _feed_forward(functools.partial(_compiled, ends=slots.ends), rows, slots.experts, weights, activation)
    else:
        output = _one_by_one(rows, slots, weights, activation)
    return slots.combine(output, assignment.weights).to(x.dtype)


def _feed_forward(
    product: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    experts: Tensor,
    weights: ExpertWeights,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what each row's expert makes of it; ``product`` multiplies rows with the (out, in) matrix of their expert, transposed."""
    hidden = product(rows, weights.gate_up)
    if weights.gate_up_bias is not None:
        hidden = hidden + F.embedding(experts, weights.gate_up_bias)
    hidden = _activate(hidden, weights.gated, activation)
    output = product(hidden, weights.down)
    return output if weights.down_bias is None else output + F.embedding(experts, weights.down_bias)


def _one_by_one(
    rows: Tensor, slots: SlotOrder, weights: ExpertWeights, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    ends = slots.ends.tolist()
    if isinstance(activation, nn.Module) and any(parameter.requires_grad for parameter in activation.parameters()):
        return _feed_forward(functools.partial(segment_linear, ends=ends), rows, slots.experts, weights, activation)
    plan = _Plan(ends, slots.experts, weights.gated, activation)
    tensors = (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    output: Tensor = _OneByOne.apply(plan, rows, *tensors)  # type: ignore[no-untyped-call]
    return output


@dataclass(frozen=True)
class _Plan:
    """What :class:`_OneByOne` does not differentiate."""

    ends: list[int]
    experts: Tensor
    gated: bool
    activation: Callable[[Tensor], Tensor]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert and its rows."""
        return enumerate(map(slice, [0, *self.ends[:-1]], self.ends))

    def activate(self, hidden: Tensor) -> Tensor:
        return _activate(hidden, self.gated, self.activation)


class _OneByOne(torch.autograd.Function):
    """The experts one after the other: what an expert needs stays in the cache, and nothing of the size of all slots but rows is made.

    Kept for backward are the rows and what the activation reads; the activation itself is run again. The gradient of each expert is
    written to its place among those of all.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, rows: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None
    ) -> Tensor:
        result = rows.new_empty(len(rows), down.shape[1])
        kept = []
        for expert, part in plan:
            hidden = _affine(rows[part], up[expert], up_bias, expert)
            kept.append(hidden)
            _affine(plan.activate(hidden), down[expert], down_bias, expert, out=result[part])
        device = rows.device.type
        ctx.plan = plan
        ctx.autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device)}
        ctx.autocast["enabled"] = torch.is_autocast_enabled(device)
        ctx.save_for_backward(rows, up, down, up_bias, down_bias, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        rows, up, down, up_bias, down_bias, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return None, *_differentiable(
                plan, ctx.needs_input_grad[1:], (rows, up, down, up_bias, down_bias), gradient
            )
        train_rows, train_up, train_down = ctx.needs_input_grad[1:4]
        g_rows = torch.empty_like(rows) if train_rows else None
        g_up, g_down = (torch.empty_like(w) if wanted else None for w, wanted in ((up, train_up), (down, train_down)))
        g_up_bias, g_down_bias = (
            None if bias is None or not wanted else torch.empty_like(bias)
            for bias, wanted in zip((up_bias, down_bias), ctx.needs_input_grad[4:], strict=True)
        )
        for expert, part in plan:
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                hidden = kept[expert].detach().requires_grad_()
                inner = plan.activate(hidden)
            own = gradient[part]
            if g_down is not None:
                torch.mm(own.t(), inner.detach(), out=g_down[expert])
            if g_down_bias is not None:
                torch.sum(own, 0, out=g_down_bias[expert])
            (g_hidden,) = torch.autograd.grad(inner, hidden, own @ down[expert])
            if g_up is not None:
                torch.mm(g_hidden.t(), rows[part], out=g_up[expert])
            if g_up_bias is not None:
                torch.sum(g_hidden, 0, out=g_up_bias[expert])
            if g_rows is not None:
                torch.mm(g_hidden, up[expert], out=g_rows[part])
        return None, g_rows, g_up, g_down, g_up_bias, g_down_bias


def _differentiable(
    plan: _Plan, wanted: Sequence[bool], inputs: Sequence[Tensor | None], gradient: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the experts as products that can be differentiated again."""
    rows, up, down, up_bias, down_bias = inputs
    assert rows is not None
    assert up is not None
    assert down is not None
    weights = ExpertWeights(up, down, up_bias, down_bias, plan.gated)
    product = functools.partial(segment_linear, ends=plan.ends)
    output = _feed_forward(product, rows, plan.experts, weights, plan.activation)
    leaves = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want and tensor is not None]
    found = iter(torch.autograd.grad(output, leaves, gradient, create_graph=True))
    return [next(found) if want and tensor is not None else None for tensor, want in zip(inputs, wanted, strict=True)]


def _affine(rows: Tensor, weight: Tensor, biases: Tensor | None, expert: int, out: Tensor | None = None) -> Tensor:
    if biases is None:
        product: Tensor = torch.mm(rows, weight.t(), out=out)
        return product
    return torch.addmm(biases[expert], rows, weight.t(), out=out)


def _grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def _compiled(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    product: Tensor = compiled_segment_mm(rows, weights.transpose(1, 2), ends)
    return product


def _activate(hidden: Tensor, gated: bool, activation: Callable[[Tensor], Tensor]) -> Tensor:
    if not gated:
        return activation(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return activation(gate) * up


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

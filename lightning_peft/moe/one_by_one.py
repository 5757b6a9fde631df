"""The experts of a mixture, one after the other: how the CPU runs them.

What an expert needs stays in the cache, and nothing of the size of all slots is made but rows, what the activation reads, and the
result. The activation is run again in backward, and the gradient of each expert is written to its place among those of all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.moe.between import Between, autocast_of
from lightning_peft.moe.expert_weights import ExpertWeights, feed_forward, parts_of
from lightning_peft.moe.segments import segment_linear


def one_by_one(rows: Tensor, experts: Tensor, ends: list[int], weights: ExpertWeights, between: Between) -> Tensor:
    """Return what each row's expert makes of it.

    Args:
        rows: sorted by expert (slots, d).
        experts: whose each row is (slots,).
        ends: one past the last row of each expert.
        weights: of all experts.
        between: what stands between their projections.
    """
    activation = between.activation
    if isinstance(activation, nn.Module) and any(parameter.requires_grad for parameter in activation.parameters()):
        return feed_forward(functools.partial(segment_linear, ends=ends), rows, experts, weights, between.dropped)
    tensors = (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    output: Tensor = _OneByOne.apply(_Plan(ends, experts, between), rows, *tensors)  # type: ignore[no-untyped-call]
    return output


@dataclass(frozen=True)
class _Plan:
    """What :class:`_OneByOne` does not differentiate."""

    ends: list[int]
    experts: Tensor
    between: Between

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert and its rows."""
        return enumerate(map(slice, [0, *self.ends[:-1]], self.ends))

    def parts_of(self, hidden: Tensor) -> Sequence[Tensor]:
        return parts_of(hidden, self.between.gated)


class _OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, rows: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None
    ) -> Tensor:
        result = rows.new_empty(len(rows), down.shape[1])
        wanted = any(ctx.needs_input_grad)
        kept, masks = [], []
        for expert, part in plan:
            hidden = _affine(rows[part], up[expert], up_bias, expert)
            inner = plan.between(plan.parts_of(hidden))
            if plan.between.dropout:
                mask = plan.between.draw(inner)
                inner = inner * mask
                masks.append(mask)
            if wanted:
                kept.append(hidden)
            _affine(inner, down[expert], down_bias, expert, out=result[part])
        ctx.plan, ctx.autocast = plan, autocast_of(rows.device.type)
        ctx.save_for_backward(rows, up, down, up_bias, down_bias, *kept, *masks)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        saved = ctx.saved_tensors  # to be asked for once only under gradient checkpointing
        inputs, kept, masks = saved[:5], saved[5 : 5 + len(plan.ends)], saved[5 + len(plan.ends) :]
        rows, up, down = inputs[:3]
        if torch.is_grad_enabled():  # a second derivative is wanted
            return None, *_differentiable(plan, masks, ctx.needs_input_grad[1:], inputs, gradient)
        g_rows, g_up, g_down, g_up_bias, g_down_bias = (
            torch.empty_like(tensor) if tensor is not None and wanted else None
            for tensor, wanted in zip(inputs, ctx.needs_input_grad[1:], strict=True)
        )
        g_hidden, g_inner = _scratch(kept, up.shape[1]), _scratch(kept, down.shape[2])
        for expert, part in plan:
            own, hidden, mask = gradient[part], kept[expert], masks[expert] if masks else None
            again = plan.between.again(plan.parts_of(hidden), ctx.autocast)
            if g_down is not None:
                torch.mm(own.t(), again.hidden if mask is None else again.hidden * mask, out=g_down[expert])
            if g_down_bias is not None:
                torch.sum(own, 0, out=g_down_bias[expert])
            by_inner = torch.mm(own, down[expert], out=g_inner[: len(own)])
            by_hidden = g_hidden[: len(own)]
            again.pull(by_inner if mask is None else by_inner.mul_(mask), plan.parts_of(by_hidden))
            if g_up is not None:
                torch.mm(by_hidden.t(), rows[part], out=g_up[expert])
            if g_up_bias is not None:
                torch.sum(by_hidden, 0, out=g_up_bias[expert])
            if g_rows is not None:
                torch.mm(by_hidden, up[expert], out=g_rows[part])
        return None, g_rows, g_up, g_down, g_up_bias, g_down_bias


def _differentiable(
    plan: _Plan, masks: Sequence[Tensor], wanted: Sequence[bool], inputs: Sequence[Tensor | None], gradient: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the experts as products that can be differentiated again."""
    rows, up, down, up_bias, down_bias = inputs
    assert rows is not None
    assert up is not None
    assert down is not None
    weights = ExpertWeights(up, down, up_bias, down_bias, plan.between.gated)
    product = functools.partial(segment_linear, ends=plan.ends)

    def between(parts: Sequence[Tensor]) -> Tensor:
        hidden = plan.between(parts)
        return hidden * torch.cat(list(masks)) if masks else hidden

    output = feed_forward(product, rows, plan.experts, weights, between)
    leaves = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want and tensor is not None]
    found = iter(torch.autograd.grad(output, leaves, gradient, create_graph=True))
    return [next(found) if want and tensor is not None else None for tensor, want in zip(inputs, wanted, strict=True)]


def _scratch(each: Sequence[Tensor], width: int) -> Tensor:
    """Return room for ``width`` features of the rows of any of ``each``."""
    return each[0].new_empty(max(map(len, each)), width)


def _affine(rows: Tensor, weight: Tensor, biases: Tensor | None, expert: int, out: Tensor | None = None) -> Tensor:
    if biases is None:
        product: Tensor = torch.mm(rows, weight.t(), out=out)
        return product
    return torch.addmm(biases[expert], rows, weight.t(), out=out)

"""Products of segments of rows, each with a matrix of its own.

Three products, each linear in both of its arguments, whose derivatives are among the three again::

    segment_linear(rows, weights)    y = rows W_e^T         as nn.Linear does
    segment_mm(rows, weights)        y = rows W_e
    segment_outer(rows, others)      dW_e = rows^T others

All segments write into one tensor, the gradient of stacked weights too: no tensor of their size is made, filled and copied.

How long the segments are is known only when they are there. A loop over them would break the graph of a compiled model; an operator
with a known shape of its result, :func:`compiled_segment_mm`, does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Ends = list[int]
"""One past the last row of each segment: segment e is ``rows[ends[e - 1]:ends[e]]``."""


def segment_linear(rows: Tensor, weights: Tensor, ends: Ends) -> Tensor:
    """Return each segment of ``rows`` (slots, in) times its matrix of ``weights`` (experts, out, in), transposed: (slots, out)."""
    result: Tensor = _Linear.apply(rows, weights, ends)  # type: ignore[no-untyped-call]
    return result


def segment_mm(rows: Tensor, weights: Tensor, ends: Ends) -> Tensor:
    """Return each segment of ``rows`` (slots, in) times its matrix of ``weights`` (experts, in, out): (slots, out)."""
    result: Tensor = _Product.apply(rows, weights, ends)  # type: ignore[no-untyped-call]
    return result


def segment_outer(rows: Tensor, others: Tensor, ends: Ends) -> Tensor:
    """Return for each segment its ``rows`` (slots, in), transposed, times its ``others`` (slots, out): (experts, in, out).

    A segment without rows gives zeros.
    """
    result: Tensor = _Outer.apply(rows, others, ends)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Ends) -> Tensor:
        ctx.ends = ends
        ctx.save_for_backward(rows, weights)
        return _products(rows, weights.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        by_rows = segment_mm(gradient, weights, ctx.ends) if wanted[0] else None
        return by_rows, segment_outer(gradient, rows, ctx.ends) if wanted[1] else None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Ends) -> Tensor:
        ctx.ends = ends
        ctx.save_for_backward(rows, weights)
        return _products(rows, weights, ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        by_rows = segment_linear(gradient, weights, ctx.ends) if wanted[0] else None
        return by_rows, segment_outer(rows, gradient, ctx.ends) if wanted[1] else None, None


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor, ends: Ends) -> Tensor:
        ctx.ends = ends
        ctx.save_for_backward(rows, others)
        return _outer_products(rows, others, ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, others = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        by_rows = segment_linear(others, gradient, ctx.ends) if wanted[0] else None
        return by_rows, segment_mm(rows, gradient, ctx.ends) if wanted[1] else None, None


@torch.library.custom_op("lightning_peft::segment_mm", mutates_args=())
def compiled_segment_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return what :func:`segment_mm` does, as an operator that ``torch.compile`` takes whole; ``ends`` is a tensor (experts,)."""
    return _products(rows, weights, ends.tolist())


@torch.library.custom_op("lightning_peft::segment_outer", mutates_args=())
def compiled_segment_outer(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    """Return what :func:`segment_outer` does, as an operator that ``torch.compile`` takes whole."""
    return _outer_products(rows, others, ends.tolist())


@compiled_segment_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@compiled_segment_outer.register_fake
def _(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1], others.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    by_rows = compiled_segment_mm(gradient, weights.transpose(1, 2), ends)
    return by_rows, compiled_segment_outer(rows, gradient, ends), None


compiled_segment_mm.register_autograd(_backward, setup_context=_keep)


def _products(rows: Tensor, weights: Tensor, ends: Ends) -> Tensor:
    result = rows.new_empty(len(rows), weights.shape[2])
    for expert, part in _segments(ends):
        torch.mm(rows[part], weights[expert], out=result[part])
    return result


def _outer_products(rows: Tensor, others: Tensor, ends: Ends) -> Tensor:
    result = rows.new_empty(len(ends), rows.shape[1], others.shape[1])
    for expert, part in _segments(ends):
        torch.mm(rows[part].t(), others[part], out=result[expert])
    return result


def _segments(ends: Ends) -> Iterator[tuple[int, slice]]:
    return enumerate(map(slice, [0, *ends[:-1]], ends))

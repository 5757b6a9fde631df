"""Products of segments of rows, each with a matrix of its own, as operators that ``torch.compile`` takes whole.

How long the segments are is known only when they are there. A loop over them would break the graph of a compiled model; an operator
with a known shape of its result does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("lightning_peft::segment_mm", mutates_args=())
def segment_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return each segment of ``rows`` (slots, in) times its matrix of ``weights`` (experts, in, out), (slots, out).

    Args:
        rows: segment e is ``rows[ends[e - 1]:ends[e]]``.
        weights: a matrix for each segment.
        ends: one past the last row of each segment (experts,).
    """
    result = rows.new_empty(len(rows), weights.shape[2])
    start = 0
    for weight, end in zip(weights.unbind(0), ends.tolist(), strict=True):
        result[start:end] = rows[start:end] @ weight
        start = end
    return result


@torch.library.custom_op("lightning_peft::segment_outer", mutates_args=())
def segment_outer(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    """Return for each segment its ``rows`` (slots, in), transposed, times its ``others`` (slots, out): (experts, in, out)."""
    result = rows.new_empty(len(ends), rows.shape[1], others.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        result[expert] = rows[start:end].t() @ others[start:end]
        start = end
    return result


@segment_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@segment_outer.register_fake
def _(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1], others.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    return segment_mm(gradient, weights.transpose(1, 2), ends), segment_outer(rows, gradient, ends), None


segment_mm.register_autograd(_backward, setup_context=_keep)

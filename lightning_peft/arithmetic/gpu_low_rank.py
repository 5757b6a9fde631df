"""Where low-rank updates of a linear layer go through Triton kernels, and what autograd knows of them.

::

    layer and update    y = x W^T + b + s (x A^T) B      W, b frozen; dx is made once: dy W, and the update's part into it
    update alone        y = y + s (x A^T) B              y of a packed layer, of one that is hooked or trained, or of x before dropout

Either is one kernel after the product with W, and in backward three kernels beside the product with W. Kernels act only where
``LIGHTNING_PEFT_TRITON=1`` is in the environment, as they have not been measured on a GPU, and :func:`refusal` finds nothing against them; all
else takes the plain path. Differentiating twice (``create_graph=True``) takes it in backward.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.arithmetic.recomputing import recipe_of
from lightning_peft.arithmetic.row_stacks import padded_pairs, while_unchanged
from lightning_peft.errors import ConfigError
from lightning_peft.row_batches import AdapterRows

if TYPE_CHECKING:
    from lightning_peft.arithmetic.low_rank import LowRankLinear

VARIABLE = "LIGHTNING_PEFT_TRITON"
"""The environment variable that asks for kernels: ``1``."""
DEVICES: tuple[str, ...] = ("cuda",)
"""Types of devices on which kernels may act."""
DTYPES = (torch.bfloat16, torch.float16)
"""What x may be of; in float32 the tensor cores would round."""
LARGEST_RANK = 128
"""Above it the tiles of one program no longer fit."""

asked: bool = os.environ.get(VARIABLE, "0") == "1"
"""Whether kernels are asked for."""
_installed: bool = importlib.util.find_spec("triton") is not None


def reached(x: Tensor) -> bool:
    """Tell whether kernels are asked for and x (..., in) is where they act.

    Raises:
        ConfigError: they are asked for, and Triton is not installed.
    """
    if not asked or x.device.type not in DEVICES:
        return False
    if not _installed:
        raise ConfigError(
            f"{VARIABLE}=1 asks for Triton kernels, but triton is not installed: pip install 'lightning-peft[triton]', or unset {VARIABLE}"
        )
    return True


def refusal(x: Tensor, dtype: torch.dtype, A: Tensor, B: Tensor) -> str | None:  # noqa: N803 - as in the formula
    """Return why kernels do not take x (..., in), where they are asked for; None where they do.

    Args:
        x: the input.
        dtype: of the output.
        A: (rank, in), or (adapters, rank, in).
        B: (rank, out), or (adapters, rank, out).
    """
    if dtype not in DTYPES:
        return f"the output is {dtype}; the kernels are for {' and '.join(map(str, DTYPES))}"
    if A.shape[-2] > LARGEST_RANK:
        return f"the rank is {A.shape[-2]}; the kernels go to {LARGEST_RANK}"
    if B.requires_grad and not A.requires_grad and torch.is_grad_enabled():
        return "A is frozen, so that x need not be kept; for a second derivative the kernels would keep it"
    if not torch.compiler.is_compiling():
        if not all(type(one) in (Tensor, nn.Parameter) for one in (x, A, B)):
            return "there are tensors of a subclass, which has operations of its own"
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
            return "torch.func or forward-mode differentiation is at work"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU has a compute capability below 8.0"
    return None


def layer_and_update(adapter: LowRankLinear, base: Callable[..., Any], x: Tensor) -> Tensor | None:
    """Return what ``base`` and the update make of x (..., in), a new (..., out); None where another path is taken."""
    if (
        not reached(x)
        or recipe_of(x) is not None
        or not adapter.own_update
        or adapter.slices
        or (adapter.dropout and adapter.training)
    ):
        return None
    A, B = adapter.factors()
    held = adapter.weights_of(base)
    if held is None or not _stays(x) or refusal(x, x.dtype, A, B) is not None:
        return None
    y = linear_and_update(x.reshape(-1, x.shape[-1]), *held, A, B, adapter.scaling)
    return None if y is None else y.view(*x.shape[:-1], y.shape[-1])


def update(adapter: LowRankLinear, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor | None:
    """Return y (tokens, out) plus the update of x (tokens, in); None where another path is taken."""
    if not reached(x) or adapter.slices:
        return None
    A, B = adapter.factors()
    return None if refusal(x, y.dtype, A, B) is not None else added(y, x, A, B, adapter.scaling, in_place=in_place)


def rows_and_updates(base: Callable[..., Any], rows: AdapterRows, x: Tensor) -> Tensor | None:
    """Return what ``base`` and the update of each row make of x (..., in), (..., out); None where another path is taken."""
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]
    if not reached(x) or any(
        (adapter.dropout and adapter.training) or adapter.bias is not None for adapter in adapters
    ):
        return None
    A, B = while_unchanged(rows, "padded", lambda: padded_pairs(adapters))
    if refusal(x, x.dtype if _stays(x) else torch.get_autocast_dtype(x.device.type), A, B) is not None:
        return None
    index = rows.numbers(rows.index, x.device)
    flat, held = x.reshape(-1, x.shape[-1]), adapters[0].weights_of(base)
    y = linear_and_update(flat, *held, A, B, 1.0, index) if held is not None and _stays(x) else None
    if y is None:
        y = base(x) if held is None else F.linear(flat, *held)
        y = added(y.reshape(-1, y.shape[-1]), flat, A, B, 1.0, index, in_place=held is not None)
    return y.view(*x.shape[:-1], y.shape[-1])


def linear_and_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,  # noqa: N803 - as in the formula
    B: Tensor,  # noqa: N803 - as in the formula
    scale: float,
    index: Tensor | None = None,
) -> Tensor | None:
    """Return ``x W^T + b + scale * (x A^T) B``, a new (tokens, out); None where W or b is trained or of another dtype.

    Args:
        x: (tokens, in).
        weight: (out, in).
        bias: (out,).
        A: (rank, in), or (adapters, rank, in) with ``index``.
        B: (rank, out), or (adapters, rank, out).
        scale: factor of the update.
        index: for each of the rows that the tokens are made of the place of its adapter, -1 for none.
    """
    for one in (weight, bias):
        if one is not None and (one.requires_grad or one.dtype != x.dtype):
            return None
    y: Tensor = _LinearAndUpdate.apply(x, weight, bias, A, B, scale, index)  # type: ignore[no-untyped-call]
    return y


def added(
    y: Tensor,
    x: Tensor,
    A: Tensor,  # noqa: N803 - as in the formula
    B: Tensor,  # noqa: N803 - as in the formula
    scale: float,
    index: Tensor | None = None,
    *,
    in_place: bool,
) -> Tensor:
    """Return ``y + scale * (x A^T) B`` (tokens, out), in y itself where ``in_place`` says so; see :func:`linear_and_update`."""
    in_place = in_place and y.is_contiguous() and not torch.compiler.is_compiling()
    total: Tensor = _Added.apply(y, x.to(y.dtype), A, B, scale, index, in_place)  # type: ignore[no-untyped-call]
    return total


def _stays(x: Tensor) -> bool:
    """Tell whether a linear layer of the dtype of x, with autocast or without, returns that dtype."""
    kind = x.device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == x.dtype


def _kernels() -> tuple[Any, Any]:
    from lightning_peft.arithmetic import triton_low_rank as kernels

    if torch.compiler.is_compiling():
        return kernels.add_operator, kernels.outer_operator
    return kernels.add, kernels.outer


class _LinearAndUpdate(torch.autograd.Function):
    """``x W^T + b + s (x A^T) B`` with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,  # noqa: N803 - as in the formula
        B: Tensor,  # noqa: N803 - as in the formula
        scale: float,
        index: Tensor | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        thin = _kernels()[0](y, x, A, B, scale, None, index)
        _keep(ctx, (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5]), x, A, B, thin, index, weight)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dA, dB = _gradients(ctx, dy)
        return dx, None, None, dA, dB, None, None


class _Added(torch.autograd.Function):
    """``y + s (x A^T) B``."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,  # noqa: N803 - as in the formula
        B: Tensor,  # noqa: N803 - as in the formula
        scale: float,
        index: Tensor | None,
        in_place: bool,
    ) -> Tensor:
        if in_place:
            ctx.mark_dirty(y)
        total = y if in_place else y.new_empty(y.shape)
        thin = _kernels()[0](total, x, A, B, scale, None if in_place else y, index)
        _keep(ctx, ctx.needs_input_grad[1:4], x, A, B, thin, index)
        ctx.scale = scale
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (dy, *_gradients(ctx, dy), None, None, None)


def _keep(
    ctx: Any,
    needed: tuple[bool, ...],
    x: Tensor,
    A: Tensor,  # noqa: N803 - as in the formula
    B: Tensor,  # noqa: N803 - as in the formula
    thin: Tensor,
    index: Tensor | None,
    weight: Tensor | None = None,
) -> None:
    """Save what the gradients of x, A and B need, as far as they are ``needed``."""
    ctx.needed = needed
    to_x, to_A, to_B = needed
    ctx.save_for_backward(x if to_A or to_B else None, A, B, thin if to_B else None, index, weight if to_x else None)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B, as far as they are needed."""
    x, A, B, thin, index, weight = ctx.saved_tensors  # once: activation checkpointing unpacks them once
    dx = None if weight is None else dy @ weight
    to_x, to_A, to_B = ctx.needed
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a second derivative is wanted
        ours, dA, dB = _plain_gradients(dy, x, A, B, ctx.scale, index)
        return (ours if dx is None else dx + ours) if to_x else None, dA, dB
    add, outer = _kernels()
    into, up = dx, A
    if into is None:
        into = dy.new_empty(len(dy), A.shape[-1] if to_x else 0)
        up = A if to_x else A[..., :0]
    narrow = add(into, dy, B, up, ctx.scale, None, index, dx is not None) if to_x or to_A else None
    count = 0 if index is None else len(A)
    dA = outer(narrow, x, ctx.scale, A.dtype, count, index) if to_A else None
    dB = outer(thin, dy, ctx.scale, B.dtype, count, index) if to_B else None
    return into if to_x else None, dA, dB


def _plain_gradients(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor,  # noqa: N803 - as in the formula
    B: Tensor,  # noqa: N803 - as in the formula
    scale: float,
    index: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x (the update's part), A and B by operations that can be differentiated again."""
    index = torch.zeros(1, dtype=torch.int64, device=dy.device) if index is None else index
    place, some = index.clamp_min(0), (index >= 0).view(-1, 1, 1)
    downs, ups = (one.view(-1, *one.shape[-2:]) for one in (A, B))  # (adapters, rank, ...)
    down, up = (one.index_select(0, place).to(dy.dtype) * some for one in (downs, ups))  # (rows, rank, ...)
    dys = dy.reshape(len(index), -1, dy.shape[1])  # (rows, tokens, out)
    narrow = scale * dys @ up.transpose(1, 2)  # (rows, tokens, rank)
    dx = (narrow @ down).flatten(0, 1)
    if x is None:
        return dx, None, None
    xs = x.reshape(len(index), -1, x.shape[1])
    thin = scale * xs @ down.transpose(1, 2)
    dA, dB = (
        torch.zeros_like(all_of).index_add(0, place, (one.transpose(1, 2) @ other).to(all_of.dtype)).view_as(like)
        for all_of, one, other, like in ((downs, narrow, xs, A), (ups, thin, dys, B))
    )
    return dx, dA, dB

"""A linear layer with a low-rank update whose input is not kept for backward, and whose dropout keeps one byte an element.

::

    y = x W^T + b + s (A d(x)^T)^T B       x: (tokens, in)   W: (out, in)   A: (rank, in)   B: (rank, out)   d: dropout

    kept       what x is made again from, or x; A x^T; the mask of d
    gradients  dB = s h dy      dh = s B dy^T      dA = dh d(x)      dx = dy W + d(dh^T A)        h = A d(x)^T: (rank, tokens)

For an input that is kept anyway and has no dropout, plain operations of autograd keep the same and cost less; see ``low_rank.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.recomputing import Recipe, recipe_of, transformed

if TYPE_CHECKING:
    from lightning_peft.arithmetic.low_rank import LowRankLinear


def why_not_lean(adapter: LowRankLinear) -> str | None:
    """Return why ``adapter`` keeps its input for backward in any case; None where it does only if it has to."""
    if not adapter.own_update:
        return f"{type(adapter).__name__} has an update of its own"
    if adapter.slices:
        return "the adapter acts on slices of a fused projection"
    if adapter.input_part is not None or type(adapter.lora_A) is not nn.Parameter:
        return "the adapter is split over processes"
    return None


def lean_forward(adapter: LowRankLinear, base: Callable[..., Any], x: Tensor) -> Tensor | None:
    """Return y (..., out) of x (..., in), less a trained bias, where x or a mask is kept in less space than plain operations take; else None."""
    if torch.compiler.is_compiling():
        return None
    recipe = recipe_of(x)
    dropout = adapter.dropout if adapter.training else 0.0
    if recipe is None and not (dropout and torch.is_grad_enabled()):
        return None
    if why_not_lean(adapter) is not None or transformed():
        return None
    pair, scale = adapter.factors(), adapter.scaling
    held = adapter.weights_of(base)
    if held is None or any(one is not None and one.requires_grad for one in held):
        return lean_update(x, base(x), pair, scale=scale, dropout=dropout, recipe=recipe)
    return lean_linear(x, *held, pair, scale=scale, dropout=dropout, recipe=recipe)


def lean_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pair: tuple[Tensor, Tensor],
    *,
    scale: float,
    dropout: float,
    recipe: Recipe | None,
) -> Tensor:
    """Return y (..., out) of x (..., in) by a frozen ``weight`` (out, in) and ``bias`` with the update of ``pair``, A (rank, in) and B (rank, out)."""
    y: Tensor = _LeanLinear.apply(x, *pair, weight, bias, None, scale, dropout, recipe)  # type: ignore[no-untyped-call]
    return y


def lean_update(
    x: Tensor, y: Tensor, pair: tuple[Tensor, Tensor], *, scale: float, dropout: float, recipe: Recipe | None
) -> Tensor:
    """Return y (..., out), what a layer made of x (..., in), plus the update of ``pair``, A (rank, in) and B (rank, out)."""
    updated: Tensor = _LeanLinear.apply(x, *pair, None, None, y, scale, dropout, recipe)  # type: ignore[no-untyped-call]
    return updated


class _LeanLinear(torch.autograd.Function):
    @staticmethod
    @override
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        A: Tensor,  # noqa: N803 - as in the formula
        B: Tensor,  # noqa: N803
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        scale: float,
        dropout: float,
        recipe: Recipe | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = F.linear(flat, weight, bias) if weight is not None else y.reshape(-1, y.shape[-1])  # type: ignore[union-attr]
        dtype = out.dtype
        mask = None
        if dropout:
            flat, mask = torch.native_dropout(flat, dropout, True)
        h = A.to(dtype) @ flat.to(dtype).t()  # (rank, tokens)
        up = B.to(dtype)
        out = out.addmm_(h.t(), up, alpha=scale) if y is None else torch.addmm(out, h.t(), up, alpha=scale)
        ctx.scale, ctx.dropout, ctx.shape, ctx.dtype = scale, dropout, x.shape, x.dtype
        ctx.cell = None if recipe is None else recipe.cell
        ctx.save_for_backward(A, B, weight, h, mask, *((x,) if recipe is None else recipe.kept))
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        A, B, weight, h, mask, *kept = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        need_y = ctx.needs_input_grad[5]
        again = torch.is_grad_enabled()  # backward is differentiated: by new tensors only
        dy = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
        dtype = dy.dtype
        factor = 1.0 / (1.0 - ctx.dropout)
        down, up = A.to(dtype), B.to(dtype)
        flat = x = None
        if need_A or again:
            x = kept[0] if ctx.cell is None else ctx.cell.get(tuple(kept))
            flat = x.reshape(-1, x.shape[-1])
            flat = (flat if mask is None else flat * mask * factor).to(dtype)
        if again:
            h = down @ flat.t()  # type: ignore[union-attr]
        dx = dA = dB = None
        if need_B:
            dB = ((h @ dy) * ctx.scale).to(B.dtype)
        if need_A or need_x:
            dh = (up @ dy.t()) * ctx.scale  # (rank, tokens)
            if need_A:
                dA = (dh @ flat).to(A.dtype)
            if need_x:
                dx = _to_input(dy, weight, dh, down, mask, factor, again=again)
                dx = dx.view(ctx.shape).to(ctx.dtype)
        return dx, dA, dB, None, None, gradient if need_y else None, None, None, None


def _to_input(
    dy: Tensor, weight: Tensor | None, dh: Tensor, down: Tensor, mask: Tensor | None, factor: float, *, again: bool
) -> Tensor:
    """Return the gradient of the input (tokens, in) in the dtype of ``dy`` (tokens, out)."""
    if mask is not None:
        side = dh.t() @ down
        side = side * mask * factor if again else side.mul_(mask).mul_(factor)
        if weight is None:
            return side
        return torch.addmm(side, dy, weight.to(dy.dtype)) if again else side.addmm_(dy, weight.to(dy.dtype))
    if weight is None:
        return dh.t() @ down
    dx = dy @ weight.to(dy.dtype)
    return torch.addmm(dx, dh.t(), down) if again else dx.addmm_(dh.t(), down)

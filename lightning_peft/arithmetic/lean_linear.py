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

from lightning_peft.arithmetic.dropped_parts import drawn_mask, masked
from lightning_peft.arithmetic.recomputing import Recipe, recipe_of, transformed

if TYPE_CHECKING:
    from lightning_peft.arithmetic.low_rank import LowRankLinear


_WHOLE = (nn.Parameter, Tensor)
_MANY, _PIECE = 1024, 16
_FEW = 2**16
"""Elements of input and output together below which a processor's products in 16 bits take longer to call than to compute."""


def product_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Return the dtype that the thin products between x (tokens, in) and y (tokens, out) are computed in: that of ``y``, or float32 where that is faster."""
    if y.dtype != torch.bfloat16 or y.device.type != "cpu" or torch.compiler.is_compiling():
        return y.dtype
    few = y.shape[0] * (x.shape[1] + y.shape[1]) <= _FEW and not torch.is_autocast_enabled("cpu")
    return torch.float32 if few else y.dtype


def add_product(y: Tensor, left: Tensor, right: Tensor, scale: float, *, in_place: bool) -> Tensor:
    """Return ``y + scale * left @ right`` in the dtype of ``y``, of y (tokens, out), left (tokens, rank) and right (rank, out)."""
    if left.dtype != y.dtype:
        product = left @ right
        return y.add_(product, alpha=scale) if in_place else torch.add(y, product, alpha=scale).to(y.dtype)
    return y.addmm_(left, right, alpha=scale) if in_place else torch.addmm(y, left, right, alpha=scale)


def thin_product(thin: Tensor, wide: Tensor) -> Tensor:
    """Return ``thin @ wide^T`` (rank, tokens) of thin (rank, features) and wide (tokens, features).

    Over many features MKL takes nearly twice as long for all tokens as for a few at a time.
    """
    tokens, features = wide.shape
    if features < _MANY or tokens % _PIECE or wide.dtype != torch.float32 or wide.device.type != "cpu":
        return thin @ wide.t()
    pieces = wide.reshape(-1, _PIECE, features)
    parts = torch.bmm(thin.expand(len(pieces), *thin.shape), pieces.transpose(1, 2))  # (pieces, rank, tokens of one)
    return parts.transpose(0, 1).reshape(thin.shape[0], tokens)


def why_not_lean(adapter: LowRankLinear) -> str | None:
    """Return why ``adapter`` keeps its input for backward in any case; None where it does only if it has to."""
    if not adapter.own_update:
        return f"{type(adapter).__name__} has an update of its own"
    if adapter.slices:
        return "the adapter acts on slices of a fused projection"
    if adapter.input_part is not None or type(adapter.lora_A) not in _WHOLE:
        return "the adapter is split over processes"
    return None


def lean_forward(adapter: LowRankLinear, base: Callable[..., Any], x: Tensor) -> Tensor | None:
    """Return y (..., out) of x (..., in), less a trained bias, where x or a mask is kept in less space than plain operations take; else None."""
    if torch.compiler.is_compiling():
        return None
    recipe = recipe_of(x)
    dropout = adapter.dropout if adapter.training else 0.0
    if recipe is None and not dropout:
        return None  # with dropout also without gradients: reentrant checkpointing then draws the masks that its second forward draws
    if why_not_lean(adapter) is not None or transformed():
        return None
    pair, scale, held = adapter.factors(), adapter.scaling, adapter.weights_of(base)
    if held is not None and type(held[0]) not in _WHOLE:
        return None
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
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        scale: float,
        dropout: float,
        recipe: Recipe | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = F.linear(flat, weight, bias) if weight is not None else y.reshape(-1, y.shape[-1])  # type: ignore[union-attr]
        dtype, mask = product_dtype(flat, out), None
        if dropout:
            mask, factor = drawn_mask(flat.shape, dropout, flat.device)
            flat, scale = masked(flat, mask), scale * factor
        h = thin_product(A.to(dtype), flat.to(dtype))  # (rank, tokens)
        dtype = h.dtype  # of autocast, where the layer returns another one, as a packed layer may
        out = add_product(out, h.t(), B.to(dtype), scale, in_place=y is None)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, dtype)
        ctx.cell = None if recipe is None else recipe.cell
        ctx.save_for_backward(A, B, weight, h, mask, *((x,) if recipe is None else recipe.kept))
        shaped: Tensor = torch.ops.aten._unsafe_view(
            out, (*x.shape[:-1], out.shape[-1])
        )  # fresh, and no view for autograd
        return shaped

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kind = gradient.device.type
        if torch.is_autocast_enabled(kind):  # backward is run in its block too, and the dtypes are chosen already
            with torch.autocast(kind, enabled=False):
                return _LeanLinear.backward(ctx, gradient)
        A, B, weight, h, mask, *kept = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        need_y = ctx.needs_input_grad[5]
        again = torch.is_grad_enabled()  # backward is differentiated: by new tensors only
        dy = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
        into, dtype = ctx.dtypes
        wide = dy.to(dtype)
        down, up = A.to(dtype), B.to(dtype)
        flat = x = None
        if need_A or again:
            x = kept[0] if ctx.cell is None else ctx.cell.get(tuple(kept))
            flat = x.reshape(-1, x.shape[-1])
            flat = (flat if mask is None else masked(flat, mask)).to(dtype)
        if again:
            h = down @ flat.t()  # type: ignore[union-attr]
        dx = dA = dB = None
        if need_B:
            dB = ((h @ wide) * ctx.scale).to(B.dtype)
        if need_A or need_x:
            dh = thin_product(up, wide) * ctx.scale  # (rank, tokens)
            if need_A:
                dA = (dh @ flat).to(A.dtype)
                flat = None  # with dropout a copy, and not needed any more
            if need_x:
                dx = _to_input(dy, weight, dh, down, mask, again=again)
                dx = dx.view(ctx.shape).to(into)
        return dx, dA, dB, None, None, gradient if need_y else None, None, None, None


def _to_input(
    dy: Tensor, weight: Tensor | None, dh: Tensor, down: Tensor, mask: Tensor | None, *, again: bool
) -> Tensor:
    """Return the gradient of the input (tokens, in) in the dtype of ``dy`` (tokens, out)."""
    if mask is None and weight is not None:
        dx = dy @ weight.to(dy.dtype)
        return add_product(dx, dh.t(), down, 1.0, in_place=not again)
    side = dh.t() @ down
    if mask is not None:
        side = masked(side, mask) if again else side.mul_(mask)
    if weight is None:
        return side
    return add_product(side.to(dy.dtype), dy, weight.to(dy.dtype), 1.0, in_place=not again)


def hooked(module: Any) -> bool:
    """Tell whether somebody listens to ``module`` or replaced its forward, so that it must be called rather than computed."""
    return "forward" in module.__dict__ or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )

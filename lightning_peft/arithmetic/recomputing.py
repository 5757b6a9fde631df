"""Tensors that are made again in backward, from what is kept anyway, instead of being kept themselves.

::

    forward    x ──recipe──▶ y ──▶ linear layers with adapters        x is kept: the residual stream, or the gate and the up-projection
    backward   x ──recipe──▶ y     for the first that asks; the others use the same y, until the gradient of x is computed

What :func:`made` returns is an ordinary tensor that carries how it was made. Whoever would keep it for backward may keep :attr:`Recipe.kept`
instead; whoever does not know of this keeps the tensor, and all is as always.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from typing_extensions import override

Kept = tuple[Tensor, ...]


class Making(ABC):
    """A function of tensors that is cheap to run twice."""

    @abstractmethod
    def make(self, *inputs: Tensor) -> tuple[Tensor, Kept]:
        """Return what is made of ``inputs``, and what backward needs besides them."""

    @abstractmethod
    def plain(self, *inputs: Tensor) -> Tensor:
        """Return what is made, by operations that autograd knows."""

    @abstractmethod
    def again(self, kept: Kept) -> tuple[Tensor, Any]:
        """Return what was made once more from the inputs and what was kept besides, and whatever helps :meth:`pull`."""

    @abstractmethod
    def pull(self, kept: Kept, help: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients of the inputs from that of what was made, which is not written to.

        ``help`` is what :meth:`again` returned, None if it was not called.
        """


class Cell:
    """What was made, while backward needs it.

    Args:
        making: how.
        inputs: how many of the tensors that are kept are inputs; they come first.
    """

    __slots__ = ("help", "inputs", "making", "value")

    def __init__(self, making: Making, inputs: int) -> None:
        self.making, self.inputs = making, inputs
        self.value: Tensor | None = None
        self.help: Any = None

    def get(self, kept: Kept) -> Tensor:
        """Return the tensor once more; made with a graph where backward itself is differentiated."""
        if torch.is_grad_enabled():
            return self.making.plain(*kept[: self.inputs])
        if self.value is None:
            self.value, self.help = self.making.again(kept)
        return self.value


class Recipe:
    """How a tensor is made again.

    Attributes:
        cell: makes it in backward.
        kept: the tensors it is made of, to be kept for backward.
        version: the version of the tensor it describes.
    """

    __slots__ = ("cell", "kept", "version")

    def __init__(self, cell: Cell, kept: Kept, version: int) -> None:
        self.cell, self.kept, self.version = cell, kept, version


def made(making: Making, *inputs: Tensor) -> Tensor:
    """Return what ``making`` makes of ``inputs``, with its :class:`Recipe`.

    Example:
        >>> class Doubling(Making):
        ...     def make(self, x): return 2 * x, ()
        ...     def plain(self, x): return 2 * x
        ...     def again(self, kept): return 2 * kept[0], None
        ...     def pull(self, kept, help, gradient): return (2 * gradient,)
        >>> x = torch.ones(2, requires_grad=True)
        >>> y = made(Doubling(), x)
        >>> recipe_of(y).kept[0] is x, torch.autograd.grad(y.sum(), x)
        (True, (tensor([2., 2.]),))
    """
    found = list[Tensor]()
    cell = Cell(making, len(inputs))
    y: Tensor = _Made.apply(cell, found, *inputs)  # type: ignore[no-untyped-call]
    y._recipe = Recipe(cell, (*inputs, *found), y._version)  # type: ignore[attr-defined]
    return y


def recipe_of(x: Tensor) -> Recipe | None:
    """Return how ``x`` is made again; None where it must be kept itself."""
    recipe: Recipe | None = getattr(x, "_recipe", None)
    return recipe if recipe is not None and recipe.version == x._version and torch.is_grad_enabled() else None


def transformed() -> bool:
    """Tell whether forward is compiled or differentiated in another way than by backward, which written gradients do not serve."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


class _Made(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, cell: Cell, found: list[Tensor], *inputs: Tensor) -> Tensor:
        y, beside = cell.making.make(*inputs)
        found.extend(beside)
        ctx.cell = cell
        ctx.save_for_backward(*inputs, *beside)
        return y

    @staticmethod
    @override
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Any:
        cell: Cell = ctx.cell  # type: ignore[attr-defined]
        kept: Kept = ctx.saved_tensors  # type: ignore[attr-defined]
        if torch.is_grad_enabled():
            return None, None, *_with_graph(cell, kept, ctx.needs_input_grad[2:], gradient)  # type: ignore[attr-defined]
        help, cell.value, cell.help = cell.help, None, None
        return None, None, *cell.making.pull(kept, help, gradient)


def _with_graph(cell: Cell, kept: Kept, needed: Sequence[bool], gradient: Tensor) -> list[Tensor | None]:
    inputs = kept[: cell.inputs]
    y = cell.making.plain(*inputs)
    wanted = [one for one, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
    return [next(found) if need else None for need in needed]


class RMSNorm(Making):
    """``x / rms(x)`` times a frozen weight (features,), of x (..., features): arXiv:1910.07467.

    Args:
        eps: added to the mean square.
        offset: whether the factor is ``1 + weight``, multiplied before the result is rounded (Gemma); else it is the weight, after (Llama).
    """

    __slots__ = ("eps", "offset")

    def __init__(self, eps: float, offset: bool) -> None:
        self.eps, self.offset = eps, offset

    @override
    def make(self, *inputs: Tensor) -> tuple[Tensor, Kept]:
        x, weight = inputs
        wide = x.float()
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()  # (..., 1)
        return self._scaled(wide, inverse, weight, x.dtype), (inverse,)

    @override
    def plain(self, *inputs: Tensor) -> Tensor:
        x, weight = inputs
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + weight.float())).type_as(x) if self.offset else weight * normed.to(x.dtype)

    @override
    def again(self, kept: Kept) -> tuple[Tensor, Any]:
        x, weight, inverse = kept
        return self._scaled(x.float(), inverse, weight, x.dtype), None

    def _scaled(self, wide: Tensor, inverse: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        normed = wide * inverse
        if self.offset:
            return normed.mul_(1.0 + weight.float()).to(dtype)
        normed = normed.to(dtype)
        return normed.mul_(weight) if weight.dtype == dtype else weight * normed

    @override
    def pull(self, kept: Kept, help: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        x, weight, inverse = kept
        wide = x.float()
        pulled = gradient.float() * (1.0 + weight.float()) if self.offset else (gradient * weight).float()
        # d(x r) = r dx - x r^3 mean(x dx), where r is the inverse of the root of the mean square
        along = (pulled * wide).mean(-1, keepdim=True).mul_(inverse.pow(3))
        return pulled.mul_(inverse).addcmul_(wide, along, value=-1.0).to(x.dtype), None


class LayerNorm(Making):
    """``torch.nn.functional.layer_norm`` over the last dimension, its weight and bias frozen."""

    __slots__ = ("bias", "eps")

    def __init__(self, eps: float) -> None:
        self.eps = eps

    @override
    def make(self, *inputs: Tensor) -> tuple[Tensor, Kept]:
        x, *factors = inputs
        y, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], *_two(factors), self.eps)
        return y, (mean, inverse)

    @override
    def plain(self, *inputs: Tensor) -> Tensor:
        x, *factors = inputs
        return torch.nn.functional.layer_norm(x, x.shape[-1:], *_two(factors), self.eps)

    @override
    def again(self, kept: Kept) -> tuple[Tensor, Any]:
        return self.make(*kept[:-2])[0], None

    @override
    def pull(self, kept: Kept, help: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        x, *factors, mean, inverse = kept
        weight, bias = _two(factors)
        pulled = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), x, x.shape[-1:], mean, inverse, weight, bias, [True, False, False]
        )[0]
        return (pulled, *[None] * len(factors))


def _two(factors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = [*factors, None, None][:2]
    return weight, bias

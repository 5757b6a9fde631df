"""Sums over a weight block of rows by block of rows: what is wider than the weight is never there whole.

::

    weight (bf16)    + s B A                    =    merged (bf16)
    ┌────────┐         ┌─┐                           ┌────────┐
    │ rows   │ float32 │B│ rows @ A, float32  ─────▶ │ rows   │   rounded once
    ├────────┤         ├─┤                           ├────────┤
    │  ...   │         │ │                           │  ...   │
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**17
"""Elements in one block on a CPU: so few that they stay in its cache from the first operation to the last."""
_BLOCK_ELSEWHERE = 2**24


@dataclass(frozen=True)
class Product:
    """The matrix ``scale * left @ right``, made only as far as it is asked for."""

    left: Tensor
    """(out, rank)"""
    right: Tensor
    """(rank, in)"""
    scale: float = 1.0
    """Factor of the product."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix, (out, in)."""
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    def t(self) -> Product:
        """Return the transpose."""
        return Product(self.right.t(), self.left.t(), self.scale)

    def add_to(self, block: Tensor, start: int) -> None:
        """Add the rows from ``start`` on to ``block`` (rows, in), in its precision, which is at least float32."""
        left, right = (factor.to(block.dtype) for factor in (self.left[start : start + len(block)], self.right))
        block.addmm_(left, right, alpha=self.scale)

    def whole(self) -> Tensor:
        """Return all rows."""
        wide = torch.promote_types(torch.float32, self.left.dtype)
        product: Tensor = self.scale * (self.left.to(wide) @ self.right.to(wide))
        return product


def plus(weight: Tensor, delta: Tensor | Product) -> Tensor:
    """Return ``weight + delta`` in the precision of ``weight``, summed in at least float32 and rounded once.

    Args:
        weight: (rows, ...); it is left as it is.
        delta: of the same shape.

    Example:
        >>> plus(torch.zeros(3, 2), Product(torch.ones(3, 1), torch.ones(1, 2), 0.5)).sum()
        tensor(3.)
    """
    if type(weight) not in (Tensor, torch.nn.Parameter):
        wide = torch.promote_types(torch.float32, weight.dtype)
        added = delta.whole() if isinstance(delta, Product) else delta
        return (weight.to(wide) + added.to(wide)).to(weight.dtype)
    return _added(weight, delta, torch.empty_like(weight))


def add_(weight: Tensor, delta: Product) -> None:
    """Have ``weight`` be what :func:`plus` returns, bit for bit, in its own memory."""
    _added(weight, delta, weight)


def _added(weight: Tensor, delta: Tensor | Product, into: Tensor) -> Tensor:
    wide = torch.promote_types(torch.float32, weight.dtype)
    if isinstance(delta, Product):
        wide = torch.promote_types(wide, delta.left.dtype)
        delta = Product(delta.left.to(wide), delta.right.to(wide), delta.scale)
    elements = BLOCK if weight.device.type == "cpu" else _BLOCK_ELSEWHERE
    step = max(1, elements * len(weight) // max(1, weight.numel()))
    block = torch.empty_like(weight[:step], dtype=wide)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = block[: len(weight) - start]
        part.copy_(weight[rows])
        if isinstance(delta, Product):
            delta.add_to(part, start)
        else:
            part.add_(delta[rows])
        into[rows] = part
    return into

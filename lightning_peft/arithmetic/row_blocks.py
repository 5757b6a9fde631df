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

BLOCK = 2**20
"""Elements in one block."""


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

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows from ``start`` to ``stop``, multiplied in at least float32."""
        wide = torch.promote_types(torch.float32, self.left.dtype)
        block: Tensor = self.scale * (self.left[start:stop].to(wide) @ self.right.to(wide))
        return block

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
    wide = torch.promote_types(torch.float32, weight.dtype)
    if weight.numel() <= BLOCK or type(weight) not in (Tensor, torch.nn.Parameter):
        added = delta.whole() if isinstance(delta, Product) else delta
        return (weight.to(wide) + added.to(wide)).to(weight.dtype)
    merged = torch.empty_like(weight)
    step = max(1, BLOCK * len(weight) // weight.numel())
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        added = delta.rows(start, start + step) if isinstance(delta, Product) else delta[rows]
        merged[rows] = weight[rows].to(wide) + added.to(wide)
    return merged

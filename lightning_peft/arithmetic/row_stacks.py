"""The low-rank matrices of all adapters of one place below each other, kept until one of them changes.

::

    A (K, in)    ┌ a ┐      a, b of one rank r are a batch of matrices (2, r, in) without a copy,
                 │ b │      and all together are one matrix
                 └ c ┘
"""

from __future__ import annotations

import weakref
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_peft.arithmetic.low_rank import LowRankLinear

_version = attrgetter("_version")
_NOTHING = torch.empty(0)


class RowStack:
    """The matrices A (K, in) and B (K, out) of all adapters of one place below each other, the scales in B, and what they are made of.

    Args:
        adapters: the adapters.
        dtype: of the matrices.
        tensors: all that the adapters are made of.
        scales: the factors of their updates.
    """

    def __init__(
        self, adapters: tuple[LowRankLinear, ...], dtype: torch.dtype, tensors: list[Tensor], scales: list[float]
    ) -> None:
        self.scales, self.dtype = scales, dtype
        self.made_of = list(map(id, tensors)), *_marks(tensors)
        self.alive = True
        self.sources = [weakref.ref(tensor, self._lost) for tensor in tensors]
        pairs = [adapter.row_factors() for adapter in adapters]
        self.ranks = tuple([len(A) for A, _ in pairs])
        self.A = torch.cat([A for A, _ in pairs]).to(dtype).contiguous()
        self.B = torch.cat([B * scale for (_, B), scale in zip(pairs, scales, strict=True)]).to(dtype).contiguous()
        # Zero times what is not finite would reach the rows of other adapters.
        self.finite = bool(torch.isfinite(self.B).all())

    def batch(self, count: int, start: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Return so many pairs A (count, rank, in) and B (count, rank, out), the first from the line ``start`` on, the next ``step`` lines on."""
        A, B = (
            whole.as_strided(
                (count, rank, whole.shape[1]), (step * whole.shape[1], whole.shape[1], 1), start * whole.shape[1]
            )
            for whole in (self.A, self.B)
        )
        return A, B

    def _lost(self, source: weakref.ref[Tensor]) -> None:
        self.alive = False  # another tensor may get the same address
        self.A = self.B = _NOTHING

    def holds(self, dtype: torch.dtype, tensors: list[Tensor], scales: list[float]) -> bool:
        """Tell whether it would be made the same way again."""
        if dtype != self.dtype or scales != self.scales or not self.alive:
            return False
        ids, versions, addresses = self.made_of
        return list(map(id, tensors)) == ids and _marks(tensors) == (versions, addresses)


def _marks(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Return what changes when the values of one of ``tensors`` do."""
    return list(map(_version, tensors)), list(map(Tensor.data_ptr, tensors))


_stacks: weakref.WeakKeyDictionary[nn.Module, RowStack] = weakref.WeakKeyDictionary()
"""The last stack made at each place."""


def stacked(
    base: Any, adapters: tuple[LowRankLinear, ...], dtype: torch.dtype, held: dict[Any, Any]
) -> RowStack | None:
    """Return the matrices of all adapters around ``base``, made when they change; None where there can be none.

    ``held`` is that of the rows: the stack is looked up there before.
    """
    tensors: list[Any] = []
    scales = []
    for adapter in adapters:  # asked for at every place in every forward, so without a call where that can be
        if adapter.training and adapter.dropout:
            return None
        plain = not (adapter._modules or adapter._buffers)
        tensors += adapter._parameters.values() if plain else adapter.held_tensors()
        scales.append(adapter.method_scaling * adapter.scale)
    stack: RowStack | None = held.get("stack") or _stacks.get(base)
    if stack is None or not stack.holds(dtype, tensors, scales):
        # A trained bias is left to the other ways. Tensors made in inference mode do not count their changes.
        if any(adapter.bias is not None for adapter in adapters) or any(tensor.is_inference() for tensor in tensors):
            return None
        stack = _stacks[base] = RowStack(adapters, dtype, tensors, scales)
    held["stack"] = stack
    return stack

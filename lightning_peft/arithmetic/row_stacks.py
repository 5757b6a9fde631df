"""The low-rank matrices of all adapters of one place below each other, kept until one of them changes.

::

    A (K, in)    ┌ a ┐      a, b of one rank r are a batch of matrices (2, r, in) without a copy,
                 │ b │      and all together are one matrix
                 └ c ┘
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.row_batches import AdapterRows

if TYPE_CHECKING:
    from lightning_peft.arithmetic.low_rank import LowRankLinear

_NOTHING = torch.empty(0)
_parameters = attrgetter("_parameters")
_settings = attrgetter("scale", "method_scaling", "dropout", "training")
_version = attrgetter("_version")


class RowStack:
    """The matrices A (K, in) and B (K, out) of all adapters of one place below each other, the scales in B, and what they are made of.

    Args:
        adapters: the adapters.
        dtype: of the matrices.
        tensors: all that the adapters are made of.
    """

    def __init__(self, adapters: tuple[LowRankLinear, ...], dtype: torch.dtype, tensors: list[Tensor]) -> None:
        self.dtype = dtype
        self.settings = list(map(_settings, adapters))
        self.ids, self.versions, self.addresses = list(map(id, tensors)), *_marks(tensors)
        self.plain = not any(adapter._modules or adapter._buffers for adapter in adapters)
        self.alive = True
        self.sources = [weakref.ref(tensor, self._lost) for tensor in tensors]
        pairs = [adapter.row_factors() for adapter in adapters]
        self.ranks = tuple([len(A) for A, _ in pairs])
        self.lines = sum(self.ranks)
        self.A = torch.cat([A for A, _ in pairs]).to(dtype).contiguous()
        scaled = [B * adapter.scaling for (_, B), adapter in zip(pairs, adapters, strict=True)]
        self.B = torch.cat(scaled).to(dtype).contiguous()
        # Zero times what is not finite would reach the rows of other adapters.
        self.finite = bool(torch.isfinite(self.B).all())
        # Rows and tokens to what they are multiplied with, and how.
        self.ways: dict[Any, Any] = {}

    def batch(self, count: int, start: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Return so many pairs A (count, rank, in) and B (count, rank, out), the first from line ``start`` on, the next ``step`` lines on."""
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
        self.ways.clear()

    def holds(self, adapters: tuple[LowRankLinear, ...], dtype: torch.dtype, tensors: list[Tensor]) -> bool:
        """Tell whether it would be made the same way again."""
        return (
            self.alive
            and dtype == self.dtype
            and list(map(id, tensors)) == self.ids
            and _marks(tensors) == (self.versions, self.addresses)
            and list(map(_settings, adapters)) == self.settings
        )


def _marks(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Return what changes when the values of one of ``tensors`` do."""
    return list(map(_version, tensors)), list(map(Tensor.data_ptr, tensors))


_stacks: dict[int, tuple[weakref.ref[nn.Module], RowStack]] = {}
"""The last stack made at each place, by the id of its module."""


def stacked(base: Any, rows: AdapterRows, dtype: torch.dtype, most: int) -> RowStack | None:
    """Return the matrices of all adapters around ``base``, made when they change.

    Returns None where there can be none: with dropout, trained biases, more than ``most`` lines, or tensors made in inference mode,
    which do not count their changes.
    """
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]
    kept = _stacks.get(id(base))
    stack = kept[1] if kept is not None and kept[0]() is base else None
    if stack is not None:
        # The processor has nothing of this in its caches, at every place in every forward; so few and short loops.
        plain = itertools.chain.from_iterable(map(dict.values, map(_parameters, adapters)))
        tensors: list[Any] = list(plain) if stack.plain else _tensors(adapters)
    if stack is None or not stack.holds(adapters, dtype, tensors):
        tensors = _tensors(adapters)
        if sum([adapter.file_rank for adapter in adapters]) > most:
            return None
        if any((adapter.training and adapter.dropout) or adapter.bias is not None for adapter in adapters):
            return None
        if any(tensor.is_inference() for tensor in tensors):
            return None
        stack = RowStack(adapters, dtype, tensors)
        key = id(base)
        _stacks[key] = weakref.ref(base, lambda _: _stacks.pop(key, None)), stack
    return stack if stack.lines <= most else None


def _tensors(adapters: tuple[LowRankLinear, ...]) -> list[Tensor]:
    return [tensor for adapter in adapters for tensor in adapter.held_tensors()]


def padded_pairs(adapters: tuple[LowRankLinear, ...]) -> tuple[Tensor, Tensor]:
    """Return A (adapters, K, in) and B (adapters, K, out) of the adapters, zeros up to the largest rank K, the scales in B."""
    pairs = [adapter.row_factors() for adapter in adapters]
    K = max(len(A) for A, _ in pairs)
    downs = [F.pad(A, (0, 0, 0, K - len(A))) if len(A) < K else A for A, _ in pairs]
    scaled = [B * adapter.scaling for (_, B), adapter in zip(pairs, adapters, strict=True)]
    ups = [F.pad(B, (0, 0, 0, K - len(B))) if len(B) < K else B for B in scaled]
    return torch.stack(downs), torch.stack(ups)


def while_unchanged(rows: AdapterRows, key: Any, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return what ``make`` makes of the adapters; without gradients it is kept with ``rows`` while no parameter changes.

    Args:
        rows: the rows and their adapters.
        key: what else it depends on.
        make: makes it.
    """
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]
    mark: Any = None
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        tensors = _tensors(adapters)
        if not any(tensor.is_inference() for tensor in tensors):  # these do not count their changes
            scales = [adapter.scaling for adapter in adapters]
            mark = (key, scales, [(tensor.data_ptr(), tensor._version) for tensor in tensors])
    if mark is not None and rows.held.get("mark") == mark:
        held: tuple[Tensor, Tensor] = rows.held["pair"]
        return held
    made = make()
    if mark is not None:
        rows.held.update(mark=mark, pair=made)
    return made

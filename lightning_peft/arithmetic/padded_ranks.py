"""Low-rank adapters in tensors of a larger rank, and with a scaling that is not that of their file.

::

    s B A x  =  s_here ((s / s_here) B | 0) (A | 0) x        zeros up to the rank that is held here

A graph that was compiled for one rank and one scaling then serves adapters of any smaller rank and any scaling. What the zeros meet
has no gradient: they stay zeros when the adapter is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.arithmetic.low_rank import LowRankAdapter, RankAxis
from lightning_peft.interfaces import Adapter

_Adapter = TypeVar("_Adapter", bound=Adapter)


def paddable(adapter: Adapter) -> bool:
    """Tell whether ``adapter`` can hold a smaller rank or another scaling than its own."""
    declared = bool(type(adapter).__dict__.get("paddable", False))
    return declared and isinstance(adapter, LowRankAdapter) and not adapter.tied_parameters


@torch.no_grad()
def pad(adapter: LowRankAdapter, rank: int) -> None:
    """Let ``adapter`` hold pairs of ``rank``, which is not below its own, with zeros at the end. It acts as before."""
    held = adapter.in_file or (adapter.rank, adapter.method_scaling)
    for name, axis in adapter.rank_axes().items():
        old = adapter.get_parameter(name)
        setattr(adapter, name, nn.Parameter(_resized(old, axis, rank), requires_grad=old.requires_grad))
    adapter.file_rank = adapter.file_rank // adapter.rank * rank
    adapter.rank, adapter.in_file = rank, held


def fitted(adapter: LowRankAdapter, other: LowRankAdapter) -> dict[str, Tensor]:
    """Return values for the pairs of ``adapter`` with which it acts as ``other``, of the same kind and no larger rank."""
    return _resized_pairs(other, adapter.rank, other.method_scaling / adapter.method_scaling)


@torch.no_grad()
def as_in_file(adapter: _Adapter) -> _Adapter:
    """Return ``adapter`` with the rank and the scaling that its file has: itself, where it is not padded."""
    if not isinstance(adapter, LowRankAdapter) or adapter.in_file is None:
        return adapter
    rank, scaling = adapter.in_file
    twin = copy.copy(adapter)
    pairs = _resized_pairs(adapter, rank, adapter.method_scaling / scaling)
    twin._parameters = {**adapter._parameters, **{name: nn.Parameter(value) for name, value in pairs.items()}}
    twin.file_rank = adapter.file_rank // adapter.rank * rank
    twin.rank, twin.method_scaling, twin.in_file = rank, scaling, None
    return twin


def as_in_files(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return each of ``adapters`` as :func:`as_in_file` does."""
    return {path: as_in_file(adapter) for path, adapter in adapters.items()}


def _resized_pairs(adapter: LowRankAdapter, rank: int, factor: float) -> dict[str, Tensor]:
    values = {}
    for name, axis in adapter.rank_axes().items():
        value = _resized(adapter.get_parameter(name).detach(), axis, rank)
        values[name] = value * factor if axis.up and factor != 1.0 else value
    return values


def _resized(tensor: Tensor, axis: RankAxis, rank: int) -> Tensor:
    """Return a copy of ``tensor`` with ``rank`` in the place of its own rank: zeros at the end of each block, or its start only."""
    own = tensor.shape[axis.dim] // axis.blocks
    shape = [*tensor.shape]
    shape[axis.dim] = axis.blocks * rank
    result = tensor.new_zeros(shape)
    kept = min(own, rank)
    new, old = (torch.unflatten(whole, axis.dim, (axis.blocks, -1)) for whole in (result, tensor))  # blocks, rank
    new.narrow(axis.dim + 1, 0, kept).copy_(old.narrow(axis.dim + 1, 0, kept))
    return result

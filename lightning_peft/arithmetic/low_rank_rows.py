"""Low-rank updates of which each row of a batch has its own.

::

    y[r] = W x[r] + s_r B_r A_r x[r]        x: (rows, tokens, in)

The base runs once, on all rows; those without an adapter stay the base bit for bit. On a GPU one kernel can make all updates, see
``gpu_low_rank``. Else they come in one of four ways:

    products    A (rows, K, in), B (rows, K, out)      two batched products; with gradients, when compiled, and off the CPU; neighbours
                                                       of one adapter are one longer row where that works out for all
    in turn     A (k, in), B (k, out) of each run      consecutive rows of one adapter at a time, into y; nothing is copied
    in batches  A (n, k, in), B (n, k, out) of n runs  for small matrices: neighbours in the stack of all A and B, into y
    masked      A (K, in), B (K, out) of all           for the smallest: h = A x^T for every adapter, that of others set to zero

Padding of batched products with zeros adds zeros to sums and gets no gradient; each adapter's parameters get the sum over its rows. Where
ranks differ much, a CPU multiplies neighbours of one rank at a time instead.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.arithmetic import gpu_low_rank
from lightning_peft.arithmetic.row_stacks import RowStack, padded_pairs, stacked, while_unchanged
from lightning_peft.row_batches import AdapterRows

if TYPE_CHECKING:
    from lightning_peft.arithmetic.low_rank import LowRankLinear

_RUN = 300_000
"""What a further run costs, in multiplications that the masked way, or padding, may do more."""
_WAYS = 8
"""How many ways are remembered at a place."""
_KEPT = 25_000
"""How many elements a stack may have at one place for each run of rows."""
_FEW, _MANY, _LONG, _PIECE = 32, 256, 98_304, 16
"""Products of more than ``_FEW`` and less than ``_MANY`` tokens with ``_LONG`` results or more go in pieces of ``_PIECE`` tokens, run by run."""

_Batch: TypeAlias = tuple[int, int, int, int, int]
"""First unit of rows, the one behind the last, where in a stack the first matrix starts, how far the next is, and the rank of all."""


def low_rank_rows(base: Callable[..., Any], rows: AdapterRows, x: Tensor) -> Tensor:
    """Return y (..., out) for x (..., in), whose first dimension holds the rows of the batch, each the same number of times."""
    if (y := gpu_low_rank.rows_and_updates(base, rows, x)) is not None:
        return y
    if not torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _into(base, rows, x)
    return _products(base, rows, x)


# -- without gradients, on a CPU ---------------------------------------------------------------------------------------


def _into(base: Callable[..., Any], rows: AdapterRows, x: Tensor) -> Tensor:
    """Return what :func:`low_rank_rows` does; the updates are added to the output of the base where it is."""
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]
    y = adapters[0].computed(base, x)
    if y is None:
        y = base(x)
        y = y.reshape(-1, y.shape[-1]).clone()
    flat = x.reshape(-1, x.shape[-1])
    tokens, features = flat.shape[0] // len(rows.index), y.shape[1]
    stack = None
    if tokens * features < _LONG:
        most = _KEPT * len(_runs(rows.index)) // (flat.shape[1] + features)
        stack = stacked(base, rows, y.dtype, most)
    way = None if stack is None else _way(stack, rows.index, tokens)
    if stack is None or way is None:
        _in_turn(adapters, rows.index, flat.view(len(rows.index), tokens, -1), y.view(len(rows.index), tokens, -1))
    elif isinstance(way, Tensor):
        h = torch.mm(stack.A, flat.to(y.dtype).t())  # (K, rows * tokens)
        y.addmm_(h.masked_fill_(way, 0.0).t(), stack.B)
    else:
        _in_batches(way, flat.to(y.dtype), y)
    return y.view(*x.shape[:-1], features)


def _in_batches(way: _Batches, x: Tensor, y: Tensor) -> None:
    """Add the updates of x (rows * tokens, in) to y (rows * tokens, out), one batch after the other, or all at once where they are alike."""
    if way.alike:
        _, _, A, B = way.each[0]
        ins, outs = (part.view(-1, A.shape[0], part.shape[1]) for part in (x, y))  # (batches, rows of one, ...)
        h = torch.bmm(A, ins.permute(1, 2, 0))  # (rows of one, rank, batches)
        outs.add_(torch.bmm(h.transpose(1, 2), B).transpose(0, 1))
        return
    ins, outs = (part.view(way.units, -1, part.shape[1]) for part in (x, y))
    for start, stop, A, B in way.each:
        h = torch.bmm(A, ins[start:stop].transpose(1, 2))  # (rows, rank, tokens)
        outs[start:stop].baddbmm_(h.transpose(1, 2), B)


class _Batches(NamedTuple):
    """Batches of units of rows, of consecutive rows with one adapter."""

    units: int
    """How many units there are."""
    alike: bool
    """Whether all batches have the same adapters, no rows between them, and one token in each unit."""
    each: list[tuple[int, int, Tensor, Tensor]]
    """The first unit of a batch, the one behind its last, A (units, rank, in) and B (units, rank, out)."""


def _way(stack: RowStack, index: tuple[int, ...], tokens: int) -> Tensor | _Batches | None:
    """Return what is to be zero (K, rows * tokens) of the masked way, the batches, or None for rows in turn."""
    key = (index, tokens)
    if key in stack.ways:
        found: Tensor | _Batches | None = stack.ways[key]
        return found
    batches, runs, units = _batches(index, stack.ranks), len(_runs(index)), len(_units(index))
    multiplied = len(index) * tokens * stack.lines * (stack.A.shape[1] + stack.B.shape[1])
    if stack.finite and multiplied <= _RUN * len(batches):
        found = _of_others(index, stack.ranks, tokens)
    elif len(batches) < runs and len(index) // units * tokens * stack.B.shape[1] < _LONG:
        alike = {(stop - start, *where) for start, stop, *where in batches}
        whole = (
            sum([stop - start for start, stop, *_ in batches]) == len(index) * tokens
        )  # units are tokens, and none is left out
        each = [(start, stop, *stack.batch(stop - start, *where)) for start, stop, *where in batches]
        found = _Batches(units, whole and len(alike) == 1, each)
    else:
        found = None
    if len(stack.ways) >= _WAYS:
        stack.ways.clear()
    stack.ways[key] = found
    return found


def _in_turn(adapters: tuple[LowRankLinear, ...], index: tuple[int, ...], x: Tensor, y: Tensor) -> None:
    """Add the updates of x (rows, tokens, in) to y (rows, tokens, out), one run of rows after the other."""
    runs = _runs(index)
    if len(runs) == len(index):  # views made all at once
        xs, ys = x.unbind(), y.unbind()
    else:
        xs, ys = (tuple(part[start:stop].flatten(0, 1) for start, stop, _ in runs) for part in (x, y))
        runs = tuple((number, number + 1, place) for number, (_, _, place) in enumerate(runs))
    pairs = [
        None
        if adapter.slices or adapter.bias is not None or (adapter.dropout and adapter.training)
        else _factors(adapter, y.dtype)
        for adapter in adapters
    ]
    same = x.dtype == y.dtype
    for start, _, place in runs:
        pair, part = pairs[place], ys[start]
        if pair is None:
            adapters[place].update_rows(xs[start], part)
        else:
            A, B, scale = pair
            h = A.mm((xs[start] if same else xs[start].to(y.dtype)).t())  # (rank, tokens)
            _add_product(part, h.t(), B, scale)


def _add_product(y: Tensor, h: Tensor, B: Tensor, scale: float) -> None:  # noqa: N803 - as in the formula
    """Add ``scale * h @ B`` to y (tokens, out), for h (tokens, rank) and B (rank, out).

    Between few and many tokens MKL takes up to four times as long for one thin product as for several of fewer tokens.
    """
    tokens, out = y.shape
    if not _FEW < tokens < _MANY or tokens * out < _LONG:
        y.addmm_(h, B, alpha=scale)
        return
    pieces = tokens // _PIECE
    whole = pieces * _PIECE
    y[:whole].view(pieces, _PIECE, out).baddbmm_(
        torch.unflatten(h[:whole], 0, (pieces, _PIECE)), B.expand(pieces, *B.shape), alpha=scale
    )
    if whole < tokens:
        y[whole:].addmm_(h[whole:], B, alpha=scale)


def _factors(adapter: LowRankLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Return A (k, in), B (k, out) and the scale of an adapter."""
    A, B = adapter.row_factors()
    return A.to(dtype), B.to(dtype), adapter.scaling


@functools.lru_cache(maxsize=16)
def _runs(index: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Return (first row, row behind the last, place of the adapter) of consecutive rows with one adapter."""
    found: list[tuple[int, int, int]] = []
    start = 0
    for place, run in itertools.groupby(index):
        stop = start + len(list(run))
        found += [(start, stop, place)] if place >= 0 else []
        start = stop
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _batches(index: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[_Batch, ...]:
    """Return neighbouring units of rows whose matrices in a stack are as long as, and as far from, each other.

    Example:
        >>> _batches((0, 1, 2, 0, 1, 2), (4, 4, 4)), _batches((0, 0, 1, 1), (2, 4))
        (((0, 3, 0, 4, 4), (3, 6, 0, 4, 4)), ((0, 1, 0, 0, 2), (1, 2, 2, 0, 4)))
    """
    starts = [0, *itertools.accumulate(ranks)]
    found: list[_Batch] = []
    for unit, place in enumerate(_units(index)):
        if place < 0:
            continue
        start, rank = starts[place], ranks[place]
        if found and found[-1][1] == unit and found[-1][4] == rank:
            first, _, offset, step, _ = found[-1]
            distance = start - offset - step * (unit - 1 - first)  # from the matrix of the unit before
            if distance == step or (unit - first == 1 and distance > 0):
                found[-1] = (first, unit + 1, offset, distance, rank)
                continue
        found.append((unit, unit + 1, start, 0, rank))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _of_others(index: tuple[int, ...], ranks: tuple[int, ...], tokens: int) -> Tensor:
    """Return (K, rows * tokens), true where a line of the stacked A is not that of the adapter of the row."""
    owner = torch.tensor([place for place, rank in enumerate(ranks) for _ in range(rank)])
    return (owner[:, None] != torch.tensor(index)).repeat_interleave(tokens, dim=1)


# -- batched products --------------------------------------------------------------------------------------------------


def _products(base: Callable[..., Any], rows: AdapterRows, x: Tensor) -> Tensor:
    """Return what :func:`low_rank_rows` does, by two batched products."""
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]
    fresh = adapters[0].computed(base, x)
    y: Tensor = base(x) if fresh is None else fresh
    compiling = torch.compiler.is_compiling()
    index = rows.index if compiling else _units(rows.index)
    n, features = len(index), y.shape[-1]
    parts = x.reshape(n, -1, x.shape[-1])  # (rows, tokens, in)
    out = y.reshape(n, -1, features)  # (rows, tokens, out)
    cost = parts.shape[1] * (parts.shape[2] + features)
    ranks = [adapters[place].file_rank if place >= 0 else 0 for place in index]
    sizes = _spans(ranks, cost) if torch.is_grad_enabled() and x.device.type == "cpu" and not compiling else [n]
    if len(sizes) == 1:
        return _updated(rows, index, parts, out, in_place=fresh is not None).view(*x.shape[:-1], features)
    updated, start = [], 0
    for size, part, piece in zip(sizes, torch.split(parts, sizes), torch.split(out, sizes), strict=True):
        own = _part(rows, index[start : start + size])
        updated.append(_updated(own, own.index, part, piece, in_place=False))
        start += size
    return torch.cat(updated).view(*x.shape[:-1], features)


def _updated(rows: AdapterRows, index: tuple[int, ...], parts: Tensor, out: Tensor, *, in_place: bool) -> Tensor:
    """Return out (rows, tokens, out) with the updates for parts (rows, tokens, in), whose adapters ``index`` tells."""
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]
    chosen = [row for row, place in enumerate(index) if place >= 0]
    some = rows.numbers(chosen, parts.device) if len(chosen) < len(index) else None
    if some is not None:
        parts = parts.index_select(0, some)
    places = [index[row] for row in chosen]
    A, B = _gathered(rows, places, out)
    parts = _dropped(parts, [adapters[place].dropout if adapters[place].training else 0.0 for place in places])
    h = torch.bmm(A, parts.to(out.dtype).transpose(1, 2)).transpose(1, 2)  # (rows, tokens, K)
    bias = _biases(rows, places, out)
    if some is None:
        out = out.baddbmm_(h, B) if in_place else torch.baddbmm(out, h, B)
        return out if bias is None else out + bias
    update = torch.bmm(h, B) if bias is None else torch.baddbmm(bias, h, B)
    return out.index_add_(0, some, update) if in_place else out.index_add(0, some, update)


def _part(rows: AdapterRows, index: tuple[int, ...]) -> AdapterRows:
    """Return what of ``rows`` acts on the rows that ``index`` is of."""
    used = sorted({place for place in index if place >= 0})
    number = {place: new for new, place in enumerate(used)}
    return AdapterRows(
        tuple([rows.adapters[place] for place in used]), tuple([number.get(place, -1) for place in index])
    )


def _spans(ranks: list[int], cost: int) -> list[int]:
    """Return how many neighbouring rows go into one product each: all of one rank, where padding costs more than further products.

    Args:
        ranks: of the adapter of each row; 0 for the base.
        cost: multiplications for one rank of one row.

    Example:
        >>> _spans([2, 2, 0, 32], cost=10_000), _spans([2, 2, 0, 32], cost=10)
        ([3, 1], [4])
    """
    sizes: list[int] = []
    before = 0
    for rank in ranks:
        if sizes and (rank in (0, before) or not before):
            sizes[-1] += 1
        else:
            sizes.append(1)
        before = rank or before
    padding = sum([max(ranks) - rank for rank in ranks if rank]) * cost
    return sizes if padding > _RUN * (len(sizes) - 1) else [len(ranks)]


@functools.lru_cache(maxsize=64)
def _units(index: tuple[int, ...]) -> tuple[int, ...]:
    """Return the places of rows with as many consecutive rows of one adapter taken as one longer row as fit everywhere.

    Example:
        >>> _units((0, 0, 0, 0, 1, 1)), _units((0, 1, 1))
        ((0, 0, 1), (0, 1, 1))
    """
    length = math.gcd(*[len(list(run)) for _, run in itertools.groupby(index)])
    return index[::length]


def _gathered(rows: AdapterRows, places: list[int], y: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (rows, K, in) and B (rows, K, out) of the adapter of each row, in the dtype of ``y``, the scales in B.

    Without gradients they are kept while the parameters do not change.
    """
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]

    def made() -> tuple[Tensor, Tensor]:
        index = rows.numbers(places, y.device)
        A, B = (one.to(y).index_select(0, index) for one in padded_pairs(adapters))
        return A, B

    return while_unchanged(rows, (y.dtype, y.device), made)


def _dropped(x: Tensor, rates: list[float]) -> Tensor:
    """Return x (rows, tokens, in) after dropout at the rate of each row."""
    if not any(rates):
        return x
    if len(set(rates)) == 1:
        return F.dropout(x, rates[0])
    keep = 1.0 - torch.tensor(rates, device=x.device).view(-1, 1, 1)
    mask = torch.rand(x.shape, device=x.device) < keep
    return x * (mask / keep).to(x.dtype)


def _biases(rows: AdapterRows, places: list[int], y: Tensor) -> Tensor | None:
    """Return what training changed of each row's bias (rows, 1, out); None where no adapter trains it."""
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]
    if all(adapter.bias is None for adapter in adapters):
        return None
    changes = [
        y.new_zeros(y.shape[-1])
        if adapter.bias is None
        else (adapter.scale * (adapter.bias - adapter.base_bias)).to(y.dtype)  # type: ignore[operator]
        for adapter in adapters
    ]
    return torch.stack(changes).index_select(0, rows.numbers(places, y.device)).unsqueeze(1)

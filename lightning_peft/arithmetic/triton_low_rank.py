"""Low-rank updates as Triton kernels, for one adapter or for one of several in each row of a batch.

::

    add      out (T, o) = y + s (x down^T) up      x (T, i), down (r, i), up (r, o)      x and y are read once, out is written once
    outer    grad (r, c) = s thin^T wide           thin (T, r), wide (T, c)              wide is read once

With h = x down^T, ``add`` makes y of x in forward (down = A, up = B) and dx of dy in backward (down = B, up = A), and hands h out, which ``outer``
makes the gradients from: dB of h and dy, dA of dy B^T and x. Sums are in float32. The matrices stay in their own dtype in memory and are
rounded to that of x as they are read; the gradients are written in theirs. No sum depends on the order in which programs run.

With rows, down is (adapters, r, i), up (adapters, r, o), and ``index`` tells the adapter of each row, -1 for none: the grouped products of Punica
(arXiv 2310.18547) and S-LoRA (arXiv 2311.03285). Rows without an adapter are copied as they are.

Nothing waits for the device, and no shape depends on values, so the calls can be captured in CUDA graphs. They are custom operators
of torch, which ``torch.compile`` takes as they are. Importing this module needs no Triton; calling does.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # who calls has asked for it before
    triton = tl = None

LARGEST_RANK = 128
"""Above it the tiles of one program no longer fit."""
_TILE = 4096
"""Elements of a piece of A or B that one program holds at a time."""


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


# ruff: noqa: N803 - constants of a kernel are in upper case, as Triton's own


@_jit
def _dot(one: tl.tensor, other: tl.tensor, total: tl.tensor, INTERPRETED: tl.constexpr) -> Any:
    """Return total + one @ other, summed in float32. The interpreter takes the bits of bfloat16 for integers here."""
    if INTERPRETED:
        one, other = one.to(tl.float32), other.to(tl.float32)
    return tl.dot(one, other, total, input_precision="ieee")


@_jit
def _rounded(value: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr) -> Any:
    """Return value in dtype, rounded to the nearest even number. The interpreter cuts bfloat16 off; a GPU does not."""
    if INTERPRETED and dtype == tl.bfloat16 and value.dtype == tl.float32:
        bits = value.to(tl.uint32, bitcast=True)
        value = (bits + (0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@_jit
def _add_kernel(
    x: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    out: tl.tensor,
    thin: tl.tensor,
    index: tl.tensor,
    tokens: tl.tensor,
    width_in: tl.tensor,
    width_out: tl.tensor,
    rank: tl.tensor,
    part: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    READ: tl.constexpr,
    TOKENS: tl.constexpr,
    INS: tl.constexpr,
    OUTS: tl.constexpr,
    RANK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Make ``part`` features of some tokens of one row; every program of these tokens multiplies x with ``down`` anew."""
    blocks = tl.cdiv(tokens, TOKENS)
    row = tl.program_id(0) // blocks
    t = (tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, RANK)
    adapter = row
    if ROWS:
        adapter = tl.load(index + row).to(tl.int32)
    matrix = tl.maximum(adapter, 0).to(tl.int64) * rank
    place = (row.to(tl.int64) * tokens + t)[:, None]  # of the tokens in x, y, out and thin
    here, ranks = (t < tokens)[:, None], (r < rank)[:, None]
    h = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for start in range(0, tl.where(adapter < 0, 0, width_in), INS):
        i = (start + tl.arange(0, INS))[None, :]
        xs = tl.load(x + place * width_in + i, mask=here & (i < width_in), other=0.0)
        a = tl.load(down + (matrix + r[:, None]) * width_in + i, mask=ranks & (i < width_in), other=0.0)
        h = _dot(xs, tl.trans(_rounded(a, xs.dtype, INTERPRETED)), h, INTERPRETED)
    narrow = _rounded(h, thin.dtype.element_ty, INTERPRETED)
    if tl.program_id(1) == 0:
        tl.store(thin + place * rank + r[None, :], narrow, mask=here & (r < rank)[None, :])
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, width_out), OUTS):
        o = (start + tl.arange(0, OUTS))[None, :]
        inside = here & (o < width_out)
        b = tl.load(up + (matrix + r[:, None]) * width_out + o, mask=ranks & (o < width_out), other=0.0)
        b = _rounded(b, narrow.dtype, INTERPRETED)
        update = scale * _dot(narrow, b, tl.zeros((TOKENS, OUTS), dtype=tl.float32), INTERPRETED)
        if READ:
            before = tl.load(y + place * width_out + o, mask=inside, other=0.0)
            update = tl.where(adapter < 0, before.to(tl.float32), before.to(tl.float32) + update)
        tl.store(out + place * width_out + o, _rounded(update, out.dtype.element_ty, INTERPRETED), mask=inside)


@_jit
def _outer_kernel(
    thin: tl.tensor,
    wide: tl.tensor,
    grad: tl.tensor,
    index: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Make some columns of the gradient of one adapter, over all tokens of its rows in their order."""
    adapter = tl.program_id(1)
    c = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    r = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    for row in range(rows):
        length = tokens
        if ROWS:
            length = tl.where(tl.load(index + row) == adapter, tokens, 0)
        for start in range(0, length, TOKENS):
            t = start + tl.arange(0, TOKENS)
            place = (row * tokens + t).to(tl.int64)[:, None]
            here = (t < tokens)[:, None]
            h = tl.load(thin + place * rank + r[None, :], mask=here & (r < rank)[None, :], other=0.0)
            w = tl.load(wide + place * width + c, mask=here & (c < width), other=0.0)
            total = _dot(tl.trans(h), w, total, INTERPRETED)
    at = grad + (adapter.to(tl.int64) * rank + r[:, None]) * width + c
    tl.store(at, _rounded(scale * total, grad.dtype.element_ty, INTERPRETED), mask=(r < rank)[:, None] & (c < width))


class _Tiles(NamedTuple):
    """How ``add`` is divided into programs."""

    tokens: int
    ins: int
    outs: int
    rank: int
    parts: int
    """Programs that share the features of the same tokens."""
    part: int
    """Features of each, a multiple of ``outs``."""


def _power(number: int) -> int:
    """Return the least power of two that is at least ``number`` and 16, the least side of a product of tiles."""
    return max(16, 1 << (number - 1).bit_length())


@functools.lru_cache(maxsize=256)
def _tiles(tokens: int, rows: int, width_in: int, width_out: int, rank: int, processors: int) -> _Tiles:
    """Divide the work so that there are two programs for each processor, where x is then not read too often.

    Example:
        >>> _tiles(2048, 1, 4096, 4096, 16, 132)
        _Tiles(tokens=32, ins=128, outs=128, rank=16, parts=5, part=896)
    """
    lines, few = _power(rank), _power(tokens)
    size = 64 if tokens * rows >= 128 * processors and few >= 64 else min(few, 32)
    ins, outs = (min(max(32, min(128, _TILE // lines)), _power(width)) for width in (width_in, width_out))
    blocks = rows * -(-tokens // size)
    pieces = -(-width_out // outs)
    parts = max(1, min(-(-2 * processors // blocks), pieces, 16))
    part = max(1, -(-pieces // parts)) * outs
    return _Tiles(size, ins, outs, lines, max(1, -(-width_out // part)), part)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _interpreted() -> bool:
    return type(_add_kernel).__name__ == "InterpretedFunction"


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def add(
    out: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    y: Tensor | None = None,
    index: Tensor | None = None,
    accumulate: bool = True,
) -> Tensor:
    """Write ``y + scale * (x down^T) up`` into ``out`` and return ``x down^T`` (T, r) in the dtype of x.

    Args:
        out: (T, o), overwritten.
        x: (T, i), of the dtype of ``out``.
        down: (r, i), or (adapters, r, i) with ``index``.
        up: (r, o), or (adapters, r, o).
        scale: factor of the update.
        y: (T, o); without it ``out`` is added to, or 0.
        index: for each of the rows that T is made of the place of its adapter, -1 for none.
        accumulate: whether ``out`` is what is added to where there is no ``y``.
    """
    (total, width_in), width_out, rank = x.shape, out.shape[1], down.shape[-2]
    thin = x.new_empty(total, rank)
    if not total:
        return thin
    rows = 1 if index is None else index.numel()
    before = y if y is not None else out if accumulate else None
    t = _tiles(total // rows, rows, width_in, width_out, rank, _processors(x.device))
    grid = (rows * -(-(total // rows) // t.tokens), t.parts)
    with _on(x.device):
        _add_kernel[grid](
            x.contiguous(),
            down.contiguous(),
            up.contiguous(),
            None if before is None else before.contiguous(),
            out,
            thin,
            index,
            total // rows,
            width_in,
            width_out,
            rank,
            t.part,
            float(scale),
            ROWS=index is not None,
            READ=before is not None,
            TOKENS=t.tokens,
            INS=t.ins,
            OUTS=t.outs,
            RANK=t.rank,
            INTERPRETED=_interpreted(),
        )
    return thin


def outer(
    thin: Tensor, wide: Tensor, scale: float, dtype: torch.dtype, adapters: int = 0, index: Tensor | None = None
) -> Tensor:
    """Return ``scale * thin^T wide`` (r, c) in ``dtype``; with ``index`` (adapters, r, c), each over the rows of its adapter.

    Args:
        thin: (T, r).
        wide: (T, c), of the dtype of ``thin``.
        scale: factor of the product.
        dtype: of what is returned.
        adapters: how many there are, where ``index`` is given.
        index: for each of the rows that T is made of the place of its adapter, -1 for none.
    """
    (total, rank), width = thin.shape, wide.shape[1]
    rows, count = (1, 1) if index is None else (index.numel(), adapters)
    grad = thin.new_empty(count, rank, width, dtype=dtype)
    columns, lines = min(_power(width), 32 if width <= 8192 else 64), _power(rank)
    with _on(thin.device):
        _outer_kernel[(-(-width // columns), count)](
            thin.contiguous(),
            wide.contiguous(),
            grad,
            index,
            rows,
            total // rows,
            width,
            rank,
            float(scale),
            ROWS=index is not None,
            TOKENS=64 if total // rows > 32 else 32,
            COLUMNS=columns,
            RANK=lines,
            INTERPRETED=_interpreted(),
        )
    return grad[0] if index is None else grad


add_operator = torch.library.custom_op("lightning_peft::low_rank_add", add, mutates_args=("out",))
"""``add`` as an operator of torch."""
outer_operator = torch.library.custom_op("lightning_peft::low_rank_outer", outer, mutates_args=())
"""``outer`` as an operator of torch."""


@add_operator.register_fake
def _(
    out: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    y: Tensor | None = None,
    index: Tensor | None = None,
    accumulate: bool = True,
) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[-2])


@outer_operator.register_fake
def _(
    thin: Tensor, wide: Tensor, scale: float, dtype: torch.dtype, adapters: int = 0, index: Tensor | None = None
) -> Tensor:
    shape = (thin.shape[1], wide.shape[1])
    return thin.new_empty(shape if index is None else (adapters, *shape), dtype=dtype)

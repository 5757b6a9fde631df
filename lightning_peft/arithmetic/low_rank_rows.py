"""Low-rank updates of which each row of a batch has its own, as two batched products.

::

    y[r] = W x[r] + s_r B_r A_r x[r]        x: (rows, tokens, in)

    A: (rows, K, in)     the matrices of each row's adapter, padded with zeros to the largest rank K
    B: (rows, K, out)    the same, times the scale

The base runs once, on all rows. Rows without an adapter are not touched, so they are the base bit for bit. Padding adds zeros to
sums and gets no gradient; each adapter's parameters get the sum over its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.row_batches import AdapterRows

if TYPE_CHECKING:
    from lightning_peft.arithmetic.low_rank import LowRankLinear


def low_rank_rows(base: Callable[..., Any], rows: AdapterRows, x: Tensor) -> Tensor:
    """Return y (..., out) for x (..., in), whose first dimension holds the rows of the batch, each the same number of times."""
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]
    fresh = adapters[0].computed(base, x)
    y: Tensor = base(x) if fresh is None else fresh
    n, features = len(rows.index), y.shape[-1]
    parts = x.reshape(n, -1, x.shape[-1])  # (rows, tokens, in)
    out = y.reshape(n, -1, features)  # (rows, tokens, out)
    chosen = [row for row, place in enumerate(rows.index) if place >= 0]
    some = rows.numbers(chosen, x.device) if len(chosen) < n else None
    if some is not None:
        parts = parts.index_select(0, some)
    places = [rows.index[row] for row in chosen]
    A, B = _gathered(rows, places, y)
    parts = _dropped(parts, [adapters[place].dropout if adapters[place].training else 0.0 for place in places])
    h = torch.bmm(A, parts.to(y.dtype).transpose(1, 2)).transpose(1, 2)  # (rows, tokens, K)
    bias = _biases(rows, places, y)
    if some is None:
        out = out.baddbmm_(h, B) if fresh is not None else torch.baddbmm(out, h, B)
        out = out if bias is None else out + bias
    else:
        update = torch.bmm(h, B) if bias is None else torch.baddbmm(bias, h, B)
        out = out.index_add_(0, some, update) if fresh is not None else out.index_add(0, some, update)
    return out.view(*x.shape[:-1], features)


def _gathered(rows: AdapterRows, places: list[int], y: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (rows, K, in) and B (rows, K, out) of the adapter of each row, in the dtype of ``y``, the scales in B.

    Without gradients they are kept while the parameters do not change.
    """
    adapters: tuple[LowRankLinear, ...] = rows.adapters  # type: ignore[assignment]
    kept = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    mark: Any = None
    if kept:
        tensors = [tensor for adapter in adapters for tensor in adapter.held_tensors()]
        kept = not any(tensor.is_inference() for tensor in tensors)  # these do not count their changes
        if kept:
            scales = [adapter.scaling for adapter in adapters]
            mark = (y.dtype, y.device, scales, [(tensor.data_ptr(), tensor._version) for tensor in tensors])
    if kept and rows.held.get("mark") == mark:
        held: tuple[Tensor, Tensor] = rows.held["pair"]
        return held
    pairs = [adapter.row_factors() for adapter in adapters]
    K = max(len(A) for A, _ in pairs)
    downs = [F.pad(A, (0, 0, 0, K - len(A))) if len(A) < K else A for A, _ in pairs]
    scaled = [B * adapter.scaling for (_, B), adapter in zip(pairs, adapters, strict=True)]
    ups = [F.pad(B, (0, 0, 0, K - len(B))) if len(B) < K else B for B in scaled]
    index = rows.numbers(places, y.device)
    A, B = (torch.stack(list(one)).to(y).index_select(0, index) for one in (downs, ups))
    if kept:
        rows.held.update(mark=mark, pair=(A, B))
    return A, B


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

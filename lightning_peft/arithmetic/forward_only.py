"""A linear layer with a low-rank update where nothing is kept for backward: as few operations and as little Python as it takes.

::

    y = x W^T + b;  y += s (A x^T)^T B        x: (tokens, in)   W: (out, in)   A: (rank, in)   B: (rank, out)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.arithmetic.lean_linear import hooked, product_dtype

if TYPE_CHECKING:
    from lightning_peft.arithmetic.low_rank import LowRankLinear

_PLAIN = (nn.Parameter, Tensor)


def forward_only(adapter: LowRankLinear, base: Any, x: Tensor) -> Tensor | None:
    """Return y (..., out) of x (..., in) without anything for backward; None where that is not as simple as this.

    Args:
        adapter: one whose :attr:`~lightning_peft.arithmetic.low_rank.LowRankLinear.direct` is the type of ``base``.
        base: what the adapter acts around.
        x: the input.
    """
    if (adapter.dropout and adapter.training) or hooked(base) or torch.compiler.is_compiling():
        return None
    held, own = base._parameters, adapter._parameters
    weight, A, B = held.get("weight"), own.get("lora_A"), own.get("lora_B")
    if weight is None or A is None or B is None:
        return None
    if type(weight) not in _PLAIN or type(A) not in _PLAIN or weight.dtype is not x.dtype:
        return None
    y = F.linear(x, weight.t() if adapter.transposed else weight, held.get("bias"))
    if not y.is_contiguous():
        return None
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if y.dtype is A.dtype is x.dtype:
        out.addmm_(torch.mm(A, rows.t()).t(), B, alpha=adapter.scaling)
    elif A.dtype is product_dtype(rows, out) is torch.float32:
        out.add_(torch.mm(torch.mm(A, rows.float().t()).t(), B), alpha=adapter.scaling)
    else:
        adapter._update(rows, out, in_place=True)
    return y

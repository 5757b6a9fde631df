"""The weights of the experts of a mixture, and the formula they are in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of E experts, stacked; each expert's are (out, in), as in ``nn.Linear``."""

    gate_up: Tensor
    """(experts, 2 * ff, d), the gate above the up-projection; (experts, ff, d) where there is no gate."""
    down: Tensor
    """(experts, d, ff)."""
    gate_up_bias: Tensor | None = None
    """(experts, 2 * ff) or (experts, ff)."""
    down_bias: Tensor | None = None
    """(experts, d)."""
    gated: bool = True
    """Whether there is a gate."""

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights in ``dtype``."""
        up_bias = None if self.gate_up_bias is None else self.gate_up_bias.to(dtype)
        down_bias = None if self.down_bias is None else self.down_bias.to(dtype)
        return ExpertWeights(self.gate_up.to(dtype), self.down.to(dtype), up_bias, down_bias, self.gated)


def feed_forward(
    product: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    experts: Tensor,
    weights: ExpertWeights,
    between: Callable[[Sequence[Tensor]], Tensor],
) -> Tensor:
    """Return what each row's expert makes of it; ``product`` multiplies rows with the (out, in) matrix of their expert, transposed."""
    hidden = product(rows, weights.gate_up)
    if weights.gate_up_bias is not None:
        hidden = hidden + F.embedding(experts, weights.gate_up_bias)
    output = product(between(parts_of(hidden, weights.gated)), weights.down)
    return output if weights.down_bias is None else output + F.embedding(experts, weights.down_bias)


def parts_of(hidden: Tensor, gated: bool) -> Sequence[Tensor]:
    """Return the gate, if any, and the up-projection in what they give together."""
    return hidden.chunk(2, dim=-1) if gated else (hidden,)

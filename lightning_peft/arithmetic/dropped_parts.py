"""Dropout by a mask of one byte an element, and dropout of a part of the features with the mask that all of them would draw.

Processes that each hold a part of the features of one tensor, and draw the same random numbers, then drop what one process drops, and
go on with the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 2**16
"""Into how many equal parts a processor divides [0, 1): four draws are one random word, which is four times as fast as one each."""


def drawn_mask(shape: Sequence[int], p: float, device: torch.device) -> tuple[Tensor, float]:
    """Return which elements dropout at probability ``p`` keeps, as booleans, and the factor that keeps their mean.

    Example:
        >>> mask, factor = drawn_mask((100, 100), 0.25, torch.device("cpu"))
        >>> mask.dtype, round(float(mask.float().mean() * factor), 1)
        (torch.bool, 1.0)
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - p), 1.0 / (1.0 - p)
    count, dropped = math.prod(shape), min(round(p * _STEPS), _STEPS - 1)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)  # all 64 bits
    mask = words.view(torch.int16)[:count] >= dropped - _STEPS // 2
    return mask.view(shape), _STEPS / (_STEPS - dropped)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x`` with zeros where ``mask`` is false, of its shape."""
    return mask.view(torch.uint8).to(x.dtype).mul_(x)  # processors convert bytes several times as fast as booleans


def dropped_part(x: Tensor, p: float, part: tuple[int, int] | None) -> Tensor:
    """Return ``x`` (..., features) with dropout, in training.

    Args:
        x: a tensor, or a part of its last dimension.
        p: the probability of dropping an element.
        part: which of how many equal parts ``x`` is; None if it is whole.

    Example:
        >>> x = torch.ones(2, 6)
        >>> mask, factor = (torch.manual_seed(0), drawn_mask((2, 6), 0.5, x.device))[1]
        >>> left = (torch.manual_seed(0), dropped_part(x[:, :3], 0.5, (0, 2)))[1]
        >>> torch.equal((mask * factor)[:, :3], left)
        True
    """
    if part is None:
        return F.dropout(x, p)
    index, count = part
    width = x.shape[-1]
    mask, factor = drawn_mask((*x.shape[:-1], width * count), p, x.device)
    return masked(x, mask.narrow(-1, index * width, width).contiguous()) * factor

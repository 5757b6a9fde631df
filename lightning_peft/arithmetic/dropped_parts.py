"""Dropout of a part of the features, with the mask that dropout of all of them would draw.

Processes that each hold a part of the features of one tensor, and draw the same random numbers, then drop what one process drops, and
go on with the same random numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropped_part(x: Tensor, p: float, part: tuple[int, int] | None) -> Tensor:
    """Return ``x`` (..., features) with dropout, in training.

    Args:
        x: a tensor, or a part of its last dimension.
        p: the probability of dropping an element.
        part: which of how many equal parts ``x`` is; None if it is whole.

    Example:
        >>> x = torch.ones(2, 6)
        >>> whole, left = (torch.manual_seed(0), F.dropout(x, 0.5))[1], (torch.manual_seed(0), dropped_part(x[:, :3], 0.5, (0, 2)))[1]
        >>> torch.equal(whole[:, :3], left)
        True
    """
    if part is None:
        return F.dropout(x, p)
    index, count = part
    width = x.shape[-1]
    with torch.no_grad():
        mask = F.dropout(x.new_ones(*x.shape[:-1], width * count), p)
    return x * mask.narrow(-1, index * width, width)

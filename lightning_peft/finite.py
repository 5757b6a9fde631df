"""Whether all values of a tensor are numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def all_finite(tensor: Tensor) -> bool:
    """Tell whether ``tensor`` has no infinity and no NaN.

    Either would show in the sum, which reads the values once and writes none; only a sum that is too large is looked into.

    Example:
        >>> all_finite(torch.tensor([1.0, 2.0])), all_finite(torch.tensor([1.0, math.nan])), all_finite(torch.full((9,), 3e38))
        (True, False, True)
    """
    if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and math.isfinite(tensor.detach().sum()):
        return True
    return bool(torch.isfinite(tensor).all())

"""What is merged at one place, to be had again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class MergeState:
    """What is merged at one place: the tensors themselves, not copies of them."""

    base_layer: nn.Module
    """The module that is wrapped."""
    values: Mapping[str, Tensor]
    """Its parameters."""
    merged: tuple[str, ...]
    """Names of the merged adapters."""
    originals: Mapping[str, Tensor]
    """What merging replaced, by parameter name."""
    replaced: tuple[nn.Module, ...]
    """The module that merging replaced, if it did."""
    permanent: tuple[str, ...]
    """Names of the adapters that were merged without keeping what they replaced."""

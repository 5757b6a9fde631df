"""What an adapter layer hands out and takes in: what is merged there, and who decides about the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_peft.adapter_layer import AdapterLayer


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


class RowRunner(Protocol):
    """What decides, row by row of a batch, which adapters act at a place."""

    def run(self, layer: AdapterLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what ``layer`` returns for these arguments."""

"""Precision plugins that leave adapters in float32.

In Lightning a *plugin* is precision, input and output, or environment; these are of that kind, and have nothing to do with the plugins
that pluggy registers.

``bf16-true`` of Lightning rounds everything to bfloat16, adapters too: of their elements a quarter never moved in 30 steps at 2e-4, as
an update smaller than half a unit in the last place is lost. Here the frozen base is rounded and what is trained is not; under
autocast both meet in bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Literal

import torch
from lightning.pytorch.plugins import HalfPrecision, Precision
from torch import nn
from typing_extensions import override


class FrozenHalfPrecision(HalfPrecision):
    """Rounds the frozen tensors of a module to 16 bits and leaves what is trained in float32; both meet under autocast.

    Args:
        precision: ``bf16-true`` or ``16-true``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
        >>> [str(p.dtype) for p in FrozenHalfPrecision("bf16-true").convert_module(net).parameters()]
        ['torch.bfloat16', 'torch.bfloat16', 'torch.float32', 'torch.float32']
    """

    def __init__(self, precision: Literal["bf16-true", "16-true"] = "bf16-true") -> None:
        super().__init__(precision)
        self.dtype: torch.dtype = self._desired_input_dtype

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Round frozen parameters in place; buffers stay, as rotary frequencies and statistics need their digits."""
        for parameter in module.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)
        return module

    @contextlib.contextmanager
    @override
    def forward_context(self) -> Generator[None, None, None]:
        """Run under autocast."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.autocast(device, dtype=self.dtype):
            yield

    @contextlib.contextmanager
    @override
    def module_init_context(self) -> Generator[None, None, None]:
        """Build modules in the dtype they ask for."""
        yield


def keeping_adapters(plugin: Precision) -> Precision:
    """Return a plugin of the same precision that does not round what is trained: ``plugin`` itself, if it does not."""
    if type(plugin) is HalfPrecision:
        return FrozenHalfPrecision(plugin.precision)
    return plugin

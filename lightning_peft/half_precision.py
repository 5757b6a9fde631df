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
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import BitsandbytesPrecision, HalfPrecision, Precision
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.adapter_layer import AdapterLayer
from lightning_peft.errors import ConfigError


class FrozenHalfPrecision(HalfPrecision):
    """Rounds the frozen base to 16 bits and leaves what is trained, and adapters that are not active, in float32.

    Both meet under autocast. A :class:`~lightning_peft.PEFTMixin` and the strategies of this package take it by themselves for
    ``Trainer(precision="bf16-true")``; with other modules and strategies it is ``Trainer(plugins=[FrozenHalfPrecision()])``.

    Args:
        precision: ``bf16-true`` or ``16-true``. In float16 nothing scales the loss, and small gradients become zero.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
        >>> [str(p.dtype) for p in FrozenHalfPrecision("bf16-true").convert_module(net).parameters()]
        ['torch.bfloat16', 'torch.bfloat16', 'torch.float32', 'torch.float32']
    """

    def __init__(self, precision: Literal["bf16-true", "16-true"] = "bf16-true") -> None:
        super().__init__(precision)
        self.dtype: torch.dtype = self._desired_input_dtype
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Round frozen parameters in place; buffers stay, as rotary frequencies and statistics need their digits.

        Quantised weights stay too: what looks like numbers in float16 there are packed bytes.
        """
        kept = {id(p) for m in module.modules() if isinstance(m, AdapterLayer) for p in m.adapters.parameters()}
        for parameter in module.parameters():
            frozen = not parameter.requires_grad and id(parameter) not in kept
            if frozen and parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
                parameter.data = parameter.data.to(self.dtype)
        return module

    @override
    def connect(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        """Note where the model is, which is where autocast acts."""
        first = next(model.parameters(), None)
        self._device = self._device if first is None else first.device.type
        return super().connect(model, optimizers, lr_schedulers)

    @contextlib.contextmanager
    @override
    def forward_context(self) -> Generator[None, None, None]:
        """Run under autocast."""
        with torch.autocast(self._device, dtype=self.dtype, cache_enabled=False):
            yield

    @override
    def tensor_init_context(self) -> contextlib.AbstractContextManager[Any]:
        """Make tensors and modules in the dtype they ask for."""
        return contextlib.nullcontext()


def keeping_adapters(plugin: Precision) -> Precision:
    """Return a plugin of the same precision that does not round what is trained: ``plugin`` itself, if it does not.

    Raises:
        ConfigError: it is Lightning's ``BitsandbytesPrecision``, which quantises adapters too, and freezes them without a word.
    """
    if isinstance(plugin, BitsandbytesPrecision):
        raise ConfigError(
            "BitsandbytesPrecision quantises every linear layer, those of adapters too, which then are not trained; leave it out, and let the "
            "method quantise the base (QLoRA), or load a base that is quantised"
        )
    if type(plugin) is HalfPrecision:
        return FrozenHalfPrecision(plugin.precision)
    return plugin

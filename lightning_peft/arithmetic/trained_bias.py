"""The bias of a layer, trained where nothing else of the layer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.low_rank import CONVOLUTIONS, LowRankAdapter, LowRankSettings


class BiasAdapter(LowRankAdapter):
    """The trained bias of a layer that has no low-rank update, for ``bias='all'``."""

    scalable: ClassVar[bool] = True

    def __init__(self, settings: LowRankSettings, module: nn.Module) -> None:
        super().__init__(settings, module)
        self.channels_last = not isinstance(module, (*CONVOLUTIONS, nn.GroupNorm))

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_bias(base_layer)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X -> y, shapes as in the base."""
        y: Tensor = base(x)
        return self.add_bias(y, channel_dim=-1 if self.channels_last else 1 - y.dim())

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"bias": self.bias} if self.bias is not None else {}

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        return self.merged_with(base_layer)

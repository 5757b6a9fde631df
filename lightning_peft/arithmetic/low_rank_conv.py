"""Low-rank adapters for convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.low_rank import CONVOLUTIONS, LowRankAdapter, LowRankSettings, RankAxis


class LowRankConv(LowRankAdapter):
    """LoRA on convolutions: A (rank, in, *kernel) strides over the input as the base does, B (out, rank, 1, ...) mixes."""

    scalable: ClassVar[bool] = True
    paddable: ClassVar[bool] = True

    def __init__(self, settings: LowRankSettings, module: nn.Module) -> None:
        super().__init__(settings, module)
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        self.convolve = next(function for kind, function in CONVOLUTIONS.items() if isinstance(module, kind))
        self.settings = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        self.lora_A = self.new(self.rank, module.in_channels, *module.kernel_size)
        self.lora_B = self.new(module.out_channels, self.rank, *[1] * len(module.kernel_size))

    @override
    def rank_axes(self) -> Mapping[str, RankAxis]:
        return {"lora_A": RankAxis(0), "lora_B": RankAxis(1, up=True)}

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_down(self.lora_A)
        nn.init.zeros_(self.lora_B)
        self.reset_bias(base_layer)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (batch, in, *size) -> y (batch, out, *size)."""
        y: Tensor = base(x)
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        h = self.convolve(x, self.lora_A.to(y.dtype), **self.settings)  # (batch, rank, *size)
        y = y + self.convolve(h, self.lora_B.to(y.dtype)) * self.scaling
        return self.add_bias(y, channel_dim=1 - self.lora_B.dim())

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B, **self.bias_tensors()}

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        delta = torch.tensordot(self.lora_B.detach().flatten(1), self.lora_A.detach(), dims=1)  # (out, in, *kernel)
        return self.merged_with(base_layer, weight=self.scaling * delta)

"""LoRA on ``nn.MultiheadAttention``, which holds its projections as parameters rather than modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.low_rank import LowRankAdapter, LowRankSettings
from lightning_peft.errors import TargetError
from lightning_peft.interfaces import Target


class LowRankMultiheadAttention(LowRankAdapter):
    """LoRA on ``nn.MultiheadAttention``: its joint input projection and its output projection.

    The module reads its weights itself, so the updates are added to the weights for the time of the forward.
    """

    def __init__(self, settings: LowRankSettings, module: nn.MultiheadAttention, target: Target) -> None:
        super().__init__(settings, module)
        for name in ("dropout", "bias"):
            if getattr(settings, name) not in (0.0, "none"):
                raise TargetError(
                    f"LoRA {name}={getattr(settings, name)!r} was asked for at {target.path!r}, an nn.MultiheadAttention, "
                    f"whose projections are not modules: {name} is not possible there"
                )
        width = module.embed_dim
        self.lora_A, self.lora_B = self.new(self.rank, width), self.new(self.rank, 3 * width)
        self.out_lora_A, self.out_lora_B = self.new(self.rank, width), self.new(self.rank, width)

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_down(self.lora_A, self.out_lora_A)
        nn.init.zeros_(self.lora_B)
        nn.init.zeros_(self.out_lora_B)

    def deltas(self) -> dict[str, Tensor]:
        """Return what is added to each weight, (out, in)."""
        return {
            "in_proj_weight": self.scaling * (self.lora_B.t() @ self.lora_A),
            "out_proj.weight": self.scaling * (self.out_lora_B.t() @ self.out_lora_A),
        }

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of ``nn.MultiheadAttention``."""
        around: list[LowRankMultiheadAttention] = [self]
        while isinstance(base, functools.partial):  # further adapters inside this one: their updates add up
            assert isinstance(base.func, LowRankMultiheadAttention)
            around.append(base.func)
            base = base.args[0]
        assert isinstance(base, nn.MultiheadAttention)
        names = ("in_proj_weight", "out_proj.weight")
        weights: dict[str, Tensor] = {name: base.get_parameter(name) for name in names}
        for adapter in around:
            weights = {name: weights[name] + delta.to(weights[name].dtype) for name, delta in adapter.deltas().items()}
        return torch.func.functional_call(base, weights, args, kwargs)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {
            "lora_A.weight": self.lora_A,
            "lora_B.weight": self.lora_B.t(),
            "base_layer.out_proj.lora_A.weight": self.out_lora_A,
            "base_layer.out_proj.lora_B.weight": self.out_lora_B.t(),
        }

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        deltas = {name.replace(".", "__"): delta.detach() for name, delta in self.deltas().items()}
        return self.merged_with(base_layer, **deltas)

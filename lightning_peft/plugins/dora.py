"""DoRA: low-rank adaptation of the direction of each weight vector, beside a trained length.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv:2402.09353)::

    y = m / ||W + s B A|| * (W + s B A) x + b       s = alpha / rank   (or alpha / sqrt(rank))

    x ──┬── W (frozen) ──────(+)── * m / ||W + s B A|| ── + b ── y      A: (rank, in)   random
        └── A ── B ── s ──────┘                                         B: (out, rank)  zero
                                                                        m: (out,)       ||W||, one norm an output feature

As in section 4.3 of the paper the norm is a constant of backward. The arithmetic is in :mod:`lightning_peft.arithmetic.weight_decomposed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self, override

from lightning_peft.arithmetic.low_rank import CONVOLUTIONS
from lightning_peft.arithmetic.trained_bias import BiasAdapter
from lightning_peft.arithmetic.weight_decomposed import (
    WeightDecomposedConv,
    WeightDecomposedEmbedding,
    WeightDecomposedLinear,
)
from lightning_peft.errors import TargetError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.plugins.lora import LoRA
from lightning_peft.quantized_layers import unpacked_weight
from lightning_peft.targets import is_fused_experts


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA of the direction of each weight vector, and a trained length: linear, embedding and convolution layers.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = inject(model, DoRA(rank=2), "0")
        >>> trainable_summary(model).trainable
        80
    """

    name: ClassVar[str] = "dora"
    ties: ClassVar[bool] = False
    composable: ClassVar[bool] = False
    # transformers 5.23 looks for the magnitudes under another name and starts with those of the base.
    transformers_loads: ClassVar[bool] = False

    @override
    def supports(self, module: nn.Module) -> bool:
        odd = isinstance(module, nn.MultiheadAttention) or is_fused_experts(module)
        return not odd and super().supports(module)

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if target.slices:
            roles = ", ".join(part.role for part in target.slices)
            raise TargetError(
                f"DoRA was asked for at {roles} of {target.path!r}, a fused projection, of which it cannot adapt a slice; name the whole "
                f"module, such as {target.path.rsplit('.', 1)[-1]!r}"
            )
        plain = super().adapter(module, target)
        if isinstance(plain, BiasAdapter):
            return plain
        unpacked_weight(module)  # refuses weights that nobody can unpack
        settings = self.settings
        if isinstance(module, nn.Embedding):
            return WeightDecomposedEmbedding(settings, module, unpacked_weight)
        if isinstance(module, tuple(CONVOLUTIONS)):
            return WeightDecomposedConv(settings, module, unpacked_weight)
        return WeightDecomposedLinear(settings, module, unpacked_weight)

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {**super().to_hf_config(adapters), "use_dora": True}

    @classmethod
    @override
    def reads_hf_config(cls, config: Mapping[str, Any]) -> bool:
        return bool(config.get("use_dora"))

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> Self:
        return super().from_hf_config({key: value for key, value in config.items() if key != "use_dora"})


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register DoRA."""
    return [DoRA]

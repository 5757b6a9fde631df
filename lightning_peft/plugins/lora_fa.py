"""LoRA-FA: LoRA whose A stays at its random values, so that training need not keep the inputs of the adapted layers.

Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023 (arXiv:2308.03303)::

    y = W x + s B A x       s = alpha / rank   (or alpha / sqrt(rank))

    x ──┬── W (frozen) ──────────────(+)── y        A: (rank, in)   random, frozen
        └── A ── B ── s ──────────────┘             B: (out, rank)  zero, trained

The gradient of A would need x (tokens, in); that of B needs A x (tokens, rank) only. A is a buffer: saved, and not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.plugins.lora import LoRA
from lightning_peft.targets import is_conv1d_linear


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA with A frozen, on linear layers and slices of fused projections.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = inject(model, LoRAFA(rank=2), "0")
        >>> trainable_summary(model).trainable
        32
    """

    name: ClassVar[str] = "lora_fa"
    ties: ClassVar[bool] = False

    @override
    def supports(self, module: nn.Module) -> bool:
        # Elsewhere nothing would be saved: an embedding reads ids, attention adds the update to its weights, and torch keeps the
        # input of every convolution, trained or not.
        return isinstance(module, nn.Linear) or is_conv1d_linear(module)

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        adapter = super().adapter(module, target)
        A = adapter._parameters.pop("lora_A", None)  # none where only a bias is trained
        if A is not None:
            adapter.register_buffer("lora_A", A.detach())
        return adapter

    @classmethod
    @override
    def reads_hf_config(cls, config: Mapping[str, Any]) -> bool:
        return False  # HF PEFT writes LoRA-FA as LoRA: which of them it was is a matter of its optimizer


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register LoRA-FA."""
    return [LoRAFA]

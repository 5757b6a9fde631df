"""LoRA+: LoRA whose matrix B learns faster than its matrix A.

Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024 (arXiv:2402.12354)::

    y = W x + s B A x        A <- A - lr * update(A)        B <- B - lr * lr_ratio * update(B)

B starts at zero and A does not, so with one learning rate for both B learns too slowly, and the more so the wider the layer
is. Everything but the learning rates is LoRA's, and so are the files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.arithmetic.low_rank_embedding import LowRankEmbedding
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.plugins.lora import LoRA

_UP = frozenset({"lora_B", "out_lora_B", "bias"})
"""Parameters of adapters that learn at the rate of B."""


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    """LoRA with a learning rate for B that is ``lr_ratio`` times that of A.

    Where the optimizer is made by hand, make it over :func:`~lightning_peft.parameter_groups` and then call
    :func:`~lightning_peft.scale_learning_rates`; :class:`~lightning_peft.PEFTModule` does.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, parameter_groups, scale_learning_rates
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
        >>> _ = inject(model, LoRAPlus(rank=2, lr_ratio=8.0), "0")
        >>> optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.01)
        >>> scale_learning_rates(optimizer)
        >>> [(group["lr"], tuple(group["params"][0].shape)) for group in optimizer.param_groups]
        [(0.01, (2, 16)), (0.08, (2, 4))]
    """

    name: ClassVar[str] = "lora_plus"
    ties: ClassVar[bool] = False

    lr_ratio: float = 16.0
    """Learning rate of B, and of biases that are trained, as a multiple of the optimizer's."""
    embedding_lr_ratio: float = 1.0
    """Learning rate of both matrices of an embedding, as a multiple of the optimizer's."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr_ratio", "embedding_lr_ratio"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ConfigError(f"LoRAPlus {name} must be a positive number, got {value!r}")

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        adapter = super().adapter(module, target)
        names = [name for name, _ in adapter.named_parameters()]
        if isinstance(adapter, LowRankEmbedding):
            adapter.lr_ratios = dict.fromkeys(names, float(self.embedding_lr_ratio))
        elif faster := [name for name in names if name in _UP or name.endswith("_lora_B")]:
            adapter.lr_ratios = dict.fromkeys(faster, float(self.lr_ratio))
        elif names:
            raise TargetError(
                f"LoRAPlus was asked to adapt {target.path!r}, a {type(module).__name__}, and does not know which of {names} is B; "
                "leave it out of the targets, or use LoRA"
            )
        return adapter


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register LoRA+."""
    return [LoRAPlus]

"""OLoRA: LoRA that starts from the QR decomposition of the weight.

Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024 (arXiv:2406.01775)::

    W = Q R      B0 = Q[:, :rank]      A0 = R[:rank]

    y = W x + s (B A - B0 A0) x        A starts at A0, B at B0, s = alpha / rank

The columns of B0 are orthonormal. The paper trains B A over W - s B0 A0, which is the same function; here the base stays as it
is: see :mod:`lightning_peft.arithmetic.initial_pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.initial_pairs import InitialPairLinear
from lightning_peft.arithmetic.low_rank import LowRankAdapter
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Method, Target
from lightning_peft.plugins.lora import LoRA
from lightning_peft.targets import is_conv1d_linear


@dataclass(frozen=True, kw_only=True)
class OLoRA(LoRA):
    """LoRA on linear layers whose B starts with orthonormal columns and whose A starts with the weight's part along them.

    Example:
        >>> import torch
        >>> from lightning_peft import inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> _ = inject(model, OLoRA(rank=2), "0")
        >>> B = model[0].adapters["default"].lora_B
        >>> torch.allclose(B @ B.t(), torch.eye(2), atol=1e-6)
        True
    """

    name: ClassVar[str] = "olora"
    ties: ClassVar[bool] = False
    init: ClassVar[Literal["kaiming"]] = "kaiming"  # type: ignore[misc]  # no field here: A and B come from the weight

    @override
    def supports(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_conv1d_linear(module)

    @override
    def linear_adapter(self, module: nn.Module, target: Target) -> LowRankAdapter:
        return OrthonormalLinear(self.settings, module, target)


class OrthonormalLinear(InitialPairLinear):
    """An update that starts from the QR decomposition of the weight."""

    @override
    def pair(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(weight)  # (out, k), (k, in)
        return R[: self.pair_rank], Q[:, : self.pair_rank]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register OLoRA."""
    return [OLoRA]

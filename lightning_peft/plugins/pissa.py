"""PiSSA: LoRA that starts from the largest singular values of the weight.

Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", 2024
(arXiv:2404.02948)::

    W = U S V^T      s B0 A0 = U_r S_r V_r^T      A0 = sqrt(S_r / s) V_r^T      B0 = U_r sqrt(S_r / s)

    y = W x + s (B A - B0 A0) x        A starts at A0, B at B0, s = alpha / rank

The paper trains B A over the residual W - s B0 A0. That is the same function with the same gradients; here the base stays as it
is: see :mod:`lightning_peft.arithmetic.initial_pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.initial_pairs import InitialPairLinear, principal_directions
from lightning_peft.arithmetic.low_rank import LowRankAdapter, LowRankSettings
from lightning_peft.errors import ConfigError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Method, Target
from lightning_peft.plugins.lora import LoRA
from lightning_peft.targets import is_conv1d_linear


@dataclass(frozen=True, kw_only=True)
class PiSSA(LoRA):
    """LoRA on linear layers whose A and B start at the principal singular vectors of the weight.

    Example:
        >>> import torch
        >>> from lightning_peft import inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> _ = inject(model, PiSSA(rank=2, alpha=2), "0")
        >>> adapter = model[0].adapters["default"]
        >>> largest = torch.linalg.matrix_norm(model[0].base_layer.weight, 2)
        >>> torch.allclose(torch.linalg.matrix_norm(adapter.lora_B.t() @ adapter.lora_A, 2), largest)
        True
    """

    name: ClassVar[str] = "pissa"
    ties: ClassVar[bool] = False
    init: ClassVar[Literal["kaiming"]] = "kaiming"  # type: ignore[misc]  # no field here: A and B come from the weight

    alpha: float = 8.0
    """Scale of the update: it is multiplied by alpha / rank. The paper has alpha = rank."""
    svd: Literal["exact", "fast"] = "exact"
    """How the singular vectors are found: all of them, or the largest ones by a randomised method."""
    iterations: int = 4
    """Power iterations of ``fast``: more are closer to ``exact`` and take longer."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for label, alpha in {
            "alpha": self.alpha,
            **{f"alpha_pattern[{key!r}]": value for key, value in self.alpha_pattern.items()},
        }.items():
            if alpha <= 0:
                raise ConfigError(f"PiSSA {label} must be positive, got {alpha!r}")
        if self.svd not in ("exact", "fast"):
            raise ConfigError(f"PiSSA svd must be one of exact, fast, got {self.svd!r}")
        if not isinstance(self.iterations, int) or isinstance(self.iterations, bool) or self.iterations < 0:
            raise ConfigError(f"PiSSA iterations must be 0 or a positive integer, got {self.iterations!r}")

    @override
    def supports(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_conv1d_linear(module)

    @override
    def linear_adapter(self, module: nn.Module, target: Target) -> LowRankAdapter:
        return PrincipalLinear(self.settings, module, target, self.iterations if self.svd == "fast" else None)


class PrincipalLinear(InitialPairLinear):
    """An update that starts from the principal singular vectors of the weight.

    Args:
        settings: the hyperparameters at this place.
        module: the layer to adapt.
        target: where it stands.
        iterations: power iterations of a randomised decomposition; None for a full one.
    """

    def __init__(self, settings: LowRankSettings, module: nn.Module, target: Target, iterations: int | None) -> None:
        super().__init__(settings, module, target)
        self.iterations = iterations

    @override
    def pair(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        U, S, Vh = principal_directions(weight, self.pair_rank, iterations=self.iterations)
        root = (S / self.scaling).sqrt()  # (rank,)
        return root[:, None] * Vh, U * root


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register PiSSA."""
    return [PiSSA]

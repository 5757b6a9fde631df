"""LoftQ: LoRA over a quantised base that starts from what quantising took away.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023 (arXiv:2310.08659)::

    P = 0;  repeat:  Q = quantised(W - P)      P = the best approximation of W - dequantised(Q) of the rank of the adapter

    y = dequantised(Q) x + s B A x             s B A starts at P, so that the model starts closer to the one in full precision

:meth:`LoftQ.prepare` sees the weight last. It decomposes the error while it quantises, with the quantizer itself in the loop, and leaves
the two factors of P beside the packed weight, from where a fresh adapter takes them. One round packs the weight as QLoRA does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.initial_pairs import principal_directions
from lightning_peft.arithmetic.low_rank import LowRankAdapter, LowRankLinear
from lightning_peft.errors import ConfigError, InjectionError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Method, Quantizer, Target
from lightning_peft.plugins.qlora import QLoRA
from lightning_peft.quantized_layers import packed_layers
from lightning_peft.targets import matches

_FACTORS = "_lightning_peft_loftq_factors"
"""Attribute of a layer that was quantised here: what a fresh adapter starts from, and the method."""


@dataclass(frozen=True)
class Factors:
    """What quantising a layer took away, up to a rank."""

    A: Tensor
    """(rank, in)"""
    B: Tensor
    """(out, rank)"""
    method: LoftQ
    """The method that quantised the layer."""


@dataclass(frozen=True, kw_only=True)
class LoftQ(QLoRA):
    """LoRA over a base that is quantised before adapters go in, starting from the principal part of the quantisation error.

    Example:
        >>> import torch
        >>> from lightning_peft import inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> x = torch.randn(8, 64)
        >>> before = model(x)
        >>> _ = inject(model, LoftQ(rank=32, skip=["2"], compute_dtype="float32"), "0")
        >>> bool((model(x) - before).norm() < 0.1 * before.norm())
        True
    """

    name: ClassVar[str] = "loftq"
    ties: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False
    composable: ClassVar[bool] = False
    exact_packed_base: ClassVar[bool] = True
    merge_refusal: ClassVar[str] = (
        "and its base is quantised: packed weights cannot take an update. It makes up for what quantising took away, so it belongs to "
        "no other base either; keep the adapter active instead, or merge with quantized='dequantize' or quantized='requantize'"
    )

    iterations: int = 1
    """Rounds of quantising and decomposing; the paper has 5. One packs the weight as QLoRA does."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.iterations, int) or isinstance(self.iterations, bool) or self.iterations < 1:
            raise ConfigError(f"LoftQ iterations must be a positive integer, got {self.iterations!r}")
        for label, alpha in {
            "alpha": self.alpha,
            **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()},
        }.items():
            if alpha <= 0:
                raise ConfigError(f"LoftQ {label} must be positive, got {alpha!r}")

    # -- the base --------------------------------------------------------------------------------------------------

    @override
    def prepare(self, model: nn.Module) -> None:
        """Quantise the linear layers of ``model`` in place, one by one, and keep with each what its adapter starts from.

        A base that LoftQ prepared is left as it is.

        Raises:
            TargetError: a target of ``skip`` matches nothing.
            InjectionError: the base is quantised already, but not by LoftQ; or as :meth:`QLoRA.prepare`.
        """
        packed = packed_layers(model)
        if packed and not any(_factors(module) for module in packed.values()):
            raise InjectionError(
                f"LoftQ starts from what quantising takes away, but {min(packed)!r} is quantised already and its full weight is gone; "
                "load the base in 16 or 32 bit, or use QLoRA"
            )
        super().prepare(model)

    @override
    def packer(self, model: nn.Module, family: ModelFamily) -> Callable[[str, nn.Linear], nn.Module]:
        ranks: dict[str, int] = {}
        for word, rank in self.rank_pattern.items():
            for path in matches(word, model, family):
                ranks.setdefault(path, rank)
        quantizer = self.quantizer

        def pack(path: str, linear: nn.Linear) -> nn.Module:
            rank = min(ranks.get(path, self.rank), linear.in_features, linear.out_features)
            packed, A, B = quantized_with_error(quantizer, linear, rank, self.iterations)
            vars(packed)[_FACTORS] = Factors(A, B, self)
            return packed

        return pack

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        """Return the targets, once it is known that every layer quantised for an adapter gets one.

        Raises:
            InjectionError: with several rounds, a quantised layer has no adapter: it would act as another weight.
        """
        chosen = {target.path for target in targets}
        for path, module in packed_layers(model).items():
            held = _factors(module)
            if held is not None and held.method.iterations > 1 and path not in chosen:
                raise InjectionError(
                    f"LoftQ with iterations={held.method.iterations} quantises {path!r} for an adapter that it does not get here, and so "
                    "as another weight; adapt it too, name it in skip=, or use iterations=1, and load the base again"
                )
        return super().expand(model, targets, family)

    @override
    def loaded_over(self, model: nn.Module) -> Method:
        """Return this method over a full-precision base, which is quantised again, and over one it prepared; else ``QLoRA``."""
        packed = packed_layers(model)
        if not packed or any(held.method == self for module in packed.values() if (held := _factors(module))):
            return self
        return QLoRA(**{field.name: getattr(self, field.name) for field in dataclasses.fields(QLoRA)})

    # -- adapters --------------------------------------------------------------------------------------------------

    @override
    def linear_adapter(self, module: nn.Module, target: Target) -> LowRankAdapter:
        held = _factors(module)
        if held is None:
            return super().linear_adapter(module, target)
        if target.slices:
            raise TargetError(f"LoftQ cannot adapt a slice of {target.path!r}; name the whole module")
        if len(held.A) != self.rank:
            raise InjectionError(
                f"LoftQ quantised {target.path!r} for rank {len(held.A)}, but an adapter of rank {self.rank} was asked for; "
                f"use rank {len(held.A)} there, or load the base again"
            )
        return CompensatingLinear(self.settings, module)


class CompensatingLinear(LowRankLinear):
    """LoRA on a quantised layer that starts from what quantising took away."""

    @override
    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module) -> None:
        super().reset_parameters(base_layer)
        held = _factors(base_layer)
        assert held is not None
        root = self.scaling**0.5
        self.lora_A.copy_(held.A / root)
        self.lora_B.copy_(held.B.t() / root)


@torch.no_grad()
def quantized_with_error(
    quantizer: Quantizer, linear: nn.Linear, rank: int, iterations: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return ``linear`` quantised, and A (rank, in), B (out, rank) such that its weight plus B A is close to what it was."""
    weight = linear.weight.detach()
    packed = quantizer.quantize(linear)
    A, B = _principal(weight, quantizer.dequantized(packed), rank)
    for _ in range(iterations - 1):
        rest = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        rest.weight = nn.Parameter((weight.float() - B @ A).to(weight.dtype), requires_grad=False)
        rest.bias = linear.bias
        packed = quantizer.quantize(rest.train(linear.training))
        A, B = _principal(weight, quantizer.dequantized(packed), rank)
    return packed, A, B


def _principal(weight: Tensor, dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = principal_directions(weight.float() - dense.float(), rank)
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def _factors(module: nn.Module) -> Factors | None:
    found: Any = vars(module).get(_FACTORS)
    return found if isinstance(found, Factors) else None


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register LoftQ."""
    return [LoftQ]

"""Mixtures of LoRA at linear layers: several low-rank pairs beside one frozen weight, and a router that weighs them token by token.

Dense ("soft") routing over all experts: Dou et al., "LoRAMoE", 2023 (arXiv:2312.09979). The top-k experts of each token, and
numbers of experts that differ from layer to layer: Gao et al., "Higher Layers Need More LoRA Experts" (MoLA), 2024
(arXiv:2402.08562)::

    y = W x + s sum_e g_e B_e A_e x        A_e: (rank, in) random      B_e: (out, rank) zero      s = alpha / rank

    soft     g = softmax(R x)                                          R: router (experts, in), float32
    top-k    g = softmax(R x) at the k largest, divided by their sum; zero elsewhere

        ┌── W ─────────────────────────────────────────────(+)── y
    x ──┼── A_1 .. A_E ── (n, E * rank) ── * g ── B_1 .. B_E ┘
        └── R ── softmax, top-k ── g (n, E) ┘

All experts run as two products of width E * rank with the gates between them: no token is sorted or moved. With all B zero a
fresh mixture is the layer bit for bit; until B moves, the router has no gradient but that of its losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.moe.feed_forward import MLPs
from lightning_peft.moe.low_rank_mixtures import MixtureAdapter, MixtureMethod
from lightning_peft.moe.padding import MaskReader, mask_argument, read_note
from lightning_peft.targets import is_conv1d_linear, is_linear


@dataclass(frozen=True)
class _Place(Target):
    """The attention of a block, or a layer in it or behind it, which attention tells what is padding."""


@dataclass(frozen=True, kw_only=True)
class LoRAMixture(MixtureMethod):
    """A mixture of LoRA experts at each linear layer.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = inject(model, LoRAMixture(experts=4, rank=2), "0")
        >>> trainable_summary(model).trainable  # 4 experts of 2 * (16 + 16), and a router of 4 * 16
        320
    """

    name: ClassVar[str] = "lora_mixture"
    merge_refusal: ClassVar[str] = (
        "a mixture, whose update differs from token to token, and no exporter writes it; keep it as an adapter folder, "
        "save_adapter(model, folder), or train LoRA where the result has to be merged"
    )

    choices = {**MixtureMethod.choices, "routing": ("top_k", "soft")}  # noqa: RUF012

    routing: Literal["top_k", "soft"] = "top_k"
    """Whether each token goes to its top_k experts or to all of them, weighed by their probabilities."""

    @classmethod
    def loramoe(cls, **fields: Any) -> LoRAMixture:
        """Return the mixture of Dou et al. but for its localised balance: all experts, six of rank 4; ``fields`` differ from that."""
        return cls(**{"routing": "soft", "experts": 6, "rank": 4, "alpha": 32.0, "dropout": 0.05, **fields})

    @classmethod
    def mola(cls, depth: int, counts: tuple[int, int, int, int] = (2, 4, 6, 8), **fields: Any) -> LoRAMixture:
        """Return the mixture of Gao et al.: the top two experts, and ``counts`` experts in the four quarters of ``depth`` blocks.

        Example:
            >>> LoRAMixture.mola(8).experts_pattern["re:.*[.]7[.].*"]
            8
        """
        if depth < 4 or depth % 4:
            raise ConfigError(
                f"LoRAMixture.mola depth must be a multiple of 4, got {depth!r}; give experts_pattern instead"
            )
        pattern = {f"re:.*[.]{layer}[.].*": counts[4 * layer // depth] for layer in range(depth)}
        return cls(**{"experts": counts[-1], "experts_pattern": pattern, **fields})

    @property
    @override
    def soft(self) -> bool:
        return self.routing == "soft"

    @override
    def supports(self, module: nn.Module) -> bool:
        return is_linear(module)

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        """Add the self-attention of each block, which is told what is padding and tells the layers in it and behind it."""
        mlps = MLPs(model, family)
        readers: dict[str, _Place] = {}
        places: list[Target] = []
        for target in targets:
            attention = mlps.attention(target.path)
            inside = [path for path in mlps.by_role["attention"] if target.path.startswith(f"{path}.")]
            # Keys and values of attention to an encoder are of other tokens.
            if attention is None or mask_argument(mlps.modules[attention]) is None or inside not in ([], [attention]):
                places.append(target)
                continue
            readers.setdefault(attention, _Place(path=attention, only_listens=True))
            places.append(_Place(path=target.path, slices=target.slices, rule=target.rule))
        return [*places, *readers.values()]

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        noted = isinstance(target, _Place)
        if noted and not is_linear(module):
            return MaskReader(module)
        if target.slices:
            raise TargetError(
                f"LoRAMixture was asked for {', '.join(part.role for part in target.slices)}, a slice of {target.path!r}, and adapts "
                "whole layers; name the layer itself"
            )
        return LowRankLinearExperts(self, module, noted=noted)


class LowRankLinearExperts(MixtureAdapter):
    """The router and the pairs of one linear layer (quantised ones too) or ``Conv1D``.

    Args:
        method: the hyperparameters at this place.
        module: the layer.
        noted: whether the attention of its block notes what is padding.
    """

    def __init__(self, method: LoRAMixture, module: nn.Module, *, noted: bool = False) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        widths = weight.shape if is_conv1d_linear(module) else (module.in_features, module.out_features)
        self.in_features, self.out_features = (int(width) for width in widths)  # type: ignore[arg-type]
        super().__init__(method, weight, self.in_features)
        self.noted = noted
        self.new_pair("", self.in_features, self.out_features)

    @property
    @override
    def pairs(self) -> tuple[str, ...]:
        return ("",)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (..., in) -> y (..., out)."""
        y: Tensor = base(x)
        x = x.reshape(-1, self.in_features)
        gates = self.gates(x).t()[:, None]  # (E, 1, n)
        if self.training and self.method.dropout:
            x = F.dropout(x, self.method.dropout)
        A, B = (tensor.to(y.dtype).flatten(0, 1) for tensor in self.pair(""))  # (E * rank, in), (E * rank, out)
        h = A @ x.to(y.dtype).t()  # (E * rank, n)
        h = (h.view(self.num_experts, self.rank, -1) * gates.to(y.dtype)).flatten(0, 1)
        return torch.addmm(y.reshape(-1, self.out_features), h.t(), B, alpha=self.scaling).view(y.shape)

    def gates(self, x: Tensor) -> Tensor:
        """X (n, in) -> the weight of each expert for each token (n, experts), in float32."""
        grid = read_note(len(x)) if self.noted else None
        assignment = self.assign(x, grid.mask if grid is not None else None)
        weights, chosen = (part.view(len(x), -1) for part in (assignment.weights, assignment.experts))
        return torch.zeros_like(assignment.logits).scatter(1, chosen, weights)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register mixtures of LoRA."""
    return [LoRAMixture]

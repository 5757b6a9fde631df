"""MixLoRA: the MLP becomes a mixture of low-rank experts that share its frozen weights, and a router picks them for each token.

Li et al., "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts", 2024 (arXiv:2404.15159).
With G, U, D the gate, the up- and the down-projection of the frozen MLP, and dG_e = s B_e A_e and so on the pairs of expert e::

    y = sum_k w_k [D + dD_e](act([G + dG_e] x) * [U + dU_e] x)       e: the k-th of the top_k experts of the token x
    w = softmax(R x) of those experts, divided by their sum           R: router (experts, width), float32

                ┌── R ── top-k ── e, w ──────┐
    x ──────────┼── G x, U x  (once) ── [ + dG_e x, + dU_e x; act; * ] ── h_k ──┬── sum_k w_k h_k ── D ──(+)── y
                └── A_e x, all experts at once ┘                                └── sum_k w_k dD_e h_k ───┘

The base projections run once a token, however many experts it has: G x and U x are the same for all, and D is linear, so
sum_k w_k D h_k = D sum_k w_k h_k. As the weights sum to one, that is D (h_1 + sum_k w_k (h_k - h_1)): with all B zero a fresh
mixture is the MLP bit for bit. Until B moves, the router has no gradient but that of its losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.moe.between import Between
from lightning_peft.moe.expert_weights import ExpertWeights
from lightning_peft.moe.feed_forward import MLPs
from lightning_peft.moe.low_rank_mixtures import MixtureAdapter, MixtureMethod
from lightning_peft.moe.low_rank_segments import SegmentPlan, Segments, run_segments
from lightning_peft.moe.mlp_parts import MLPParts
from lightning_peft.moe.padding import MaskReader, mask_argument, take_note
from lightning_peft.quantized_layers import dense_weight
from lightning_peft.routers import Assignment

_READER = "padding"


@dataclass(frozen=True, kw_only=True)
class MixLoRA(MixtureMethod):
    """A top-k mixture of low-rank experts over a shared frozen MLP, gated or not.

    Example:
        >>> from lightning_peft import inject
        >>> from lightning_peft.testing import tiny_llama
        >>> model = tiny_llama()
        >>> inject(model, MixLoRA(experts=4, rank=2)).paths
        ['model.layers.0.mlp', 'model.layers.1.mlp']
    """

    name: ClassVar[str] = "mix_lora"
    default_targets: ClassVar[tuple[str, ...]] = ("mlp",)
    merge_refusal: ClassVar[str] = (
        "a mixture, whose update differs from token to token; write the whole model with the exporter 'mixtral', an HF PEFT adapter with "
        "'mixtral_peft', or keep the mixture as an adapter folder: save_adapter(model, folder)"
    )
    normalized_weights: ClassVar[bool] = True
    choices = {**MixtureMethod.choices, "implementation": ("auto", "segments", "wide")}  # noqa: RUF012

    rank: int = 16
    """Rank of each expert's pair at each projection."""
    alpha: float = 32.0
    """Scale of the experts: their updates are multiplied by alpha / rank."""
    dropout: float = 0.05
    """Probability of dropping an input of the low-rank path in training."""
    balance_coef: float = 1e-3
    """Factor of the load-balancing loss of each layer, which training adds; 0 for none."""
    implementation: Literal["auto", "segments", "wide"] = "auto"
    """How the pairs run: tokens sorted by expert, one product an expert, or one product over the pairs of all experts."""

    @override
    def supports(self, module: nn.Module) -> bool:
        return MLPParts.of(module) is not None

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        """Add the attention of each block, which is told what is padding and tells the mixture."""
        mlps, modules = MLPs(model, family), dict(base_modules(model))
        found = dict.fromkeys(mlps.attention(target.path) for target in targets)
        readers = [path for path in found if path is not None and mask_argument(unwrapped(modules[path])) is not None]
        return [*targets, *(Target(path=path, rule=_READER, only_listens=True) for path in readers)]

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if target.rule == _READER:
            return MaskReader(module)
        return LowRankMLPExperts(self, module, target)


class LowRankMLPExperts(MixtureAdapter):
    """The router and the pairs of one MLP: ``up`` and ``down``, and ``gate`` where it has one.

    Args:
        method: the hyperparameters at this place.
        module: the MLP.
        target: the place, for messages.
    """

    def __init__(self, method: MixLoRA, module: nn.Module, target: Target) -> None:
        parts = MLPParts.of(module)
        if parts is None or target.slices:
            raise TargetError(f"MixLoRA needs a whole MLP, and {target.path!r} is a {type(module).__name__}")
        super().__init__(method, getattr(module, parts.up).weight, parts.width)
        self.parts, self.path, self.implementation = parts, target.path, method.implementation
        for name in self.inward:
            self.new_pair(name, parts.width, parts.inner)
        self.new_pair("down", parts.inner, parts.width)

    @property
    def inward(self) -> tuple[str, ...]:
        """Names of the pairs that read the input of the MLP."""
        return ("gate", "up") if self.parts.gated else ("up",)

    @property
    @override
    def pairs(self) -> tuple[str, ...]:
        return (*self.inward, "down")

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.parts.check(base_layer, self.path)
        super().reset_parameters(base_layer)

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """X (..., width) -> y (..., width)."""
        around, others = [self], []
        while isinstance(base, functools.partial):  # further adapters inside this one: mixtures act together, innermost
            inner: Adapter = base.func  # type: ignore[assignment]
            if isinstance(inner, LowRankMLPExperts):
                around.append(inner)
            else:
                others.append(inner)
            base = base.args[0]
        assert isinstance(base, nn.Module)
        call: Callable[..., Any] = functools.partial(_mixed_mlp, base, around)
        for adapter in reversed(others):
            call = functools.partial(adapter, call)
        return call(*args, **kwargs)

    def mix(self, module: nn.Module, x: Tensor, bases: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mixed hidden features (n, inner), and what the experts' down-projections add to the output (n, width).

        Args:
            module: the MLP.
            x: its input (n, width).
            bases: what its gate, if it has one, and its up-projection make of it (n, inner).
            mask: which tokens are no padding (n,), bool; None for all.
        """
        assignment = self.assign(x, mask)
        n, dtype = len(x), bases[-1].dtype
        A = torch.stack([self.pair(name)[0] for name in self.inward], dim=1)  # (E, 1 or 2, rank, width)
        low = self._dropped(x).to(dtype) @ A.to(dtype).flatten(0, 2).t()  # (n, E * 1 or 2 * rank)
        low = low.view(n, self.num_experts, len(bases), self.rank)
        between = self.parts.between(module)
        mixed, spread = (self._wide if self._is_wide(x) else self._segments)(between, assignment, low, bases)
        rows = spread.to(dtype).flatten(1)  # (n, E * rank)
        return mixed, self.scaling * (rows @ self.pair("down")[1].to(dtype).flatten(0, 1))

    def _is_wide(self, x: Tensor) -> bool:
        if self.implementation != "auto":
            return self.implementation == "wide"
        # How many tokens an expert has is known on the device only: asking makes the host wait, or a compiler give up.
        return x.device.type != "cpu" or torch.compiler.is_compiling()

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.method.dropout) if self.training and self.method.dropout else x

    def _segments(
        self, between: Between, assignment: Assignment, low: Tensor, bases: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Sort the slots by expert and run one product an expert."""
        n, experts, parts, rank = low.shape
        chosen = assignment.experts.view(n, -1)
        segments = Segments.of(chosen, experts)
        plan = SegmentPlan(segments, between, self.scaling, self.method.dropout if self.training else 0.0)
        weights, dtype = _weights(assignment), bases[-1].dtype
        own = low.view(n * experts, parts * rank).index_select(0, segments.tokens * experts + segments.experts)
        ups = [self.pair(name)[1].to(dtype) for name in self.inward]
        mixed, thin = run_segments(plan, weights, own, self.pair("down")[0].to(dtype), bases, ups)
        thin = thin.index_select(0, segments.places).view(n, -1, rank) * weights[..., None]  # (n, k, rank)
        spread = torch.zeros(n, experts, rank, dtype=thin.dtype, device=low.device)
        return mixed, spread.scatter(1, chosen[..., None].expand(thin.shape), thin)

    def _wide(
        self, between: Between, assignment: Assignment, low: Tensor, bases: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the pairs of all experts as one, on rows that are zero but at the expert of the token."""
        n, experts, _, rank = low.shape
        chosen = assignment.experts.view(n, -1, 1) == torch.arange(experts, device=low.device)  # (n, k, E)
        weights = _weights(assignment)[..., None]  # (n, k, 1)
        ups = [self.pair(name)[1].to(low.dtype).flatten(0, 1) for name in self.inward]  # (E * rank, inner)
        down = self.pair("down")[0].to(low.dtype).flatten(0, 1)  # (E * rank, inner)
        hidden, spreads = [], []
        for k in range(chosen.shape[1]):
            here = chosen[:, k, :, None]  # (n, E, 1)
            own = torch.where(here[:, :, None], low, 0.0).unbind(2)  # (n, E, rank) for each of the bases
            each = zip(bases, own, ups, strict=True)
            hidden.append(
                between([torch.addmm(base, rows.flatten(1), B, alpha=self.scaling) for base, rows, B in each])
            )
            thin = (self._dropped(hidden[-1]).to(low.dtype) @ down.t()).view(n, experts, rank)
            spreads.append(torch.where(here, thin, 0.0) * weights[:, k, :, None])
        first_h, *others = hidden  # weights are float32 at least, so the sum is
        changes = [(h - first_h) * weight for h, weight in zip(others, weights.unbind(1)[1:], strict=True)]
        return functools.reduce(torch.add, changes, first_h).to(first_h.dtype), functools.reduce(torch.add, spreads)

    @torch.no_grad()
    def expert_weights(self, base_layer: nn.Module) -> ExpertWeights:
        """Return the experts as whole weights, W + s B_e A_e for each projection: what other software runs."""
        parts = self.parts
        linears = {name: getattr(base_layer, getattr(parts, name)) for name in self.pairs}
        held = {name: dense_weight(linear) for name, linear in linears.items()}  # (out, in)
        biases = {name: getattr(linear, "bias", None) for name, linear in linears.items()}
        if parts.gate == parts.up:  # one module computes both
            held["gate"], held["up"] = held["up"].chunk(2)
            if biases["up"] is not None:
                biases["gate"], biases["up"] = biases["up"].chunk(2)
        whole = {name: held[name] + self.update_of(name) for name in self.pairs}  # (E, out, in)
        stacked = {name: None if b is None else b.expand(self.num_experts, -1) for name, b in biases.items()}
        inner = [stacked[name] for name in self.inward]
        return ExpertWeights(
            gate_up=torch.cat([whole[name] for name in self.inward], dim=1),
            down=whole["down"],
            gate_up_bias=None if any(b is None for b in inner) else torch.cat(inner, dim=1),  # type: ignore[arg-type]
            down_bias=stacked["down"],
            gated=parts.gated,
        )


def _mixed_mlp(module: nn.Module, mixtures: Sequence[LowRankMLPExperts], x: Tensor) -> Tensor:
    """X (..., width) -> what the MLP ``module`` with the experts of ``mixtures`` makes of it; several add what each changes."""
    parts = mixtures[0].parts
    gate, up = parts.inward(module, x)
    bases = [part.reshape(-1, parts.inner) for part in (gate, up) if part is not None]
    flat = x.reshape(-1, parts.width)
    grid = take_note(len(flat))
    results = [one.mix(module, flat, bases, grid.mask if grid is not None else None) for one in mixtures]
    mixed, update = results[0]
    if len(results) > 1:
        hidden = parts.between(module)(bases)
        for other, more in results[1:]:
            mixed, update = mixed + (other - hidden), update + more
    return parts.outward(module, mixed.view(*x.shape[:-1], parts.inner), update.view(x.shape))


def _weights(assignment: Assignment) -> Tensor:
    """Return the weight of each choice of each token (n, k); they sum to one."""
    n = len(assignment.logits)
    weights = assignment.weights.view(n, -1)
    if assignment.valid is None:
        return weights
    first = (
        torch.arange(weights.shape[1], device=weights.device) == 0
    )  # padding has no weight: there its first choice counts
    return torch.where(assignment.valid.view(n, -1), weights, first.to(weights.dtype))


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register MixLoRA."""
    return [MixLoRA]

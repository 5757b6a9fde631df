"""Upcycling: the MLPs of a dense model become mixtures of experts, which start as copies of them.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", 2022 (arXiv:2212.05055); weight
scaling and fine-grained experts by virtual groups: He et al., "Upcycling Large Language Models into Mixture of Experts", 2024
(arXiv:2410.07524); re-drawn neurons: Nakamura et al., "Drop-Upcycling", 2025 (arXiv:2502.19261)::

    x ──┬── router ── p = softmax(R x) ── which experts, with what weight w
        └── expert 1 ... expert E ── y = Σ_e w_e f_e(x)          f_e(x) = D_e (act(G_e x) * U_e x), at first the dense MLP

The mixture stands around the MLP and takes its place; the dense MLP stays the base. What MLPs are made of is in
:mod:`lightning_peft.moe.feed_forward`, the first values in :mod:`lightning_peft.moe.initial_experts`, routing and arithmetic beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.arithmetic.parameter_copies import ParameterCopies, parameter_places, train_tied_as_one
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.moe.experts import Implementation
from lightning_peft.moe.feed_forward import FeedForward, MLPs, every_other, last_half
from lightning_peft.moe.initial_experts import Layout
from lightning_peft.moe.mixture import MixtureOfExperts
from lightning_peft.moe.padding import Bypass, MaskReader, MaskReadingCopies, mask_argument
from lightning_peft.moe.router_choice import check_router_fields, router_named
from lightning_peft.routers import Router

_CHOICES: dict[str, tuple[str, ...]] = {
    "combine": ("renorm", "softmax", "straight_through"),
    "weight_scale": ("auto", "spread", "none"),
    "group": ("batch", "sequence"),
    "uncovered": ("residual", "dense"),
    "layers": ("all", "last_half", "every_other"),
    "train": ("experts", "all"),
    "implementation": ("auto", "unbind", "grouped_mm"),
    "dtype": ("float32", "base"),
}
_SHARED = ("top_k", "combine", "noise", "capacity", "group")
"""Fields that are handed to any router that has a field of that name."""


@dataclass(frozen=True)
class _Place(Target):
    """A place, with what stands there."""

    part: Literal["mixture", "bypass", "reader", "copies"] = "mixture"
    feed_forward: FeedForward | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MoEUpcycling(Method):
    """Turn MLPs into mixtures of experts that start as copies of them.

    Targets name MLPs by what is in or around them: the role ``down`` (the default) is every MLP that the family knows. ``mlp``, ``block``
    or a path do as well, and :class:`~lightning_peft.Targets` has the layers: ``Targets(include="down", layers="-4:")``.

    Example:
        >>> from lightning_peft import inject, trainable_summary
        >>> from lightning_peft.testing import tiny_llama
        >>> model = tiny_llama()
        >>> _ = inject(model, MoEUpcycling(experts=4))
        >>> trainable_summary(model).trainable  # 2 layers of 4 experts of 3 * 64 * 128, and a router of 4 * 64
        197120
    """

    name: ClassVar[str] = "moe_upcycling"
    default_targets: ClassVar[tuple[str, ...]] = ("down",)
    identity_at_init: ClassVar[bool] = False
    row_routable: ClassVar[bool] = True
    composable: ClassVar[bool] = False
    merge_refusal: ClassVar[str] = (
        "a mixture of experts, which no single MLP can stand for; write the whole model with the exporter 'transformers_moe' (Mixtral, Qwen2Moe, "
        "Qwen3Moe) or 'mixtral', or keep the mixture as an adapter folder: save_adapter(model, folder)"
    )

    experts: int = 8
    """Copies of the MLP, E in the papers."""
    top_k: int = 2
    """Experts that each token goes to; with granularity, a multiple of it. Not used by expert_choice."""
    router: str = "topk"
    """How tokens and experts find each other, by the name of a registered router: tokens choose experts (topk: by softmax, sigmoid,
    noisy_topk: with noise), or experts tokens (expert_choice)."""
    router_fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the router itself. top_k, combine, noise, capacity and group go to a router that has such fields anyway."""
    combine: Literal["renorm", "softmax", "straight_through"] = "renorm"
    """How probabilities become weights: those of a token sum to one, as they are, or with the gradient of the latter and the value of the former."""
    weight_scale: float | Literal["auto", "spread", "none"] = "auto"
    """Factor of what experts give at first; auto makes up for weights that do not sum to one, by E / K with combine='softmax' (2 / K with
    sigmoids). It goes to the projections that the output is linear in; with spread, as in the paper, to every one."""
    noise: float = 1.0
    """With noisy_topk, deviation of the noise on the logits in training."""
    capacity: float = 2.0
    """With expert_choice, experts that a token goes to on average."""
    group: int | Literal["batch", "sequence"] = "batch"
    """With expert_choice, the tokens that an expert chooses from: the batch, each sequence, or so many at a time."""
    uncovered: Literal["residual", "dense"] = "residual"
    """What a token gets that no expert chose: nothing but the residual connection, or the dense MLP."""
    layers: Literal["all", "last_half", "every_other"] = "all"
    """Which of the targeted MLPs: all, the last half of each stack of layers, or its second, fourth and so on."""
    router_std: float = 0.02
    """Deviation of the router's first weights."""
    expert_noise: float = 0.0
    """Noise on the first weights of each expert, as a share of their deviation."""
    reinit: float = 0.0
    """Share of the neurons of each expert that are drawn anew (Drop-Upcycling)."""
    granularity: int = 1
    """Experts that each copy of the MLP is cut into, G; the router sees the parts of a copy as one at first."""
    balance_coef: float = 1e-2
    """Factor of the load balancing loss of each layer; not used by expert_choice, which is balanced."""
    z_coef: float = 0.0
    """Factor of the z-loss of each layer, which keeps logits of the router small."""
    jitter: float = 0.0
    """In training the router reads its input times a number within 1 - jitter and 1 + jitter."""
    train: Literal["experts", "all"] = "experts"
    """Whether experts and routers are trained alone, or with copies of all other parameters."""
    allow_noncausal: bool = False
    """Let expert_choice into decoders, where a token then depends on later ones: generation differs from training."""
    implementation: Implementation = "auto"
    """How the products of the experts run."""
    dtype: Literal["float32", "base"] = "float32"
    """Precision of the experts: at least float32, or that of the base. Routers are float32."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name, words in _CHOICES.items():
            value = getattr(self, name)
            if value not in words and (isinstance(value, str) or name not in ("weight_scale", "group")):
                raise ConfigError(f"{kind} {name} must be one of {', '.join(words)}, got {value!r}")
        for name, least in (("experts", 2), ("top_k", 1), ("granularity", 1)):
            if not _number(getattr(self, name), int) or getattr(self, name) < least:
                raise ConfigError(f"{kind} {name} must be an integer of at least {least}, got {getattr(self, name)!r}")
        for name in ("router_std", "expert_noise", "reinit", "balance_coef", "z_coef", "jitter", "noise", "capacity"):
            if not _number(getattr(self, name), float) or getattr(self, name) < 0:
                raise ConfigError(f"{kind} {name} must be a finite number of at least 0, got {getattr(self, name)!r}")
        for name in ("reinit", "jitter"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{kind} {name} is a share and cannot exceed 1, got {getattr(self, name)!r}")
        if not isinstance(self.weight_scale, str) and not (_number(self.weight_scale, float) and self.weight_scale > 0):
            raise ConfigError(
                f"{kind} weight_scale must be 'auto', 'spread', 'none' or a positive number, got {self.weight_scale!r}"
            )
        if not isinstance(self.allow_noncausal, bool):
            raise ConfigError(f"{kind} allow_noncausal must be true or false, got {self.allow_noncausal!r}")
        check_router_fields(self, self.router, self.router_fields)
        rule = self.make_router()
        if self.granularity > 1 and (not rule.keeps_parts_together or rule.experts_per_token % self.granularity):
            raise ConfigError(
                f"{kind} granularity={self.granularity} needs a router that chooses all parts of a copy together: top_k must be a multiple of "
                f"it, and the tokens must choose; got {rule!r}, the router {self.router!r}"
            )
        if self.granularity > 1 and not self.router_std:
            raise ConfigError(
                f"{kind} granularity={self.granularity} needs router_std > 0: a router of zeros cannot tell the copies apart"
            )
        rule.check(self.experts * self.granularity)
        object.__setattr__(self, "row_routable", rule.acts_on_rows)

    def make_router(self) -> Router:
        """Return the rule that assigns tokens to experts."""
        return router_named(self.router, self.router_fields, {name: getattr(self, name) for name in _SHARED})

    def scales(self) -> tuple[float, float, bool]:
        """Return the factor of the output, that of its last bias, and whether the former goes to every matrix."""
        if not isinstance(self.weight_scale, str):
            return self.weight_scale, self.weight_scale / self.granularity, False
        if self.weight_scale == "none":
            return 1.0, 1.0, False
        # The parts of a copy are chosen together, and the weights of all of them make up for those of one.
        bias = self.make_router().undecided_scale(self.experts * self.granularity)
        return bias * self.granularity, bias, self.weight_scale == "spread"

    # -- the contract ----------------------------------------------------------------------------------------------

    @override
    def supports(self, module: nn.Module) -> bool:
        return next(module.parameters(), None) is not None

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        for target in targets:
            if target.slices:
                raise TargetError(
                    f"MoEUpcycling cannot take a slice of {target.path!r}; name the MLP, or the role 'down'"
                )
        mlps = MLPs(model, family)
        downs = list(dict.fromkeys(down for target in targets for down in mlps.inside(target.path)))
        chosen = {"all": downs, "last_half": last_half(downs), "every_other": every_other(downs)}[self.layers]
        if not chosen:
            raise TargetError(f"MoEUpcycling layers={self.layers!r} leaves none of the MLPs {downs}; choose 'all'")
        places: dict[str, _Place] = {}
        for down in chosen:
            self._refuse_causal(mlps, down)
            found = mlps.describe(down)
            if found.hidden % self.granularity:
                raise TargetError(
                    f"MoEUpcycling granularity={self.granularity} does not divide the {found.hidden} hidden features of {found.place!r}"
                )
            places[found.place] = _Place(path=found.place, feed_forward=found)
            for path in found.bypassed:
                places[path] = _Place(path=path, part="bypass")
            attention = mlps.attention(down)
            if attention is not None and mask_argument(mlps.modules[attention]) is not None:
                places.setdefault(attention, _Place(path=attention, part="reader", only_listens=True))
        if self.train == "all":
            self._add_others(model, places)
        return list(places.values())

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if not isinstance(target, _Place):
            raise TargetError(f"MoEUpcycling has no description of the MLP at {target.path!r}; use inject")
        if target.part == "mixture":
            assert target.feed_forward is not None
            return MixtureOfExperts(self, module, target.feed_forward)
        if target.part == "bypass":
            return Bypass()
        if target.part == "reader":
            return MaskReadingCopies(module, target.names) if target.names else MaskReader(module)
        return ParameterCopies(module, target.names)

    @override
    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Show the mixtures the modules of their MLPs, and let tied weights be trained as one."""
        modules = {path: unwrapped(module) for path, module in base_modules(model)}
        for path, adapter in adapters.items():
            if isinstance(adapter, MixtureOfExperts):
                adapter.connect(modules)
                adapter.reset_parameters(modules[path])
        train_tied_as_one(model, adapters)

    def layout(self, feed_forward: FeedForward) -> Layout:
        """Return how the experts lie that an MLP becomes."""
        return Layout(self.experts, self.granularity, feed_forward.width, feed_forward.hidden, feed_forward.gated)

    # -- details -----------------------------------------------------------------------------------------------------

    def _refuse_causal(self, mlps: MLPs, down: str) -> None:
        if not self.make_router().causal and not self.allow_noncausal and mlps.is_causal(down):
            raise TargetError(
                f"MoEUpcycling router={self.router!r} was asked for at {down!r}, in a decoder: whether an expert takes a token would depend on "
                "later tokens, so that training sees what generation cannot. Use router='topk', target the encoder alone, or set "
                "allow_noncausal=True"
            )

    def _add_others(self, model: nn.Module, places: dict[str, _Place]) -> None:
        """Add copies of all parameters outside the MLPs."""
        own = [name for name, _ in unwrapped(model).named_parameters(recurse=False)]
        if own:
            raise TargetError(
                f"MoEUpcycling train='all' cannot train {own[:3]}, which {type(model).__name__} itself holds and nothing can stand around; "
                "put them into a module of their own, or set train='experts'"
            )
        replaced = [path for path, place in places.items() if place.part != "reader"]
        roots = [path for path, _ in base_modules(model) if path and "." not in path]
        for path, names in parameter_places(model, roots).items():
            if any(path == root or path.startswith(f"{root}.") for root in replaced):
                continue
            part = places[path].part if path in places else "copies"
            places[path] = _Place(path=path, part=part, names=tuple(names))


def _number(value: object, kind: type) -> bool:
    wanted = (int, float) if kind is float else (int,)
    return isinstance(value, wanted) and not isinstance(value, bool) and math.isfinite(value)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register upcycling."""
    return [MoEUpcycling]

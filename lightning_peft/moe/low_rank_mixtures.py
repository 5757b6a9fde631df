"""What mixtures of low-rank experts have in common: their hyperparameters, the router and its losses, and the experts' pairs.

::

    x (n, d) ── router (E, d), float32 ── logits (n, E) ── top-k or softmax ── which experts, with what weight
    each expert e, at each projection:  dW_e = s B_e A_e       A_e: (rank, in) random       B_e: (out, rank) zero

All experts of a projection are two parameters, A (E, rank, in) and B (E, rank, out), so that an expert that no token chose gets
a gradient of zeros, never none, and all of them are one matrix (E * rank, in) where that is faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.errors import ConfigError
from lightning_peft.field_checks import check_switches
from lightning_peft.interfaces import Adapter, Method
from lightning_peft.moe.balance import load_balancing_loss, sum_over_processes, with_auxiliary_loss, z_loss
from lightning_peft.moe.router_choice import check_router_fields, router_named
from lightning_peft.moe.statistics import Routed
from lightning_peft.routers import Assignment, Router


@dataclass(frozen=True, kw_only=True)
class MixtureMethod(Method):
    """What methods have in common that mix low-rank experts; a subclass says where they act."""

    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    merge_refusal: ClassVar[str] = "a mixture, whose update differs from token to token"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "init": ("kaiming", "gaussian"),
        "dtype": ("float32", "base"),
    }
    """The fields that take one of a few words, and the words."""
    normalized_weights: ClassVar[bool] = False
    """The arithmetic needs weights of a token that sum to one."""

    experts: int = 8
    """Experts at each place, E in the formula."""
    top_k: int = 2
    """Experts that each token goes to, at least 2: the weight of a single one would always be 1, and the router never learn."""
    router: str = "topk"
    """How tokens choose experts, by the name of a registered router: topk, noisy_topk, sigmoid."""
    router_fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the router itself; top_k goes to a router that has it anyway."""
    rank: int = 8
    """Rank of each expert."""
    alpha: float = 16.0
    """Scale of the experts: their update is multiplied by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps the update's size as the rank grows."""
    dropout: float = 0.0
    """Probability of dropping an input of the low-rank path in training."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts: Kaiming uniform or Gaussian with deviation 1/rank. B starts at zero."""
    router_std: float = 0.02
    """Deviation of the Gaussian that the router starts from."""
    balance_coef: float = 0.01
    """Factor of the loss that spreads the tokens over the experts; 0 for none."""
    z_coef: float = 0.0
    """Factor of the router z-loss, which keeps its logits small; 0 for none."""
    experts_pattern: Mapping[str, int] = field(default_factory=dict)
    """Target (role, glob or ``re:``) to experts, where that differs; the first match counts."""
    dtype: Literal["float32", "base"] = "float32"
    """Precision of the experts: at least float32, or that of the base. The router is always in at least float32."""

    def __post_init__(self) -> None:
        check_switches(self)
        kind = type(self).__name__
        if not isinstance(self.experts_pattern, Mapping):
            raise ConfigError(f"{kind} experts_pattern must map targets to numbers, got {self.experts_pattern!r}")
        counts = {f"experts_pattern[{word!r}]": number for word, number in self.experts_pattern.items()}
        for label, value in {"experts": self.experts, "rank": self.rank, **counts}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{kind} {label} must be a positive integer, got {value!r}")
        self._check_router({"experts": self.experts, **counts})
        if not _number(self.alpha):
            raise ConfigError(f"{kind} alpha must be a finite number, got {self.alpha!r}")
        if not _number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"{kind} dropout must lie in [0, 1), got {self.dropout!r}")
        for label in ("router_std", "balance_coef", "z_coef"):
            if not _number(getattr(self, label)) or getattr(self, label) < 0:
                raise ConfigError(f"{kind} {label} must be a finite number of at least 0, got {getattr(self, label)!r}")
        for label, allowed in self.choices.items():
            if getattr(self, label) not in allowed:
                raise ConfigError(f"{kind} {label} must be one of {', '.join(allowed)}, got {getattr(self, label)!r}")

    def _check_router(self, counts: Mapping[str, int]) -> None:
        kind = type(self).__name__
        check_router_fields(self, self.router, self.router_fields)
        if self.soft:
            if self.router != "topk" or self.router_fields:
                raise ConfigError(
                    f"{kind} router={self.router!r} with router_fields={dict(self.router_fields)!r} was asked for, but every token goes to all "
                    "experts here and no router chooses; leave both out, or choose routing='top_k'"
                )
            return
        if self.top_k == 1:
            raise ConfigError(
                f"{kind} top_k=1 gives a single expert the weight one, whatever the router says, so that the router never learns; choose top_k=2"
            )
        for label, experts in counts.items():
            try:
                rule = self.make_router()
                rule.check(experts)
            except ConfigError as error:
                raise ConfigError(f"{kind} top_k={self.top_k!r} with {label}={experts!r}: {error}") from error
        if not (rule.causal and rule.uniform):
            raise ConfigError(
                f"{kind} router={self.router!r} does not let each token choose the same number of experts by itself, which low-rank experts "
                "need; choose topk, noisy_topk or sigmoid"
            )
        if self.normalized_weights and not rule.normalized:
            raise ConfigError(
                f"{kind} needs a router whose weights sum to one, as the frozen projections run once for all experts of a token, got {rule!r}; "
                "choose combine='renorm'"
            )

    def make_router(self) -> Router:
        """Return the rule by which tokens choose experts."""
        return router_named(self.router, self.router_fields, {"top_k": self.top_k})

    @property
    def soft(self) -> bool:
        """Whether each token goes to all experts, weighed by their probabilities."""
        return False

    @property
    def scaling(self) -> float:
        """The factor s of each expert."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @override
    def patterns(self) -> Mapping[str, Mapping[str, Any]]:
        return {"experts": self.experts_pattern}


class MixtureAdapter(Routed, Adapter):
    """The router of one place, and what makes the experts' parameters there.

    Args:
        method: the hyperparameters, as they are at this place.
        like: a weight of the adapted module.
        width: features that the router reads.
    """

    def __init__(self, method: MixtureMethod, like: Tensor, width: int) -> None:
        super().__init__()
        self.method, self.num_experts, self.rank, self.scaling = method, method.experts, method.rank, method.scaling
        held = like.dtype if like.is_floating_point() else torch.float32  # packed weights of a quantised base
        wide = torch.promote_types(torch.float32, held)
        self.rule = None if method.soft else method.make_router()
        self._device, self._dtype = like.device, held if method.dtype == "base" else wide
        self.router = nn.Parameter(torch.empty(method.experts, width, device=like.device, dtype=wide))

    @property
    @abstractmethod
    def pairs(self) -> tuple[str, ...]:
        """Names of the pairs: for ``up`` there are the parameters ``up_lora_A`` and ``up_lora_B``."""

    def new_pair(self, name: str, in_features: int, out_features: int) -> None:
        """Allocate the A (experts, rank, in) and B (experts, rank, out) of one projection."""
        for letter, features in (("A", in_features), ("B", out_features)):
            shape = (self.num_experts, self.rank, features)
            tensor = torch.empty(shape, device=self._device, dtype=self._dtype)
            self.register_parameter(_joined("_", name, f"lora_{letter}"), nn.Parameter(tensor))

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (experts, rank, in) and B (experts, rank, out) of one projection."""
        A, B = (self.get_parameter(_joined("_", name, f"lora_{letter}")) for letter in "AB")
        return A, B

    def update_of(self, name: str) -> Tensor:
        """Return what the experts add to the weight of one projection, s B_e A_e (experts, out, in)."""
        A, B = (tensor.detach() for tensor in self.pair(name))
        return self.scaling * (B.transpose(1, 2) @ A)

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        nn.init.normal_(self.router, std=self.method.router_std)
        for name in self.pairs:
            A, B = self.pair(name)
            for matrix in A.detach():
                if self.method.init == "gaussian":
                    nn.init.normal_(matrix, std=1.0 / self.rank)
                else:
                    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            nn.init.zeros_(B)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {"router.weight": self.router}
        for name in self.pairs:
            A, B = self.pair(name)
            tensors[_joined(".", name, "lora_A.weight")] = A
            tensors[_joined(".", name, "lora_B.weight")] = B.transpose(1, 2)  # (experts, out, rank)
        return tensors

    # -- routing -----------------------------------------------------------------------------------------------------

    def logits(self, x: Tensor) -> Tensor:
        """X (n, width) -> what the router says (n, experts), in float32 also under autocast."""
        mixed = torch.amp.is_autocast_available(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if mixed else contextlib.nullcontext():
            return F.linear(x.to(self.router.dtype), self.router)

    def assign(self, x: Tensor, mask: Tensor | None) -> Assignment:
        """X (n, width) -> which experts its tokens go to; ``mask`` (n,) is false at padding. In training with the losses."""
        logits = self.logits(x)
        rule = self.rule
        assignment = _to_all(logits, mask) if rule is None else rule.route(logits, mask=mask, training=self.training)
        self.observe(assignment, mask)
        losses = []
        if self.training and self.method.balance_coef and not (rule is not None and rule.balanced):
            loss = importance_loss if rule is None else load_balancing_loss
            losses.append(self.method.balance_coef * loss(assignment, mask))
        if self.training and self.method.z_coef:
            losses.append(self.method.z_coef * z_loss(assignment, mask))
        if not losses:
            return assignment
        return dataclasses.replace(
            assignment, weights=with_auxiliary_loss(assignment.weights, sum(losses[1:], losses[0]))
        )

    @override
    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={'all' if self.method.soft else self.method.top_k}, rank={self.rank}"


def importance_loss(assignment: Assignment, mask: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation, over the experts, of the sum of their probabilities, a scalar; 0 where balanced.

    The balance of dense routing, where every expert has every token (Shazeer et al., arXiv:1701.06538).
    """
    p = assignment.probabilities
    importance = (p if mask is None else torch.where(mask[:, None], p, 0.0)).sum(0)  # (experts,)
    total, processes = sum_over_processes(importance)
    importance = importance + (total - importance).detach()  # of all processes; the gradient is that of the part here
    mean = importance.mean()
    return processes * (importance - mean).square().mean() / mean.square().clamp(min=torch.finfo(p.dtype).tiny)


def _to_all(logits: Tensor, mask: Tensor | None) -> Assignment:
    """Return the assignment of every token to every expert, each with its probability."""
    n, experts = logits.shape
    p = torch.softmax(logits, dim=-1)
    tokens = torch.arange(n, device=logits.device).repeat_interleave(experts)
    numbers = torch.arange(experts, device=logits.device).repeat(n)
    valid = None if mask is None else mask.repeat_interleave(experts)
    weights = p if mask is None else torch.where(mask[:, None], p, 0.0)
    return Assignment(tokens, numbers, weights.reshape(-1), logits, p, experts, valid)


def _joined(sign: str, name: str, rest: str) -> str:
    return f"{name}{sign}{rest}" if name else rest


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

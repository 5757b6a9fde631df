"""Routers: which token goes to which expert, with what weight.

All of them start from p = softmax(logits) over **all** E experts, in float32 (the sigmoid router: from sigmoids).

**Top-K** (Shazeer et al., arXiv:1701.06538; Fedus et al., arXiv:2101.03961): each token takes its K likeliest experts ``S``::

    renorm              w_j = p_j / Σ_{i in S} p_i               sums to one: identical experts give exactly the dense output
    softmax             w_j = p_j                                the size of p stays in the output
    straight_through    w_j = p_j / Σ_{i in S} stop(p_i)         value of renorm, gradient of softmax

With renorm and K = 1 the weight is one whatever the router says and the router never learns, so that is refused.

**Expert Choice** (Zhou et al., arXiv:2202.09368): each expert takes the T = ceil(C n / E) tokens of a group of n that want it most. The
load is balanced by construction, but a token may get no expert, and which it gets depends on the other tokens of its group, later ones too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self, override

from lightning_peft.errors import ConfigError
from lightning_peft.routers import Assignment as Assignment
from lightning_peft.routers import Router as Router


@dataclass(frozen=True, kw_only=True)
class TopKRouter(Router):
    """Each token takes its ``top_k`` likeliest experts."""

    name: ClassVar[str] = "topk"
    causal: ClassVar[bool] = True
    uniform: ClassVar[bool] = True
    keeps_parts_together: ClassVar[bool] = True

    top_k: int = 2
    """Experts that each token goes to."""
    combine: Literal["renorm", "softmax", "straight_through"] = "renorm"
    """How probabilities become weights."""

    def __post_init__(self) -> None:
        _check_top_k(self, self.top_k, self.combine, ("renorm", "softmax", "straight_through"))

    @property
    @override
    def normalized(self) -> bool:
        return self.combine == "renorm"

    @override
    def undecided_scale(self, experts: int) -> float:
        return experts / self.top_k if self.combine == "softmax" else 1.0

    @override
    def check(self, experts: int) -> None:
        _check_experts(self, self.top_k, experts)

    @override
    def route(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        training: bool = False,
    ) -> Assignment:
        self.check(logits.shape[-1])
        logits = _wide(logits)
        p = torch.softmax(logits, dim=-1)
        return _top_k(p, self.top_k, self.combine, mask, logits=logits, probabilities=p)


@dataclass(frozen=True, kw_only=True)
class NoisyTopKRouter(TopKRouter):
    """Top-K over logits with noise in training, so that experts that are not quite chosen are tried.

    ::

        p = softmax(logits + noise / E * N(0, 1))        Riquelme et al., arXiv:2106.05974

    The losses see the logits without noise.
    """

    name: ClassVar[str] = "noisy_topk"
    keeps_parts_together: ClassVar[bool] = False

    noise: float = 1.0
    """Standard deviation of the noise, times the number of experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.noise > 0 and math.isfinite(self.noise)):
            raise ConfigError(f"{type(self).__name__} noise must be positive and finite, got {self.noise!r}")

    @override
    def route(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        training: bool = False,
    ) -> Assignment:
        self.check(logits.shape[-1])
        logits = _wide(logits)
        p = torch.softmax(logits, dim=-1)
        noisy = p
        if training:
            noisy = torch.softmax(logits + torch.randn_like(logits) * (self.noise / logits.shape[-1]), dim=-1)
        return _top_k(noisy, self.top_k, self.combine, mask, logits=logits, probabilities=p)


@dataclass(frozen=True, kw_only=True)
class SigmoidRouter(Router):
    """Each token takes the ``top_k`` experts of the highest sigmoid; experts do not compete for probability.

    ::

        s = sigmoid(logits)        renorm: w_j = s_j / Σ_{i in S} s_i  (DeepSeek-V3, arXiv:2412.19437)        sigmoid: w_j = s_j

    The probabilities that the losses see are s / Σ_e s_e.
    """

    name: ClassVar[str] = "sigmoid"
    causal: ClassVar[bool] = True
    uniform: ClassVar[bool] = True
    keeps_parts_together: ClassVar[bool] = True

    top_k: int = 2
    """Experts that each token goes to."""
    combine: Literal["renorm", "sigmoid", "straight_through"] = "renorm"
    """How sigmoids become weights."""

    def __post_init__(self) -> None:
        _check_top_k(self, self.top_k, self.combine, ("renorm", "sigmoid", "straight_through"))

    @classmethod
    @override
    def with_shared(cls, shared: Mapping[str, Any], own: Mapping[str, Any]) -> Self:
        if shared.get("combine") == "softmax":  # scores as they are
            shared = {**shared, "combine": "sigmoid"}
        return super().with_shared(shared, own)

    @property
    @override
    def normalized(self) -> bool:
        return self.combine == "renorm"

    @override
    def undecided_scale(self, experts: int) -> float:
        return 2 / self.top_k if self.combine == "sigmoid" else 1.0  # each is one half at first

    @override
    def check(self, experts: int) -> None:
        _check_experts(self, self.top_k, experts)

    @override
    def route(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        training: bool = False,
    ) -> Assignment:
        self.check(logits.shape[-1])
        logits = _wide(logits)
        logs = F.logsigmoid(logits)
        # All sigmoids of a token times one number, which quotients of them do not see: finite where all sigmoids are zero.
        scores = (logs - logs.detach().amax(-1, keepdim=True)).exp()
        p = scores / scores.sum(-1, keepdim=True)
        chosen = torch.sigmoid(logits) if self.combine == "sigmoid" else scores
        return _top_k(chosen, self.top_k, self.combine, mask, logits=logits, probabilities=p)


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceRouter(Router):
    """Each expert takes the tokens of a group that want it most, ``capacity`` experts a token on average.

    Padding is left out before the choice and takes no capacity: T counts the real tokens of the group.
    """

    name: ClassVar[str] = "expert_choice"
    balanced: ClassVar[bool] = True

    capacity: float = 2.0
    """Experts that a token goes to on average: an expert takes ceil(capacity * n / experts) of the n tokens of a group."""
    group: Literal["batch", "sequence"] | int = "batch"
    """What the experts choose from: the whole batch, each sequence, or so many tokens at a time."""
    combine: Literal["renorm", "softmax"] = "renorm"
    """How probabilities become weights; renorm divides by the sum over the experts that chose the token."""

    def __post_init__(self) -> None:
        if not (self.capacity > 0 and math.isfinite(self.capacity)):
            raise ConfigError(f"{type(self).__name__} capacity must be positive and finite, got {self.capacity!r}")
        if self.combine not in ("renorm", "softmax"):
            raise ConfigError(f"{type(self).__name__} combine must be 'renorm' or 'softmax', got {self.combine!r}")
        if self.group not in ("batch", "sequence") and not (
            isinstance(self.group, int) and not isinstance(self.group, bool) and self.group > 0
        ):
            raise ConfigError(
                f"{type(self).__name__} group must be 'batch', 'sequence' or a positive number of tokens, got {self.group!r}"
            )

    @property
    @override
    def acts_on_rows(self) -> bool:
        return self.group == "sequence"

    @property
    @override
    def experts_per_token(self) -> float:
        return self.capacity

    @override
    def check(self, experts: int) -> None:
        if self.capacity > experts:
            raise ConfigError(
                f"{type(self).__name__} capacity={self.capacity!r} asks for more than the {experts} experts there are: every expert would take "
                f"every token already at {experts}; choose a capacity of at most {experts}"
            )

    @override
    def route(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        training: bool = False,
    ) -> Assignment:
        n, experts = logits.shape
        self.check(experts)
        logits = _wide(logits)
        p = torch.softmax(logits, dim=-1)
        size = self._group_size(n, shape)
        groups = -(-n // size)
        real = logits.new_ones(n, dtype=torch.bool) if mask is None else mask
        missing = groups * size - n  # the last group may be short: it is filled up with padding
        scores = torch.where(real[:, None], p.detach(), -1.0)
        scores = torch.nn.functional.pad(scores, (0, 0, 0, missing), value=-1.0).view(groups, size, experts)
        most = min(size, self._tokens(size, experts))
        chosen = scores.topk(most, dim=1)  # (groups, most, experts), likeliest first
        present = torch.nn.functional.pad(real, (0, missing)).view(groups, size).sum(1)  # (groups,)
        allowed = torch.ceil(self.capacity * present.double() / experts - 1e-9)  # (groups,)
        rank = torch.arange(most, device=p.device)
        valid = (rank < allowed[:, None])[:, :, None] & (chosen.values >= 0)  # (groups, most, experts)
        start = torch.arange(groups, device=p.device)[:, None, None] * size
        tokens = (chosen.indices + start).clamp(max=max(n - 1, 0))
        # Expert-major: the slots of expert 0 of all groups, then those of expert 1, ...
        tokens, valid = tokens.permute(2, 0, 1).reshape(-1), valid.permute(2, 0, 1).reshape(-1)
        which = torch.arange(experts, device=p.device).repeat_interleave(groups * most)
        weights = _expert_choice_weights(p, tokens, which, valid, self.combine)
        return Assignment(tokens, which, weights, logits, p, None, valid)

    def _tokens(self, size: int, experts: int) -> int:
        return math.ceil(self.capacity * size / experts - 1e-9)  # 1.1 * 10 / 11 is one, not a little more

    def _group_size(self, n: int, shape: tuple[int, int] | None) -> int:
        if self.group == "batch":
            return max(n, 1)
        if self.group == "sequence":
            if shape is None:
                raise ConfigError(
                    f"{type(self).__name__} group='sequence' needs the (batch, sequence) shape of its tokens, which are not known here; "
                    "choose group='batch' or a number of tokens"
                )
            return max(shape[1], 1)
        assert isinstance(self.group, int)
        return self.group


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(torch.float32, logits.dtype))


def _top_k(
    values: Tensor, k: int, combine: str, mask: Tensor | None, *, logits: Tensor, probabilities: Tensor
) -> Assignment:
    """Return the assignment of each token to the k experts of highest ``values`` (n, experts), which give the weights."""
    top, experts = values.topk(k, dim=-1)  # (n, k)
    if combine == "renorm":
        top = top / top.sum(-1, keepdim=True)
    elif combine == "straight_through":
        top = top / top.detach().sum(-1, keepdim=True)
    valid = None
    if mask is not None:
        valid = mask[:, None].expand_as(top).reshape(-1)
        top = torch.where(mask[:, None], top, 0.0)
    tokens = torch.arange(len(values), device=values.device).repeat_interleave(k)
    return Assignment(tokens, experts.reshape(-1), top.reshape(-1), logits, probabilities, k, valid)


def _expert_choice_weights(p: Tensor, tokens: Tensor, experts: Tensor, valid: Tensor, combine: str) -> Tensor:
    """Return the weight of each slot (slots,)."""
    if combine == "renorm":
        # Every (token, expert) that counts occurs once, so nothing is written twice; what does not count goes to a spare row.
        rows = torch.where(valid, tokens, len(p))
        chosen = torch.zeros(len(p) + 1, p.shape[1], dtype=torch.bool, device=p.device)
        chosen = chosen.index_put((rows, experts), torch.ones_like(valid))[:-1]
        total = torch.where(chosen, p, 0.0).sum(-1, keepdim=True)  # (n, 1)
        p = p / torch.where(total > 0, total, 1.0)
    weights = p.flatten().index_select(0, tokens * p.shape[1] + experts)
    return torch.where(valid, weights, 0.0)


def _check_top_k(router: Router, top_k: int, combine: str, choices: Sequence[str]) -> None:
    kind = type(router).__name__
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"{kind} top_k must be a positive integer, got {top_k!r}")
    if combine not in choices:
        raise ConfigError(f"{kind} combine must be one of {', '.join(map(repr, choices))}, got {combine!r}")
    if top_k == 1 and combine == "renorm":
        raise ConfigError(
            f"{kind} top_k=1 with combine='renorm' gives every token the weight one, whatever the router says, so that the router never "
            "learns; choose combine='straight_through', which starts at the same output, or top_k=2"
        )


def _check_experts(router: Router, top_k: int, experts: int) -> None:
    if top_k > experts:
        raise ConfigError(
            f"{type(router).__name__} top_k={top_k!r} asks for more than the {experts} experts there are; choose at most {experts}"
        )

"""What a router implements: the rule by which tokens and experts of a mixture find each other.

::

    logits (n, E) ── Router.route ── Assignment: slots (token, expert, weight)

A router has no tensors of its own: the weight that makes logits of tokens belongs to the mixture, and may be any rule's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_peft.errors import ConfigError, did_you_mean
from lightning_peft.named import Named


@dataclass(frozen=True)
class Assignment:
    """Which token goes to which expert, as a flat list of slots: one slot is one token at one expert."""

    tokens: Tensor
    """Token of each slot (slots,), int64."""
    experts: Tensor
    """Expert of each slot (slots,), int64."""
    weights: Tensor
    """Combine weight of each slot (slots,), float32, differentiable; zero where ``valid`` is false."""
    logits: Tensor
    """What the router said (n, experts), float32."""
    probabilities: Tensor
    """Its distribution over all experts (n, experts), float32; each row sums to one."""
    k: int | None
    """Slot i * k + j is choice j of token i, for every token; None where slots are in another order."""
    valid: Tensor | None = None
    """Which slots count (slots,), bool; None for all. The others belong to padding, or to nobody."""

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.logits.shape[-1]

    def expert_counts(self) -> Tensor:
        """Return how many slots that count each expert has (experts,), int64."""
        return _count(self.experts, self.valid, self.num_experts)

    def token_counts(self) -> Tensor:
        """Return how many slots that count each token has (n,), int64; zero for a token that no expert chose."""
        return _count(self.tokens, self.valid, len(self.logits))


@dataclass(frozen=True, kw_only=True)
class Router(Named, ABC):
    """A rule that turns the logits of a router into an :class:`Assignment`.

    A subclass is a ``@dataclass(frozen=True, kw_only=True)`` whose fields are its hyperparameters.
    """

    causal: ClassVar[bool] = False
    """What a token gets depends on that token alone, so that later tokens cannot change what earlier ones got."""
    uniform: ClassVar[bool] = False
    """Every token gets the same number of slots, token by token: :attr:`Assignment.k` is set."""
    balanced: ClassVar[bool] = False
    """Every expert gets the same load whatever the logits, so that no loss need see to it."""
    keeps_parts_together: ClassVar[bool] = False
    """Experts with equal logits are chosen together, as far as there is room for them."""

    @classmethod
    def with_shared(cls, shared: Mapping[str, Any], own: Mapping[str, Any]) -> Self:
        """Make the router that a method asks for by name.

        Args:
            shared: fields of the method that it hands to any router that has a field of that name, such as ``top_k``.
            own: fields of this router; they come before those of the method.

        Raises:
            ConfigError: there is no such field, or a value is out of its range.
        """
        known = [one.name for one in fields(cls)]
        for name in own:
            if name not in known:
                hint = did_you_mean(str(name), known) or "."
                raise ConfigError(
                    f"the router {cls.name!r} has no field {name!r}{hint} Its fields are: {', '.join(known) or 'none'}"
                )
        return cls(**{**{name: value for name, value in shared.items() if name in known}, **own})

    @property
    def acts_on_rows(self) -> bool:
        """Whether what a token gets depends on tokens of its own row of the batch at most."""
        return self.causal

    @property
    def experts_per_token(self) -> float:
        """How many experts a token goes to, on average: the field ``top_k`` where there is one, else one."""
        return float(getattr(self, "top_k", 1))

    @property
    def normalized(self) -> bool:
        """Whether the weights of a token sum to one for all logits, so that their gradients sum to zero."""
        return False

    def undecided_scale(self, experts: int) -> float:
        """Return one over the sum of a token's weights where all logits are equal: what makes up for it at the start."""
        return 1.0

    @abstractmethod
    def route(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        training: bool = False,
    ) -> Assignment:
        """Assign tokens to experts.

        Args:
            logits: what the router says (n, experts).
            mask: which tokens are real (n,), bool; False is padding, which gets no weight. None for all.
            shape: (batch, sequence) of the n tokens, where somebody knows.
            training: whether the model trains; noise is drawn only then.
        """

    def check(self, experts: int) -> None:
        """Refuse hyperparameters that do not go with that many ``experts``.

        Raises:
            ConfigError: they do not.
        """


def _count(places: Tensor, valid: Tensor | None, size: int) -> Tensor:
    ones = torch.ones_like(places) if valid is None else valid.to(places.dtype)
    return torch.zeros(size, dtype=places.dtype, device=places.device).index_add(0, places, ones)

"""What routers do, as numbers: how much each expert gets, and how sure the router is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.routers import Assignment


@dataclass(frozen=True)
class RouterReport:
    """What one router did over some tokens."""

    load: tuple[float, ...]
    """Share of the slots at each expert; they sum to one."""
    max_over_mean: float
    """Load of the busiest expert over the mean: one where balanced, the number of experts where collapsed."""
    entropy: float
    """Mean entropy of a token's distribution over the experts, in nats; log(experts) where the router is undecided."""
    confidence: float
    """Mean probability of a token's likeliest expert."""
    uncovered: float
    """Share of the tokens that no expert took."""


class RouterStatistics:
    """Sums over the assignments of one router, on its device: nothing waits until somebody asks.

    Example:
        >>> from lightning_peft.moe.routing import TopKRouter
        >>> statistics = RouterStatistics(4)
        >>> statistics.update(TopKRouter().route(torch.tensor([[9.0, 9.0, 0.0, 0.0], [9.0, 0.0, 9.0, 0.0]])))
        >>> statistics.report().load
        (0.5, 0.25, 0.25, 0.0)
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.totals = torch.zeros(experts + 4, dtype=torch.float32)
        """Slots at each expert; then tokens, and of tokens the sums of entropy, confidence and uncovered."""

    @torch.no_grad()
    def update(self, assignment: Assignment, mask: Tensor | None = None) -> None:
        """Add what ``assignment`` says; ``mask`` (n,) is false at padding."""
        p = assignment.probabilities
        entropy = torch.special.entr(p).sum(-1)  # (n,)
        uncovered = (assignment.token_counts() == 0).to(p.dtype)
        rows = torch.stack([torch.ones_like(entropy), entropy, p.amax(-1), uncovered])  # (4, n)
        rows = rows if mask is None else torch.where(mask, rows, 0.0)
        self.totals = self.totals.to(p.device) + torch.cat([assignment.expert_counts().to(p.dtype), rows.sum(1)])

    def reset(self) -> None:
        """Forget what was seen."""
        self.totals = torch.zeros_like(self.totals)

    def report(self, totals: Tensor | None = None) -> RouterReport:
        """Return the figures so far.

        Args:
            totals: sums to take instead of its own, such as those of all processes.
        """
        values = (self.totals if totals is None else totals).double().cpu()
        counts, (tokens, entropy, confidence, uncovered) = values[: self.experts], values[self.experts :].tolist()
        load = counts / counts.sum().clamp(min=1)
        tokens = max(tokens, 1.0)
        return RouterReport(
            load=tuple(load.tolist()),
            max_over_mean=float(load.max()) * self.experts,
            entropy=entropy / tokens,
            confidence=confidence / tokens,
            uncovered=uncovered / tokens,
        )


class Routed:
    """Mixed into an adapter with a router, so that a callback can watch it.

    The adapter calls :meth:`observe` in forward. Nobody listens and nothing is kept unless a callback sets ``statistics``.
    """

    training: bool
    statistics: RouterStatistics | None = None
    """Where assignments are added up while somebody listens."""
    num_experts: int
    """How many experts the router chooses from."""

    def observe(self, assignment: Assignment, mask: Tensor | None = None) -> None:
        """Count ``assignment``, in training and while somebody listens."""
        if self.statistics is not None and self.training:
            self.statistics.update(assignment, mask)

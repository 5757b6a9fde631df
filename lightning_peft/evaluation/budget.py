"""How strongly an adapter may act, so that forgetting stays under a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.forgetting import MEAN
from lightning_peft.field_checks import is_number, is_whole


@dataclass(frozen=True, kw_only=True)
class ForgettingBudget:
    """A limit for forgetting, and what to do about it.

    * ``stop`` ends training at the first measurement above the limit.
    * ``shrink`` multiplies the scale of the active adapters, by as much as is needed and no more, and training goes on.
    * ``pick`` leaves training alone; at its end it measures the adapters at several scales, and leaves them at the one that learned
      most of those within the limit, so that merging folds in that much.
    """

    limit: float
    """Most forgetting that is accepted, in the unit of the figure."""
    action: Literal["stop", "shrink", "pick"] = "stop"
    """What happens above it."""
    measure: str = MEAN
    """``mean`` over the source tasks, the label of one of them, or ``kl`` on the anchor text."""
    halvings: int = 4
    """Measurements that ``shrink`` makes to find the scale."""
    scales: list[float] | tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Factors of the scale that ``pick`` measures."""

    def __post_init__(self) -> None:
        if not is_number(self.limit) or not self.limit >= 0:
            raise ConfigError(f"ForgettingBudget limit must be a number of at least 0, got {self.limit!r}")
        if self.action not in ("stop", "shrink", "pick"):
            raise ConfigError(f"ForgettingBudget action must be stop, shrink or pick, got {self.action!r}")
        if not is_whole(self.halvings, 1):
            raise ConfigError(f"ForgettingBudget halvings must be at least 1, got {self.halvings!r}")
        right = isinstance(self.scales, (list, tuple)) and all(is_number(one) and 0 <= one <= 1 for one in self.scales)
        if not right or not self.scales:
            raise ConfigError(f"ForgettingBudget scales must be numbers from 0 to 1, got {self.scales!r}")


class ScaledPoint(NamedTuple):
    """What an adapter learned and forgot at a factor of its scale."""

    scale: float
    """The factor."""
    learning: float
    """Mean over the target tasks."""
    forgetting: float
    """As the budget measures it."""


def largest_scale(forgetting: Callable[[float], float], limit: float, halvings: int) -> float:
    """Return the largest factor of a scale, by bisection between 0 and 1, at which ``forgetting`` was measured within ``limit``.

    0, where an adapter is the base, if it was not at any.

    Example:
        >>> largest_scale(lambda scale: scale**2, 0.3, 4)
        0.5
    """
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        if forgetting(middle) <= limit:
            low = middle
        else:
            high = middle
    return low


def best_scale(points: Sequence[ScaledPoint], limit: float) -> ScaledPoint | None:
    """Return the point that learned most of those within ``limit``, the larger scale if two are equal; None where there is none.

    Example:
        >>> best_scale([ScaledPoint(0.0, 0.0, 0.0), ScaledPoint(0.5, 0.3, 0.1), ScaledPoint(1.0, 0.4, 0.9)], 0.2).scale
        0.5
    """
    within = [point for point in points if point.forgetting <= limit]
    return max(within, key=lambda point: (point.learning, point.scale), default=None)

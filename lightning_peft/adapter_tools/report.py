"""What a tool did to each weight: the rank it has now, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LowRankReport:
    """The ranks of a new adapter and its errors, by the path of the weight, which mostly is that of a module.

    Example:
        >>> LowRankReport(ranks={"a": 2}, errors={"a": 0.6}, norms={"a": 5.0}).error
        0.6
    """

    ranks: Mapping[str, int]
    """The rank of each update."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """The Frobenius norm of what is missing, as a share of that of what was asked for; empty where nothing exact was asked for."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """The Frobenius norm of what was asked for."""
    left_out: tuple[str, ...] = ()
    """Parameters whose change the new adapter does not have."""

    @property
    def error(self) -> float:
        """The error over all weights: the norm of all that is missing as a share of the norm of everything."""
        total = math.hypot(*self.norms.values())
        lost = math.hypot(*(self.errors[label] * norm for label, norm in self.norms.items()))
        return lost / total if total else 0.0

"""How the members of a population stand: who is best, who stops, and what all have come to.

::

    validation ── value of each living member ──┬── better than before      its best adapter is saved
                                                ├── no gain for `patience`  stopped
                                                ├── not finite              diverged
                                                └── a rung of Halving       all but the best 1/eta: halved
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_peft.errors import CheckpointMismatchError, ConfigError
from lightning_peft.field_checks import is_whole
from lightning_peft.population.members import Member

LIVING = "training"
"""Status of a member that is still trained."""


@dataclass(frozen=True)
class Halving:
    """Successive halving: at given times the best ``1/eta`` of the members that are left go on, the others stop.

    The first validation at or after such a time decides, by what it measures. Jamieson and Talwalkar 2016,
    `arXiv:1502.07943 <https://arxiv.org/abs/1502.07943>`_.

    Example:
        >>> Halving(at=[100, 300]).survivors(8)
        4
    """

    at: list[int]
    """Optimizer steps, or finished epochs, after which members are left out."""
    unit: Literal["step", "epoch"] = "step"
    """What ``at`` counts."""
    eta: int = 2
    """One in so many goes on, rounded up."""
    keep: int = 1
    """So many go on at least."""

    def __post_init__(self) -> None:
        whole = isinstance(self.at, (list, tuple)) and all(is_whole(one, 1) for one in self.at)
        if not whole or not self.at or sorted(set(self.at)) != list(self.at):
            raise ConfigError(
                f"Halving at must be a list of ascending whole numbers of steps or epochs from 1 on, got {self.at!r}"
            )
        if self.unit not in ("step", "epoch"):
            raise ConfigError(f"Halving unit must be 'step' or 'epoch', got {self.unit!r}")
        if not is_whole(self.eta, 2) or not is_whole(self.keep, 1):
            raise ConfigError(
                f"Halving needs whole numbers, eta of at least 2 and keep of at least 1, got eta={self.eta!r}, keep={self.keep!r}"
            )

    def survivors(self, members: int) -> int:
        """Return how many of so many members go on."""
        return min(members, max(self.keep, math.ceil(members / self.eta)))


@dataclass
class Standing:
    """Where one member stands."""

    status: str = LIVING
    """``training``, or why not: ``stopped`` (patience), ``halved``, ``diverged``; ``finished`` when the fit is over."""
    best: float | None = None
    """Best value of the monitored metric."""
    best_step: int | None = None
    """Optimizer steps before that."""
    last: float | None = None
    """Value at the last validation."""
    steps: int = 0
    """Optimizer steps it was trained for."""
    mark: float | None = None
    """Value that must be improved on for ``patience``."""
    waited: int = 0
    """Validations since then."""
    seconds: float = 0.0
    """Its share of the time of the training steps."""


class Standings:
    """Where all members stand.

    Args:
        members: the members, each with a name.
        mode: whether the monitored value is to be small (``min``) or large (``max``).
        halving: when to leave members out.
    """

    def __init__(self, members: Sequence[Member], mode: str, halving: Halving | None) -> None:
        self.members = {str(one.name): one for one in members}
        self.sign = 1.0 if mode == "min" else -1.0
        self.halving = halving
        self.of = {name: Standing() for name in self.members}
        self.rungs = 0
        self.improved: list[str] = []
        self.ended: list[str] = []

    @property
    def living(self) -> list[str]:
        """Names of the members that are trained."""
        return [name for name, one in self.of.items() if one.status == LIVING]

    def judge(self, values: Mapping[str, float], step: int, epochs: int) -> None:
        """Take the values of the living members after ``step`` steps and ``epochs`` whole epochs, and say who stops.

        Who got better is in ``improved`` afterwards, who stopped in ``ended``.
        """
        before = self.living
        self.improved, self.ended = [], []
        for name in before:
            self._judge_one(name, values[name], step)
        if self.halving is not None:
            now = step if self.halving.unit == "step" else epochs
            while self.rungs < len(self.halving.at) and self.halving.at[self.rungs] <= now:
                self.rungs += 1
                left = sorted(
                    self.living, key=lambda name: self.sign * values[name]
                )  # stable: the first of equals stays
                for name in left[self.halving.survivors(len(left)) :]:
                    self.of[name].status = "halved"
        self.ended = [name for name in before if self.of[name].status != LIVING]

    def _judge_one(self, name: str, value: float, step: int) -> None:
        member, one = self.members[name], self.of[name]
        one.last = value
        if not math.isfinite(value):
            one.status = "diverged"
            return
        if one.best is None or self.sign * value < self.sign * one.best:
            one.best, one.best_step = value, step
            self.improved.append(name)
        if one.mark is None or self.sign * value < self.sign * one.mark - member.min_delta:
            one.mark, one.waited = value, 0
            return
        one.waited += 1
        if member.patience is not None and one.waited >= member.patience:
            one.status = "stopped"

    def stepped(self) -> None:
        """Count an optimizer step of the living members."""
        for name in self.living:
            self.of[name].steps += 1

    def spent(self, seconds: float) -> None:
        """Share the time of a training step among the living members."""
        living = self.living
        for name in living:
            self.of[name].seconds += seconds / len(living)

    def ranked(self) -> list[str]:
        """Return the names, the best first; those without a value come last."""

        def key(name: str) -> tuple[bool, float]:
            best = self.of[name].best
            return best is None, 0.0 if best is None else self.sign * best

        return sorted(self.of, key=key)

    def finish(self) -> None:
        """Say of the members that are left that they were trained to the end."""
        for name in self.living:
            self.of[name].status = "finished"

    def state(self) -> dict[str, Any]:
        """Return it in plain values."""
        return {"rungs": self.rungs, "of": {name: dataclasses.asdict(one) for name, one in self.of.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` returned.

        Raises:
            CheckpointMismatchError: it is that of other members.
        """
        stored: Mapping[str, Mapping[str, Any]] = state["of"]
        if set(stored) != set(self.of):
            raise CheckpointMismatchError(
                f"the checkpoint is of a population of {list(stored)}, this one has {list(self.of)}; resume with the members of the checkpoint"
            )
        self.rungs = state["rungs"]
        self.of = {name: Standing(**stored[name]) for name in self.of}
        for one in self.of.values():
            one.status = LIVING if one.status == "finished" else one.status
        self.improved, self.ended = [], []

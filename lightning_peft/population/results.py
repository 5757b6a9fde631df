"""What became of the members of a population, and the table of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.adapter_layer import adapters_named
from lightning_peft.population.members import Member
from lightning_peft.population.standings import Standings


@dataclass(frozen=True)
class MemberResult:
    """What became of one member."""

    name: str
    """The member."""
    status: str
    """``finished``, or why it was not trained to the end."""
    best: float | None
    """Best value of the monitored metric; None where nothing was measured."""
    best_step: int | None
    """Optimizer steps before that."""
    last: float | None
    """Value at its last validation."""
    steps: int
    """Optimizer steps it was trained for."""
    parameters: int
    """Trained numbers."""
    seconds: float
    """Its share of the time of the training steps; in each step all that take part have the same."""
    share: float
    """That as a part of the time of all."""
    settings: dict[str, Any]
    """Method, fields, targets, optimizer, learning rate and seed in plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain values."""
        return dataclasses.asdict(self)


def results_of(standings: Standings, model: nn.Module | None, rates: Mapping[str, float]) -> list[MemberResult]:
    """Return what became of the members, the best first.

    Args:
        standings: where they stand.
        model: what holds their adapters; None before it is loaded.
        rates: the learning rate that each began with, as far as known.
    """
    total = sum(one.seconds for one in standings.of.values())
    found = []
    for name in standings.ranked():
        one = standings.of[name]
        adapters = {} if model is None else adapters_named(model, name)
        parameters = {id(p): p.numel() for adapter in adapters.values() for p in adapter.parameters()}
        found.append(
            MemberResult(
                name=name,
                status=one.status,
                best=one.best,
                best_step=one.best_step,
                last=one.last,
                steps=one.steps,
                parameters=sum(parameters.values()),
                seconds=one.seconds,
                share=one.seconds / total if total else 0.0,
                settings=_settings(standings.members[name], rates.get(name)),
            )
        )
    return found


def _settings(member: Member, rate: float | None) -> dict[str, Any]:
    targets = member.targets
    return {
        "method": member.method.name,
        "fields": member.method.to_config(),
        "targets": targets if targets is None or isinstance(targets, (str, list)) else repr(targets),
        "modules_to_save": member.modules_to_save,
        "lr": member.lr if rate is None else rate,
        "seed": member.seed,
    }


def print_ranking(results: list[MemberResult], monitor: str) -> None:
    """Print a table of what :meth:`PopulationModule.ranking` returned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Population by {monitor}")
    for column in ("#", "member", "best", "at step", "last", "steps", "status", "parameters", "time"):
        words = column in ("member", "status")
        table.add_column(column, justify="left" if words else "right", no_wrap=words)
    for place, one in enumerate(results, start=1):
        numbers = [
            _shown(one.best),
            "" if one.best_step is None else str(one.best_step),
            _shown(one.last),
            str(one.steps),
        ]
        table.add_row(str(place), one.name, *numbers, one.status, f"{one.parameters:,}", f"{one.share:.0%}")
    console = Console()
    if not console.is_terminal:  # a log, where no line is too long
        console.width = 160
    console.print(table)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"

"""The table and the figure of the study, from the files of its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

SHARES = (0.5, 0.8)


def write_report(files: Sequence[Path], output: Path) -> None:
    """Write ``report.md`` and ``pareto.png`` into the folder ``output``."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    studies: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for run in found:
        studies.setdefault((run["base"], run["corpus"]), {}).setdefault(run["method"], []).append(run)
    if not studies:
        print("there are no runs yet")
        return
    parts = [table(base, corpus, methods) for (base, corpus), methods in sorted(studies.items(), reverse=True)]
    minutes = sum(run["seconds"] for run in found) / 60
    parts.append(f"{len(found)} runs, {minutes:.0f} minutes of one core.\n")
    (output / "report.md").write_text("\n".join(parts), encoding="utf-8")
    figure(studies).savefig(output / "pareto.png", dpi=110)
    print("\n".join(parts))
    print(f"{output / 'report.md'}, {output / 'pareto.png'}")


def learned(point: dict[str, Any]) -> float:
    """How much lower the loss on the target is than the base's, in nats a token."""
    return float(point["learning"]["mean"])


def forgotten(point: dict[str, Any]) -> float:
    """How much higher the loss on stories is than the base's, in nats a token."""
    return float(point["forgetting"]["stories"])


def best(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run that learned most at its end: the learning rate one would choose who does not look at what is forgotten."""
    return max(runs, key=lambda run: learned(run["points"][-1]))


def least_forgotten(runs: Sequence[dict[str, Any]], level: float) -> float | None:
    """The least that is forgotten by any point of any run that has learned ``level``, interpolated within runs; None where none has."""
    found = []
    for run in runs:
        for before, after in zip(run["points"], run["points"][1:], strict=False):
            low, high = learned(before), learned(after)
            if low < level <= high:
                share = (level - low) / (high - low)
                found.append(forgotten(before) + share * (forgotten(after) - forgotten(before)))
    return min(found, default=None)


def table(base: str, corpus: str, methods: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of one base and target, in Markdown."""
    first = next(iter(methods.values()))[0]["base_figures"]
    start = {name.split("/", 1)[1]: figures for name, figures in first.items()}
    most = max(learned(run["points"][-1]) for runs in methods.values() for run in runs)
    lines = [
        f"### {base} on {corpus}",
        "",
        f"The base: {corpus} {start[corpus]['loss']:.3f}, stories {start['stories']['loss']:.3f}, BLiMP {start['blimp']['acc']:.3f}.",
        "",
        f"| method | trained | learning rate | {corpus} loss | learned | forgotten | BLiMP | KL | "
        + " | ".join(f"forgotten at {share:.0%} learned" for share in SHARES)
        + " |",
        "| --- " * (8 + len(SHARES)) + "|",
    ]
    for method, runs in methods.items():
        run = best(runs)
        end = run["points"][-1]
        figures = {name.split("/", 1)[1]: values for name, values in end["figures"].items()}
        at = [least_forgotten(runs, share * most) for share in SHARES]
        cells = [
            method,
            f"{run['trained']:,}",
            f"{run['lr']:g}",
            f"{figures[corpus]['loss']:.3f}",
            f"{learned(end):.3f}",
            f"{forgotten(end):.3f}",
            f"{figures['blimp']['acc']:.3f}",
            f"{end['anchor']['kl']:.3f}",
            *("not reached" if value is None else f"{value:.3f}" for value in at),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def figure(studies: dict[tuple[str, str], dict[str, list[dict[str, Any]]]]) -> Figure:
    """Return the learning-forgetting curves: a line for each method at its best rate, and a dot for the end of every other run."""
    drawn = Figure(figsize=(5.2 * len(studies), 4.6), layout="constrained")
    axes = drawn.subplots(1, len(studies), squeeze=False)[0]
    for place, ((base, corpus), methods) in zip(axes, sorted(studies.items(), reverse=True), strict=True):
        for number, (method, runs) in enumerate(methods.items()):
            color = f"C{number}"
            points = best(runs)["points"]
            place.plot(
                [forgotten(p) for p in points],
                [learned(p) for p in points],
                "o-",
                ms=3,
                lw=1.2,
                color=color,
                label=method,
            )
            ends = [run["points"][-1] for run in runs]
            place.plot([forgotten(p) for p in ends], [learned(p) for p in ends], "x", ms=5, color=color)
        place.set_title(f"{base} on {corpus}")
        place.set_xlabel("forgotten: loss on stories above the base's, nats a token")
        place.set_ylabel("learned: loss on the target below the base's")
        place.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    return drawn

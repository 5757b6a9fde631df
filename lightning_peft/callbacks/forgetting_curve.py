"""The learning-forgetting curve of a run: as JSON, and drawn as in Biderman et al., 2024 (arXiv:2405.09673), figure 4."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.adapter_files import write_file
from lightning_peft.callbacks.figures import figure_class
from lightning_peft.evaluation.forgetting import MEAN, pareto_front

FILE = "forgetting.json"
"""Name of the file of a run."""


def write_curve(
    folder: Path,
    base: Mapping[str, Mapping[str, float]],
    tasks: Mapping[str, Sequence[Any]],
    points: Sequence[Mapping[str, Any]],
    scaled: Sequence[Mapping[str, float]],
) -> None:
    """Write ``forgetting.json``: figures of the base, points of the run, and which of them are on the Pareto front.

    Args:
        folder: where; made if it is not there.
        base: figures of the base by label.
        tasks: label to the figure it is compared by and whether higher is better.
        points: measurements of the run.
        scaled: measurements at other scales, after it.
    """
    content = {
        "compared_by": {label: {"figure": name, "higher_is_better": higher} for label, (name, higher) in tasks.items()},
        "base": base,
        "points": points,
        "pareto_front": [points[number]["step"] for number in front_of(points)],
        "scales": scaled,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / FILE, json.dumps(content, indent=2).encode())


def front_of(points: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of the points that no other is better than, by learning; none where nothing is to be learned."""
    if not points or MEAN not in points[0]["learning"]:
        return []
    return pareto_front([(point["learning"][MEAN], point["forgetting"][MEAN]) for point in points])


def curve_figure(points: Sequence[Mapping[str, Any]], scaled: Sequence[Mapping[str, float]] = ()) -> Any:
    """Return a matplotlib figure: learning to the right and forgetting upward, or forgetting over steps where there is no target.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = figure_class("ForgettingEvaluation plot=True", "plot")(figsize=(5.5, 4.0), layout="constrained")
    axes = figure.subplots()
    forgetting = [point["forgetting"][MEAN] for point in points]
    if MEAN in points[0]["learning"]:
        learning = [point["learning"][MEAN] for point in points]
        axes.plot(learning, forgetting, color="0.7", zorder=1)
        dots = axes.scatter(learning, forgetting, c=[point["step"] for point in points], cmap="viridis", zorder=2)
        figure.colorbar(dots, label="step")
        front = front_of(points)
        axes.plot([learning[i] for i in front], [forgetting[i] for i in front], "k--", lw=1, label="Pareto front")
        if scaled:
            line = [(one["learning"], one["forgetting"]) for one in scaled]
            axes.plot(*zip(*line, strict=True), "r.:", lw=1, label="end, scaled")
        axes.set_xlabel("learning (mean over targets)")
        axes.legend()
    else:
        axes.plot([point["step"] for point in points], forgetting, ".-")
        axes.set_xlabel("step")
    axes.set_ylabel("forgetting (mean over sources)")
    return figure

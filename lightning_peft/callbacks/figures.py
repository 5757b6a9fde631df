"""Figures of matplotlib, and the ways in which Lightning's loggers take them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_peft.errors import ConfigError


def figure_class(asked: str, instead: str) -> Any:
    """Return matplotlib's Figure.

    Raises:
        ConfigError: matplotlib is not installed; ``asked`` is what needs it and ``instead`` what to leave out.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"{asked} draws with matplotlib, which is not installed: pip install 'lightning-peft[plot]', or leave {instead} out"
        ) from error
    return Figure


def log_figure(logger: Logger, name: str, folder: str, draw: Callable[[], Any], step: int) -> bool:
    """Hand a figure to a logger in the way it takes one, and tell whether it takes any; only then it is drawn.

    ::

        TensorBoardLogger   experiment.add_figure(name, figure)
        WandbLogger         log_image(name, [file])
        MLFlowLogger        experiment.log_figure(run_id, figure, "<folder>/step=<step>.png")
        CSVLogger           <log_dir>/<folder>/step=<step>.png

    Args:
        logger: the logger.
        name: what the figure is called.
        folder: folder for the files of those that keep files.
        draw: makes the figure.
        step: the step it belongs to.
    """
    if isinstance(logger, CSVLogger):
        place = Path(logger.log_dir) / folder
        place.mkdir(parents=True, exist_ok=True)
        draw().savefig(place / f"step={step}.png")
        return True
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(name, draw(), global_step=step)
        return True
    run = getattr(logger, "run_id", None)
    if run is not None and hasattr(experiment, "log_figure"):
        experiment.log_figure(run, draw(), f"{folder}/step={step}.png")
        return True
    if hasattr(logger, "log_image"):
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / f"{folder}.png"
            draw().savefig(file)
            logger.log_image(name, [str(file)], step=step)
        return True
    return False

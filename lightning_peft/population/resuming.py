"""How the members of a population stand, in a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_peft.errors import CheckpointMismatchError, LightningPEFTWarning
from lightning_peft.population.standings import Standings

STATE = "lightning_peft_population"
"""Key of a ``.ckpt`` under which it stands how the members stand."""
_DUE = "validation_due"


def store_standings(checkpoint: dict[str, Any], standings: Standings, trainer: Trainer | None) -> None:
    """Put how the members stand into ``checkpoint``, and whether a validation is about to change it."""
    checkpoint[STATE] = {**standings.state(), _DUE: trainer is not None and _validation_due(trainer)}


def take_standings(checkpoint: Mapping[str, Any], standings: Standings, trainer: Trainer | None) -> None:
    """Go back to what :func:`store_standings` stored; warn if a fit resumes that does not make up for a validation.

    Raises:
        CheckpointMismatchError: the checkpoint is of no population, or of another one.
    """
    if STATE not in checkpoint:
        raise CheckpointMismatchError(
            f"the checkpoint has no {STATE!r} entry, so it was not saved by a PopulationModule; load it with the module that saved it"
        )
    state: Mapping[str, Any] = checkpoint[STATE]
    standings.load(state)
    if state[_DUE] and trainer is not None and trainer.state.fn == "fit":
        warnings.warn(
            "the checkpoint was saved after a batch and before the validation that follows it, which is not made up for: best values, patience and "
            "halving go on without it, and this run does not resume exactly. Save after validation, or at steps that none follows",
            LightningPEFTWarning,
            stacklevel=3,
        )


def _validation_due(trainer: Trainer) -> bool:
    if trainer.state.fn != "fit" or not trainer.enable_validation:
        return False
    loop = trainer.fit_loop.epoch_loop
    progress, fetcher = loop.batch_progress.current, trainer.fit_loop._data_fetcher
    in_batch_end = progress.completed < progress.ready
    return bool(in_batch_end and fetcher is not None and loop._should_check_val_fx(fetcher))

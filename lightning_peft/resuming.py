"""Exact resuming: a run goes on from its checkpoint with the random numbers and the batches it would have had.

What Lightning does at the end of an epoch, and where the draws of the data loader (``*``) lie::

    uninterrupted   ... last batch | validation* | epoch end | loader starts* | batch ...
    resumed                                    start | loader starts* | batch ...
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import CheckpointMismatchError, LightningPEFTWarning
from lightning_peft.random_state import of_all_processes, random_state, set_random_state

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Host
else:
    _Host = object

RANDOM_STATES = "lightning_peft_random_states"
"""Key of a ``.ckpt`` under which the random states of all processes stand."""


class ExactResume(_Host):
    """The hooks of a LightningModule that make a run resume bit for bit, with dropout.

    It does so from the end of an epoch; and within an epoch where the training loader has ``state_dict`` and
    ``load_state_dict``, unless loading a batch draws random numbers in the main process. Validation in the midst of
    training leaves the random numbers of the training as they were.
    """

    _resume_from: dict[str, Any] | None = None
    _resume_within_epoch = False
    _before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random number generators."""
        super().on_save_checkpoint(checkpoint)
        self._warn_of_gathered_gradients()
        checkpoint[RANDOM_STATES] = of_all_processes(self._before_validation or random_state())

    def _warn_of_gathered_gradients(self) -> None:
        if getattr(self, "_trainer", None) is None:
            return
        every, loop = self.trainer.accumulate_grad_batches, self.trainer.fit_loop.epoch_loop
        done = loop.batch_progress.current.ready
        if every > 1 and done % every and not loop.batch_progress.is_last_batch and self.trainer.state.fn == "fit":
            warnings.warn(
                f"this checkpoint is saved after {done % every} of {every} batches whose gradients are accumulated; it does not hold the "
                "gradients, so a run that resumes from it is not exact. Save at a multiple of accumulate_grad_batches",
                LightningPEFTWarning,
                stacklevel=2,
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the state of the random number generators, if a fit resumes."""
        super().on_load_checkpoint(checkpoint)
        if getattr(self, "_trainer", None) is None or self.trainer.state.fn != "fit":
            return
        if RANDOM_STATES not in checkpoint:
            raise CheckpointMismatchError(
                f"the checkpoint has no {RANDOM_STATES!r} entry to resume from: it is damaged"
            )
        within_epoch = not _at_end_of_epoch(checkpoint.get("loops", {}))
        states = checkpoint[RANDOM_STATES]
        if len(states) != self.trainer.world_size:
            return  # saved by another number of processes: there is no state for each
        self._resume_from, self._resume_within_epoch = states[self.trainer.global_rank], within_epoch
        if self.trainer.strategy.restore_checkpoint_after_setup:
            self._resume_random_state()  # on_fit_start is over already

    def _resume_random_state(self) -> None:
        if self._resume_from is not None:
            set_random_state(self._resume_from)

    def on_fit_start(self) -> None:
        """Go back to the random state of the checkpoint, before the data loader starts and draws from it."""
        super().on_fit_start()
        self._resume_random_state()

    def on_train_epoch_end(self) -> None:
        """Go back again where Lightning first ends the epoch of the checkpoint: the data loader will start once more."""
        super().on_train_epoch_end()
        self._resume_random_state()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Go back again within an epoch: in the uninterrupted run the data loader had started long before."""
        if self._resume_within_epoch:
            self._resume_random_state()
        self._resume_from, self._resume_within_epoch = None, False
        return super().on_train_batch_start(batch, batch_idx)

    def on_validation_model_zero_grad(self) -> None:
        """Note the random state before validation in the midst of training, whose data loader draws from it."""
        self._before_validation = random_state()
        super().on_validation_model_zero_grad()

    def on_validation_end(self) -> None:
        """Let training go on as it would have without validation."""
        super().on_validation_end()
        if self._before_validation is not None:
            set_random_state(self._before_validation)
            self._before_validation = None


def _at_end_of_epoch(loops: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint was saved after the last batch of an epoch, and mark that epoch as finished.

    Lightning's counters say so only halfway while hooks run. Resuming from such counters, Lightning 2.6 trains one batch of
    the finished epoch again (with ``max_steps``), or draws random numbers for a validation that it then skips.
    """
    fit = loops.get("fit_loop")
    if fit is None:
        return True
    batches, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
    if not batches["is_last_batch"]:
        return False
    in_batch_end = batches["current"]["completed"] < batches["current"]["processed"]
    in_epoch_end = epochs["current"]["processed"] == epochs["current"]["started"]
    if in_batch_end or in_epoch_end:  # otherwise in validation, from where Lightning goes on rightly
        for counts in (epochs["total"], epochs["current"], batches["total"]):
            counts.update(dict.fromkeys(counts, counts["ready"]))
        batches["current"].update(dict.fromkeys(batches["current"], 0))
        batches["is_last_batch"] = False
    return True

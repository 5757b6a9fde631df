"""Exact resuming: a run goes on from its checkpoint with the random numbers, batches and gradients it would have had.

What Lightning does at the end of an epoch, and where the draws of the data loader (``*``) lie::

    uninterrupted   ... last batch | validation* | epoch end | loader starts* | batch ...
    resumed                                    start | loader starts* | batch ...
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_peft import data_position as position
from lightning_peft.errors import CheckpointMismatchError, LightningPEFTWarning
from lightning_peft.gathered_gradients import (
    GRADIENTS,
    batches_gathered,
    gathered_gradients,
    gradients_are_whole,
    plain_gradients,
    restore_gradients,
)
from lightning_peft.random_state import of_all_processes, random_state, set_random_state, state_for
from lightning_peft.weight_files import survives_saving

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Host
else:
    _Host = object

RANDOM_STATES = "lightning_peft_random_states"
"""Key of a ``.ckpt`` under which the random states of all processes stand."""
POSITIONS = "lightning_peft_positions"
"""Key of a ``.ckpt`` under which the positions in the data of all processes stand, of loaders that do not keep their own."""


class ExactResume(_Host):
    """The hooks of a LightningModule that make a run resume bit for bit, with dropout.

    Training loaders with ``state_dict`` and ``load_state_dict`` bring themselves to their position. The iterators of others are
    made again from the random numbers of their epoch, and the batches that were trained on are thrown away; if they turn out to
    be other ones, a warning says so. A window of accumulated gradients goes on with those gathered before. Validation in the
    midst of training leaves the random numbers of the training as they were.
    """

    _resume_from: dict[str, Any] | None = None
    _resume_within_epoch = False
    _starts_epoch = False
    _resume_position: Mapping[str, Any] | None = None
    _resume_gradients: Any = None
    _before_validation: dict[str, Any] | None = None
    _epoch_start: dict[str, Any] | None = None
    _next_epoch: tuple[dict[str, Any], dict[str, Any], Any] | None = None
    _sample: position.Sample | None = None
    _writes_into_batches = False
    _quiet: warnings.catch_warnings[Any] | None = None
    _other_processes = False  # than those that saved the checkpoint

    # -- saving ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random number generators, the position in the data and gathered gradients."""
        super().on_save_checkpoint(checkpoint)
        _, _, each = position.place_of(getattr(self, "_trainer", None))
        checkpoint[RANDOM_STATES] = of_all_processes(self._before_validation or random_state(), each)
        if getattr(self, "_trainer", None) is None:
            return
        if self.trainer.state.fn == "fit" and position.training_loaders(self.trainer):
            checkpoint[POSITIONS] = of_all_processes(self._position(), each)
        self._save_gradients(checkpoint)

    def _position(self) -> dict[str, Any]:
        loaders = position.training_loaders(self.trainer)
        if not all(map(position.keeps_its_position, loaders)):
            return {
                "start": self._epoch_start,
                "generators": position.generator_states(self.trainer),
                "sample": [] if self._sample is None else self._sample.taken(),
            }
        ahead = position.fetched_ahead(self.trainer)
        if ahead and not survives_saving(ahead):
            self._warn(
                f"{_names(loaders)} has no length, so Lightning fetched a batch ahead of the training; it is no plain value that a checkpoint "
                "can hold, and a run that resumes leaves it out. Give batches of tensors, or data with a length"
            )
            ahead = []
        return {"ahead": ahead} if ahead else {}

    def _save_gradients(self, checkpoint: dict[str, Any]) -> None:
        gathered = batches_gathered(self.trainer)
        if not gathered or "optimizer_states" not in checkpoint:  # nothing to resume from
            return
        if gradients_are_whole(self.trainer):
            checkpoint[GRADIENTS] = of_all_processes(gathered_gradients(self))
            return
        self._warn(
            f"this checkpoint is saved after {gathered} of {self.trainer.accumulate_grad_batches} batches whose gradients are accumulated; "
            f"{type(self.trainer.strategy).__name__} splits them, so it does not hold them and a run that resumes from it is not exact. Save at "
            "a multiple of accumulate_grad_batches"
        )

    def _warn(self, message: str) -> None:
        warnings.warn(message, LightningPEFTWarning, stacklevel=3)

    # -- resuming --------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over random states, position and gradients, if a fit resumes."""
        super().on_load_checkpoint(checkpoint)
        if getattr(self, "_trainer", None) is None or self.trainer.state.fn != "fit":
            return
        if RANDOM_STATES not in checkpoint:
            raise CheckpointMismatchError(
                f"the checkpoint has no {RANDOM_STATES!r} entry to resume from: it is damaged"
            )
        within_epoch = not _at_end_of_epoch(checkpoint.get("loops", {}))
        states, (rank, processes, each) = checkpoint[RANDOM_STATES], position.place_of(self.trainer)
        self._resume_gradients = plain_gradients(checkpoint.get(GRADIENTS), rank, processes) if each == 1 else None
        if GRADIENTS in checkpoint and self._resume_gradients is None:
            self._warn(
                f"the checkpoint holds the gathered gradients of {len(checkpoint[GRADIENTS])} processes and this run has {self.trainer.world_size}, so they are "
                "left out; resume with as many processes to go on exactly"
            )
        self._resume_from, self._resume_within_epoch = state_for(states, rank), within_epoch
        positions = checkpoint.get(POSITIONS) or [None]  # older checkpoints have none
        self._resume_position, self._other_processes = positions[rank % len(positions)], len(states) != processes
        if self.trainer.strategy.restore_checkpoint_after_setup:
            self._resume_random_state()  # on_fit_start is over already

    def _resume_random_state(self) -> None:
        if self._resume_from is not None:
            set_random_state(self._resume_from)

    def on_fit_start(self) -> None:
        """Go back to the random state that the loaders were made in or start from, and note it."""
        super().on_fit_start()
        self._next_epoch = self._sample = None
        start = (self._resume_position or {}).get("start")
        if start is None:
            self._resume_random_state()
        else:
            set_random_state(start["fit"])
            if start["epoch"] is None:
                position.set_generator_states(self.trainer, start["generators"])
        generators = position.generator_states(self.trainer)
        self._epoch_start = {"fit": random_state(), "epoch": None, "generators": generators}

    def on_train_start(self) -> None:
        """Bring the training loaders to the position of the checkpoint, before the first batch is fetched."""
        super().on_train_start()
        if self._resume_from is None or self._resume_position is None:
            return
        loaders = position.training_loaders(self.trainer)
        keeping = [loader for loader in loaders if position.keeps_its_position(loader)]
        if not keeping and "start" in self._resume_position:
            self._resume_plain_loaders(loaders, self._resume_position, self._resume_from)
        elif len(keeping) == len(loaders):
            self._starts_epoch = not self._resume_within_epoch and position.end_epoch(self.trainer)
            position.put_ahead(self.trainer, self._resume_position.get("ahead", []))
            if all(map(position.starts_at_once, loaders)):
                self._resume_random_state()
                self._resume_within_epoch = False
        elif self._resume_within_epoch:
            self._warn(
                f"among the training loaders are some that keep their position ({_names(keeping)}) and others that do not "
                f"({_names([one for one in loaders if one not in keeping])}); within an epoch such a run does not resume exactly. Give all of "
                "them state_dict and load_state_dict, as torchdata's StatefulDataLoader has, or none"
            )

    def _resume_plain_loaders(self, loaders: list[Any], stored: Mapping[str, Any], state: dict[str, Any]) -> None:
        start = stored["start"]
        if self._resume_within_epoch and start["epoch"] is None:
            self._epoch_start = start  # the iterators are made in the first epoch, as they were then
        else:
            begun = (
                (start["epoch"], start["generators"]) if self._resume_within_epoch else (state, stored["generators"])
            )
            position.start_again(self.trainer, *begun)
            self._epoch_start = {"fit": start["fit"], "epoch": begun[0], "generators": begun[1]}
        persistent = _names([loader for loader in loaders if position.keeps_its_workers(loader)])
        if not self._resume_within_epoch:
            if persistent:
                self._warn(
                    f"the workers of {persistent} are persistent (persistent_workers=True): in the run that was not interrupted they go on with the "
                    "random numbers of the epoch before, which a checkpoint cannot hold; if the data draws random numbers in workers, this run "
                    "does not resume exactly. Set persistent_workers=False"
                )
            return
        self._hush()
        batch, drew = position.skip_batches(self.trainer, position.batches_done(self.trainer))
        known, here = stored["sample"], [] if batch is None else position.sample_of(position.as_trained(self, batch))
        if not drew and not self._other_processes and known is not None and not position.same_samples(known, here):
            cause = (
                f"as the workers of {persistent} are persistent and went on with random numbers of the epochs before; this run does not resume "
                "exactly. Set persistent_workers=False, or take a"
                if persistent and start["epoch"] is not None
                else "as its order does not come from the random numbers of python, numpy or torch nor from the generator of the loader or its "
                "sampler; this run does not resume exactly. Take a"
            )
            self._warn(
                f"{_names(loaders)} did not give the batches again that it gave before the checkpoint, {cause} loader with state_dict and "
                "load_state_dict, such as torchdata's StatefulDataLoader or ResumableDataLoader"
            )
        set_random_state(state)
        position.set_generator_states(self.trainer, stored["generators"])
        self._resume_within_epoch = False

    def _hush(self) -> None:
        """Keep Lightning from warning, until the first batch, of a loader that does not resume: it is being resumed."""
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")

    def on_train_epoch_start(self) -> None:
        """Note what the iterators of this epoch start from, if they are made now."""
        super().on_train_epoch_start()
        if self._starts_epoch and self.trainer.fit_loop.is_resuming:  # in later epochs Lightning does this itself
            position.start_iterators(self.trainer)
        self._starts_epoch = False
        iterator = self._iterator()
        self._next_epoch = (random_state(), position.generator_states(self.trainer), iterator)

    def _iterator(self) -> Any:
        combined = self.trainer.fit_loop._combined_loader
        return None if combined is None else combined._iterator

    def on_train_epoch_end(self) -> None:
        """Go back again where Lightning first ends the epoch of the checkpoint: the data loader will start once more."""
        super().on_train_epoch_end()
        self._resume_random_state()
        if self._resume_from is not None and self._resume_position is not None:
            position.set_generator_states(self.trainer, self._resume_position.get("generators", {}))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Go back again within an epoch, where the loader draws as it starts: in the uninterrupted run that was long before."""
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)
            self._quiet = None
        if self._next_epoch is not None:
            state, generators, iterator = self._next_epoch
            if iterator is not self._iterator():
                self._epoch_start = {**(self._epoch_start or {}), "epoch": state, "generators": generators}
            self._next_epoch = None
        if self._resume_within_epoch:
            self._resume_random_state()
        if self._resume_gradients is not None:
            restore_gradients(self, self._resume_gradients)
        held = self.__dict__  # past nn.Module, which takes a while to set a plain attribute
        held.update(_resume_from=None, _resume_within_epoch=False, _resume_position=None)
        held.update(_resume_gradients=None, _before_validation=None)
        if not all(map(position.keeps_its_position, position.training_loaders(self.trainer))):
            held["_sample"] = position.Sample(batch, at_once=self._writes_into_batches)
        return super().on_train_batch_start(batch, batch_idx)

    # -- validation ------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the random state within a window, where Lightning validates without :meth:`on_validation_model_zero_grad`."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self._sample is not None and self._sample.changed():
            self._writes_into_batches = True
        if self.trainer.accumulate_grad_batches > 1 and batches_gathered(self.trainer):
            self._before_validation = random_state()

    def on_validation_model_zero_grad(self) -> None:
        """Note the random state before validation in the midst of training, whose data loader draws from it."""
        self._before_validation = random_state()
        if not batches_gathered(self.trainer):  # Lightning would drop the gradients of a window that is not over
            super().on_validation_model_zero_grad()

    def on_validation_end(self) -> None:
        """Let training go on as it would have without validation."""
        super().on_validation_end()
        if self._before_validation is not None:
            set_random_state(self._before_validation)
            self._before_validation = None


def _names(loaders: list[Any]) -> str:
    return ", ".join(sorted({type(loader).__name__ for loader in loaders}))


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

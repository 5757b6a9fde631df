"""Resuming with the optimizer of the checkpoint or not at all, its state bound by the names of the parameters.

Lightning restores the parameter groups of an optimizer and the state of a scheduler whole, with the learning rate and every other
setting, and so would drop what the run that resumes asks for. Hence the settings of the fresh objects are compared first::

    fit           make optimizers | on_fit_start: note their settings | train ... save them
    resumed fit   make optimizers | on_fit_start: note and compare,   | Lightning restores its state
                                    put the stored state in order
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.errors import CheckpointMismatchError
from lightning_peft.optimizer_names import bound_by_name, group_names, is_by_position, order_of_groups

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Host
else:
    _Host = object

OPTIMIZERS = "lightning_peft_optimizers"
"""Key of a ``.ckpt`` under which the settings of optimizers and schedulers stand, as they were when training began."""
PARAMETERS = "lightning_peft_optimizer_parameters"
"""Key of a ``.ckpt`` under which the names of the parameters of each optimizer stand, group by group."""
_NOT_SETTINGS = ("params", "param_names")
_NOT_PLAIN = object()


def optimizer_settings(optimizers: Iterable[Any], schedulers: Iterable[Any]) -> dict[str, Any]:
    """Return class and settings of fresh optimizers and schedulers in plain values.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> settings = optimizer_settings([sgd], [])["optimizers"][0]
        >>> settings["class"], settings["groups"][0]["lr"]
        ('SGD', 0.1)
    """
    return {
        "optimizers": [
            {
                "class": type(optimizer).__name__,
                "groups": [
                    _plain({key: value for key, value in group.items() if key not in _NOT_SETTINGS})
                    for group in optimizer.param_groups
                ],
            }
            for optimizer in optimizers
        ],
        "schedulers": [
            {"class": type(scheduler).__name__, "settings": _plain(dict(scheduler.state_dict()))}
            for scheduler in schedulers
        ],
    }


def check_optimizer_settings(stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compare the settings of a checkpoint with those of a run that resumes.

    Raises:
        CheckpointMismatchError: they differ; the message has the first setting with both values.
    """
    for setting, before, now in _differences(stored, here):
        raise CheckpointMismatchError(
            f"{setting} was {before!r} when the run of the checkpoint began and is {now!r} now, but a run that resumes goes on with the optimizer "
            "and scheduler of the checkpoint. Resume with the old setting, or start a new run from the adapter folder, PEFTModule(base, "
            "adapter=...)"
        )


class SameOptimizers(_Host):
    """The hooks of a LightningModule that refuse to resume with other settings of optimizers and schedulers.

    The states of the optimizers are bound by the names of the parameters, in whatever order these come.
    """

    _optimizer_settings: dict[str, Any] | None = None
    _stored_optimizers: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Forget the settings of an earlier fit."""
        super().setup(stage)
        self._optimizer_settings = self._stored_optimizers = None

    def on_fit_start(self) -> None:
        """Note the settings of the fresh optimizers, and compare them if a fit resumes."""
        super().on_fit_start()
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        self._optimizer_settings = optimizer_settings(self.trainer.optimizers, schedulers)
        self._take_stored_optimizers()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings, and the names of the parameters."""
        super().on_save_checkpoint(checkpoint)
        if self._optimizer_settings is not None:
            checkpoint[OPTIMIZERS] = self._optimizer_settings
            checkpoint[PARAMETERS] = group_names(self, self.trainer.optimizers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the settings of the checkpoint, if a fit resumes; compare them if there are optimizers already."""
        super().on_load_checkpoint(checkpoint)
        if getattr(self, "_trainer", None) is None or self.trainer.state.fn != "fit":
            return
        self._stored_optimizers = checkpoint  # the state is put in order in it, before Lightning restores from it
        if self.trainer.strategy.restore_checkpoint_after_setup:
            self._take_stored_optimizers()  # on_fit_start is over already

    def _take_stored_optimizers(self) -> None:
        checkpoint, self._stored_optimizers = self._stored_optimizers, None
        if checkpoint is None or self._optimizer_settings is None:
            return
        settings = checkpoint.get(OPTIMIZERS)  # older checkpoints have none
        if settings is not None:
            settings = self._bind_by_name(checkpoint, settings)
            check_optimizer_settings(settings, self._optimizer_settings)

    def _bind_by_name(self, checkpoint: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Put the stored states in the order of the parameters here; return the stored settings with groups in that order."""
        names, here = checkpoint.get(PARAMETERS) or [], group_names(self, self.trainer.optimizers)
        states = checkpoint.get("optimizer_states") or []
        if not len(names) == len(here) == len(states) == len(settings["optimizers"]):
            return settings  # an older checkpoint, or other optimizers, which the comparison refuses
        compared = []
        for number, (stored, now) in enumerate(zip(names, here, strict=True)):
            one = settings["optimizers"][number]
            optimizer = self.trainer.optimizers[number]
            if stored is None or now is None or not is_by_position(states[number]):
                compared.append(one)
                continue
            if one["class"] != type(optimizer).__name__ or len(stored) != len(now):
                compared.append(one)  # refused by the comparison
                continue
            order = order_of_groups(stored, now, type(optimizer).__name__)
            if order != list(range(len(order))) and self.trainer.lr_scheduler_configs:
                raise CheckpointMismatchError(
                    f"the parameter groups of {type(optimizer).__name__} come in another order than in the checkpoint, and its scheduler counts "
                    f"them: the checkpoint has {stored}, this run has {now}. Resume with the groups in the order of the checkpoint"
                )
            states[number] = bound_by_name(states[number], stored, now, order)
            compared.append({**one, "groups": [one["groups"][group] for group in order]})
        return {**settings, "optimizers": compared}


def _differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield setting, value before and value now. What only one side has is skipped: releases of torch add settings."""
    for kind in ("optimizers", "schedulers"):
        before, now = stored.get(kind, []), here[kind]
        classes = [[one["class"] for one in side] for side in (before, now)]
        if classes[0] != classes[1]:
            yield f"the class of the {kind}", classes[0], classes[1]
            return
        for old, new in zip(before, now, strict=True):
            name = new["class"]
            if kind == "schedulers":
                yield from _differing(f"{name}: ", old["settings"], new["settings"])
                continue
            if len(old["groups"]) != len(new["groups"]):
                yield f"the number of parameter groups of {name}", len(old["groups"]), len(new["groups"])
                return
            for number, groups in enumerate(zip(old["groups"], new["groups"], strict=True)):
                yield from _differing(f"{name}, parameter group {number}: ", *groups)


def _differing(where: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in [key for key in old if key in new]:
        if old[key] != new[key] and repr(old[key]) != repr(new[key]):  # nan is not itself
            yield f"{where}{key}", old[key], new[key]


def _plain(value: Any) -> Any:
    """Return ``value`` in plain values, without what has none, such as functions."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else _NOT_PLAIN
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        pairs = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, item in pairs.items() if item is not _NOT_PLAIN}
    if isinstance(value, (list, tuple)):
        return [item for item in map(_plain, value) if item is not _NOT_PLAIN]
    return _NOT_PLAIN

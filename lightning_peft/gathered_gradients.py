"""The gradients of a window of accumulated batches, by the names of their parameters.

A checkpoint in the midst of a window holds what was gathered so far, or training would go on from nothing::

    accumulate_grad_batches=3    batch 0 | batch 1 | <- saved here: gradients of 0 and 1 | batch 2, step
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lightning_peft.errors import CheckpointMismatchError

GRADIENTS = "lightning_peft_gradients"
"""Key of a ``.ckpt`` under which the gathered gradients of all processes stand, by rank."""


def batches_gathered(trainer: Trainer) -> int:
    """Return how many batches of the present window have given their gradients; 0 where the optimizer has just made its step."""
    every, loop = trainer.accumulate_grad_batches, trainer.fit_loop.epoch_loop
    if every <= 1 or loop.batch_progress.is_last_batch or trainer.state.fn != "fit":
        return 0
    return int(loop.batch_progress.current.ready) % every


def gradients_are_whole(trainer: Trainer) -> bool:
    """Tell whether a process holds the gradients of its parameters as tensors of the same shape, not parts of them."""
    return isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))


def gathered_gradients(module: LightningModule) -> dict[str, Tensor]:
    """Return the gradients that are there by the names of their parameters; with fp16, scaled as the loss is."""
    return {
        name: parameter.grad.detach()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


def restore_gradients(module: LightningModule, gradients: Mapping[str, Tensor]) -> None:
    """Give the parameters of ``module`` what :func:`gathered_gradients` returned; all others have none.

    Raises:
        CheckpointMismatchError: there is no trained parameter of that name and shape.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, gradient in gradients.items():
        if name not in trained or trained[name].shape != gradient.shape:
            here = list(trained[name].shape) if name in trained else "no trained parameter"
            raise CheckpointMismatchError(
                f"the checkpoint holds a gathered gradient {list(gradient.shape)} of {name!r}, here it is {here}; resume with what was trained "
                "before"
            )
    for name, parameter in trained.items():
        stored = gradients.get(name)
        parameter.grad = None if stored is None else _like(stored, parameter)


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    kept = torch.empty_like(parameter)  # the memory format of the parameter, as autograd makes it
    return kept.copy_(gradient)


def plain_gradients(stored: Any, rank: int, processes: int) -> Mapping[str, Tensor] | None:
    """Return the gradients of one process out of a checkpoint, or None where it has none for each process here."""
    return stored[rank] if isinstance(stored, list) and len(stored) == processes else None

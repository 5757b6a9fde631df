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
from torch.distributed.tensor import DTensor

from lightning_peft.errors import CheckpointMismatchError
from lightning_peft.sharded_parameters import fsdp_parameters

GRADIENTS = "lightning_peft_gradients"
"""Key of a ``.ckpt`` under which the gathered gradients of all processes stand, by rank."""


def batches_gathered(trainer: Trainer) -> int:
    """Return how many batches of the present window have given their gradients; 0 where the optimizer has just made its step."""
    every, loop = trainer.accumulate_grad_batches, trainer.fit_loop.epoch_loop
    if every <= 1 or loop.batch_progress.is_last_batch or trainer.state.fn != "fit":
        return 0
    return int(loop.batch_progress.current.ready) % every


def tensors_are_whole(trainer: Trainer) -> bool:
    """Tell whether a process holds parameters as tensors of their shape, not parts of them."""
    return isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))


def gradients_are_whole(trainer: Trainer) -> bool:
    """Tell whether a process holds the gradients of a window as tensors of the shape of their parameters.

    So it does under FSDP2 too where gradients are not reduced before the last batch of a window.
    """
    gathered = gathered_gradients(trainer.lightning_module)
    return tensors_are_whole(trainer) or not any(isinstance(gradient, DTensor) for gradient in gathered.values())


def gathered_gradients(module: LightningModule) -> dict[str, Tensor]:
    """Return the gradients that are there by the names of their parameters; with fp16, scaled as the loss is."""
    unreduced = {id(parameter): _unreduced(known) for parameter, known in fsdp_parameters(module)}
    found = {}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else unreduced.get(id(parameter))
        if parameter.requires_grad and gradient is not None:
            found[name] = gradient.detach()
    return found


def _unreduced(known: Any) -> Tensor | None:
    """Return the gradient of a window that FSDP2 has not reduced yet."""
    if known.unsharded_accumulated_grad is not None:
        found: Tensor | None = known.unsharded_accumulated_grad
        return found
    return getattr(getattr(known, "_unsharded_param", None), "grad", None)


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
    sharded = {id(parameter): known for parameter, known in fsdp_parameters(module)}
    for name, parameter in trained.items():
        stored, known = gradients.get(name), sharded.get(id(parameter))
        if known is None:
            parameter.grad = None if stored is None else _like(stored, parameter)
        else:  # FSDP2 adds the batches to come to it, as autograd would
            known.unsharded_accumulated_grad = None if stored is None else stored.to(known.device).contiguous()


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    kept = torch.empty_like(parameter)  # the memory format of the parameter, as autograd makes it
    return kept.copy_(gradient)


def plain_gradients(stored: Any, rank: int, processes: int) -> Mapping[str, Tensor] | None:
    """Return the gradients of one process out of a checkpoint, or None where it has none for each process here."""
    return stored[rank] if isinstance(stored, list) and len(stored) == processes else None

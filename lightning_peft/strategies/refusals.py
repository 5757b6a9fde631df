"""What goes wrong under FSDP2 in the midst of a run, or silently, refused before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim import Optimizer

from lightning_peft.errors import ConfigError
from lightning_peft.unread_weights import unread


def refuse_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that copy the model, of which each process has a part.

    Raises:
        ConfigError: there is one.
    """
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, WeightAveraging):
            raise ConfigError(
                f"{type(callback).__name__} copies the model, and sharded models are not copied; leave it out, or use the strategy 'peft_ddp'"
            )


def refuse_meta(module: nn.Module) -> None:
    """Refuse what has no values and will get none: Lightning would fill it with what happens to be in memory.

    Raises:
        ConfigError: a parameter or a buffer is on the meta device, and no weight of ``module`` is to be read yet.
    """
    if any(unread(inner) for inner in module.modules()):
        return
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise ConfigError(
                f"{name!r} is on the meta device and has no values, as modules have that are made inside trainer.init_module() or torch.device('meta'); "
                "make them on the CPU in configure_model, or let a loader such as CausalLMLoader read a base in parts"
            )


def refuse_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose kernels take no sharded tensors.

    Raises:
        ConfigError: one is of bitsandbytes.
    """
    for one in optimizers:
        bare: Any = getattr(one, "optimizer", one)
        if type(bare).__module__.partition(".")[0] == "bitsandbytes":
            raise ConfigError(
                f"{type(bare).__module__}.{type(bare).__name__} takes no sharded tensors; use torch.optim.AdamW, whose state is sharded, or the strategy "
                "'peft_ddp'"
            )

"""Every predicted token counts the same in a step of the optimizer, whichever batch and process it is in.

Of batches with n_i tokens and mean losses l_i, over all processes and all batches of a window of accumulated gradients::

    as a rule    mean_i l_i               a token of a short batch counts for more than one of a long batch
    here         Σ n_i l_i / Σ n_i        what one process does with all of them in one batch

Sums over tokens are what backward runs on, as the batches to come are not known; what was gathered is divided before the step. So
callbacks see gradients of sums in ``on_after_backward``, and those of the mean behind ``on_before_optimizer_step`` of the module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_peft.batch_parts import IGNORED
from lightning_peft.data_position import place_of
from lightning_peft.errors import ConfigError
from lightning_peft.gathered_gradients import GRADIENTS, plain_gradients

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Host
else:
    _Host = object

TOKENS = "lightning_peft_window_tokens"
"""Key of a ``.ckpt`` that stands in the midst of a window: how many tokens it has so far, over all processes."""


class TokenWeighting(_Host):
    """The hooks of a LightningModule that weigh batches by their tokens; without :meth:`weigh` they do nothing."""

    _window_tokens: Tensor | None = None

    def weigh(self, loss: Tensor, wanted: Tensor | None) -> Tensor:
        """Have the next backward count ``loss``, a mean, once for each token, and return it; nothing is lost where there is none.

        Args:
            loss: a scalar.
            wanted: the tokens that are predicted (batch, seq), with ``IGNORED`` where none is.

        Raises:
            ConfigError: there are no tokens.
        """
        if wanted is None:
            raise ConfigError(
                "loss_weighting='tokens' was asked for, but the batch has no labels (batch, seq) and logits (batch, seq, vocabulary) beside them; "
                "leave it out"
            )
        count = (wanted != IGNORED).sum().to(loss.device, torch.float32)
        self._window_tokens = count if self._window_tokens is None else self._window_tokens + count
        over_all = count
        if self.trainer.world_size > 1:
            over_all = self.trainer.strategy.reduce(count.clone(), reduce_op="mean")
        # Lightning divides by the number of batches; what routers add is one loss over all processes.
        every = self.trainer.accumulate_grad_batches
        self.__dict__["_loss_weights"] = (count * every, over_all * every)
        return torch.where(count > 0, loss, torch.zeros_like(loss))

    def setup(self, stage: str) -> None:
        """Begin with an empty window."""
        super().setup(stage)
        self._window_tokens = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make gradients of sums over tokens those of their mean."""
        super().on_before_optimizer_step(optimizer)
        if self._window_tokens is None:
            return
        strategy = self.trainer.strategy
        tokens = strategy.reduce(self._window_tokens.clone(), reduce_op="sum")
        factor = self.trainer.world_size / tokens.clamp(min=1)  # gradients are means over processes
        for parameter in self.parameters():
            gradient = parameter.grad
            if gradient is not None:
                here = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                here.mul_(factor)
        self._window_tokens = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how many tokens an open window has."""
        super().on_save_checkpoint(checkpoint)
        if self._window_tokens is not None:
            total = self.trainer.strategy.reduce(self._window_tokens.clone(), reduce_op="sum")
            checkpoint[TOKENS] = float(total)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the tokens of an open window over, where its gradients are."""
        super().on_load_checkpoint(checkpoint)
        trainer = getattr(self, "_trainer", None)
        if trainer is None or TOKENS not in checkpoint:
            return
        rank, processes, each = place_of(trainer)
        if each == 1 and plain_gradients(checkpoint.get(GRADIENTS), rank, processes) is not None:
            here = checkpoint[TOKENS] if rank == 0 else 0.0
            self._window_tokens = torch.tensor(here, device=self.device)

"""What adapters do while they train, beyond forward: losses of their own, and changes after a step of the optimizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.injection import KnownRoots, adapted_roots, records
from lightning_peft.interfaces import Adapter, Method
from lightning_peft.moe.balance import balanced_over, loss_scale
from lightning_peft.rows import adapter_rows
from lightning_peft.saved_modules import own_adapters

ADAPTER_COLUMN = "adapter"
"""Key of a batch under which each row names its adapter."""

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Host
else:
    _Host = object


def auxiliary_loss(module: nn.Module, roots: Sequence[nn.Module] | None = None) -> Tensor | None:
    """Return the sum of what the adapters in ``module`` that are active, or trained on rows of a batch, add to the loss, a scalar; None if that is nothing.

    ``roots`` are the adapted models in it, where the caller knows them.
    """
    total: Tensor | None = None
    for root in adapted_roots(module) if roots is None else roots:
        names = [name for name, injection in records(root).items() if injection.method.auxiliary_losses]
        for layer in adapter_layers(root).values() if names else ():
            for name in filter(layer.trains, layer.adapters):
                adapter = layer.adapters[name]
                assert isinstance(adapter, Adapter)
                loss = adapter.auxiliary_loss() if name in names and name not in layer.merged else None
                if loss is not None:
                    total = loss if total is None else total + loss.to(total.device)
    return total


class AdapterTraining(_Host):
    """The hooks of a LightningModule that let adapters take part in training, whatever ``training_step`` does."""

    def _adapted_roots(self) -> list[nn.Module]:
        known = self.__dict__.get("_known_roots")
        if known is None:
            known = self.__dict__["_known_roots"] = KnownRoots()
        found: list[nn.Module] = known.of(self)
        return found

    @contextlib.contextmanager
    def batch_rows(self, batch: Any) -> Iterator[Any]:
        """Let the adapters that a batch names act on its rows for the time of a ``with`` block, and in the backward behind it.

        Yields:
            The batch without its column ``adapter``: a name for each row, and None or ``""`` for the base alone. A batch
            without that column is handed back, and the active adapters act.
        """
        names: Sequence[Any] | None = None
        if isinstance(batch, Mapping) and ADAPTER_COLUMN in batch:
            names = [name or None for name in batch[ADAPTER_COLUMN]]
            batch = {key: value for key, value in batch.items() if key != ADAPTER_COLUMN}
        self.__dict__["_row_names"] = names
        with self._rows(names):
            yield batch

    @contextlib.contextmanager
    def _rows(self, names: Sequence[Any] | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if names is not None:
                stack.enter_context(
                    balanced_over(1)
                )  # a process may have no row for a router, and would not be waited for
            for root in adapted_roots(self) if names is not None else ():
                stack.enter_context(adapter_rows(root, names or []))
            yield

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add what the adapters ask for to ``loss``, in its scale, and run backward; losses of routers join in there."""
        share: float | Tensor = 1.0 / self.trainer.accumulate_grad_batches if self.automatic_optimization else 1.0
        if (weights := self.__dict__.pop("_loss_weights", None)) is not None:
            loss, share = loss * weights[0], share * weights[1]
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = share if scaler is None else scaler.scale(torch.as_tensor(share, device=loss.device))
        own = auxiliary_loss(self, self._adapted_roots())
        if own is not None and own.requires_grad:
            loss = loss + (own * scale).to(loss.device, loss.dtype)
        # What gradient checkpointing runs again needs the rows of the forward.
        names = self.__dict__.pop("_row_names", None)
        with loss_scale(scale), contextlib.nullcontext() if names is None else self._rows(names):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step the optimizer, then let the methods of active adapters act."""
        acting = [
            (root, name, injection.method)
            for root in self._adapted_roots()
            for name, injection in records(root).items()
            if type(injection.method).after_optimizer_step is not Method.after_optimizer_step
        ]
        step = self.trainer.global_step if acting else 0
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not acting:
            return
        steps = self.trainer.estimated_stepping_batches
        bare: Optimizer = getattr(optimizer, "optimizer", optimizer)
        for root, name, method in acting:
            here = own_adapters(root, name)
            active = any(layer.trains(name) for layer in adapter_layers(root).values() if name in layer.adapters)
            if active and any(p.requires_grad for adapter in here.values() for p in adapter.parameters()):
                with torch.no_grad():
                    method.after_optimizer_step(here, bare, step, int(steps) if math.isfinite(steps) else 0)

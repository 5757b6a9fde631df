"""Tokens a second and peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override


class ResourceMonitor(Callback):
    """Logs ``tokens_per_second`` and ``peak_memory_mb`` of training, as often as the Trainer logs.

    Tokens are the elements of ``input_ids`` in a dict batch, or of a tensor batch; for other batches ``rows_per_second``
    is logged instead. Waiting for data counts, validation does not. Memory is the most that was allocated on a GPU, or
    the largest resident set of the process.
    """

    def __init__(self) -> None:
        self._count, self._seconds, self._started = 0, 0.0, 0.0
        self._unit = "tokens"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start measuring."""
        self._count, self._seconds, self._started = 0, 0.0, time.perf_counter()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._started = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the time that validation took."""
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log when the Trainer logs."""
        now = time.perf_counter()
        self._seconds, self._started = self._seconds + now - self._started, now
        self._unit, count = _size(batch)
        self._count += count
        if not trainer._logger_connector.should_update_logs:
            return
        pl_module.log_dict(
            {
                f"{self._unit}_per_second": self._count / max(self._seconds, 1e-9),
                "peak_memory_mb": peak_memory_mb(pl_module.device),
            },
            batch_size=1,
        )
        self._count, self._seconds = 0, 0.0


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in MiB: allocated on a GPU, resident of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _size(batch: Any) -> tuple[str, int]:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        return "tokens", ids.numel()
    tensors = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return "rows", next((len(tensor) for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim()), 1)

"""What a LightningModule measures in validation and test: losses over tokens or rows, and the metrics of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.aggregation import MeanMetric

from lightning_peft.batch_parts import IGNORED, MeanPerplexity, rows_of, tokens_of
from lightning_peft.tasks.task import Task

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Host
else:
    _Host = object


class Measuring(_Host):
    """The hooks of a LightningModule that measure.

    A set of data has metrics of its own, which are named after it where there are several. The module has ``model``, ``predict_outputs`` and
    ``compute_loss``.
    """

    model: nn.Module | None
    metrics: nn.ModuleDict
    loss: Callable[[Any, Any], Tensor] | None
    task: Task | None
    predict_outputs: Any
    compute_loss: Any
    batch_rows: Any

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch: ``val_loss``, and ``val_perplexity`` and ``val_token_accuracy`` where there are tokens."""
        self._measure("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch: ``test_loss``, and ``test_perplexity`` and ``test_token_accuracy`` where there are tokens."""
        self._measure("test", batch, dataloader_idx)

    def _measure(self, stage: str, batch: Any, dataloader_idx: int) -> None:
        outputs = self.predict_outputs(batch)
        self._record(f"{stage}-{dataloader_idx}", outputs, self.compute_loss(outputs, batch).detach(), batch)

    def _record(self, key: str, outputs: Any, loss: Tensor, batch: Any) -> None:
        tokens = tokens_of(self.model, outputs, batch) if self.loss is None else None
        metrics = self._metrics_for(key, with_tokens=tokens is not None)
        if self.task is not None and self.model is not None:
            with self.batch_rows(batch) as own:  # generated text is that of the adapters of its rows
                self.task.update(metrics, self.model, outputs, own)
        if tokens is None:
            if not _without_labels(batch):  # the loss of nothing is not a number
                metrics["loss"].update(loss, weight=rows_of(batch))
            return
        predicted, wanted = tokens
        counted = wanted != IGNORED
        if count := int(counted.sum()):
            metrics["loss"].update(loss, weight=count)
            if "perplexity" in metrics:
                metrics["perplexity"].update(loss, weight=count)
                metrics["token_accuracy"].update(((predicted == wanted) & counted).sum() / count, weight=count)

    def _metrics_for(self, key: str, *, with_tokens: bool) -> Mapping[str, Metric]:
        if key not in self.metrics:
            with torch.inference_mode(False):  # a fit may follow, whose validation updates them in another mode
                made: dict[str, Metric] = {"loss": MeanMetric()}
                if with_tokens and (self.task is None or self.task.predicts_tokens):
                    made |= {"perplexity": MeanPerplexity(), "token_accuracy": MeanMetric()}
                if self.task is not None:
                    made |= self.task.make_metrics(key.split("-")[0])
                self.metrics[key] = MetricCollection(made, compute_groups=False).to(self.device)  # type: ignore[arg-type]
        return self.metrics[key]  # type: ignore[return-value]

    def on_validation_epoch_end(self) -> None:
        """Log what was measured, once for each data set by name and under the plain names for the first."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log what was measured, once for each data set by name and under the plain names for the first."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        names = list(getattr(getattr(self.trainer, "datamodule", None), f"{stage}_names", ()))
        kept = [key for key in self.metrics if key.startswith(f"{stage}-")]
        for key in kept:
            index = int(key.rsplit("-", 1)[1])
            values = self.metrics[key].compute()  # type: ignore[operator]
            for metric, value in values.items():
                if index == 0:
                    self.log(f"{stage}_{metric}", value, prog_bar=metric == "loss", sync_dist=True)
                if len(kept) > 1:
                    self.log(f"{stage}_{metric}/{names[index] if index < len(names) else index}", value, sync_dist=True)
            with torch.inference_mode(False):
                self.metrics[key].reset()  # type: ignore[operator]


def _without_labels(batch: Any) -> bool:
    """Tell whether a batch has labels of classes, none of which counts."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORED).all())

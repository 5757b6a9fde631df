"""Classification of sequences, images and tokens, regression, and multiple choice.

The metrics of GLUE (Wang et al., 2018, arXiv 1804.07461), and with them of the tables of LoRA (arXiv 2106.09685)::

    CoLA          matthews               SST-2, MNLI, QNLI, RTE        accuracy
    STS-B         pearson, spearman      MRPC, QQP                     accuracy, f1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from typing_extensions import override

from lightning_peft.batch_parts import IGNORED
from lightning_peft.errors import ConfigError
from lightning_peft.field_checks import is_whole
from lightning_peft.tasks.task import Task, check_names, logits_and_labels

_OF_CLASSES = ("accuracy", "f1", "matthews")
_OF_NUMBERS = ("pearson", "spearman", "mse", "mae")


@dataclass(frozen=True, kw_only=True)
class ClassificationTask(Task):
    """Each row, a sequence or an image, belongs to one of ``num_labels`` classes; with one label it has a number, which is a regression.

    Logits are (batch, num_labels); labels (batch,), classes or numbers.

    Example:
        >>> sorted(ClassificationTask(num_labels=2, metrics=["accuracy", "f1"]).make_metrics("val"))
        ['accuracy', 'f1']
    """

    num_labels: int = 2
    """Classes; 1 for a regression."""
    metrics: Sequence[str] | None = None
    """Of classes: ``accuracy``, ``f1``, ``matthews``; of numbers: ``pearson``, ``spearman``, ``mse``, ``mae``. If None, ``accuracy``, or
    ``pearson`` and ``spearman``."""
    average: Literal["macro", "micro", "weighted"] = "macro"
    """How ``f1`` of more than two classes is averaged. Of two it is that of class 1, as GLUE has it."""

    def __post_init__(self) -> None:
        if not is_whole(self.num_labels, 1):
            raise ConfigError(f"ClassificationTask num_labels must be 1 or more, got {self.num_labels!r}")
        if self.average not in ("macro", "micro", "weighted"):
            raise ConfigError(f"ClassificationTask average must be macro, micro or weighted, got {self.average!r}")
        check_names(self, "metrics", self._names(), _OF_NUMBERS if self.num_labels == 1 else _OF_CLASSES)

    def _names(self) -> Sequence[str]:
        if self.metrics is not None:
            return self.metrics
        return ("pearson", "spearman") if self.num_labels == 1 else ("accuracy",)

    @override
    def make_metrics(self, stage: str) -> dict[str, Metric]:
        classes = self.num_labels
        if classes == 1:
            numbers = (PearsonCorrCoef, SpearmanCorrCoef, MeanSquaredError, MeanAbsoluteError)
            return {name: dict(zip(_OF_NUMBERS, numbers, strict=True))[name]() for name in self._names()}
        made: dict[str, Metric] = {}
        for name in self._names():
            if name == "accuracy":
                made[name] = MulticlassAccuracy(classes, average="micro")
            elif name == "f1":
                made[name] = BinaryF1Score() if classes == 2 else MulticlassF1Score(classes, average=self.average)
            else:
                made[name] = MulticlassMatthewsCorrCoef(classes)
        return made

    @override
    def update(self, metrics: Mapping[str, Metric], model: nn.Module, outputs: Any, batch: Any) -> None:
        logits, labels = logits_and_labels(self, outputs, batch, 2)
        if logits.shape[1] != self.num_labels:
            raise ConfigError(
                f"ClassificationTask has num_labels={self.num_labels}, but the model gives {logits.shape[1]} logits a row; give both the same"
            )
        regression = self.num_labels == 1
        predicted = logits.flatten().float() if regression else logits.argmax(-1)
        wanted = labels.flatten().to(predicted.dtype)
        for name in self._names():
            metrics[name].update(predicted, wanted)


@dataclass(frozen=True, kw_only=True)
class TokenClassificationTask(Task):
    """Each token belongs to one of ``num_labels`` classes, as in tagging; those labelled -100 are left out.

    Logits are (batch, seq, num_labels); labels (batch, seq). Metrics count tokens, not spans of them.
    """

    num_labels: int = 2
    """Classes."""
    metrics: Sequence[str] = ("accuracy", "f1")
    """``accuracy``, ``f1``, ``matthews``."""
    average: Literal["macro", "micro", "weighted"] = "macro"
    """How ``f1`` is averaged over classes."""

    def __post_init__(self) -> None:
        if not is_whole(self.num_labels, 2):
            raise ConfigError(f"TokenClassificationTask num_labels must be 2 or more, got {self.num_labels!r}")
        if self.average not in ("macro", "micro", "weighted"):
            raise ConfigError(f"TokenClassificationTask average must be macro, micro or weighted, got {self.average!r}")
        check_names(self, "metrics", self.metrics, _OF_CLASSES)

    @override
    def make_metrics(self, stage: str) -> dict[str, Metric]:
        made: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(self.num_labels, average="micro"),
            "f1": MulticlassF1Score(self.num_labels, average=self.average),
            "matthews": MulticlassMatthewsCorrCoef(self.num_labels),
        }
        return {name: made[name] for name in self.metrics}

    @override
    def update(self, metrics: Mapping[str, Metric], model: nn.Module, outputs: Any, batch: Any) -> None:
        logits, labels = logits_and_labels(self, outputs, batch, 3)
        predicted = logits[:, -labels.shape[1] :].argmax(-1)  # (batch, seq); a soft prompt makes logits longer
        counted = labels != IGNORED
        for name in self.metrics if counted.any() else ():
            metrics[name].update(predicted[counted], labels[counted])


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceTask(Task):
    """One of several choices is right: ``accuracy``. Logits are (batch, choices); labels (batch,), the place of the right one."""

    @override
    def make_metrics(self, stage: str) -> dict[str, Metric]:
        return {"accuracy": MeanMetric()}

    @override
    def update(self, metrics: Mapping[str, Metric], model: nn.Module, outputs: Any, batch: Any) -> None:
        logits, labels = logits_and_labels(self, outputs, batch, 2)
        right = logits.argmax(-1) == labels
        metrics["accuracy"].update(right.float().mean(), weight=len(labels))

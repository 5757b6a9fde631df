"""The contract of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_peft.batch_parts import field_of
from lightning_peft.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """How good a model is at what it is trained for, over a whole validation or test set. A frozen dataclass.

    ``PEFTModule(task=...)`` logs each metric as ``val_<name>`` and ``test_<name>``, beside the loss. Metrics gather over processes, so
    that a figure is that of the whole set, not a mean of figures.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    """Columns of a batch that are for the task, and that the model is not called with."""
    predicts_tokens: ClassVar[bool] = False
    """Whether perplexity and the share of tokens that are predicted right are measured too."""

    @abstractmethod
    def make_metrics(self, stage: str) -> dict[str, Metric]:
        """Return fresh metrics by name, for ``stage`` ``"val"`` or ``"test"``."""

    @abstractmethod
    def update(self, metrics: Mapping[str, Metric], model: nn.Module, outputs: Any, batch: Any) -> None:
        """Take a batch into ``metrics``, which are those of :meth:`make_metrics` and perhaps others.

        Args:
            metrics: by name.
            model: the adapted model.
            outputs: what it returned for the batch.
            batch: the batch, with the task's own columns.
        """

    def inputs(self, batch: Any) -> Any:
        """Return ``batch`` without the columns that are for the task."""
        if not self.columns or not isinstance(batch, Mapping):
            return batch
        return {key: value for key, value in batch.items() if key not in self.columns}


def check_names(task: Task, field: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names of metrics that are not ``known``, and a bare word.

    Raises:
        ConfigError: there is one.
    """
    label = f"{type(task).__name__} {field}"
    if isinstance(names, str):
        raise ConfigError(f"{label} must be a list of names, got {names!r}; write [{names!r}]")
    for name in names:
        if name not in known:
            raise ConfigError(f"{label} must be among {', '.join(known)}, got {name!r}{did_you_mean(name, known)}")


def logits_and_labels(task: Task, outputs: Any, batch: Any, dimensions: int) -> tuple[Tensor, Tensor]:
    """Return the logits, of so many ``dimensions``, and the ``labels`` of a batch: the last element of a tuple.

    Raises:
        ConfigError: there are none, or of another shape.
    """
    logits = outputs if isinstance(outputs, Tensor) else field_of(outputs, "logits")
    labels = (
        batch.get("labels") if isinstance(batch, Mapping) else batch[-1] if isinstance(batch, (tuple, list)) else None
    )
    if not isinstance(logits, Tensor) or logits.dim() != dimensions or not isinstance(labels, Tensor):
        found = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
        raise ConfigError(
            f"{type(task).__name__} compares logits of {dimensions} dimensions with the labels of a batch, and found {found} and "
            f"{'labels' if isinstance(labels, Tensor) else 'no labels'}; give the model and the data of that task"
        )
    return logits.detach(), labels

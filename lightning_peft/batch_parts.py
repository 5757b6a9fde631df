"""What is in a batch and in what a model returns, and the mean perplexity of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from typing_extensions import override

from lightning_peft.losses_in_chunks import PREDICTED

IGNORED = -100
"""Label of a token that is not predicted, as in transformers."""


class MeanPerplexity(MeanMetric):
    """The exponential of the mean loss."""

    @override
    def compute(self) -> Tensor:
        """Return exp(mean loss a token)."""
        return torch.exp(super().compute())


def target_of(batch: Any) -> Any:
    """Return what a loss compares the outputs with."""
    if isinstance(batch, Mapping):
        return batch.get("labels", batch)
    return batch[-1] if isinstance(batch, (tuple, list)) else batch


def predicts_the_next_token(model: nn.Module | None) -> bool:
    """Tell whether a position of the logits is about the token after it, as in a causal language model."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    # Of the models of transformers, those that label or fill in each position say so in their names.
    return not type(model).__name__.endswith(("ForTokenClassification", "ForMaskedLM", "ForPreTraining"))


def labels_of(batch: Any) -> Tensor | None:
    """Return the token labels (batch, seq) of a language-model batch, or None."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch
    return labels if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point() else None


def tokens_of(model: nn.Module | None, outputs: Any, batch: Any) -> tuple[Tensor, Tensor] | None:
    """Return predicted and wanted tokens, both (batch, seq), of a language model; None for any other."""
    labels, logits = labels_of(batch), field_of(outputs, "logits")
    predicted = getattr(outputs, PREDICTED, None)  # (batch, seq)
    if labels is None:
        return None
    if predicted is None:
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            return None
        predicted = logits.detach()[:, -labels.shape[1] :].argmax(-1)  # a soft prompt makes logits longer
    if predicts_the_next_token(model):
        return predicted[:, : labels.shape[1] - 1], labels[:, 1:]  # (batch, seq - 1)
    return predicted, labels


def wanted_of(model: nn.Module | None, outputs: Any, batch: Any) -> Tensor | None:
    """Return the wanted tokens of :func:`tokens_of`, also where no predicted ones are known, as after a loss in chunks."""
    labels, logits = labels_of(batch), field_of(outputs, "logits")
    if labels is None or not (hasattr(outputs, PREDICTED) or (isinstance(logits, Tensor) and logits.dim() == 3)):
        return None
    return labels[:, 1:] if predicts_the_next_token(model) else labels


def field_of(outputs: Any, name: str) -> Any:
    """Return a field of what a model returned, or None."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def rows_of(batch: Any) -> int:
    """Return the number of rows in a batch."""
    tensors = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(tensor) for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim()), 1)

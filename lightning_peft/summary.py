"""How much of a model is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_peft.adapter_layer import adapter_layers


@dataclass(frozen=True)
class TrainableSummary:
    """How much of a model is trained."""

    trainable: int
    """Parameters that are trained."""
    total: int
    """All parameters, adapters included."""
    layers: int
    """Places that are adapted."""

    @property
    def percent(self) -> float:
        """Share of the parameters that are trained, in percent."""
        return 100.0 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.percent:.3f} %), at {self.layers} places"


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count the parameters of ``model`` and those of them that are trained. Shared parameters count once."""
    parameters = list(model.parameters())
    return TrainableSummary(
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        total=sum(parameter.numel() for parameter in parameters),
        layers=len(adapter_layers(model)),
    )

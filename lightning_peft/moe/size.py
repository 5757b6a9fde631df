"""How large an upcycled model is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_peft.adapter_layer import adapters_named, base_parameters
from lightning_peft.moe.mixture import MixtureOfExperts


@dataclass(frozen=True)
class UpcycledSize:
    """How large an upcycled model is, in parameters and bytes."""

    dense: int
    """Parameters of the dense model."""
    total: int
    """Parameters of the upcycled model: the mixtures, and what is left of the dense one."""
    active: int
    """Those of them that a token meets, on average."""
    trained: int
    """Parameters that are trained."""
    held_bytes: int
    """Bytes of all that is held while adapters are in the model: the dense base, whole, and the adapters."""
    training_bytes: int
    """Bytes of gradients and of the two moments of Adam, in the precision of the trained parameters."""

    def __str__(self) -> str:
        gib = 1 << 30
        return (
            f"{self.dense:,} parameters become {self.total:,}, of which a token meets {self.active:,}; {self.trained:,} are trained. Held: "
            f"{self.held_bytes / gib:.1f} GiB, and {self.training_bytes / gib:.1f} GiB for gradients and Adam"
        )


def upcycled_size(model: nn.Module, name: str = "default") -> UpcycledSize:
    """Measure ``model``, upcycled by the adapter ``name``; one on the meta device will do.

    Raises:
        AdapterNotFoundError: there is no adapter of that name.
    """
    adapters = adapters_named(model, name).values()
    mixtures = [adapter for adapter in adapters if isinstance(adapter, MixtureOfExperts)]
    own = [parameter for adapter in adapters for parameter in adapter.parameters()]
    dense = dict(base_parameters(model))
    left = sum(parameter.numel() for parameter in dense.values())
    left -= sum(dense[key].numel() for mixture in mixtures for key in mixture.dense_names())
    routers = sum(mixture.router.numel() for mixture in mixtures)
    experts = sum(tensor.numel() for mixture in mixtures for tensor in mixture.tensors().values())
    active = sum(
        tensor.numel() * mixture.copies_per_token / mixture.layout.copies
        for mixture in mixtures
        for tensor in mixture.tensors().values()
    )
    trained = [parameter for parameter in own if parameter.requires_grad]
    return UpcycledSize(
        dense=sum(parameter.numel() for parameter in dense.values()),
        total=left + routers + experts,
        active=left + routers + round(active),
        trained=sum(parameter.numel() for parameter in trained),
        held_bytes=sum(p.numel() * p.element_size() for p in [*dense.values(), *own]),
        training_bytes=3 * sum(p.numel() * p.element_size() for p in trained),
    )

"""Which adapters a model holds, and what there is to know of each; and other names for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_peft.activation import active_adapters
from lightning_peft.adapter_layer import adapter_layers, adapters_named
from lightning_peft.errors import AdapterNotFoundError
from lightning_peft.injection import adapted_roots, records
from lightning_peft.interfaces import Adapter
from lightning_peft.offloading import offloaded_to, rename_offloaded
from lightning_peft.rows import refuse_in_rows
from lightning_peft.scaling import adapter_scale
from lightning_peft.surgery import check_name


@dataclass(frozen=True)
class AdapterInfo:
    """What there is to know of one adapter of a model."""

    name: str
    """Its name."""
    method: str
    """Registry name of its method; empty where it was injected into a part of the model and not into the model."""
    active: bool
    """Whether it acts, or is merged."""
    trainable: bool
    """Whether it is trained while it is active."""
    merged: bool
    """Whether it is folded into the weights of the base."""
    scale: float
    """Factor of its effect."""
    parameters: int
    """Numbers that are trained, shared ones once."""
    bytes: int
    """Memory of its tensors, shared ones once; on disk if that is where they are."""
    device: str
    """Where its tensors are: a device, several joined by commas, or the folder they are offloaded to."""
    places: tuple[str, ...]
    """Paths of the modules it adapts."""

    def __str__(self) -> str:
        marks = [mark for mark in ("active", "trainable", "merged") if getattr(self, mark)]
        return (
            f"{self.name}: {self.method or 'adapter'}, {', '.join(marks) or 'inactive'}, scale {self.scale:g}, {self.parameters:,} parameters "
            f"({self.bytes:,} bytes) at {len(self.places)} places, on {self.device}"
        )


def list_adapters(model: nn.Module) -> list[AdapterInfo]:
    """Return what there is to know of each adapter of ``model``, in the order they were added.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> _ = inject(model, LoRA(rank=1))
        >>> print(*list_adapters(model))
        default: lora, active, trainable, scale 1, 14 parameters (56 bytes) at 2 places, on cpu
    """
    layers = adapter_layers(model)
    found: dict[str, dict[str, Adapter]] = {name: {} for name in records(model)}
    for path, layer in layers.items():
        for name in layer.adapters:
            found.setdefault(name, {})[path] = layer._adapter(name)
    merged = {name for layer in layers.values() for name in layer.merged}
    trainable = {name for layer in layers.values() for name in layer._trainable}
    acting = {*active_adapters(model)} | merged
    return [
        _info(model, name, adapters, active=name in acting, trainable=name in trainable, merged=name in merged)
        for name, adapters in found.items()
        if adapters
    ]


def _info(model: nn.Module, name: str, adapters: Mapping[str, Adapter], **state: bool) -> AdapterInfo:
    held = records(model).get(name)
    parameters = {id(p): p for adapter in adapters.values() for p in adapter.parameters()}
    tensors: dict[int, Tensor] = dict(parameters)
    tensors |= {id(b): b for adapter in adapters.values() for b in adapter.buffers()}
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    return AdapterInfo(
        name=name,
        method=held.method.name if held else "",
        scale=adapter_scale(model, name),
        parameters=sum(p.numel() for p in parameters.values()),
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        device=offloaded_to(model, name) or ", ".join(devices) or "-",
        places=tuple(adapters),
        **state,
    )


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Call the adapter ``old`` ``new``, wherever the model knows it; values, order and state stay.

    Raises:
        AdapterNotFoundError: the model has no adapter ``old``, or only a part of it was handed over.
        ConfigError: ``new`` is no name.
        InjectionError: ``new`` is taken, or a block of :func:`~lightning_peft.rows.adapter_rows` uses ``old``. The model is unchanged in
            all of these cases.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA, active_adapters, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = inject(model, LoRA(rank=1), name="draft")
        >>> rename_adapter(model, "draft", "final")
        >>> active_adapters(model)
        ['final']
    """
    adapters_named(model, old)
    if new == old:
        return
    check_name(model, new)
    roots = [root for root in adapted_roots(model) if old in records(root)]
    if not roots:
        raise AdapterNotFoundError(
            f"adapter {old!r} was injected into a model that {type(model).__name__} is a part of: hand over that model"
        )
    refuse_in_rows(model, old, f"adapter {old!r} cannot be renamed")
    for layer in adapter_layers(model).values():
        if old in layer.adapters:
            layer.rename(old, new)
    for root in roots:
        held = records(root)
        entries = [(new if name == old else name, injection) for name, injection in held.items()]
        held.clear()
        held.update(entries)
        rename_offloaded(root, old, new)

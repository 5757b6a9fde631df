"""A model that is what it was if something fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lightning_peft.activation import active_adapters, set_active_adapters
from lightning_peft.adapter_layer import adapter_layers, base_parameters
from lightning_peft.surgery import delete_adapter


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Take out again, if the block raises, what it injected; what was active and what was trained is so again."""
    # Adapters that are not active now are touched by nothing that may go in; there may be hundreds of them.
    parameters = [parameter for _, parameter in base_parameters(model)]
    layers = adapter_layers(model).values()
    parameters += [p for layer in layers for name in layer.active for p in layer.adapters[name].parameters()]
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    held, active = {id(layer): len(layer.adapters) for layer in layers}, active_adapters(model)
    try:
        yield
    except BaseException:
        now = adapter_layers(model).values()
        fresh = dict.fromkeys(name for layer in now for name in [*layer.adapters][held.get(id(layer), 0) :])
        for name in fresh:
            delete_adapter(model, name)
        if fresh:
            set_active_adapters(model, active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise

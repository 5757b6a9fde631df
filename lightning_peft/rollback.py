"""A model that is what it was if something fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lightning_peft.activation import active_adapters, set_active_adapters
from lightning_peft.adapter_layer import adapter_names
from lightning_peft.surgery import delete_adapter


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Take out again, if the block raises, what it injected; what was active and what was trained is so again."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    held, active = adapter_names(model), active_adapters(model)
    try:
        yield
    except BaseException:
        fresh = [name for name in adapter_names(model) if name not in held]
        for name in fresh:
            delete_adapter(model, name)
        if fresh:
            set_active_adapters(model, active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise

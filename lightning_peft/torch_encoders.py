"""torch's own encoders, whose fused path reads the weights of layers and does not call them."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.adapter_layer import AdapterLayer, base_modules, unwrapped

_NESTED = "_lightning_peft_use_nested_tensor"
"""Attribute of an adapted ``nn.TransformerEncoder``: its own ``use_nested_tensor``."""


def keep_torch_encoders_calling(model: nn.Module) -> None:
    """Keep torch's own encoders from reading the weights of adapted layers instead of calling them.

    In eval mode ``nn.TransformerEncoderLayer`` has a fused path that bypasses its modules, but not while anybody listens to
    one of them; ``nn.TransformerEncoder`` then must not hand it nested tensors, which only that path understands.
    """
    for _, encoder in base_modules(model):  # the modules of adapters may be many
        encoder = unwrapped(encoder)
        if not isinstance(encoder, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        layers = [layer for layer in encoder.modules() if isinstance(layer, AdapterLayer)]
        if isinstance(encoder, nn.TransformerEncoderLayer):
            for layer in layers:
                if not layer._forward_pre_hooks:
                    layer.register_forward_pre_hook(_listen)
        elif layers:
            encoder.__dict__.setdefault(_NESTED, encoder.use_nested_tensor)
            encoder.use_nested_tensor = False
        elif _NESTED in encoder.__dict__:
            encoder.use_nested_tensor = encoder.__dict__.pop(_NESTED)


def _listen(module: nn.Module, args: Any) -> None:
    """Do nothing: being registered is the effect."""

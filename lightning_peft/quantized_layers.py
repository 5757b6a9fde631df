"""Linear layers whose weights are packed in few bits: which they are, which quantizer made them, what their weights stand for.

Layers come from a :class:`~lightning_peft.interfaces.Quantizer`, which marks them, or from transformers, which takes those
of bitsandbytes.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.interfaces import Quantizer
from lightning_peft.registry import get_registry
from lightning_peft.targets import is_conv1d_linear

_MARK = "_lightning_peft_quantized_as"
"""Attribute of a layer that was quantised here: the name of the quantizer."""


def mark_packed(module: nn.Module, quantizer: str) -> None:
    """Note on ``module`` that the quantizer of that name made it."""
    vars(module)[_MARK] = quantizer


def is_packed(module: nn.Module) -> bool:
    """Tell whether ``module`` is a quantised linear layer."""
    if _MARK in vars(module):
        return True
    weight = module.weight if isinstance(module, nn.Linear) else None
    return weight is not None and (not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None)


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the quantised layers of the base of ``model`` by path."""
    return {path: module for path, held in base_modules(model) if is_packed(module := unwrapped(held))}


def quantizer_name(module: nn.Module) -> str | None:
    """Return the name of the quantizer that a quantised layer is from, where it can be known."""
    if _MARK in vars(module):
        return str(vars(module)[_MARK])
    kind = getattr(module.weight, "quant_type", None)
    return str(kind) if kind else "int8" if type(module).__name__ == "Linear8bitLt" else None


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer, quantised or not, or of a ``Conv1D`` as (out, in), in at least float32.

    Raises:
        UnknownNameError: the layer is quantised by nobody whom the registry knows.
    """
    if is_packed(module):
        kind: type[Quantizer] = get_registry().get("quantizer", quantizer_name(module) or type(module).__name__)
        weight = kind().dequantized(module)
    else:
        weight = module.get_parameter("weight").detach()
        weight = weight.t() if is_conv1d_linear(module) else weight
    return weight if weight.element_size() > 2 else weight.float()

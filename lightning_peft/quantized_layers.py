"""Linear layers whose weights are packed in few bits: which they are, which quantizer made them, what their weights stand for.

Layers come from a :class:`~lightning_peft.interfaces.Quantizer`, which marks them, or from transformers, which takes those
of bitsandbytes.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapter_layer import AdapterLayer, base_modules, unwrapped
from lightning_peft.errors import InjectionError, LightningPEFTWarning, TargetError
from lightning_peft.interfaces import Quantizer
from lightning_peft.packed_products import UnpacksInto, packed_product
from lightning_peft.registry import get_registry
from lightning_peft.targets import is_conv1d_linear

_TOLD = "_lightning_peft_misread_told"
"""Attribute of a layer of which a warning has said that it is read back wrongly."""
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


def packed_layers(model: nn.Module, *, original: bool = False) -> dict[str, nn.Module]:
    """Return the quantised layers of the base of ``model`` by path.

    Args:
        model: any module.
        original: where a merge replaced a layer, return the one that stood there before.
    """
    found = {}
    for path, held in base_modules(model):
        module = held.original_base if original and isinstance(held, AdapterLayer) else unwrapped(held)
        if is_packed(module):
            found[path] = module
    return found


def make_trainable_over(packed: Mapping[str, nn.Module]) -> None:
    """Have layers that bitsandbytes packed stay as they are in every mode, on CPUs on which it would repack them in a forward in eval mode.

    Args:
        packed: layers by path.

    Raises:
        InjectionError: one is repacked already: training would go past it without gradients, and a merge read garbage.
    """
    misread = []
    for path, module in packed.items():
        state: Any = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise InjectionError(
                f"{path!r} was quantised by bitsandbytes and repacked for inference in a forward in eval mode, which cannot be trained "
                "over; load the base again and inject before its first forward"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
        size = getattr(state, "blocksize", None)
        here = isinstance(module.weight, Tensor) and module.weight.device.type == "cpu"
        if size and here and state.shape[-1] % size and _TOLD not in vars(module):
            misread.append(path)
            vars(module)[_TOLD] = True
    if misread:
        warnings.warn(
            f"on a CPU bitsandbytes reads back wrong weights where the width of a layer is not a multiple of its block size: "
            f"{', '.join(misread[:20])} ({len(misread)}). Load the base unquantised, and QLoRA will leave these layers as they are",
            LightningPEFTWarning,
            stacklevel=4,
        )


def quantizer_name(module: nn.Module) -> str | None:
    """Return the name of the quantizer that a quantised layer is from, where it can be known."""
    if _MARK in vars(module):
        return str(vars(module)[_MARK])
    kind = getattr(module.weight, "quant_type", None)
    return str(kind) if kind else "int8" if type(module).__name__ == "Linear8bitLt" else None


def unpacked_weight(module: nn.Module) -> Tensor:
    """Return the weight of ``module``: the parameter itself, or what a registered quantizer unpacks it to.

    Raises:
        TargetError: the weight is packed in a way that no registered quantizer knows.

    Example:
        >>> import torch
        >>> from lightning_peft import NF4
        >>> packed = NF4().quantize(torch.nn.Linear(64, 32))
        >>> packed.weight.shape, unpacked_weight(packed).shape
        (torch.Size([1024, 1]), torch.Size([32, 64]))
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_floating_point() and getattr(weight, "quant_state", None) is None:
        return weight
    return packing_quantizer(module)().dequantized(module)


def packing_quantizer(module: nn.Module) -> type[Quantizer]:
    """Return the registered quantizer that reads the quantised layer ``module``.

    Raises:
        TargetError: none does.
    """
    quantizers = get_registry().quantizers
    marked: type[Quantizer] | None = quantizers.get(vars(module).get(_MARK, ""))
    for quantizer in [marked] if marked else quantizers.values():
        if marked or quantizer.packs(module):
            found: type[Quantizer] = quantizer
            return found
    raise TargetError(
        f"the dense weight of a {type(module).__name__} was asked for, but it is packed as {module.weight.dtype} and none of the "
        f"registered quantizers ({', '.join(sorted(quantizers))}) unpacks it; load the base in 16 or 32 bit"
    )


def unpacking_product(module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor | None] | None:
    """Return what computes layers like the quantised ``module`` by :func:`~lightning_peft.packed_products.packed_product`.

    None where ``module`` is not quantised, or its quantizer does not unpack into memory that it is given.
    """
    quantizer = _reader(module) if is_packed(module) else None
    return (
        functools.partial(packed_product, quantizer)
        if quantizer is not None and issubclass(quantizer, UnpacksInto)
        else None
    )


def dequantized_path(layer: nn.Module) -> str | None:
    """Return why a low-rank adapter around the quantised ``layer`` calls it; None where it unpacks the weight into memory that all layers share.

    Single calls may differ: while a model is compiled or traced, under autocast to another precision than the layer's, and where
    somebody listens to the layer, it is called.

    Example:
        >>> import torch
        >>> from lightning_peft import NF4, Int8
        >>> dequantized_path(Int8().quantize(torch.nn.Linear(64, 32)))
        "the quantizer 'int8' unpacks into memory of its own"
    """
    quantizer = _reader(layer)
    if quantizer is None or not issubclass(quantizer, UnpacksInto):
        name = quantizer_name(layer) if quantizer is None else quantizer.name
        return f"the quantizer {name!r} unpacks into memory of its own"
    if layer.bias is not None and layer.bias.requires_grad:
        return "its bias is trained"
    weight = quantizer.packed_weight(layer)
    return weight if isinstance(weight, str) else None


@contextlib.contextmanager
def unpacked_once(layer: nn.Module) -> Iterator[None]:
    """Have a quantised ``layer`` that is called many times multiply with a weight that is unpacked once, for the time of a ``with`` block.

    No graph may outlive the block, as it would keep the weight. Where :func:`dequantized_path` has a reason, and in autocast to another
    precision than the layer's, it stays as it is.
    """
    quantizer = _reader(layer)
    known = quantizer is not None and issubclass(quantizer, UnpacksInto) and "forward" not in vars(layer)
    weight = quantizer.packed_weight(layer) if known and layer._compiled_call_impl is None else ""  # type: ignore[union-attr]
    if isinstance(weight, str) or (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != weight.dtype
    ):
        yield
        return
    dense = torch.empty(weight.shape, dtype=weight.dtype)
    quantizer.unpacked_into(dense, weight)  # type: ignore[union-attr]
    bias: Any = None if layer.bias is None else layer.bias.to(weight.dtype)
    vars(layer)["forward"] = lambda x: F.linear(x.to(dense.dtype), dense, bias).to(x.dtype)
    try:
        yield
    finally:
        del vars(layer)["forward"]


def _reader(module: nn.Module) -> type[Quantizer] | None:
    try:
        return packing_quantizer(module)
    except TargetError:
        return None


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer, quantised or not, or of a ``Conv1D`` as (out, in), in at least float32.

    Raises:
        TargetError: the layer is quantised by nobody whom the registry knows.
    """
    weight = unpacked_weight(module).detach()
    weight = weight.t() if is_conv1d_linear(module) else weight
    return weight if weight.element_size() > 2 else weight.float()

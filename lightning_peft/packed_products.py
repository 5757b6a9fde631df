"""Products with packed weights: unpacked once in forward and once in backward, into memory that every layer uses in turn.

::

    forward    packed ── unpacked_into ── scratch W (out, in) ── y  = x W^T + b      given back at once
    backward   packed ── unpacked_into ── scratch W (out, in) ── dx = dy W           given back at once

A graph holds the packed weight alone, so it does not matter how often backward runs, in which thread, or after which other layers. Both
products are linear and each is the derivative of the other, so gradients of any order are right.

On a CPU a fresh tensor of tens of megabytes is new pages of the system's, and to touch them costs more than to unpack into them; hence one
buffer for all layers. Where a GPU's allocator keeps its memory, nothing is to be won by that, and layers compute as their quantizer's library does.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

_KEPT = 2
"""Buffers of one dtype that stay when nobody uses them; more exist only as long as more threads compute at once."""


@dataclass(frozen=True)
class PackedWeight:
    """The weight of a frozen layer as it is packed."""

    packed: Tensor
    """The packed numbers."""
    state: Any
    """Whatever else unpacking takes: scales, and how they are packed."""
    shape: tuple[int, int]
    """(out, in) of the weight."""
    dtype: torch.dtype
    """The precision that the layer multiplies in."""


class UnpacksInto(ABC):
    """What a :class:`~lightning_peft.interfaces.Quantizer` may be besides: one that unpacks a weight into memory it is given.

    Low-rank adapters then compute its layers by :func:`packed_product` and add their update into the result. The layers must do no more
    than multiply in one precision, add a bias, and return the precision that came in.
    """

    @classmethod
    @abstractmethod
    def packed_weight(cls, layer: nn.Module) -> PackedWeight | str:
        """Return what ``layer`` multiplies with, or why it must be called itself."""

    @classmethod
    @abstractmethod
    def unpacked_into(cls, out: Tensor, weight: PackedWeight) -> None:
        """Write ``weight`` into ``out`` (out, in), which has its shape and dtype and is contiguous."""


def packed_product(quantizer: type[UnpacksInto], layer: Any, x: Tensor) -> Tensor | None:
    """Return what ``layer`` makes of x (..., in): a new tensor (tokens, out); None where it must be called.

    It has the dtype of x, or under autocast the one of that, as the result of any linear layer has.

    Args:
        quantizer: the one that reads ``layer``.
        layer: a packed linear layer to which nobody listens.
        x: its input.
    """
    if called_reason(x) is not None:
        return None
    weight = quantizer.packed_weight(layer)
    if isinstance(weight, str) or weight.packed.device != x.device:
        return None
    bias = layer.bias
    if bias is not None:
        if bias.requires_grad:
            return None
        bias = bias.to(weight.dtype)
    kind, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if dtype != weight.dtype:
            return None
    tokens = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    y: Tensor = _Product.apply(tokens, weight.packed, quantizer, weight, bias, False)  # type: ignore[no-untyped-call]
    return y.to(dtype)


def called_reason(x: Tensor) -> str | None:
    """Return why layers must be called with ``x`` themselves, as somebody writes down what is computed; None where they need not be."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return "the model is being compiled or traced"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"its input is a {type(x).__name__}"
    if torch._C._are_functorch_transforms_active() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY):
        return "torch.func transforms or traces it"
    return "its input is empty" if not x.numel() else None


class _Product(torch.autograd.Function):
    """x (tokens, in) times W^T plus a bias, or x (tokens, out) times W."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        quantizer: type[UnpacksInto],
        weight: PackedWeight,
        bias: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(packed)
            ctx.rest = quantizer, weight, transposed
        with scratch(weight.shape, weight.dtype) as unpacked:
            quantizer.unpacked_into(unpacked, weight)
            return x @ unpacked if transposed else F.linear(x, unpacked, bias)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors  # torch complains here if somebody changed it meanwhile
        quantizer, weight, transposed = ctx.rest
        product = _Product.apply(gradient, packed, quantizer, weight, None, not transposed)  # type: ignore[no-untyped-call]
        return product, None, None, None, None, None


_free: dict[torch.dtype, list[Tensor]] = {}


@contextlib.contextmanager
def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Lend memory of the CPU with anything in it; nothing may point to it after the ``with`` block.

    Whoever asks while all memory is lent gets some of their own, so threads and calls within calls do not meet.
    """
    free = _free.setdefault(dtype, [])
    size = math.prod(shape)
    try:
        held = free.pop()  # one step for Python, so no two threads get the same
    except IndexError:
        held = None
    if held is None or held.numel() < size:
        with torch.inference_mode(mode=False):
            held = torch.empty(size, dtype=dtype, device="cpu")
    try:
        yield held[:size].view(shape)
    finally:
        if len(free) < _KEPT:
            free.append(held)


def free_scratch() -> int:
    """Let go of the memory that is kept for :func:`scratch`, and return how many bytes that was: the largest weights that were unpacked."""
    freed = sum(one.nbytes for held in _free.values() for one in held)
    _free.clear()
    return freed

"""The quantizers of bitsandbytes: frozen weights of a linear layer in four or eight bits.

* NF4 and FP4: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023 (arXiv:2305.14314). Each block of
  weights is divided by its largest magnitude and rounded to one of 16 values: the quantiles of a normal distribution
  (NF4), or floating-point numbers with two bits of exponent and one of mantissa (FP4).
* Int8: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022 (arXiv:2208.07339).
  Each row of the weight is divided by its largest magnitude and rounded to one of 255 values.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_peft.errors import ConfigError, InjectionError
from lightning_peft.field_checks import check_switches
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Quantizer
from lightning_peft.packed_products import PackedWeight, UnpacksInto

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KERNELS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_KERNELS_OF = "0.50."
"""The versions of bitsandbytes whose functions in C are called here as they are declared."""


@dataclass(frozen=True, kw_only=True)
class _FourBit(Quantizer, UnpacksInto):
    """What NF4 and FP4 share: bitsandbytes' ``Linear4bit``, with the name of the quantizer as its ``quant_type``."""

    fsdp_ready: ClassVar[bool] = True

    block_size: int = 64
    """Weights that share one scale."""
    double_quantization: bool = True
    """Quantise the scales too: 4.127 instead of 4.5 bits a weight."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the matrix product."""

    def __post_init__(self) -> None:
        check_switches(self)
        kind = type(self).__name__
        if self.block_size not in (64, 128, 256, 512, 1024, 2048, 4096):
            raise ConfigError(f"{kind} block_size must be a power of two from 64 to 4096, got {self.block_size!r}")
        if self.compute_dtype not in _DTYPES:
            raise ConfigError(f"{kind} compute_dtype must be one of {', '.join(_DTYPES)}, got {self.compute_dtype!r}")

    @override
    def quantize(self, linear: nn.Linear) -> nn.Module:
        _refuse_meta(self, linear)
        if linear.in_features % self.block_size:
            # bitsandbytes' CPU kernel gives wrong weights for such widths, so they are refused everywhere.
            raise InjectionError(
                f"{type(self).__name__} needs in_features to be a multiple of block_size={self.block_size}, got a layer of "
                f"{linear.in_features}; skip this module or choose another block size"
            )
        import bitsandbytes as bnb

        dtype = _DTYPES[self.compute_dtype]
        packed: Any = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=self.double_quantization,
            quant_type=self.name,
            device="meta",
        )
        packed.weight = bnb.nn.Params4bit(
            linear.weight.detach(),
            requires_grad=False,
            blocksize=self.block_size,
            compress_statistics=self.double_quantization,
            quant_type=self.name,
            module=packed,
        )
        # The layer would cast the bias at its first forward, and the base must not change then.
        packed.bias = _copy(linear.bias, dtype)
        # In eval mode on some CPUs bitsandbytes repacks the weights in place; training and merging then read garbage.
        packed.support_avx512bf16_for_cpu = False
        packed.train(linear.training)
        moved: nn.Module = packed.to(linear.weight.device)  # quantises into new memory
        return moved

    @classmethod
    @override
    def packs(cls, module: nn.Module) -> bool:
        state = getattr(module.weight, "quant_state", None)
        return getattr(state, "quant_type", None) == cls.name

    @override
    def dequantized(self, module: nn.Module) -> Tensor:
        import bitsandbytes.functional as bnb

        weight: Any = module.weight
        dense: Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state)
        return dense

    @classmethod
    @override
    def packed_weight(cls, layer: nn.Module) -> PackedWeight | str:
        import bitsandbytes as bnb

        one: Any = layer
        if type(layer).forward is not bnb.nn.Linear4bit.forward:
            return f"a {type(layer).__name__} computes in a way of its own"
        packed, state = one.weight, getattr(one.weight, "quant_state", None)
        if type(packed) is not bnb.nn.Params4bit or state is None:
            return "its weight is sharded, or not quantised yet"
        if getattr(state, "packing_format_for_cpu", False):
            if torch.is_grad_enabled() and layer.training:
                raise InjectionError(
                    "a layer is trained over whose weight bitsandbytes repacked for inference in a forward in eval mode: gradients would "
                    "go past it; load the base again, and inject before its first forward"
                )
            return "bitsandbytes repacked its weight for inference"
        if packed.device.type != "cpu":
            return f"on {packed.device.type} bitsandbytes has kernels of its own"
        if not one.compute_type_is_set or one.compute_dtype not in _KERNELS:
            return f"it has not taken the precision of an input yet, or multiplies in {one.compute_dtype}"
        shape = (one.out_features, one.in_features)
        # What bitsandbytes does by other code, or wrongly, is left to it.
        nested = state.nested and state.state2.blocksize != 256
        if tuple(state.shape) != shape or shape[1] % state.blocksize or state.blocksize > 1024 or nested:
            return f"bitsandbytes unpacks {tuple(state.shape)} in blocks of {state.blocksize} by other code"
        if not packed.is_contiguous() or _unpacking(state.quant_type, one.compute_dtype) is None:
            return f"bitsandbytes {bnb.__version__} has no function for it that is known here"
        return PackedWeight(packed, state, shape, one.compute_dtype)

    @classmethod
    @override
    def unpacked_into(cls, out: Tensor, weight: PackedWeight) -> None:
        state, unpack = weight.state, _unpacking(weight.state.quant_type, out.dtype)
        scales: Tensor = state.absmax
        if state.nested:
            twice = state.state2
            scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
                scales, twice.absmax, twice.code, twice.blocksize, torch.float32
            ).add_(state.offset)
        assert unpack is not None
        unpack(weight.packed, scales.float(), out, state.blocksize)

    @classmethod
    @override
    def settings_of(cls, module: nn.Module) -> Self | None:
        layer: Any = module
        state = layer.weight.quant_state
        # A layer of transformers takes the precision of its first input if none was given.
        dtype = next((name for name, dtype in _DTYPES.items() if dtype == (layer.compute_dtype or state.dtype)), None)
        if dtype is None:
            return None
        return cls(block_size=state.blocksize, double_quantization=bool(state.nested), compute_dtype=dtype)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class NF4(_FourBit):
    """Four-bit NormalFloat: the 16 values are quantiles of a normal distribution, as weights are distributed.

    Example:
        >>> import torch
        >>> quantizer = NF4(compute_dtype="float32")
        >>> linear = torch.nn.Linear(64, 32)
        >>> packed = quantizer.quantize(linear)
        >>> packed.weight.dtype, quantizer.dequantized(packed).shape
        (torch.uint8, torch.Size([32, 64]))
    """

    name: ClassVar[str] = "nf4"


@dataclass(frozen=True, kw_only=True)
class FP4(_FourBit):
    """Four-bit floating point: the 16 values are numbers with two bits of exponent and one of mantissa.

    Example:
        >>> FP4(block_size=128).to_config()
        {'block_size': 128, 'double_quantization': True, 'compute_dtype': 'bfloat16'}
    """

    name: ClassVar[str] = "fp4"


@dataclass(frozen=True, kw_only=True)
class Int8(Quantizer):
    """LLM.int8(), bitsandbytes' ``Linear8bitLt``: one scale for each output feature.

    In training on a CPU the layer multiplies with the dequantised weight. Elsewhere it rounds each row of its input to
    eight bits too and multiplies integers, which gives a result that differs by about one per cent.

    Example:
        >>> import torch
        >>> packed = Int8().quantize(torch.nn.Linear(20, 10))
        >>> packed.weight.dtype, Int8().dequantized(packed).shape
        (torch.int8, torch.Size([10, 20]))
    """

    name: ClassVar[str] = "int8"
    rounds_inputs: ClassVar[bool] = True

    threshold: float = 0.0
    """Input features with a magnitude of this or more are multiplied in full precision (the paper: 6.0); 0 for none."""

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, (int, float)) or not 0 <= self.threshold < math.inf:
            raise ConfigError(f"Int8 threshold must be 0 or a positive number, got {self.threshold!r}")

    @override
    def quantize(self, linear: nn.Linear) -> nn.Module:
        _refuse_meta(self, linear)
        import bitsandbytes as bnb

        packed: Any = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=float(self.threshold),
            device="meta",
        )
        # Done by hand, as `.to(device)` quantises only what comes from the CPU.
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(linear.weight.detach().to(torch.float16).contiguous())
        packed.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        packed.bias = _copy(linear.bias)
        layer: nn.Module = packed.train(linear.training)
        return layer

    @classmethod
    @override
    def packs(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "Linear8bitLt" and not module.weight.is_floating_point()  # type: ignore[operator]

    @override
    def dequantized(self, module: nn.Module) -> Tensor:
        layer: Any = module
        # The first forward moves the scales from the weight to the state of the layer.
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB  # (out,)
        dense: Tensor = layer.weight.data.to(torch.float32).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
        return dense

    @classmethod
    @override
    def settings_of(cls, module: nn.Module) -> Self | None:
        layer: Any = module
        return cls(threshold=float(layer.state.threshold))


@functools.cache
def _unpacking(kind: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, int], None] | None:
    """Return what writes packed weights, with scales of float32, into a tensor (out, in) of ``dtype`` on a CPU; None where it is not known.

    bitsandbytes itself does so only into new memory, so its function in C is called, which must do to some numbers what bitsandbytes does.
    """
    import bitsandbytes as bnb
    from bitsandbytes.cextension import lib

    function = getattr(lib, f"cdequantize_blockwise_cpu_{kind}_{_KERNELS[dtype]}", None)
    known = bnb.__version__.startswith(_KERNELS_OF) and isinstance(function, ctypes._CFuncPtr)  # type: ignore[attr-defined]
    if not known or function is None:
        return None

    def unpack(packed: Tensor, scales: Tensor, out: Tensor, block_size: int) -> None:
        addresses = (ctypes.c_void_p(one.data_ptr()) for one in (packed, scales, out))
        function(*addresses, *(ctypes.c_longlong(size) for size in (block_size, *out.shape)))

    packed, scales = torch.arange(256, dtype=torch.uint8), torch.linspace(0.5, 1.5, 8)
    out = torch.zeros(4, 128, dtype=dtype)
    unpack(packed, scales, out, 64)
    wanted = torch.ops.bitsandbytes.dequantize_4bit.default(packed.view(-1, 1), scales, 64, kind, out.shape, dtype)
    return unpack if torch.equal(out, wanted) else None


def _copy(bias: Tensor | None, dtype: torch.dtype | None = None) -> nn.Parameter | None:
    """Return a frozen copy of ``bias`` in ``dtype``."""
    if bias is None:
        return None
    return nn.Parameter(bias.detach().to(dtype or bias.dtype, copy=True), requires_grad=False)


def _refuse_meta(quantizer: Quantizer, linear: nn.Linear) -> None:
    if linear.weight.is_meta:
        raise InjectionError(
            f"{type(quantizer).__name__} needs the weights, got a layer on the meta device; load the base before it is quantised"
        )


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register the quantizers of bitsandbytes."""
    return [NF4, FP4, Int8]

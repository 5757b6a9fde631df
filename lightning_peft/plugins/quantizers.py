"""NF4: the frozen weights of a linear layer in four bits, through bitsandbytes.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023 (arXiv:2305.14314): each block of weights is
divided by its largest magnitude and rounded to one of the 16 quantiles of a normal distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.errors import ConfigError, InjectionError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Quantizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class NF4(Quantizer):
    """Four-bit NormalFloat, bitsandbytes' ``Linear4bit``.

    Example:
        >>> import torch
        >>> quantizer = NF4(compute_dtype="float32")
        >>> linear = torch.nn.Linear(64, 32)
        >>> packed = quantizer.quantize(linear)
        >>> packed.weight.dtype, quantizer.dequantized(packed).shape
        (torch.uint8, torch.Size([32, 64]))
    """

    name: ClassVar[str] = "nf4"

    block_size: int = 64
    """Weights that share one scale."""
    double_quantization: bool = True
    """Quantise the scales too: 4.127 instead of 4.5 bits a weight."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the matrix product."""

    def __post_init__(self) -> None:
        if self.block_size not in (64, 128, 256, 512, 1024, 2048, 4096):
            raise ConfigError(f"NF4 block_size must be a power of two from 64 to 4096, got {self.block_size!r}")
        if self.compute_dtype not in _DTYPES:
            raise ConfigError(f"NF4 compute_dtype must be one of {', '.join(_DTYPES)}, got {self.compute_dtype!r}")

    @override
    def quantize(self, linear: nn.Linear) -> nn.Module:
        if linear.in_features % self.block_size:
            # bitsandbytes' CPU kernel gives wrong weights for such widths, so they are refused everywhere.
            raise InjectionError(
                f"NF4 needs in_features to be a multiple of block_size={self.block_size}, got a layer of {linear.in_features}; "
                "skip this module or choose another block size"
            )
        import bitsandbytes as bnb

        packed: Any = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=_DTYPES[self.compute_dtype],
            compress_statistics=self.double_quantization,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bnb.nn.Params4bit(
            linear.weight.detach().clone(),
            requires_grad=False,
            blocksize=self.block_size,
            compress_statistics=self.double_quantization,
            quant_type="nf4",
            module=packed,
        )
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        # In eval mode on some CPUs bitsandbytes repacks the weights in place; training and merging then read garbage.
        packed.support_avx512bf16_for_cpu = False
        packed.train(linear.training)
        moved: nn.Module = packed.to(linear.weight.device)  # quantises
        return moved

    @override
    def dequantized(self, module: nn.Module) -> Tensor:
        import bitsandbytes.functional as bnb

        weight: Any = module.weight
        dense: Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state)
        return dense


@hookimpl
def register_quantizers() -> list[type[Quantizer]]:
    """Register the quantizers of bitsandbytes."""
    return [NF4]

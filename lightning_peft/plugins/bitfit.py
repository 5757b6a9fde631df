"""BitFit: only the biases are trained.

Ben Zaken, Ravfogel, Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
2021 (arXiv:2106.10199)::

    y = W x + b'        b' starts at b, or at zero where the layer has no bias (add_missing)

    x ── W (frozen) ──(+)── y
                       b'

Each trained bias is a copy beside the frozen one; the arithmetic is in :mod:`lightning_peft.arithmetic.parameter_copies`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.parameter_copies import ParameterCopies, reads_below
from lightning_peft.errors import MergeError, TargetError
from lightning_peft.field_checks import check_switches
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.targets import is_conv1d_linear, is_linear


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train the biases of linear, norm, convolution and ``nn.MultiheadAttention`` layers.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
        >>> _ = inject(model, BitFit())
        >>> trainable_summary(model).trainable
        20
    """

    name: ClassVar[str] = "bitfit"
    default_targets: ClassVar[tuple[str, ...]] = ("re:.*",)
    mergeable: ClassVar[bool] = True
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    target_refusal: ClassVar[str] = (
        "it has no bias: name modules with one, or give linear layers one with add_missing=True"
    )

    add_missing: bool = False
    """Also give linear layers without a bias one that starts at zero. Such a bias cannot be merged."""

    def __post_init__(self) -> None:
        check_switches(self)
        if self.add_missing:
            object.__setattr__(self, "target_refusal", "only linear layers are given a bias; name those")
            # The base has no parameter that could take the new biases.
            object.__setattr__(self, "mergeable", False)

    @override
    def supports(self, module: nn.Module) -> bool:
        return bool(_bias_names(module)) or (self.add_missing and is_linear(module))

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        names = _bias_names(module)
        if target.slices:
            raise TargetError(
                f"BitFit was asked for the {', '.join(part.role for part in target.slices)} of {target.path!r}, which is one bias for "
                f"several projections; name the whole module, {target.path.rsplit('.', 1)[-1]!r}"
            )
        return ParameterCopies(module, names, summed=True) if names else AddedBias(module)


class AddedBias(Adapter):
    """The trained bias (out,) of a linear layer that has none; it starts at zero.

    Args:
        module: the layer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weight = module.weight
        assert isinstance(weight, Tensor)
        features: Any = weight.shape[1] if is_conv1d_linear(module) else module.out_features
        dtype = torch.promote_types(torch.float32, weight.dtype) if weight.is_floating_point() else torch.float32
        self.bias = nn.Parameter(torch.empty(features, device=weight.device, dtype=dtype))

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        nn.init.zeros_(self.bias)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (..., in) -> y (..., out)."""
        y: Tensor = base(x)
        return y + self.bias.to(y.dtype)

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        raise MergeError(
            f"BitFit trained a bias for a {type(base_layer).__name__} that has none, so there is no parameter to merge it into; keep the "
            "adapter active, or train with add_missing=False"
        )


def _bias_names(module: nn.Module) -> list[str]:
    """Return the names of the biases that ``module`` reads in its forward."""
    if reads_below(module):
        return [name for name, _ in module.named_parameters() if name in ("in_proj_bias", "out_proj.bias")]
    # A container with a bias (the heads of BERT and RoBERTa) lends it to a layer inside.
    leaf = next(module.children(), None) is None
    return ["bias"] if leaf and isinstance(module._parameters.get("bias"), nn.Parameter) else []


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register BitFit."""
    return [BitFit]

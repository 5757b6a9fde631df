"""Norm tuning: only the normalisation layers are trained.

Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", 2023 (arXiv:2312.11420)::

    y = w' * (x - mean) / deviation + b'       LayerNorm
    y = w' * x / root mean square              RMSNorm

w' and b' start at those of the base. They are copies; the arithmetic is in :mod:`lightning_peft.arithmetic.parameter_copies`. Files are
those of HF PEFT's LN_TUNING.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.arithmetic.parameter_copies import ParameterCopies, trained_names
from lightning_peft.hf_types import refuse_other_keys
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target


@dataclass(frozen=True, kw_only=True)
class NormTuning(Method):
    """Train all parameters of the normalisation layers.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
        >>> _ = inject(model, NormTuning())
        >>> trainable_summary(model).trainable
        16
    """

    name: ClassVar[str] = "norm_tuning"
    default_targets: ClassVar[tuple[str, ...]] = ("re:.*",)
    mergeable: ClassVar[bool] = True
    row_routable: ClassVar[bool] = True
    composable: ClassVar[bool] = False
    quantized_base: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LN_TUNING"

    @override
    def supports(self, module: nn.Module) -> bool:
        """Tell whether ``module`` is a norm: torch's own, or a class named ``...Norm`` with one weight a feature.

        A norm that looks at other rows (batch normalisation) is none of these.
        """
        weight = module._parameters.get("weight")
        if not isinstance(weight, nn.Parameter) or next(module.children(), None) is not None:
            return False
        named = any(kind.__name__.endswith("Norm") for kind in type(module).__mro__) and weight.dim() == 1
        batched = isinstance(module, nn.modules.batchnorm._NormBase)
        return (isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) or named) and not batched

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        return ParameterCopies(module, trained_names(module), prefix="ln_tuning_layers.")

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {}

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> NormTuning:
        refuse_other_keys("NormTuning", config, _HF_UNDERSTOOD)
        return cls()


_HF_UNDERSTOOD = frozenset(
    [
        "target_modules",
        "exclude_modules",
    ]
)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register norm tuning."""
    return [NormTuning]

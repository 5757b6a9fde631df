"""(IA)^3: a learned factor for every feature of keys, values and the inner layer of the MLP.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022
(arXiv:2205.05638)::

    y = l * (W x + b)      key and value: the output is scaled
    y = W (l * x) + b      feed-forward:  the input is scaled

All factors start at one, so a fresh adapter changes nothing. Files are those of HF PEFT: ``ia3_l`` is (out, 1), or (1, in)
at a feed-forward module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft import hookimpl
from lightning_peft.errors import AdapterConfigError, ConfigError, MergeError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.targets import Targets, is_conv1d_linear, matches

FEEDFORWARD = "feedforward"
"""Rule of a target whose input is scaled."""


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Infused Adapter by Inhibiting and Amplifying Inner Activations.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> _ = inject(model, IA3(feedforward=["2"]), ["0", "2"])
        >>> trainable_summary(model).trainable
        64
    """

    name: ClassVar[str] = "ia3"
    default_targets: ClassVar[tuple[str, ...]] = ("key", "value", "down")
    mergeable: ClassVar[bool] = True
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "IA3"

    feedforward: Sequence[str] = ("down",)
    """Targets whose input is scaled instead of the output. Each must match a module of the model."""

    def __post_init__(self) -> None:
        words = (self.feedforward,) if isinstance(self.feedforward, str) else tuple(self.feedforward)
        object.__setattr__(self, "feedforward", words)
        if words:
            try:
                Targets.of(words)
            except ConfigError as error:
                raise ConfigError(f"IA3 feedforward={words!r}: {error}") from error

    @override
    def supports(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_conv1d_linear(module)

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        inputs: set[str] = set()
        for word in self.feedforward:
            found = matches(word, model, family)
            if not found:
                raise TargetError(
                    f"IA3 feedforward={word!r} matches no module of {type(model).__name__} (family {family.name!r}); name the "
                    "modules whose input is to be scaled, or give feedforward=[]"
                )
            inputs |= found
        return [
            dataclasses.replace(target, rule=FEEDFORWARD) if target.path in inputs else target for target in targets
        ]

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        return IA3Input(module) if target.rule == FEEDFORWARD else IA3Output(module, target)

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {
            "feedforward_modules": [path for path, adapter in adapters.items() if isinstance(adapter, IA3Input)],
            "fan_in_fan_out": all(adapter.transposed for adapter in adapters.values() if isinstance(adapter, _Scaling)),
            "init_ia3_weights": True,
        }

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> IA3:
        words = config.get("feedforward_modules")
        if isinstance(words, str):
            raise AdapterConfigError(
                f"feedforward_modules is the regular expression {words!r}, and none from a file is run; list the names instead"
            )
        for key, value in config.items():
            if key not in _HF_UNDERSTOOD and value not in (None, False, "", [], {}):
                raise AdapterConfigError(
                    f"this IA3 does not have HF PEFT's {key!r}, which the adapter sets to {value!r}"
                )
        try:
            return cls() if words is None else cls(feedforward=words)
        except ConfigError as error:
            raise AdapterConfigError(str(error)) from error


_HF_UNDERSTOOD = frozenset(
    {
        *(
            "peft_type",
            "peft_version",
            "task_type",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "auto_mapping",
        ),
        *("target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"),
    }
)


class _Scaling(Adapter):
    """A vector of factors, float32 over 16-bit bases, held flat so that optimizers do not decay it towards zero."""

    ia3_l: nn.Parameter

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.transposed = is_conv1d_linear(module)
        weight: Tensor = module.weight  # type: ignore[assignment]
        if self.transposed:
            self.in_features, self.out_features = weight.shape
        else:
            self.in_features, self.out_features = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
        dtype = torch.promote_types(torch.float32, weight.dtype) if weight.is_floating_point() else torch.float32
        self._device, self._dtype = weight.device, dtype

    def new(self, features: int) -> nn.Parameter:
        """Allocate a vector of factors where the base is."""
        return nn.Parameter(torch.empty(features, device=self._device, dtype=self._dtype))

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        nn.init.ones_(self.ia3_l)

    def scaled(self, base_layer: nn.Module, *, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
        """Return the weight of ``base_layer`` with its rows or columns scaled in float32, rounded once."""
        weight = base_layer.get_parameter("weight")
        if not weight.is_floating_point():
            raise MergeError(
                f"the weight of {type(base_layer).__name__} is packed as {weight.dtype}: a quantised base cannot be merged "
                "into; load the base in 16 or 32 bit and merge there"
            )
        factor = outputs[:, None] if outputs is not None else inputs  # (out, 1) or (in,)
        assert factor is not None
        plain = weight.detach().t() if self.transposed else weight.detach()  # (out, in)
        merged = (plain * factor.detach()).to(weight.dtype)
        return merged.t().contiguous() if self.transposed else merged


class IA3Input(_Scaling):
    """Scales what goes into a feed-forward module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.ia3_l = self.new(self.in_features)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (..., in) -> y (..., out)."""
        y: Tensor = base((x * self.ia3_l).to(x.dtype))
        return y

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"ia3_l": self.ia3_l[None, :]}  # (1, in)

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        return {"weight": self.scaled(base_layer, inputs=self.ia3_l)}


class IA3Output(_Scaling):
    """Scales what comes out of a module, or of the slices of a fused projection that were asked for."""

    def __init__(self, module: nn.Module, target: Target) -> None:
        super().__init__(module)
        self.slices = target.slices
        self.ia3_l = self.new(sum(part.features for part in self.slices) or self.out_features)

    def factors(self) -> Tensor:
        """Return the factor of every output feature (out,), one where no slice is scaled."""
        if not self.slices:
            return self.ia3_l
        dense = torch.ones(self.out_features, dtype=self.ia3_l.dtype, device=self.ia3_l.device)
        blocks = torch.split(self.ia3_l, [part.features for part in self.slices])
        for part, block in zip(self.slices, blocks, strict=True):
            view = part.view(dense)  # (groups, features of the slice in each)
            view.copy_(block.view(view.shape))
        return dense

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (..., in) -> y (..., out)."""
        y: Tensor = base(x)
        return (y * self.factors()).to(y.dtype)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"ia3_l": self.factors()[:, None]}  # (out, 1)

    @override
    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        stored = state["ia3_l"].flatten()  # (out,)
        self.ia3_l.copy_(torch.cat([part.view(stored).flatten() for part in self.slices]) if self.slices else stored)
        if not torch.equal(self.factors().to(stored), stored):
            raise AdapterConfigError("ia3_l has factors outside the slices it adapts; load it without slices")

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        factors = self.factors().detach()
        merged = {"weight": self.scaled(base_layer, outputs=factors)}
        bias = getattr(base_layer, "bias", None)
        if isinstance(bias, Tensor):
            merged["bias"] = (bias.detach() * factors).to(bias.dtype)
        return merged


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register (IA)^3."""
    return [IA3]

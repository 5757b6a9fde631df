"""QLoRA: LoRA over a base whose frozen weights are quantised.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023 (arXiv:2305.14314)::

    y = dequantised(W) x + s B A x        s = alpha / rank

    x ──┬── dequantised(W) (4 bits) ───(+)── y        A: (rank, in)   random, float32
        └── A ── B ── s ────────────────┘             B: (out, rank)  zero, float32

:meth:`QLoRA.prepare` quantises the base, one layer after the other. Everything else is LoRA's.
Its files are LoRA's too, so HF PEFT reads them, and over a base in 16 or 32 bit they are a LoRA adapter.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from typing_extensions import override

from lightning_peft.adapter_layer import adapter_layers, base_modules, unwrapped
from lightning_peft.errors import ConfigError, InjectionError, LightningPEFTWarning
from lightning_peft.families import ModelFamily
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Method, Quantizer
from lightning_peft.layer_preparation import LayerPreparation, prepare_layers
from lightning_peft.plugins.lora import LoRA
from lightning_peft.quantized_layers import make_trainable_over, mark_packed, packed_layers, quantizer_name
from lightning_peft.registry import get_registry
from lightning_peft.targets import Targets, is_fused_experts, is_linear, matches, resolve_targets
from lightning_peft.unpackable_layers import unpackable_layers

_SETTINGS = ("block_size", "double_quantization", "compute_dtype", "threshold")


@dataclass(frozen=True, kw_only=True)
class QLoRA(LoRA):
    """LoRA over a base that is quantised before adapters go in: every linear layer but the output head.

    Raises:
        UnknownNameError: no quantizer is registered under ``quantization``.
        ConfigError: a setting is out of range, or one that the quantizer does not have.

    Example:
        >>> import torch
        >>> from lightning_peft import inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> _ = inject(model, QLoRA(rank=2, skip=["2"]), "0")
        >>> model[0].base_layer.weight.dtype, model[2].weight.dtype
        (torch.uint8, torch.float32)
    """

    name: ClassVar[str] = "qlora"
    mergeable: ClassVar[bool] = False
    merges_quantized: ClassVar[bool] = True
    merge_refusal: ClassVar[str] = (
        "and its base is quantised: packed weights cannot take an update. Save the adapter and load its folder over the base in "
        "16 or 32 bit, where it is a LoRA adapter that merges, or merge with quantized='dequantize' or quantized='requantize'"
    )

    quantization: str = "nf4"
    """Registered name of the quantizer: ``nf4``, ``fp4``, ``int8``, or one of a plugin."""
    block_size: int | None = None
    """Weights that share one scale; the quantizer's default if None."""
    double_quantization: bool | None = None
    """Quantise the scales too; the quantizer's default if None."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the products with quantised weights; the quantizer's default if None."""
    threshold: float | None = None
    """Magnitude from which ``int8`` multiplies input features in full precision; the quantizer's default if None."""
    skip: Sequence[str] = ()
    """Targets (roles, globs or ``re:``) that are never quantised, besides the output head."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))
        self._spec()
        # A batch of several adapters adds in another order than one of a single adapter.
        object.__setattr__(self, "row_routable", type(self).row_routable and not self.quantizer.rounds_inputs)
        object.__setattr__(self, "fsdp_ready", type(self).fsdp_ready and self.quantizer.fsdp_ready)

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer, with the settings that were given."""
        kind: type[Quantizer] = get_registry().get("quantizer", self.quantization)
        known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        given = {key: getattr(self, key) for key in _SETTINGS if getattr(self, key) is not None}
        for key in given:
            if key not in known:
                raise ConfigError(
                    f"{type(self).__name__} {key}={given[key]!r} was given, but the quantizer {self.quantization!r} has no such setting; "
                    f"leave it out. It has: {', '.join(sorted(known)) or 'none'}"
                )
        return kind(**given)

    def _spec(self) -> Targets:
        return Targets(include=("all_linear",), exclude=self.skip)

    # -- the base --------------------------------------------------------------------------------------------------

    @override
    def prepare(self, model: nn.Module) -> None:
        """Quantise the linear layers of ``model`` in place, one by one, but for its head and what ``skip`` names.

        A base with quantised layers, from here or from transformers, keeps its layers as they are. A layer that cannot
        be quantised, for instance because its width is not a multiple of the block size or because the code of the model
        reads its weight, stays as it is with a warning.

        Raises:
            TargetError: a target of ``skip`` matches nothing.
            InjectionError: no layer can be quantised, an adapter is merged into the base, or the base was quantised
                elsewhere and repacked for inference.
        """
        if packed := packed_layers(model):
            self._adopt(packed)
            return
        if any(layer.merged for layer in adapter_layers(model).values()):
            raise InjectionError(
                f"{type(self).__name__} cannot quantise a base that an adapter is merged into; unmerge_adapters first"
            )
        quantization = self._quantization(model)
        prepare_layers(model, quantization)
        quantization.finish()

    @override
    def layer_preparation(self, model: nn.Module) -> LayerPreparation | None:
        if type(self).prepare is not QLoRA.prepare:  # an heir that needs the weights as they are
            return None
        return None if packed_layers(model) else self._quantization(model)

    def _quantization(self, model: nn.Module) -> Quantization:
        family = get_registry().resolve_family(model)
        found = resolve_targets(model, self._spec(), family, supports=is_linear, method=type(self).__name__)
        skipped = {path for word in self.skip for path in matches(word, model, family)}
        experts = [
            path for path, module in base_modules(model) if is_fused_experts(unwrapped(module)) and path not in skipped
        ]
        if experts:
            warnings.warn(
                f"QLoRA leaves {len(experts)} modules of fused experts, such as {experts[0]!r}, unquantised: quantizers pack linear layers. "
                "They take the memory they took. Name them in skip= to say that this is wanted",
                LightningPEFTWarning,
                stacklevel=5,
            )
        linear = [target.path for target in found]
        return Quantization(self, set(linear), self.packer(model, family), unpackable_layers(model, linear))

    def packer(self, model: nn.Module, family: ModelFamily) -> Callable[[str, nn.Linear], nn.Module]:
        """Return what makes a quantised layer of the linear layer at a path of ``model``."""
        quantizer = self.quantizer
        return lambda path, linear: quantizer.quantize(linear)

    def _adopt(self, packed: Mapping[str, nn.Module]) -> None:
        """Take a base that is quantised already, if it can be trained over."""
        make_trainable_over(packed)
        found = {quantizer_name(module) or self.quantization for module in packed.values()}
        if self.quantization not in found:
            warnings.warn(
                f"{type(self).__name__} with quantization={self.quantization!r} was asked for, but the base is quantised as {', '.join(sorted(found))} "
                "already and stays as it is; load it unquantised, or name its quantization",
                LightningPEFTWarning,
                stacklevel=3,
            )

    @override
    def loaded_over(self, model: nn.Module) -> Method:
        if packed_layers(model):
            return self
        return LoRA(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LoRA)})


class Quantization(LayerPreparation):
    """The linear layers of one base, quantised one by one.

    Args:
        method: says the name of the quantizer.
        paths: the layers.
        packer: makes the quantised layer of the linear layer at a path.
        unpackable: those of the layers that stay as they are, with the reason.
    """

    def __init__(
        self,
        method: QLoRA,
        paths: Set[str],
        packer: Callable[[str, nn.Linear], nn.Module],
        unpackable: Mapping[str, str],
    ) -> None:
        super().__init__(paths - unpackable.keys())
        self.packer, self.name, self.whose = packer, method.quantization, type(method).__name__
        self.refused = dict(unpackable)
        self.done = 0

    @override
    def replacement(self, path: str, layer: nn.Module) -> nn.Module:
        try:
            packed = self.packer(path, _plain_linear(layer))
        except InjectionError as error:
            self.refused[path] = str(error)
            return layer
        mark_packed(packed, self.name)
        self.done += 1
        return packed

    @override
    def finish(self) -> None:
        """Name the layers that stay as they are; refuse if that is all of them."""
        refused, done = self.refused, self.done
        if not refused:
            return
        first = next(iter(refused.values()))
        if not done:
            raise InjectionError(
                f"{self.whose} found no layer to quantise among {len(refused)} linear layers, such as {min(refused)!r}: {first}. "
                "Use LoRA, which leaves the base as it is, or other settings"
            )
        names = ", ".join(sorted(refused)[:20]) + (", ..." if len(refused) > 20 else "")
        warnings.warn(
            f"{self.whose} leaves {len(refused)} of {len(refused) + done} linear layers unquantised: {names}. The first: {first}. "
            "Name them in skip= to say that this is wanted",
            LightningPEFTWarning,
            stacklevel=3,
        )


def _plain_linear(module: nn.Module | None) -> nn.Linear:
    if not isinstance(module, nn.Linear) or type(module) is not nn.Linear:  # a subclass may do more than multiply
        raise InjectionError(f"a {type(module).__name__} is not a plain nn.Linear")
    return module


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register QLoRA."""
    return [QLoRA]

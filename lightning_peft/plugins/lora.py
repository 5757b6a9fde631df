"""LoRA: a frozen weight plus a trained product of two thin matrices.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685); scaling by 1/sqrt(r) from
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023 (arXiv:2312.03732)::

    y = W x + s B A x       s = alpha / rank   (or alpha / sqrt(rank))

    x ──┬── W (frozen) ──────────────(+)── y        A: (rank, in)   random
        └── A ── B ── s ──────────────┘             B: (out, rank)  zero, so that a fresh adapter changes nothing

The arithmetic is in :mod:`lightning_peft.arithmetic.low_rank`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.arithmetic.low_rank import (
    CONVOLUTIONS,
    LowRankAdapter,
    LowRankLinear,
    LowRankSettings,
)
from lightning_peft.arithmetic.low_rank_attention import LowRankMultiheadAttention
from lightning_peft.arithmetic.low_rank_conv import LowRankConv
from lightning_peft.arithmetic.low_rank_embedding import LowRankEmbedding
from lightning_peft.arithmetic.low_rank_experts import LowRankExperts, without_parameters
from lightning_peft.arithmetic.tied_low_rank import (
    TIED_RULE,
    TiedEmbedding,
    TiedLinear,
    refuse_or_warn_of_tied,
    tie,
    with_tied,
)
from lightning_peft.arithmetic.trained_bias import BiasAdapter
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.field_checks import check_switches
from lightning_peft.hf_types import refuse_other_keys
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.targets import fused_parameters, is_conv1d_linear, is_fused_experts

_BIASED = (nn.Linear, nn.LayerNorm, nn.GroupNorm, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation of linear, embedding, convolution and ``nn.MultiheadAttention`` layers, and of fused experts.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = inject(model, LoRA(rank=2), "0")
        >>> trainable_summary(model).trainable
        64
    """

    name: ClassVar[str] = "lora"
    mergeable: ClassVar[bool] = True
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LORA"
    swappable_fields: ClassVar[frozenset[str]] = frozenset(
        ("rank", "alpha", "rslora", "init", "rank_pattern", "alpha_pattern")
    )
    ties: ClassVar[bool] = True
    """Whether the adapters of one weight may share their tensors; a descendant with arithmetic of its own says no."""

    rank: int = 8
    """Rank of the update, r in the paper."""
    alpha: float = 16.0
    """Scale of the update: it is multiplied by alpha / rank. Anything but zero."""
    dropout: float = 0.0
    """Probability of dropping an input of the low-rank path in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps the update's size as the rank grows."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts: Kaiming uniform (as HF PEFT and loralib do) or Gaussian with deviation 1/rank. B starts at zero."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too: none, those of the adapted layers, or all of the model but of modules that are trained in full."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Target (role, glob or ``re:``) to rank, where it differs; the first match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Target (role, glob or ``re:``) to alpha, where it differs; the first match counts."""
    dtype: Literal["float32", "base"] = "float32"
    """Precision of the adapter: at least float32, or that of the base."""
    tied: Literal["one", "both", "error"] = "one"
    """What happens where an adapted weight is also that of another module, as tied embeddings are: only the target is adapted, with a
    warning, all modules that share it get one update together, or it is refused."""

    def __post_init__(self) -> None:
        check_switches(self)
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"LoRA {name} must map targets to values, got {getattr(self, name)!r}")
        for label, rank in {
            "rank": self.rank,
            **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()},
        }.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(f"LoRA {label} must be a positive integer, got {rank!r}")
        for label, alpha in {
            "alpha": self.alpha,
            **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()},
        }.items():
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
                raise ConfigError(f"LoRA {label} must be a finite number, got {alpha!r}")
            if alpha == 0:
                raise ConfigError(
                    f"{type(self).__name__} {label} must not be zero, which scales the update to nothing, got {alpha!r}"
                )
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"LoRA dropout must lie in [0, 1), got {self.dropout!r}")
        choices = {
            "init": ("kaiming", "gaussian"),
            "bias": ("none", "all", "lora_only"),
            "dtype": ("float32", "base"),
            "tied": ("one", "both", "error") if self.ties else ("one", "error"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{type(self).__name__} {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def settings(self) -> LowRankSettings:
        """The fields that an adapter needs."""
        return LowRankSettings(
            rank=self.rank,
            scaling=self.scaling,
            dropout=self.dropout,
            init=self.init,
            bias=self.bias != "none",
            dtype=self.dtype,
        )

    def linear_adapter(self, module: nn.Module, target: Target) -> LowRankAdapter:
        """Make the adapter for a linear layer or a ``Conv1D``; descendants put their own arithmetic here."""
        return LowRankLinear(self.settings, module, target.slices)

    @override
    def supports(self, module: nn.Module) -> bool:
        if isinstance(module, tuple(CONVOLUTIONS)):
            return bool(module.groups == 1 and module.padding_mode == "zeros")
        if isinstance(module, nn.MultiheadAttention):
            return module._qkv_same_embed_dim and module.bias_k is None
        if is_fused_experts(module):
            return all(module.get_parameter(name).is_floating_point() for name in fused_parameters(module))
        return isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d_linear(module)

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if type(module) is nn.Linear and target.rule not in (_BIAS_RULE, TIED_RULE):  # as nearly always
            return self.linear_adapter(module, target)
        settings = self.settings
        if target.rule == _BIAS_RULE:
            return BiasAdapter(settings, module)
        if target.rule == TIED_RULE:
            return TiedEmbedding(settings, module) if isinstance(module, nn.Embedding) else TiedLinear(settings, module)
        if is_fused_experts(module):
            return LowRankExperts(settings, module, target)
        if isinstance(module, nn.MultiheadAttention):
            return LowRankMultiheadAttention(settings, module, target)
        if isinstance(module, nn.Embedding):
            return LowRankEmbedding(settings, module)
        if isinstance(module, tuple(CONVOLUTIONS)):
            return LowRankConv(settings, module)
        return self.linear_adapter(module, target)

    @override
    def patterns(self) -> Mapping[str, Mapping[str, Any]]:
        return {"rank": self.rank_pattern, "alpha": self.alpha_pattern}

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        if self.tied == "both":
            targets = with_tied(model, targets)
        else:
            refuse_or_warn_of_tied(model, targets, refuse=self.tied == "error")
        if self.bias != "all":
            return targets
        chosen = {target.path for target in targets}
        extra = []
        for path, module in base_modules(model):
            module = unwrapped(module)
            if path in chosen or not isinstance(getattr(module, "_parameters", {}).get("bias"), nn.Parameter):
                continue
            if not isinstance(module, _BIASED) and not is_conv1d_linear(module):
                raise TargetError(
                    f"bias='all' cannot train the bias of {path!r}, a {type(module).__name__}; use bias='lora_only'"
                )
            extra.append(Target(path=path, rule=_BIAS_RULE, optional=True))
        return [*targets, *extra]

    @override
    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Let adapters of one weight share their tensors."""
        tie(model, adapters)

    # -- HF PEFT's adapter_config.json -----------------------------------------------------------------------------

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        places = {
            path: adapter
            for path, adapter in adapters.items()
            if isinstance(adapter, LowRankAdapter) and not isinstance(adapter, BiasAdapter)
        }
        # The slices of a fused projection are written as one update of stacked rank with the same scaling.
        ranks = {path: adapter.file_rank for path, adapter in places.items()}
        scalings = {
            path: adapter.method_scaling * (math.sqrt(ranks[path]) if self.rslora else ranks[path])
            for path, adapter in places.items()
        }
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(scalings.values()).most_common(1)[0][0]
        # HF PEFT names the parameters of experts, not their module, in its patterns too.
        named = {
            path: [f"{path}.{name}" for name in adapter.names] if isinstance(adapter, LowRankExperts) else [path]
            for path, adapter in places.items()
        }
        experts = [path for path, adapter in places.items() if isinstance(adapter, LowRankExperts)]
        transposed = [adapter.transposed for adapter in places.values() if isinstance(adapter, LowRankLinear)]
        return {
            "r": rank,
            "lora_alpha": _whole(alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": False,
            "bias": self.bias,
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
            "fan_in_fan_out": bool(transposed) and all(transposed),
            "rank_pattern": {
                re.escape(name): value for path, value in ranks.items() if value != rank for name in named[path]
            },
            "alpha_pattern": {
                re.escape(name): _whole(value)
                for path, value in scalings.items()
                if value != alpha
                for name in named[path]
            },
            "ensure_weight_tying": any(adapter.tied_parameters for adapter in places.values()),
            "target_modules": [path for path in places if path not in experts],
            "target_parameters": [name for path in experts for name in named[path]] or None,
        }

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> Self:
        if (
            isinstance(config.get("init_lora_weights"), str)
            and config["init_lora_weights"].split("_")[0] in _CHANGE_THE_BASE
        ):
            raise AdapterConfigError(
                f"init_lora_weights={config['init_lora_weights']!r} changed the base weights before training; "
                "convert the adapter with HF PEFT's `path_initial_model_for_weight_conversion` first"
            )
        refuse_other_keys("LoRA", config, _HF_UNDERSTOOD)
        try:
            for name in ("rank_pattern", "alpha_pattern"):
                if not isinstance(config.get(name) or {}, Mapping):
                    raise ConfigError(f"{name} must map patterns to values, got {config[name]!r}")
            rank, alpha, parameters = (
                config.get("r", 8),
                config.get("lora_alpha", 8),
                config.get("target_parameters") or [],
            )
            ranks = {_pattern(key): value for key, value in (config.get("rank_pattern") or {}).items()}
            alphas = {_pattern(key): value for key, value in (config.get("alpha_pattern") or {}).items()}
            return cls(
                rank=rank,
                alpha=alpha,
                dropout=config.get("lora_dropout") or 0.0,
                rslora=config.get("use_rslora") or False,
                bias=config.get("bias") or "none",
                init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
                rank_pattern=without_parameters(ranks, parameters, rank),
                alpha_pattern=without_parameters(alphas, parameters, alpha),
                tied="both" if config.get("ensure_weight_tying") else "one",
            )
        except ConfigError as error:
            raise AdapterConfigError(str(error)) from error

    @override
    def placed_tensors(self, model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = super().placed_tensors(model, stored)
        if self.bias == "lora_only" and not any(name.endswith(".bias") for name in tensors):
            modules = {path: unwrapped(module) for path, module in base_modules(model)}
            places = sorted({name.partition(".lora_")[0] for name in tensors})
            biased = [place for place in places if isinstance(getattr(modules.get(place), "bias", None), nn.Parameter)]
            if biased:
                raise AdapterMismatchError(
                    f"the adapter was trained with bias='lora_only', but the file holds no bias, such as that of {biased[0]!r}: HF PEFT before 0.21 did "
                    "not save them, and what was trained of them is lost. To load the rest, set 'bias' to 'none' in adapter_config.json"
                )
        return tensors


_BIAS_RULE = "bias='all'"
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora", "mica")
_HF_UNDERSTOOD = frozenset(
    [
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "bias",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "target_modules",
        "target_parameters",
        "ensure_weight_tying",
        "layers_to_transform",
        "layers_pattern",
        "exclude_modules",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
    ]
)


def _whole(value: float) -> int | float:
    value = round(value, 9)  # the scaling times the rank may miss the number by a rounding
    return int(value) if value == int(value) else value


def _pattern(key: str) -> str:
    """Turn a key of HF PEFT's patterns (a regular expression on the end of the path) into a target."""
    plain = re.sub(r"\\(.)", r"\1", key)
    if re.escape(plain) == key or re.fullmatch(r"[\w.]+", key):
        return plain
    if len(key) > 200 or re.search(r"[+*}]\)?\s*[+*{]|\([^)]*[+*][^)]*\)[+*{]", key):
        raise AdapterConfigError(
            f"the pattern {key!r} is refused: nested repetitions in a regular expression may never end"
        )
    try:
        re.compile(key)
    except re.error as error:
        raise AdapterConfigError(f"the pattern {key!r} is not a regular expression: {error}") from error
    return rf"re:(.*\.)?(?:{key})"


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register LoRA."""
    return [LoRA]

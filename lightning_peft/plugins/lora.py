"""LoRA: a frozen weight plus a trained product of two thin matrices.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685); scaling by 1/sqrt(r) from
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023 (arXiv:2312.03732)::

    y = W x + s B A x       s = alpha / rank   (or alpha / sqrt(rank))

    x ──┬── W (frozen) ──────────────(+)── y        A: (rank, in)   random
        └── A ── B ── s ──────────────┘             B: (out, rank)  zero, so that a fresh adapter changes nothing

A linear layer's B is held transposed, (rank, out): with ``h = A x^T`` held as (rank, tokens), every thin product of
forward and backward then meets the matrix library in its fast layout. Files hold the usual (out, rank). The input is
never copied to the dtype of the adapter; the small matrices are cast to the dtype of the output instead.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import AdapterConfigError, ConfigError, MergeError, TargetError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Slice, Target
from lightning_peft.targets import is_conv1d_linear

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_BIASED = (nn.Linear, nn.LayerNorm, nn.GroupNorm, *_CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation of linear, embedding, convolution and ``nn.MultiheadAttention`` layers.

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

    rank: int = 8
    """Rank of the update, r in the paper."""
    alpha: float = 16.0
    """Scale of the update: it is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an input of the low-rank path in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps the update's size as the rank grows."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts: Kaiming uniform (as HF PEFT and loralib do) or Gaussian with deviation 1/rank. B starts at zero."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too: none, those of the adapted layers, or all of the model."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Target (role, glob or ``re:``) to rank, where it differs; the first match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Target (role, glob or ``re:``) to alpha, where it differs; the first match counts."""
    dtype: Literal["float32", "base"] = "float32"
    """Precision of the adapter: at least float32, or that of the base."""

    def __post_init__(self) -> None:
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
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"LoRA dropout must lie in [0, 1), got {self.dropout!r}")
        choices = {"init": ("kaiming", "gaussian"), "bias": ("none", "all", "lora_only"), "dtype": ("float32", "base")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"LoRA {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @override
    def supports(self, module: nn.Module) -> bool:
        if isinstance(module, tuple(_CONVOLUTIONS)):
            return module.groups == 1 and module.padding_mode == "zeros"  # type: ignore[union-attr]
        if isinstance(module, nn.MultiheadAttention):
            return module._qkv_same_embed_dim and module.bias_k is None
        return isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d_linear(module)

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if target.rule == _BIAS_RULE:
            return BiasAdapter(self, module)
        if isinstance(module, nn.MultiheadAttention):
            return LoRAMultiheadAttention(self, module, target)
        if isinstance(module, nn.Embedding):
            return LoRAEmbedding(self, module)
        if isinstance(module, tuple(_CONVOLUTIONS)):
            return LoRAConv(self, module)
        return LoRALinear(self, module, target.slices)

    @override
    def patterns(self) -> Mapping[str, Mapping[str, Any]]:
        return {"rank": self.rank_pattern, "alpha": self.alpha_pattern}

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target]) -> Sequence[Target]:
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
            extra.append(Target(path=path, rule=_BIAS_RULE))
        return [*targets, *extra]

    # -- HF PEFT's adapter_config.json -----------------------------------------------------------------------------

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        places = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, _LowRank)}
        # The slices of a fused projection are written as one update of stacked rank with the same scaling.
        ranks = {path: adapter.file_rank for path, adapter in places.items()}
        scalings = {
            path: adapter.scaling * (math.sqrt(ranks[path]) if self.rslora else ranks[path])
            for path, adapter in places.items()
        }
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(scalings.values()).most_common(1)[0][0]
        transposed = [adapter.transposed for adapter in places.values() if isinstance(adapter, LoRALinear)]
        return {
            "r": rank,
            "lora_alpha": _whole(alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": False,
            "bias": self.bias,
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
            "fan_in_fan_out": bool(transposed) and all(transposed),
            "rank_pattern": {re.escape(path): value for path, value in ranks.items() if value != rank},
            "alpha_pattern": {re.escape(path): _whole(value) for path, value in scalings.items() if value != alpha},
            "target_modules": list(places),
        }

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> LoRA:
        if (
            isinstance(config.get("init_lora_weights"), str)
            and config["init_lora_weights"].split("_")[0] in _CHANGE_THE_BASE
        ):
            raise AdapterConfigError(
                f"init_lora_weights={config['init_lora_weights']!r} changed the base weights before training; "
                "convert the adapter with HF PEFT's `path_initial_model_for_weight_conversion` first"
            )
        for key, value in config.items():
            if key not in _HF_UNDERSTOOD and value not in (None, False, "", [], {}):
                raise AdapterConfigError(
                    f"this LoRA does not have HF PEFT's {key!r}, which the adapter sets to {value!r}"
                )
        try:
            return cls(
                rank=config.get("r", 8),
                alpha=config.get("lora_alpha", 8),
                dropout=config.get("lora_dropout") or 0.0,
                rslora=bool(config.get("use_rslora")),
                bias=config.get("bias") or "none",
                init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
                rank_pattern={_pattern(key): value for key, value in (config.get("rank_pattern") or {}).items()},
                alpha_pattern={_pattern(key): value for key, value in (config.get("alpha_pattern") or {}).items()},
            )
        except ConfigError as error:
            raise AdapterConfigError(str(error)) from error


_BIAS_RULE = "bias='all'"
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora", "mica")
_HF_UNDERSTOOD = frozenset(
    ["r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_modules", "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "layers_to_transform", "layers_pattern", "exclude_modules", "megatron_core", "qalora_group_size", "loftq_config", "eva_config"]
)


class _LowRank(Adapter):
    """What the low-rank adapters share: rank, scaling, dropout, and a bias that is trained beside them if asked for."""

    bias: nn.Parameter | None

    def __init__(self, method: LoRA, module: nn.Module) -> None:
        super().__init__()
        self.rank, self.scaling, self.dropout, self.init = (
            method.rank,
            method.scaling,
            float(method.dropout),
            method.init,
        )
        self.file_rank = method.rank
        weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
        assert isinstance(weight, Tensor)
        self._factory = {"device": weight.device, "dtype": _adapter_dtype(weight.dtype, method.dtype)}
        base_bias = getattr(module, "bias", None)
        if method.bias != "none" and isinstance(base_bias, Tensor):
            self.bias = nn.Parameter(torch.empty(base_bias.shape, **self._factory))
            self.register_buffer("base_bias", torch.empty(base_bias.shape, **self._factory), persistent=False)
        else:
            self.bias = None

    def new(self, *shape: int) -> nn.Parameter:
        """Allocate a parameter of the adapter."""
        return nn.Parameter(torch.empty(shape, **self._factory))

    def reset_A(self, *matrices: Tensor) -> None:
        """Start the matrices A (rank, in, ...)."""
        for A in matrices:
            if self.init == "gaussian":
                nn.init.normal_(A, std=1.0 / self.rank)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    def reset_bias(self, base_layer: nn.Module) -> None:
        """Start the trained bias at the bias of the base."""
        if self.bias is not None:
            with torch.no_grad():
                self.base_bias.copy_(base_layer.bias)  # type: ignore[operator, arg-type]
                self.bias.copy_(base_layer.bias)  # type: ignore[arg-type]

    def bias_tensors(self) -> dict[str, Tensor]:
        """Return the trained bias under its name in a file."""
        return {} if self.bias is None else {"base_layer.bias": self.bias}

    def add_bias(self, output: Tensor, channel_dim: int = -1) -> Tensor:
        """Add what training changed of the bias to ``output``, along ``channel_dim``."""
        if self.bias is None:
            return output
        change = (self.bias - self.base_bias).to(output.dtype)  # type: ignore[operator]
        return output + (change if channel_dim == -1 else change.view(-1, *[1] * (-channel_dim - 1)))

    def merged_with(self, base_layer: nn.Module, **deltas: Tensor) -> dict[str, Tensor]:
        """Return the merged parameters: each delta added to the parameter of its name in float32, rounded once."""
        merged = {}
        for name, delta in deltas.items():
            name = name.replace("__", ".")
            weight = base_layer.get_parameter(name)
            if not weight.is_floating_point() or weight.shape != delta.shape:
                raise MergeError(
                    f"the {name} of {type(base_layer).__name__} holds {weight.dtype} of shape {tuple(weight.shape)}: a quantised base "
                    "cannot be merged into; load the base in 16 or 32 bit and merge there"
                )
            wide = torch.promote_types(torch.float32, weight.dtype)
            merged[name] = (weight.detach().to(wide) + delta.to(wide)).to(weight.dtype)
        if self.bias is not None:
            merged["bias"] = self.bias.detach().to(base_layer.get_parameter("bias").dtype)
        return merged


class LoRALinear(_LowRank):
    """LoRA on ``nn.Linear`` (quantised ones too) and transformers' ``Conv1D``, whole or on slices of a fused projection.

    Each of k slices has a pair A, B of its own; A is held as (k * rank, in), B as (rank, features of all slices).

    Args:
        method: the hyperparameters at this place.
        module: the layer to adapt.
        slices: the slices of the output to adapt; empty for all of it.
    """

    def __init__(self, method: LoRA, module: nn.Module, slices: tuple[Slice, ...] = ()) -> None:
        super().__init__(method, module)
        self.transposed = is_conv1d_linear(module)
        if self.transposed:
            in_features, self.out_features = module.weight.shape  # type: ignore[union-attr, misc]
        else:
            in_features, self.out_features = module.in_features, module.out_features  # type: ignore[assignment]
        self.slices = slices
        self.file_rank = self.rank * max(1, len(slices))
        self.lora_A = self.new(self.file_rank, in_features)  # type: ignore[arg-type]
        self.lora_B = self.new(self.rank, sum(part.features for part in slices) or self.out_features)
        exact = type(module) is nn.Linear or (self.transposed and type(module).__name__ == "Conv1D")
        self._plain: type | None = type(module) if exact else None

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_A(*self.lora_A.split(self.rank))
        nn.init.zeros_(self.lora_B)
        self.reset_bias(base_layer)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (..., in) -> y (..., out)."""
        if type(base) is self._plain and not _hooked(base):
            x2 = x.reshape(-1, x.shape[-1])  # (tokens, in)
            if self.transposed:
                y = torch.addmm(base.bias, x2, base.weight)  # type: ignore[attr-defined]  # (tokens, out)
            else:
                y = F.linear(x2, base.weight, base.bias)  # type: ignore[attr-defined]  # (tokens, out)
            # The output is fresh here, so the update can go into it.
            y = self._update(x2, y, in_place=True)
            return self.add_bias(y).view(*x.shape[:-1], self.out_features)
        y = base(x)
        y = self._update(x.reshape(-1, x.shape[-1]), y.reshape(-1, self.out_features), in_place=False).view(y.shape)
        return self.add_bias(y)

    def _update(self, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        """Return y (tokens, out) plus the update of x (tokens, in)."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        A, B, x = self.lora_A.to(y.dtype), self.lora_B.to(y.dtype), x.to(y.dtype)
        h = A @ x.t()  # (k * rank, tokens)
        if not self.slices:
            if in_place:
                return y.addmm_(h.t(), B, alpha=self.scaling)
            return torch.addmm(y, h.t(), B, alpha=self.scaling)
        y = y if in_place else y.clone()
        widths = [part.features for part in self.slices]
        for part, rows, columns in zip(self.slices, h.split(self.rank), B.split(widths, dim=1), strict=True):
            view = part.view(y)  # (tokens, groups, width of the slice)
            view.add_((rows.t() @ columns).view(view.shape), alpha=self.scaling)
        return y

    def _dense_B(self) -> Tensor:
        """B as the file holds it: (out, k * rank), zero where a slice's own columns do not reach its features."""
        if not self.slices:
            return self.lora_B.t()
        dense = torch.zeros(self.file_rank, self.out_features, dtype=self.lora_B.dtype, device=self.lora_B.device)
        for index, (part, block) in enumerate(zip(self.slices, self._blocks(self.lora_B), strict=True)):
            view = part.view(dense[index * self.rank : (index + 1) * self.rank])
            view.copy_(block.reshape(view.shape))
        return dense.t()

    def _blocks(self, B: Tensor) -> tuple[Tensor, ...]:
        return B.split([part.features for part in self.slices], dim=1)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self._dense_B().detach(), **self.bias_tensors()}

    @override
    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        if not self.slices:
            super().import_state(state)
            return
        self.lora_A.copy_(state["lora_A.weight"])
        dense = state["lora_B.weight"].t()  # (k * rank, out)
        for index, (part, block) in enumerate(zip(self.slices, self._blocks(self.lora_B), strict=True)):
            block.copy_(part.view(dense[index * self.rank : (index + 1) * self.rank]).reshape(block.shape))
        if not torch.equal(self._dense_B().to(dense), dense.t()):
            raise AdapterConfigError("lora_B.weight has values outside the slices it adapts; load it without slices")
        if self.bias is not None:
            self.bias.copy_(state["base_layer.bias"])

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        delta = self.scaling * (self._dense_B().detach() @ self.lora_A.detach())  # (out, in)
        return self.merged_with(base_layer, weight=delta.t() if self.transposed else delta)


class LoRAEmbedding(_LowRank):
    """LoRA on ``nn.Embedding``: A (rank, vocabulary) starts at zero, B (dim, rank) at random, both held transposed."""

    def __init__(self, method: LoRA, module: nn.Embedding) -> None:
        super().__init__(method, module)
        if module.max_norm is not None:
            raise TargetError("LoRA cannot adapt an embedding with max_norm, which rewrites its own weights in forward")
        self.padding_idx = module.padding_idx
        # Some models (Gemma 3) scale what the embedding returns; the update is part of the weight, so it is scaled too.
        self.embed_scale = float(getattr(module, "scalar_embed_scale", 1.0))
        self.lora_embedding_A = self.new(module.num_embeddings, self.rank)
        self.lora_embedding_B = self.new(self.rank, module.embedding_dim)

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    @override
    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        """Ids (...) -> y (..., dim)."""
        y: Tensor = base(ids)
        h = F.embedding(ids, self.lora_embedding_A.to(y.dtype), self.padding_idx)  # (..., rank)
        return y + (h @ self.lora_embedding_B.to(y.dtype)) * (self.scaling * self.embed_scale)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_embedding_A.t(), "lora_embedding_B": self.lora_embedding_B.t()}

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        return self.merged_with(
            base_layer, weight=self.scaling * (self.lora_embedding_A.detach() @ self.lora_embedding_B.detach())
        )


class LoRAConv(_LowRank):
    """LoRA on convolutions: A (rank, in, *kernel) strides over the input as the base does, B (out, rank, 1, ...) mixes."""

    def __init__(self, method: LoRA, module: nn.Module) -> None:
        super().__init__(method, module)
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        self.convolve = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(module, kind))
        self.settings = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        self.lora_A = self.new(self.rank, module.in_channels, *module.kernel_size)
        self.lora_B = self.new(module.out_channels, self.rank, *[1] * len(module.kernel_size))

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_A(self.lora_A)
        nn.init.zeros_(self.lora_B)
        self.reset_bias(base_layer)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (batch, in, *size) -> y (batch, out, *size)."""
        y: Tensor = base(x)
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        h = self.convolve(x, self.lora_A.to(y.dtype), **self.settings)  # (batch, rank, *size)
        y = y + self.convolve(h, self.lora_B.to(y.dtype)) * self.scaling
        return self.add_bias(y, channel_dim=1 - self.lora_B.dim())

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B, **self.bias_tensors()}

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        delta = torch.tensordot(self.lora_B.detach().flatten(1), self.lora_A.detach(), dims=1)  # (out, in, *kernel)
        return self.merged_with(base_layer, weight=self.scaling * delta)


class LoRAMultiheadAttention(_LowRank):
    """LoRA on ``nn.MultiheadAttention``: its joint input projection and its output projection.

    The module reads its weights itself, so the updates are added to the weights for the time of the forward.
    """

    # Encoder layers otherwise take a fused path in eval mode that never calls this module.
    attribute_overrides: ClassVar[Mapping[str, Any]] = {"_qkv_same_embed_dim": False}

    def __init__(self, method: LoRA, module: nn.MultiheadAttention, target: Target) -> None:
        super().__init__(method, module)
        for name in ("dropout", "bias"):
            if getattr(method, name) not in (0.0, "none"):
                raise TargetError(
                    f"LoRA {name}={getattr(method, name)!r} was asked for at {target.path!r}, an nn.MultiheadAttention, "
                    f"whose projections are not modules: {name} is not possible there"
                )
        width = module.embed_dim
        self.lora_A, self.lora_B = self.new(self.rank, width), self.new(self.rank, 3 * width)
        self.out_lora_A, self.out_lora_B = self.new(self.rank, width), self.new(self.rank, width)

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_A(self.lora_A, self.out_lora_A)
        nn.init.zeros_(self.lora_B)
        nn.init.zeros_(self.out_lora_B)

    def deltas(self) -> dict[str, Tensor]:
        """Return what is added to each weight, (out, in)."""
        return {
            "in_proj_weight": self.scaling * (self.lora_B.t() @ self.lora_A),
            "out_proj.weight": self.scaling * (self.out_lora_B.t() @ self.out_lora_A),
        }

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of ``nn.MultiheadAttention``."""
        around = [self]
        while isinstance(base, functools.partial):  # further adapters inside this one: their updates add up
            around.append(base.func)
            base = base.args[0]
        assert isinstance(base, nn.MultiheadAttention)
        weights = {name: base.get_parameter(name) for name in ("in_proj_weight", "out_proj.weight")}
        for adapter in around:
            weights = {name: weights[name] + delta.to(weights[name].dtype) for name, delta in adapter.deltas().items()}
        return torch.func.functional_call(base, weights, args, kwargs)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {
            "lora_A.weight": self.lora_A,
            "lora_B.weight": self.lora_B.t(),
            "base_layer.out_proj.lora_A.weight": self.out_lora_A,
            "base_layer.out_proj.lora_B.weight": self.out_lora_B.t(),
        }

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        deltas = {name.replace(".", "__"): delta.detach() for name, delta in self.deltas().items()}
        return self.merged_with(base_layer, **deltas)


class BiasAdapter(_LowRank):
    """The trained bias of a layer that has no low-rank update, for ``bias='all'``."""

    def __init__(self, method: LoRA, module: nn.Module) -> None:
        super().__init__(method, module)
        self.channels_last = not isinstance(module, (*_CONVOLUTIONS, nn.GroupNorm))

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_bias(base_layer)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X -> y, shapes as in the base."""
        y: Tensor = base(x)
        return self.add_bias(y, channel_dim=-1 if self.channels_last else 1 - y.dim())

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"bias": self.bias} if self.bias is not None else {}

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        return self.merged_with(base_layer)


def _adapter_dtype(base: torch.dtype, wanted: str) -> torch.dtype:
    if not base.is_floating_point:  # packed weights of a quantised base
        return torch.float32
    return base if wanted == "base" else torch.promote_types(torch.float32, base)


def _hooked(module: Any) -> bool:
    """Tell whether somebody listens to ``module``, so that it must be called rather than computed."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
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
    return rf"re:(.*\.)?(?:{key})"


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register LoRA."""
    return [LoRA]

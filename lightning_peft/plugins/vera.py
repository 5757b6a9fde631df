"""VeRA: one frozen random pair of matrices for the whole model, and two trained vectors a layer.

Kopiczko, Blankevoort, Asano, "VeRA: Vector-based Random Matrix Adaptation", 2023 (arXiv:2310.11454)::

    y = W x + b * (B (d * (A x)))

    x ──┬── W (frozen) ─────────────────(+)── y      A: (rank, widest input)   frozen, random, the same in every layer
        └── A ── d * ── B ── b * ────────┘           B: (widest output, rank)  frozen, random, the same in every layer
                                                     d: (rank,) starts at 0.1, b: (out,) at zero

A layer takes the first columns of A and the first rows of B. One adapter, the leader, holds A and B as buffers; the others look
them up there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules
from lightning_peft.arithmetic.low_rank import LowRankAdapter, LowRankSettings
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError
from lightning_peft.field_checks import check_switches
from lightning_peft.hf_types import refuse_other_keys
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import HF_PREFIX, Adapter, Method, Slice, Target
from lightning_peft.targets import is_conv1d_linear, is_linear

_PAIR = ("vera_A", "vera_B")
_HF_SHARED = {f"base_model.{name}": name for name in _PAIR}
"""Name in a file of HF PEFT to name here, for the tensors that belong to the whole model."""


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Vector-based random matrix adaptation of linear layers.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
        >>> _ = inject(model, VeRA(rank=8))
        >>> trainable_summary(model).trainable
        48
    """

    name: ClassVar[str] = "vera"
    mergeable: ClassVar[bool] = True
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "VERA"
    # transformers 5.23 refuses this type of HF PEFT, for the projections that its layers share.
    transformers_loads: ClassVar[bool] = False

    rank: int = 256
    """Rank of the random pair, r in the paper; it costs one trained number a layer."""
    d_initial: float = 0.1
    """Where the vector d starts; b starts at zero."""
    projection_seed: int = 0
    """Seed of the random pair."""
    dropout: float = 0.0
    """Probability of dropping an input of the adapter's path in training."""
    save_projection: bool = True
    """Whether files hold the random pair; without it they are smaller, and the pair is drawn again from the seed."""

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("projection_seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise ConfigError(f"VeRA {name} must be an integer of at least {least}, got {value!r}")
        if not _is_number(self.d_initial) or not math.isfinite(self.d_initial) or self.d_initial == 0:
            raise ConfigError(
                f"VeRA d_initial must be a finite number other than zero, which could not learn, got {self.d_initial!r}"
            )
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"VeRA dropout must lie in [0, 1), got {self.dropout!r}")
        check_switches(self)

    @override
    def supports(self, module: nn.Module) -> bool:
        return is_linear(module)

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        return VectorScaledLinear(self, module, target.slices)

    @override
    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Let the first adapter in the order of the model hold the random pair, as wide as any place needs."""
        places = [adapters[path] for path, _ in base_modules(model) if path in adapters]
        leader, *followers = (adapter for adapter in places if isinstance(adapter, VectorScaledLinear))
        every = (leader, *followers)
        leader.hold_pair(max(one.in_features for one in every), max(one.out_features for one in every))
        for follower in followers:
            follower.follow(leader)

    # -- HF PEFT's files -------------------------------------------------------------------------------------------

    @override
    def file_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {}
        for name, tensor in tensors.items():
            last = name.rpartition(".")[2]
            named[f"base_model.{last}" if last in _PAIR else HF_PREFIX + name] = tensor
        return named

    @override
    def placed_tensors(self, model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = super().placed_tensors(model, {key: stored[key] for key in stored if key not in _HF_SHARED})
        places = {name.rpartition(".")[0] for name in tensors}
        leader = next((path for path, _ in base_modules(model) if path in places), None)
        if leader is None:
            raise AdapterMismatchError(
                f"none of the places {sorted(places)[:3]} is in {type(model).__name__}, so nothing can hold the random pair: wrong base?"
            )
        shared = {f"{leader}.{name}": stored[key] for key, name in _HF_SHARED.items() if key in stored}
        return {**tensors, **shared}

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {
            "r": self.rank,
            "d_initial": self.d_initial,
            "projection_prng_key": self.projection_seed,
            "vera_dropout": self.dropout,
            "save_projection": self.save_projection,
            "fan_in_fan_out": all(isinstance(one, VectorScaledLinear) and one.transposed for one in adapters.values()),
            "bias": "none",
        }

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> VeRA:
        refuse_other_keys("VeRA", config, _HF_UNDERSTOOD)
        if config.get("bias", "none") != "none":
            raise AdapterConfigError(f"VeRA trains no biases, but the adapter has bias={config['bias']!r}")
        try:
            return cls(
                rank=config.get("r", 256),
                d_initial=config.get("d_initial", 0.1),
                projection_seed=config.get("projection_prng_key", 0),
                dropout=config.get("vera_dropout") or 0.0,
                save_projection=config.get("save_projection", True),
            )
        except ConfigError as error:
            raise AdapterConfigError(str(error)) from error


class VectorScaledLinear(LowRankAdapter):
    """The two vectors of one layer: a linear one (quantised ones too) or transformers' ``Conv1D``, whole or slices of it.

    Args:
        method: the hyperparameters.
        module: the layer to adapt.
        slices: the slices of the output to adapt; empty for all of it.
    """

    def __init__(self, method: VeRA, module: nn.Module, slices: tuple[Slice, ...] = ()) -> None:
        super().__init__(LowRankSettings(rank=method.rank, scaling=1.0, dropout=method.dropout), module)
        self.d_initial, self.seed, self.persistent = method.d_initial, method.projection_seed, method.save_projection
        self.transposed = is_conv1d_linear(module)
        width = module.weight.shape if self.transposed else (module.in_features, module.out_features)
        self.in_features, self.out_features = (int(number) for number in width)  # type: ignore[union-attr, arg-type]
        self.slices = slices
        self.vera_lambda_b = self.new(sum(part.features for part in slices) or self.out_features)
        self.vera_lambda_d = self.new(self.rank)
        self._leader: tuple[VectorScaledLinear, ...] = ()  # a tuple, so that it is not registered as a part of this one

    def hold_pair(self, in_features: int, out_features: int) -> None:
        """Hold the random pair of the model, with so many features at most."""
        for name, shape in zip(_PAIR, ((self.rank, in_features), (out_features, self.rank)), strict=True):
            empty = torch.empty(shape, device=self._device, dtype=self._dtype)
            self.register_buffer(name, empty, persistent=self.persistent)
        self._reset_pair()

    def follow(self, leader: VectorScaledLinear) -> None:
        """Use the random pair that ``leader`` holds."""
        self._leader = (leader,)

    @override
    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.vera_lambda_b.zero_()
        self.vera_lambda_d.fill_(self.d_initial)
        if "vera_A" in self._buffers:
            self._reset_pair()

    @torch.no_grad()
    def _reset_pair(self) -> None:
        """Draw A, then B, on the CPU in float32: Kaiming uniform, as HF PEFT does from the same seed."""
        matrices = [self.get_buffer(name) for name in _PAIR]
        if matrices[0].is_meta:
            return
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        for tensor in matrices:
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(tensor.shape[1]))
            drawn = torch.empty(tensor.shape, device="cpu", dtype=torch.float32)
            tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return this layer's part of the random pair: A (rank, in) and B (out, rank)."""
        leader = self._leader[0] if self._leader else self
        A, B = (leader.get_buffer(name) for name in _PAIR)
        return A[:, : self.in_features], B[: self.out_features]

    def _dense_b(self) -> Tensor:
        """B's vector for all output features (out,), zero outside the slices."""
        if not self.slices:
            return self.vera_lambda_b
        dense = torch.zeros(self.out_features, dtype=self.vera_lambda_b.dtype, device=self.vera_lambda_b.device)
        widths = [part.features for part in self.slices]
        for part, block in zip(self.slices, torch.split(self.vera_lambda_b, widths), strict=True):
            view = part.view(dense)
            view.copy_(block.reshape(view.shape))
        return dense

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (..., in) -> y (..., out)."""
        y: Tensor = base(x)
        A, B = (matrix.to(device=y.device, dtype=y.dtype) for matrix in self.pair())
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        h = F.linear(x, A) * self.vera_lambda_d.to(y.dtype)  # (..., rank)
        return y + F.linear(h, B) * self._dense_b().to(y.dtype)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {**super().disk_tensors(), "vera_lambda_b": self._dense_b()}

    @override
    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        if not self.slices:
            super().import_state(state)
            return
        for name, tensor in self.disk_tensors().items():
            if name != "vera_lambda_b":
                tensor.copy_(state[name])
        dense = state["vera_lambda_b"]
        self.vera_lambda_b.copy_(torch.cat([part.view(dense).reshape(-1) for part in self.slices]))
        if not torch.equal(self._dense_b().to(dense), dense):
            raise AdapterConfigError("vera_lambda_b has values outside the slices it adapts; load it without slices")

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        b, d = self._dense_b().detach(), self.vera_lambda_d.detach()
        A, B = (matrix.to(b.device) for matrix in self.pair())
        delta = (b[:, None] * B) @ (d[:, None] * A)  # (out, in)
        return self.merged_with(base_layer, weight=delta.t() if self.transposed else delta)


_HF_UNDERSTOOD = frozenset(
    [
        "r",
        "d_initial",
        "projection_prng_key",
        "vera_dropout",
        "save_projection",
        "fan_in_fan_out",
        "bias",
        "init_weights",
        "target_modules",
        "layers_to_transform",
        "layers_pattern",
        "exclude_modules",
    ]
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register VeRA."""
    return [VeRA]

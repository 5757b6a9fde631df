"""Low-rank adapters for every kind of layer: what LoRA and its relatives put around a module.

A linear layer's B is held transposed, (rank, out): with ``h = A x^T`` held as (rank, tokens), every thin product of
forward and backward then meets the matrix library in its fast layout. Files hold the usual (out, rank). The input is
never copied to the dtype of the adapter, but for few tokens (``product_dtype``); the small matrices are cast to that of the output instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic import gpu_low_rank
from lightning_peft.arithmetic.dropped_parts import dropped_part
from lightning_peft.arithmetic.forward_only import forward_only
from lightning_peft.arithmetic.lean_linear import add_product, hooked, lean_forward, product_dtype
from lightning_peft.arithmetic.low_rank_rows import low_rank_rows
from lightning_peft.arithmetic.row_blocks import Product, plus
from lightning_peft.errors import AdapterConfigError, MergeError
from lightning_peft.initial_values import comes_from_file
from lightning_peft.interfaces import Adapter, Slice
from lightning_peft.quantized_layers import unpacking_product
from lightning_peft.targets import is_conv1d_linear

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
"""The convolutions that can be adapted, and their functions."""


@dataclass(frozen=True, kw_only=True)
class LowRankSettings:
    """What a low-rank adapter needs to know of its method."""

    rank: int
    """Rank r of the update."""
    scaling: float
    """Factor of the update."""
    dropout: float = 0.0
    """Probability of dropping an input of the low-rank path in training."""
    init: str = "kaiming"
    """How A starts: ``kaiming`` or ``gaussian``."""
    bias: bool = False
    """Whether the bias of the layer is trained too."""
    dtype: str = "float32"
    """``float32`` for at least that, ``base`` for the dtype of the base."""


@dataclass(frozen=True)
class RankAxis:
    """Where a parameter of a low-rank adapter counts the rank."""

    dim: int
    """The dimension, as long as all blocks together."""
    blocks: int = 1
    """Of how many blocks of one rank each the dimension is made."""
    up: bool = False
    """Whether it is the matrix after the rank, which a factor of the update can go into."""


class LowRankAdapter(Adapter):
    """What the low-rank adapters share: rank, scaling, dropout, and a bias that is trained beside them if asked for."""

    bias: nn.Parameter | None
    rank: int
    method_scaling: float
    init: str
    dropout: float
    file_rank: int
    _device: torch.device
    _dtype: torch.dtype
    paddable: ClassVar[bool] = False
    """Whether rows of zeros may be added to the pairs; not inherited, since a descendant may hold more than pairs."""
    input_part: tuple[int, int] | None = None
    """Which of how many equal parts of the input's features forward sees, under tensor parallelism."""
    in_file: tuple[int, float] | None = None
    """Rank and scaling in an adapter file, where the pairs are padded with zeros or have taken another scaling in."""

    def __init__(self, settings: LowRankSettings, module: nn.Module, weight: str = "weight") -> None:
        super().__init__()
        weight = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else weight
        like = module._parameters.get(weight)
        like = module.get_parameter(weight) if like is None else like
        # Past nn.Module, which looks at each for what it might have to register: a model has hundreds of adapters.
        self.__dict__.update(
            rank=settings.rank,
            method_scaling=settings.scaling,
            init=settings.init,
            dropout=float(settings.dropout),
            file_rank=settings.rank,
            _device=like.device,
            _dtype=_adapter_dtype(like.dtype, settings.dtype),
        )
        base_bias = getattr(module, "bias", None) if settings.bias else None
        if isinstance(base_bias, Tensor):
            self.bias = self.new(*base_bias.shape)
            self.register_buffer("base_bias", torch.empty_like(self.bias), persistent=False)
        else:
            self.__dict__["bias"] = None

    @property
    def scaling(self) -> float:
        """The factor of the update: that of the method times :attr:`scale`."""
        return self.method_scaling * self.scale

    @scaling.setter
    def scaling(self, value: float) -> None:
        self.method_scaling = value

    def rank_axes(self) -> Mapping[str, RankAxis]:
        """Return the parameters that have a rank, and where."""
        return {}

    def new(self, *shape: int) -> nn.Parameter:
        """Allocate a parameter of the adapter."""
        return nn.Parameter(torch.empty(shape, device=self._device, dtype=self._dtype))

    def reset_down(self, *matrices: Tensor) -> None:
        """Start the matrices A (rank, in, ...), which every file holds."""
        for A in () if comes_from_file() else matrices:
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

    def held_tensors(self) -> list[Tensor]:
        """Return every tensor that the update is made of."""
        if self._modules:
            return [*self.parameters(), *self.buffers()]
        both = (*self._parameters.values(), *self._buffers.values())
        return [tensor for tensor in both if tensor is not None]

    def bias_tensors(self) -> dict[str, Tensor]:
        """Return the trained bias under its name in a file."""
        return {} if self.bias is None else {"base_layer.bias": self.bias}

    def add_bias(self, output: Tensor, channel_dim: int = -1) -> Tensor:
        """Add what training changed of the bias to ``output``, along ``channel_dim``."""
        if self.bias is None:
            return output
        change = (self.scale * (self.bias - self.base_bias)).to(output.dtype)  # type: ignore[operator]
        return output + (change if channel_dim == -1 else change.view(-1, *[1] * (-channel_dim - 1)))

    def merged_with(self, base_layer: nn.Module, **deltas: Tensor | Product) -> dict[str, Tensor]:
        """Return the merged parameters: each delta added to the parameter of its name in float32, rounded once."""
        merged = {}
        for name, delta in deltas.items():
            name = name.replace("__", ".")
            weight = base_layer.get_parameter(name)
            if not weight.is_floating_point() or weight.shape != delta.shape:
                raise MergeError(
                    f"the {name} of {type(base_layer).__name__} holds {weight.dtype} of shape {tuple(weight.shape)}: a quantised base "
                    "cannot be merged into; load the base in 16 or 32 bit and merge there, or merge with quantized='dequantize' or 'requantize'"
                )
            merged[name] = plus(weight.detach(), delta)
        if self.bias is not None:
            bias = base_layer.get_parameter("bias").detach()  # it may hold another merged adapter by now
            change = (self.scale * (self.bias - self.base_bias)).detach()  # type: ignore[operator]
            merged["bias"] = (bias.to(change.dtype) + change).to(bias.dtype)
        return merged


class LowRankLinear(LowRankAdapter):
    """LoRA on ``nn.Linear`` (quantised ones too) and transformers' ``Conv1D``, whole or on slices of a fused projection.

    Each of k slices has a pair A, B of its own; A is held as (k * rank, in), B as (rank, features of all slices).

    Args:
        settings: the hyperparameters at this place.
        module: the layer to adapt.
        slices: the slices of the output to adapt; empty for all of it.
    """

    scalable: ClassVar[bool] = True
    paddable: ClassVar[bool] = True
    transposed: bool
    out_features: int
    slices: tuple[Slice, ...]
    lora_A: nn.Parameter  # noqa: N815 - as in the formula and in files
    lora_B: nn.Parameter  # noqa: N815
    _plain: type | None
    _unpacking: Callable[[nn.Module, Tensor], Tensor | None] | None
    own_update: bool
    direct: type | None
    """The type of layer that :func:`~lightning_peft.arithmetic.forward_only.forward_only` computes with this adapter."""

    def __init__(self, settings: LowRankSettings, module: nn.Module, slices: tuple[Slice, ...] = ()) -> None:
        super().__init__(settings, module)
        transposed = is_conv1d_linear(module)
        width = module.weight.shape if transposed else (module.in_features, module.out_features)
        in_features, out_features = (int(number) for number in width)  # type: ignore[union-attr, arg-type]
        file_rank = self.rank * max(1, len(slices))
        exact = type(module) is nn.Linear or (transposed and type(module).__name__ == "Conv1D")
        kind, own = type(self), LowRankLinear
        simple = kind._update is own._update and kind.factors is own.factors and kind.computed is own.computed
        self.__dict__.update(
            transposed=transposed,
            out_features=out_features,
            slices=slices,
            file_rank=file_rank,
            own_update=kind._update is own._update,
            _plain=type(module) if exact else None,
            _unpacking=unpacking_product(module),
            direct=type(module) if exact and simple and not slices and self.bias is None else None,
        )
        self.register_parameter("lora_A", self.new(file_rank, in_features))
        self.register_parameter("lora_B", self.new(self.rank, sum(part.features for part in slices) or out_features))

    @override
    def rank_axes(self) -> Mapping[str, RankAxis]:
        return {"lora_A": RankAxis(0, max(1, len(self.slices))), "lora_B": RankAxis(0, up=True)}

    @override
    def tensor_parallel_plan(self, style: str, index: int, count: int) -> Mapping[str, int | None] | None:
        kind, own = type(self), LowRankLinear
        plain = kind.forward is own.forward and kind._update is own._update and kind.factors is own.factors
        if not plain or self.slices or self.transposed or set(self._parameters) != {"lora_A", "lora_B"}:
            return None
        self.input_part = (index, count) if style == "rowwise" else None
        return {"lora_A": 1, "lora_B": None} if style == "rowwise" else {"lora_A": None, "lora_B": 1}

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        if self.lora_A.is_meta:
            return  # where nothing has a value
        self.reset_down(*(torch.split(self.lora_A, self.rank) if self.slices else (self.lora_A,)))
        nn.init.zeros_(self.lora_B)
        self.reset_bias(base_layer)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (..., in) -> y (..., out)."""
        if type(base) is self.direct and not torch.is_grad_enabled() and not gpu_low_rank.asked:
            y = forward_only(self, base, x)
            if y is not None:
                return y
        y = gpu_low_rank.layer_and_update(self, base, x)
        if y is not None or (y := lean_forward(self, base, x)) is not None:
            return self.add_bias(y)
        y = self.computed(base, x)  # fresh here, so the update can go into it
        if y is not None:
            y = self._update(x.reshape(-1, x.shape[-1]), y, in_place=True)
            return self.add_bias(y).view(*x.shape[:-1], y.shape[-1])
        y = base(x)
        y = self._update(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), in_place=False).view(y.shape)
        return self.add_bias(y)

    def computed(self, base: Callable[..., Any], x: Tensor) -> Tensor | None:
        """Return what ``base`` makes of x (..., in), a new (tokens, out); None where it must be called."""
        if self._unpacking is not None:
            return None if not isinstance(base, nn.Module) or hooked(base) else self._unpacking(base, x)
        held = self.weights_of(base)
        return None if held is None else F.linear(x.reshape(-1, x.shape[-1]), *held)

    def weights_of(self, base: Any) -> tuple[Tensor, Tensor | None] | None:
        """Return the weight (out, in) and the bias that ``base`` multiplies with and adds; None where it must be called."""
        if type(base) is not self._plain or hooked(base):
            return None
        return base.weight.t() if self.transposed else base.weight, base.bias  # type: ignore[attr-defined]

    @override
    def grouped_rows(self) -> Callable[..., Any] | None:
        """Return the batched products, where forward is the one of this class."""
        own = type(self).forward is LowRankLinear.forward and type(self)._update is LowRankLinear._update
        return low_rank_rows if own else None

    def update_rows(self, x: Tensor, y: Tensor) -> None:
        """Add the update of x (tokens, in), and what was trained of the bias, to y (tokens, out)."""
        self._update(x, y, in_place=True)
        if self.bias is not None:
            y.copy_(self.add_bias(y))

    def row_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (K, in) and B (K, out) of the update, zero outside the slices."""
        A, B = self.factors()
        return A, self._dense(B).t()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (k * rank, in) and B (rank, features of all slices) of the update ``s B A``: what acts and what a file holds."""
        return self.lora_A, self.lora_B

    def _update(self, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        """Return y (tokens, out) plus the update of x (tokens, in)."""
        if self.dropout and self.training:
            x = dropped_part(x, self.dropout, self.input_part)
        if (total := gpu_low_rank.update(self, x, y, in_place=in_place)) is not None:
            return total
        dtype = product_dtype(x, y)
        A, B, x = (tensor.to(dtype) for tensor in (*self.factors(), x))
        h = A @ x.t()  # (k * rank, tokens)
        if not self.slices:
            return add_product(y, h.t(), B, self.scaling, in_place=in_place)
        y = y if in_place else y.clone()
        widths = [part.features for part in self.slices]
        for part, rows, columns in zip(
            self.slices, torch.split(h, self.rank), torch.split(B, widths, dim=1), strict=True
        ):
            view = part.view(y)  # (tokens, groups, width of the slice)
            view.add_((rows.t() @ columns).view(view.shape), alpha=self.scaling)
        return y

    def _dense(self, up: Tensor) -> Tensor:
        """Return B as the file holds it: (out, k * rank), zero where a slice's own columns do not reach its features."""
        if not self.slices:
            return up.t()
        dense = torch.zeros(self.file_rank, self.out_features, dtype=up.dtype, device=up.device)
        for rows, part, block in self._blocks(dense, up):
            part.view(rows).copy_(block.reshape(part.view(rows).shape))
        return dense.t()

    def _narrow(self, dense: Tensor) -> Tensor:
        """Return B (rank, features of all slices) from what the file holds."""
        if not self.slices:
            return dense.t()
        B = dense.new_empty(self.rank, self.lora_B.shape[1])
        for rows, part, block in self._blocks(dense.t(), B):
            block.copy_(part.view(rows).reshape(block.shape))
        if not torch.equal(self._dense(B), dense):
            raise AdapterConfigError("lora_B.weight has values outside the slices it adapts; load it without slices")
        return B

    def _blocks(self, dense: Tensor, up: Tensor) -> Iterator[tuple[Tensor, Slice, Tensor]]:
        """Yield, slice by slice, its rows of ``dense`` (rank, out), the slice, and its columns of ``up``."""
        blocks = torch.split(up, [part.features for part in self.slices], dim=1)
        for number, (part, block) in enumerate(zip(self.slices, blocks, strict=True)):
            yield dense.narrow(0, number * self.rank, self.rank), part, block

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        A, B = self.factors()
        return {"lora_A.weight": A, "lora_B.weight": self._dense(B.detach()), **self.bias_tensors()}

    @override
    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        self.lora_A.copy_(state["lora_A.weight"])
        self.lora_B.copy_(self._narrow(state["lora_B.weight"]))
        for key, tensor in self.disk_tensors().items():
            if key not in ("lora_A.weight", "lora_B.weight"):
                tensor.copy_(state[key])

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        return self.merged_with(base_layer, weight=self._product())

    def added_product(self, base_layer: nn.Module) -> Product | None:
        """Return what merging adds to the weight of ``base_layer``; None where that is not all that it changes."""
        simple = type(self).merged_parameters is LowRankLinear.merged_parameters and not self.tied_parameters
        return self._product() if simple and self.bias is None else None

    def _product(self) -> Product:
        A, B = (factor.detach() for factor in self.factors())
        delta = Product(self._dense(B), A, self.scaling)  # (out, in)
        return delta.t() if self.transposed else delta


def _adapter_dtype(base: torch.dtype, wanted: str) -> torch.dtype:
    if not base.is_floating_point:  # packed weights of a quantised base
        return torch.float32
    return base if wanted == "base" else torch.promote_types(torch.float32, base)

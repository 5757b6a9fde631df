"""Merging into quantised layers: unpacked, merged, and packed again or not, with the error as a number.

::

    packed ── dequantised ── W (float32) ── W + D ──┬── quantised with the same settings ── Q(W + D)     "requantize"
                                                    └── rounded to the precision of the model            "dequantize"

Packing rounds each weight to one of a few values, and an update that is small against their distance is lost in it. So neither is done
unless it is asked for, and what was lost is reported. Dequantising loses next to nothing and costs the memory that packing saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import (
    AdapterLayer,
    base_modules,
    base_parameters,
    parents_of,
    put_in_place,
    unwrapped,
)
from lightning_peft.errors import InjectionError, MergeError, TargetError
from lightning_peft.quantized_layers import (
    dense_weight,
    is_packed,
    mark_packed,
    packing_quantizer,
    quantizer_name,
)

Quantized = Literal["refuse", "requantize", "dequantize"]
"""What a merge does where the base is quantised."""


@dataclass(frozen=True)
class WeightError:
    """What a merge into one quantised layer lost: W is the unpacked weight, D the update, Q what stands for W + D now."""

    weight: float
    """``||Q - (W + D)|| / ||W + D||``."""
    lost: float
    """``||Q - (W + D)|| / ||D||``: at 1 the error is as large as the update."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge cost in precision."""

    weights: Mapping[str, WeightError] = field(default_factory=dict)
    """The errors of quantised layers that were merged into, by path."""
    max_logit_error: float | None = None
    """The largest difference between the outputs of the adapted model before and after, where probe inputs were given."""
    mean_logit_error: float | None = None
    """The mean of these differences."""
    max_logit: float | None = None
    """The largest magnitude of an output before, to compare with."""

    def __str__(self) -> str:
        lines = []
        if self.weights:
            worst = max(self.weights, key=lambda path: self.weights[path].lost)
            mean = math.fsum(error.weight for error in self.weights.values()) / len(self.weights)
            lost = math.fsum(error.lost for error in self.weights.values()) / len(self.weights)
            lines.append(
                f"{len(self.weights)} quantised layers: weights off by {mean:.2%} of their size and {lost:.2%} of the update on average, "
                f"at worst {self.weights[worst].lost:.2%} of the update, at {worst}"
            )
        if self.max_logit_error is not None:
            lines.append(
                f"outputs off by {self.max_logit_error:.3g} at most and {self.mean_logit_error:.3g} on average, of {self.max_logit:.3g}"
            )
        return "; ".join(lines) or "no quantised layer, no probe"


@torch.no_grad()
def merge_quantized(
    layer: AdapterLayer, names: Sequence[str], how: Quantized, dtype: torch.dtype, *, keep_originals: bool
) -> WeightError | None:
    """Merge the adapters ``names`` into the quantised base of ``layer``.

    Args:
        layer: a layer whose base, or what stood there before a merge, is packed.
        names: the adapters; those that do not live there are passed by.
        how: ``requantize`` or ``dequantize``.
        dtype: precision of a dequantised weight.
        keep_originals: keep the packed layer for ``unmerge``.

    Returns:
        The error, or None where no adapter changes the weight.

    Raises:
        MergeError: the layer cannot be unpacked, or quantised again with the settings it has, or the merge is refused.
    """
    before = layer.merge_state()
    names = [name for name in names if name in layer.adapters]
    if twice := [name for name in names if name in before.merged]:
        raise MergeError(f"adapter {twice[0]!r} is merged already; a second merge would apply it twice")
    packed = layer.original_base
    again = [name for name in before.merged if name not in before.permanent]
    try:
        linear = dense_linear(packed, torch.float32)
        W = linear.weight.detach()
        layer.unmerge()
        layer.base_layer = linear
        layer.merge([*again, *names])
        merged = layer.merged[len(before.permanent) :]
        M = linear.weight.detach()  # merging put a new tensor there
        if torch.equal(M, W):  # a bias, at most
            layer.restore_merge(before)
            layer.merge(names, keep_originals=keep_originals)
            return None
        made, Q = _quantised_again(packed, linear) if how == "requantize" else _rounded(linear, dtype)
        layer.unmerge()
        layer.base_layer = packed
        layer.replace_merged(made, merged, keep_originals=keep_originals)
    except (TargetError, InjectionError) as error:
        layer.restore_merge(before)
        raise MergeError(f"the merge into a quantised {type(packed).__name__} was asked for, but {error}") from error
    except BaseException:
        layer.restore_merge(before)
        raise
    off = torch.linalg.vector_norm(Q - M).item()
    return WeightError(
        off / torch.linalg.vector_norm(M).item() if off else 0.0, off / torch.linalg.vector_norm(M - W).item()
    )


def dense_linear(packed: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen linear layer with the weight that ``packed`` stands for, in ``dtype``, and a copy of its bias.

    Raises:
        TargetError: no registered quantizer unpacks it.
    """
    weight = dense_weight(packed).to(dtype)  # (out, in)
    bias = packed._parameters.get("bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear.train(packed.training)


def _quantised_again(packed: nn.Module, linear: nn.Linear) -> tuple[nn.Module, Tensor]:
    kind = packing_quantizer(packed)
    quantizer = kind.settings_of(packed)
    if quantizer is None:
        raise MergeError(
            f"the quantizer {kind.name!r} does not say with which settings it packed this {type(packed).__name__}, so it cannot be quantised "
            "again in the same way; use quantized='dequantize'"
        )
    state = getattr(packed.weight, "quant_state", None)
    rest = dense_copy(linear, getattr(state, "dtype", torch.float32))
    made = quantizer.quantize(rest)
    mark_packed(made, quantizer_name(packed) or kind.name)
    return made, dense_weight(made).float()


def _rounded(linear: nn.Linear, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    made = dense_copy(linear, dtype)
    if made.bias is not None:
        made.bias.data = made.bias.data.to(dtype)
    return made, made.weight.detach().float()


def dense_copy(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen layer of its own with the weight of ``linear`` in ``dtype``."""
    made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return made.train(linear.training)


def dense_dtype(model: nn.Module) -> torch.dtype:
    """Return the precision of the weights of ``model`` that are not packed; bfloat16 where all are."""
    packed = {
        id(p) for _, held in base_modules(model) if is_packed(unwrapped(held)) for p in unwrapped(held).parameters()
    }
    for _, parameter in base_parameters(model):
        if parameter.is_floating_point() and id(parameter) not in packed:
            return parameter.dtype
    return torch.bfloat16


def unpack_layers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Put dense layers in the places of all quantised ones that no adapter layer wraps, and return dense to quantised layer.

    Raises:
        MergeError: one cannot be unpacked. The model is unchanged then.
    """
    dtype = dense_dtype(model)
    found = [held for _, held in base_modules(model) if is_packed(held)]
    parents = parents_of(model) if found else {}
    made: dict[nn.Module, nn.Module] = {}
    try:
        for packed in found:
            dense, _ = _rounded(dense_linear(packed, torch.float32), dtype)
            put_in_place(dense, parents[id(packed)])
            made[dense] = packed
    except TargetError as error:
        pack_layers(model, made)
        raise MergeError(str(error)) from error
    return made


def pack_layers(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put the quantised layers back that :func:`unpack_layers` took away."""
    parents = parents_of(model) if made else {}
    for dense, packed in made.items():
        put_in_place(packed, parents[id(dense)])

"""How two adapters differ and what one is made of, weight by weight, without writing out a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_peft.adapter_tools.updates import Source, updates_of
from lightning_peft.arithmetic.thin_products import (
    difference_norm,
    effective_rank,
    inner_product,
    numerical_rank,
    principal_angles,
    product_norm,
    product_svd,
    stable_rank,
)
from lightning_peft.errors import AdapterMismatchError
from lightning_peft.low_rank_pairs import Pair, updates_in


@dataclass(frozen=True)
class WeightDifference:
    """How two updates D1 and D2 of one weight differ; an adapter that has none there has a zero."""

    norm_a: float
    """Frobenius norm of D1."""
    norm_b: float
    """Frobenius norm of D2."""
    difference: float
    """Frobenius norm of D1 - D2."""
    cosine: float
    """Cosine of the angle between D1 and D2 as vectors; NaN where one is zero."""
    output_angles: Tensor
    """Principal angles in radians between the column spaces, the smallest first: which outputs they write to."""
    input_angles: Tensor
    """Principal angles in radians between the row spaces: which inputs they read."""


@dataclass(frozen=True)
class WeightSpectrum:
    """The singular values of one update."""

    values: Tensor
    """The singular values, the largest first; as many as the rank of the adapter."""
    rank: int
    """How many of them are more than rounding."""
    effective_rank: float
    """Exponential of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007)."""
    stable_rank: float
    """Sum of squares over the largest square."""

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float(self.values.square().sum().sqrt())


def diff_adapters(a: Source, b: Source) -> dict[str, WeightDifference]:
    """Compare the updates of two low-rank adapters.

    Args:
        a: an adapter folder, or ``(model, name)``.
        b: another one, of any rank and at any places.

    Returns:
        The path of each weight that one of them changes to the comparison.

    Raises:
        AdapterFileError: a folder cannot be read, or the two change weights of different shapes.
        AdapterNotFoundError: a model has no adapter of that name.
        ConfigError: an adapter is something else than low-rank updates.
    """
    ours, theirs = (updates_of(source) for source in (a, b))
    one, other = ours.labelled, theirs.labelled
    result = {}
    for label in dict.fromkeys([*one, *other]):
        if label in one and label in other:
            result[label] = _compared(label, one[label], other[label])
        else:
            norm = product_norm(*(one[label] if label in one else other[label]).scaled())
            empty = (one if label in one else other)[label].down.new_zeros(0)
            norms = (norm, 0.0) if label in one else (0.0, norm)
            result[label] = WeightDifference(*norms, norm, math.nan, empty, empty)
    return result


def _compared(label: str, one: Pair, other: Pair) -> WeightDifference:
    if one.up.shape[0] != other.up.shape[0] or one.down.shape[1:] != other.down.shape[1:]:
        shapes = [(pair.up.shape[0], *pair.down.shape[1:]) for pair in (one, other)]
        raise AdapterMismatchError(f"the adapters change {label!r} as a weight of shape {shapes[0]} and {shapes[1]}")
    (up1, down1), (up2, down2) = one.scaled(), other.scaled()
    device = up1.device
    up2, down2 = up2.to(device), down2.to(device)
    (U1, V1), (U2, V2) = _spaces(up1, down1), _spaces(up2, down2)
    norms = product_norm(up1, down1), product_norm(up2, down2)
    zero = not (norms[0] and norms[1])
    return WeightDifference(
        norm_a=norms[0],
        norm_b=norms[1],
        difference=difference_norm((up1, down1), (up2, down2)),
        cosine=math.nan if zero else inner_product((up1, down1), (up2, down2)) / (norms[0] * norms[1]),
        output_angles=principal_angles(U1, U2),
        input_angles=principal_angles(V1, V2),
    )


def _spaces(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns that span the column space (out, k) and the row space (in, k) of ``up @ down``."""
    U, S, Vh = product_svd(up, down)
    rank = numerical_rank(S, max(len(up), down.shape[1]))
    return U[:, :rank], Vh[:rank].t()


def spectrum(adapter: Source, *, without_saved: bool = False) -> dict[str, WeightSpectrum]:
    """Return the singular values of each update of a low-rank adapter, by the path of the weight.

    Args:
        adapter: an adapter folder, or ``(model, name)``.
        without_saved: of an adapter in a model, leave its ``modules_to_save`` out, and do not refuse them.

    Raises:
        AdapterFileError: the folder cannot be read.
        AdapterNotFoundError: the model has no adapter of that name.
        ConfigError: the adapter is something else than low-rank updates.
    """
    updates = updates_in(*adapter, without_saved=without_saved) if isinstance(adapter, tuple) else updates_of(adapter)
    return {label: _spectrum(pair) for label, pair in updates.labelled.items()}


def _spectrum(pair: Pair) -> WeightSpectrum:
    up, down = pair.scaled()
    values = product_svd(up, down)[1]
    rank = numerical_rank(values, max(len(up), down.shape[1]))
    return WeightSpectrum(values, rank, effective_rank(values), stable_rank(values))


def total_difference(differences: Mapping[str, WeightDifference]) -> WeightDifference:
    """Return the comparison of two adapters as a whole: norms over all weights, and their cosine; without angles.

    Args:
        differences: what :func:`diff_adapters` returned.
    """
    a, b, difference = (
        math.hypot(*(getattr(found, name) for found in differences.values()))
        for name in ("norm_a", "norm_b", "difference")
    )
    dot = sum(d.cosine * d.norm_a * d.norm_b for d in differences.values() if not math.isnan(d.cosine))
    empty = next(iter(differences.values())).output_angles.new_zeros(0)
    return WeightDifference(a, b, difference, dot / (a * b) if a * b else math.nan, empty, empty)

"""What training did to the singular values and directions of weights.

With the update D = U S V^T of a weight W, and the tuned weight W + D::

    relative norm          ||D|| / ||W||
    amplification          ||D|| / ||U^T W V||                       how strongly D repeats directions that W hardly has
    intruder dimensions    of the first singular vectors u_j of W + D, those with max_i |u_i(W)^T u_j(W + D)| < threshold
    subspace similarity    ||V_i(A1)^T V_j(A2)||^2 / min(i, j)       of two ranks or seeds, for the first i and j directions

Amplification and similarity: Hu et al., "LoRA" (arXiv 2106.09685), section 7. Intruder dimensions: Shuttleworth et al., "LoRA vs Full
Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228), on left singular vectors. Effective rank: Roy and Vetterli, EUSIPCO 2007.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapter_tools.changes import as_matrix, changed_places, svd
from lightning_peft.adapter_tools.comparing import WeightSpectrum
from lightning_peft.adapter_tools.updates import Source, updates_of
from lightning_peft.arithmetic.thin_products import effective_rank, numerical_rank, stable_rank, widened
from lightning_peft.errors import AdapterMismatchError, ConfigError
from lightning_peft.field_checks import is_number, is_whole
from lightning_peft.low_rank_pairs import Pair


@dataclass(frozen=True)
class WeightAnalysis:
    """A weight before and after training."""

    values: Tensor
    """Singular values of the update, the largest first."""
    base_values: Tensor
    """Those of the weight of the base."""
    tuned_values: Tensor
    """Those of both together."""
    rank: int
    """How many singular values of the update are more than rounding."""
    amplification: float
    """Norm of the update over that of the base between the same directions; 0 for no update."""
    intruders: int
    """How many of the first ``top`` left singular vectors of the tuned weight are unlike every one of the base."""
    top: int
    """How many of them were looked at."""

    @property
    def relative_norm(self) -> float:
        """Frobenius norm of the update over that of the base."""
        return float(self.values.square().sum().sqrt() / self.base_values.square().sum().sqrt())

    @property
    def effective_rank(self) -> float:
        """Effective rank of the update."""
        return effective_rank(self.values)

    @property
    def stable_rank(self) -> float:
        """Stable rank of the update."""
        return stable_rank(self.values)

    @property
    def base_effective_rank(self) -> float:
        """Effective rank of the base."""
        return effective_rank(self.base_values)

    @property
    def tuned_effective_rank(self) -> float:
        """Effective rank of the tuned weight."""
        return effective_rank(self.tuned_values)


def analyze_weights(
    model: nn.Module, name: str = "default", *, top: int = 10, threshold: float = 0.5
) -> dict[str, WeightAnalysis]:
    """Compare every matrix that the adapter ``name`` changes with that of the base.

    One weight at a time is written out in float64 and decomposed, which costs seconds for one of 1000 and a minute for one of 4000 features.
    Parameters that are no matrices, such as biases and norms, are left out.

    Args:
        model: the adapted model; any method that can be merged, at least into an unpacked copy of a packed base.
        name: the adapter.
        top: how many singular vectors of a tuned weight are looked at for intruders.
        threshold: cosine below which one is an intruder.

    Returns:
        The path of each weight, without ``.weight``, to its analysis.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        MergeError: its method cannot be merged, or an adapter is merged into the base at the moment.
        ConfigError: an argument is out of range.

    Example:
        >>> from lightning_peft import LoRA, inject
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject(model, LoRA(rank=2), "0")
        >>> found = analyze_weights(model)["0"]  # B is zero yet
        >>> found.rank, found.intruders, found.relative_norm
        (0, 0, 0.0)
    """
    if not is_whole(top, 1):
        raise ConfigError(f"top must be a positive whole number, got {top!r}")
    if not is_number(threshold) or not 0 < threshold <= 1:
        raise ConfigError(f"threshold must be a cosine above 0 and at most 1, got {threshold!r}")
    return {label: _analysis(base, change, top, threshold) for label, base, change in _matrices(model, name)}


def change_spectrum(model: nn.Module, name: str = "default") -> dict[str, WeightSpectrum]:
    """Return the singular values of what an adapter of any mergeable method adds to each matrix, by the path of the weight.

    A low-rank adapter is cheaper to look at with :func:`~lightning_peft.spectrum`, which needs no matrix of the size of a weight.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        MergeError: its method cannot be merged, or an adapter is merged into the base at the moment.
    """
    found = {}
    for label, _, change in _matrices(model, name):
        values = torch.linalg.svdvals(change)
        rank = numerical_rank(values.float(), max(change.shape))
        found[label] = WeightSpectrum(values, rank, effective_rank(values), stable_rank(values))
    return found


def _matrices(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield label, weight of the base and change of every matrix, both (out, in) in float64."""
    for path, module, changes in changed_places(model, name):
        for key, change in changes.items():
            if change.dim() == 2 or (
                change.dim() > 2 and hasattr(module, "kernel_size")
            ):  # experts in one tensor are many matrices
                weight = module.get_parameter(key).detach()
                yield f"{path}.{key}".removesuffix(".weight"), as_matrix(module, weight), as_matrix(module, change)


def _analysis(base: Tensor, change: Tensor, top: int, threshold: float) -> WeightAnalysis:
    U0, S0, _ = svd(base)
    U1, S1, _ = svd(base + change)
    U, S, Vh = svd(change)
    rank = numerical_rank(S.float(), max(change.shape))  # adapters multiply in float32
    between = U[:, :rank].t() @ base.to(U.dtype) @ Vh[:rank].t()  # (rank, rank)
    shared = float(torch.linalg.vector_norm(between))
    norm = float(torch.linalg.vector_norm(S[:rank]))
    seen = min(top, U1.shape[1])
    likest = (U0.t() @ U1[:, :seen]).abs().amax(dim=0)  # (seen,)
    return WeightAnalysis(
        values=S,
        base_values=S0,
        tuned_values=S1,
        rank=rank,
        amplification=norm / shared if shared else (float("inf") if norm else 0.0),
        intruders=int((likest < threshold).sum()) if rank else 0,
        top=seen,
    )


def subspace_similarity(a: Source, b: Source, *, of: Literal["A", "B"] = "A") -> dict[str, Tensor]:
    """Return how much the first i directions of one low-rank adapter share with the first j of another, as in section 7.2 of LoRA's paper.

    Args:
        a: an adapter folder, or ``(model, name)``.
        b: another one: of another rank, or seed.
        of: ``A``, whose right singular vectors are directions of the inputs, or ``B``, whose left ones are directions of the outputs.

    Returns:
        The path of each weight that both change to a tensor (rank of a, rank of b) of numbers from 0, nothing shared, to 1.

    Raises:
        AdapterFileError: a folder cannot be read, or the two change weights of different shapes.
        AdapterNotFoundError: a model has no adapter of that name.
        ConfigError: an adapter is something else than low-rank updates, the two share no weight, or ``of`` is neither.
    """
    if of not in ("A", "B"):
        raise ConfigError(f"of must be 'A' or 'B', got {of!r}")
    one, other = updates_of(a).labelled, updates_of(b).labelled
    shared = [label for label in one if label in other]
    if not shared:
        raise ConfigError(f"the adapters change no weight in common: {sorted(one)[:3]} and {sorted(other)[:3]}")
    return {label: _similarity(label, _directions(one[label], of), _directions(other[label], of)) for label in shared}


def _directions(pair: Pair, of: str) -> Tensor:
    """Return the singular vectors (features, rank), as columns."""
    up, down = (widened(matrix) for matrix in pair.matrices())
    matrix = down.t() if of == "A" else up
    return torch.linalg.svd(matrix, full_matrices=False)[0]  # type: ignore[no-any-return]


def _similarity(label: str, one: Tensor, other: Tensor) -> Tensor:
    if len(one) != len(other):
        raise AdapterMismatchError(
            f"the adapters change {label!r} as a weight of {len(one)} and of {len(other)} features"
        )
    overlap = (one.t() @ other.to(one.device)).square().cumsum(0).cumsum(1)  # (i, j): sums over the first i and j
    i, j = (torch.arange(1, size + 1, device=one.device) for size in overlap.shape)
    return overlap / torch.minimum(i[:, None], j[None, :])

"""Products of thin matrices ``B A``, measured and cut without ever being written out.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` (QR decompositions), everything about B A is in a core of rank by rank::

    B A = Q_B (R_B R_A^T) Q_A^T = Q_B (u S v^T) Q_A^T       B: (out, rank)   A: (rank, in)   R_B R_A^T: (rank, rank)

so the singular value decomposition of an update costs O((out + in) rank^2) and the best approximation of lower rank (Eckart
and Young, 1936) is the first columns of it. All of it is done in float64 where the device has that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.errors import ConfigError


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without its gradient in float64, or in float32 on a device that has nothing wider."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, k), S (k,) and V^T (k, in) of ``up @ down``, with k at most the rank and either side.

    Args:
        up: B (out, rank).
        down: A (rank, in).

    Example:
        >>> U, S, Vh = product_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]))
        >>> S, torch.allclose(U * S @ Vh, torch.tensor([[0.0, 6.0], [0.0, 8.0]], dtype=torch.float64))
        (tensor([10.], dtype=torch.float64), True)
    """
    left, R = torch.linalg.qr(widened(up))  # (out, k_B), (k_B, rank)
    right, L = torch.linalg.qr(widened(down).t())  # (in, k_A), (k_A, rank)
    u, S, vh = torch.linalg.svd(R @ L.t(), full_matrices=False)
    return left @ u, S, vh @ right.t()


def product_norm(up: Tensor, down: Tensor) -> float:
    """Return the Frobenius norm of ``up @ down``, B (out, rank) and A (rank, in)."""
    R, L = (torch.linalg.qr(widened(matrix), mode="r").R for matrix in (up, down.t()))
    return float(torch.linalg.matrix_norm(R @ L.t()))


def difference_norm(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return the Frobenius norm of ``B1 A1 - B2 A2``, each given as (B, A).

    It is that of one product, [B1, -B2] [A1; A2], so that updates that nearly agree do not cancel in squares.
    """
    (up1, down1), (up2, down2) = ((widened(up), widened(down)) for up, down in (one, other))
    return product_norm(torch.cat([up1, -up2], dim=1), torch.cat([down1, down2]))


def inner_product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return the sum of the elementwise product of ``B1 A1`` and ``B2 A2``, each given as (B, A)."""
    (up1, down1), (up2, down2) = ((widened(up), widened(down)) for up, down in (one, other))
    return float(((up1.t() @ up2) * (down1 @ down2.t())).sum())


def numerical_rank(values: Tensor, sides: int) -> int:
    """Return how many singular ``values`` (k,), the largest first, are more than rounding.

    Args:
        values: the singular values.
        sides: the longer side of the matrix.
    """
    if not values.numel() or not float(values[0]) > 0:
        return 0
    return int((values > values[0] * sides * torch.finfo(values.dtype).eps).sum())


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """Return the angles (k,) between the spaces that the orthonormal columns of two matrices span, the smallest first.

    They lie between 0 and pi/2, and k is the smaller of the two dimensions. Small angles come from sines, which keep digits
    that cosines lose: Knyazev and Argentati, "Principal Angles between Subspaces", SIAM J. Sci. Comput. 23 (2002), algorithm 3.1.

    Args:
        one: (n, k1).
        other: (n, k2).
    """
    one, other = (one, other) if one.shape[1] >= other.shape[1] else (other, one)
    if not other.shape[1]:
        return other.new_zeros(0)
    overlap = one.t() @ other  # (k1, k2)
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)  # the largest first: the smallest angle first
    sines = torch.linalg.svdvals(other - one @ overlap).clamp(max=1).flip(0)
    return torch.where(cosines.square() >= 0.5, sines.asin(), cosines.acos())


def effective_rank(values: Tensor) -> float:
    """Return the exponential of the entropy of the singular ``values`` (k,): Roy and Vetterli, EUSIPCO 2007; 0 for a zero matrix.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]))
        2.0
    """
    if not values.numel() or not float(values.sum()) > 0:
        return 0.0
    shares = widened(values) / widened(values).sum()
    return round(float(torch.special.entr(shares).sum().exp()), 12)


def stable_rank(values: Tensor) -> float:
    """Return ``||W||_F^2 / ||W||_2^2`` from the singular ``values`` (k,), the largest first; 0 for a zero matrix."""
    if not values.numel() or not float(values[0]) > 0:
        return 0.0
    return float((widened(values) / widened(values)[0]).square().sum())


def rank_for(values: Tensor, *, rank: int | None, energy: float | None) -> int:
    """Return how many of the singular ``values`` (k,), the largest first, are kept: at least one.

    Args:
        values: the singular values.
        rank: how many at most.
        energy: the share of the sum of squares that they keep.

    Raises:
        ConfigError: both or neither are given, or one is out of its range.
    """
    check_rank_or_energy(rank, energy)
    if energy is None:
        assert rank is not None
        return max(1, min(rank, values.numel()))
    squares = widened(values).square().cumsum(0)
    if not squares.numel() or not float(squares[-1]) > 0:
        return 1
    return min(int((squares < energy * squares[-1]).sum()) + 1, values.numel())


def check_rank_or_energy(rank: int | None, energy: float | None) -> None:
    """Refuse anything but one of a positive rank and a share of the energy.

    Raises:
        ConfigError: it is not.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"give one of rank= and energy=, got rank={rank!r} and energy={energy!r}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"rank must be a positive integer, got {rank!r}")
    if energy is not None and not (isinstance(energy, (int, float)) and 0 < energy <= 1):
        raise ConfigError(f"energy must be a share above 0 and at most 1, got {energy!r}")


def tail_error(values: Tensor, kept: int) -> float:
    """Return the share of the Frobenius norm that is lost when all but the first ``kept`` singular ``values`` (k,) go."""
    total = float(torch.linalg.vector_norm(values))
    return float(torch.linalg.vector_norm(values[kept:])) / total if total > 0 else 0.0

"""Thin products against torch.linalg on the written-out matrices in float64."""

import math

import pytest
import torch

from lightning_peft.arithmetic import thin_products as thin
from lightning_peft.errors import ConfigError


def pair(out, rank, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(out, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, width, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize(("out", "rank", "width"), [(20, 4, 30), (30, 4, 20), (6, 9, 5), (1, 3, 8)])
def test_singular_values_and_norms_are_those_of_the_matrix(out, rank, width):
    B, A = pair(out, rank, width, 0)
    U, S, Vh = thin.product_svd(B, A)
    expected = torch.linalg.svdvals(B @ A)[: len(S)]
    torch.testing.assert_close(S, expected)
    torch.testing.assert_close(U * S @ Vh, B @ A)
    torch.testing.assert_close(U.t() @ U, torch.eye(len(S), dtype=torch.float64))
    assert len(S) == min(out, rank, width)
    assert thin.product_norm(B, A) == pytest.approx(float(torch.linalg.matrix_norm(B @ A)))


def test_differences_and_inner_products_are_those_of_the_matrices():
    one, other = pair(20, 4, 30, 0), pair(20, 7, 30, 1)
    D1, D2 = one[0] @ one[1], other[0] @ other[1]
    assert thin.difference_norm(one, other) == pytest.approx(float(torch.linalg.matrix_norm(D1 - D2)))
    assert thin.inner_product(one, other) == pytest.approx(float((D1 * D2).sum()))


def test_a_tiny_difference_does_not_cancel():
    B, A = pair(20, 4, 30, 0)
    step = 1e-10 * torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    exact = float(torch.linalg.matrix_norm(step @ A))
    assert thin.difference_norm((B + step, A), (B, A)) == pytest.approx(exact, rel=1e-4)


def test_principal_angles_are_those_that_were_built_in():
    angles = torch.tensor([1e-9, 0.3, 1.2], dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(12, 7, dtype=torch.float64))[0]
    one = Q[:, :4]
    other = Q[:, :3] * angles.cos() + Q[:, 4:] * angles.sin()
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    torch.testing.assert_close(thin.principal_angles(one, other @ turn), angles, rtol=1e-6, atol=1e-13)
    torch.testing.assert_close(thin.principal_angles(other @ turn, one), angles, rtol=1e-6, atol=1e-13)
    assert thin.principal_angles(one, one[:, :0]).numel() == 0


def test_ranks_of_a_spectrum():
    values = torch.tensor([4.0, 2.0, 1.0, 0.0])
    shares = values[:3] / 7
    assert thin.effective_rank(values) == pytest.approx(float((-shares * shares.log()).sum().exp()))
    assert thin.stable_rank(values) == pytest.approx(21 / 16)
    assert thin.effective_rank(values * 0) == thin.stable_rank(values * 0) == 0
    assert thin.numerical_rank(values, 4) == 3
    assert thin.numerical_rank(values * 0, 4) == 0
    assert [thin.rank_for(values, rank=None, energy=e) for e in (0.7, 16 / 21 + 1e-6, 0.96, 1.0)] == [1, 2, 3, 3]
    assert thin.rank_for(values, rank=9, energy=None) == 4
    assert thin.tail_error(values, 1) == pytest.approx(math.sqrt(5 / 21))


@pytest.mark.parametrize(
    ("rank", "energy", "message"),
    [
        (None, None, "give one of rank= and energy="),
        (2, 0.5, "give one of rank= and energy="),
        (0, None, "rank must be a positive integer, got 0"),
        (True, None, "rank must be a positive integer, got True"),
        (None, 1.5, "energy must be a share above 0 and at most 1, got 1.5"),
    ],
)
def test_what_is_no_rank_is_refused(rank, energy, message):
    with pytest.raises(ConfigError, match=message):
        thin.check_rank_or_energy(rank, energy)

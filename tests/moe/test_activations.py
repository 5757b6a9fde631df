"""Activations that write to what they read, hand it on, or are trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_peft.moe.between import Between
from lightning_peft.moe.expert_weights import ExpertWeights
from lightning_peft.moe.low_rank_segments import SegmentPlan, Segments, run_segments
from lightning_peft.moe.one_by_one import one_by_one

ODD = [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Identity(), nn.Sequential(nn.ELU(inplace=True))]
SIZES = [3, 0, 4, 1]


def fresh(activation):
    """The activation in a form that writes to nothing."""
    activation = copy.deepcopy(activation)
    for one in activation.modules():
        if hasattr(one, "inplace"):
            one.inplace = False
    return activation


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(found, wanted, inputs):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    directions = [torch.randn_like(one) for one in found]
    mine, its = (torch.autograd.grad(list(outputs), inputs, directions) for outputs in (found, wanted))
    for one, other in zip(mine, its, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ODD, ids=str)
def test_whole_experts_compute_what_is_written_out(activation, gated):
    torch.manual_seed(0)
    wide = 12 if gated else 6
    rows, up, down, up_bias, down_bias = inputs = [
        numbers(8, 5), numbers(4, wide, 5), numbers(4, 5, 6), numbers(4, wide), numbers(4, 5)
    ]  # fmt: skip
    experts = torch.repeat_interleave(torch.arange(4), torch.tensor(SIZES))
    ends = torch.tensor(SIZES).cumsum(0).tolist()
    found = one_by_one(rows, experts, ends, ExpertWeights(*inputs[1:], gated=gated), Between(activation, gated))
    hidden = torch.einsum("sd,sfd->sf", rows, up[experts]) + up_bias[experts]
    parts = hidden.chunk(2, -1) if gated else [hidden]
    inner = fresh(activation)(parts[0]) * (parts[1] if gated else 1.0)
    wanted = torch.einsum("sf,sdf->sd", inner, down[experts]) + down_bias[experts]
    same([found], [wanted], inputs)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ODD, ids=str)
def test_low_rank_experts_compute_what_is_written_out(activation, gated):
    torch.manual_seed(0)
    chosen = torch.tensor([[0, 3], [3, 0], [2, 0], [0, 2], [3, 2]])  # expert 1 has no token
    segments, count = Segments.of(chosen, 4), 2 if gated else 1
    scores, low, down = numbers(5, 2), numbers(10, 2 * count), numbers(4, 2, 6)
    bases, ups = [numbers(5, 6) for _ in range(count)], [numbers(4, 2, 6) for _ in range(count)]
    found = run_segments(
        SegmentPlan(segments, Between(activation, gated), 0.7, 0.0), scores.softmax(-1), low, down, bases, ups
    )
    parts = [
        base[segments.tokens] + 0.7 * torch.einsum("sr,sri->si", own, up[segments.experts])
        for base, up, own in zip(bases, ups, low.chunk(count, 1), strict=True)
    ]
    h = fresh(activation)(parts[0]) * (parts[1] if gated else 1.0)
    thin = torch.einsum("sri,si->sr", down[segments.experts], h)
    mixed = (scores.softmax(-1)[..., None] * h[segments.places].view(5, 2, 6)).sum(1)
    same(found, [mixed, thin], [scores, low, down, *bases, *ups])


@pytest.mark.parametrize("trained", [True, False])
def test_dropout_acts_behind_a_trained_activation_too(trained):
    torch.manual_seed(0)
    activation = nn.PReLU(dtype=torch.float64).requires_grad_(trained)
    weights = ExpertWeights(numbers(1, 200, 4), torch.eye(200, dtype=torch.float64)[None], gated=False)
    rows, experts = numbers(50, 4), torch.zeros(50, dtype=torch.long)
    plain = one_by_one(rows, experts, [50], weights, Between(activation, gated=False))
    found = one_by_one(rows, experts, [50], weights, Between(activation, gated=False, dropout=0.6))
    dropped = found == 0
    assert 0.58 < float(dropped.double().mean()) < 0.62
    torch.testing.assert_close(found[~dropped], plain[~dropped] / 0.4)

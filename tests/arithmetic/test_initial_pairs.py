"""Initial pairs: what acts is W + s (B A - B0 A0), a file gives it back bit for bit, and randomised vectors are the true ones."""

import pytest
import torch
from torch import nn

from lightning_peft import Slice, Target
from lightning_peft.arithmetic.initial_pairs import InitialPairLinear, _minuend, principal_directions
from lightning_peft.arithmetic.low_rank import LowRankSettings
from lightning_peft.errors import ConfigError, TargetError

HALVES = (Slice(role="one", groups=2, width=6, start=0, stop=2), Slice(role="two", groups=2, width=6, start=4, stop=6))


class Corner(InitialPairLinear):
    """Starts at numbers that depend on the weight."""

    def pair(self, weight):
        return weight[: self.pair_rank] * 2, weight[:, : self.pair_rank] - 1


def made(slices=(), rank=3, scaling=0.7, disturb=True):
    linear = nn.Linear(10, 12)
    adapter = Corner(LowRankSettings(rank=rank, scaling=scaling), linear, Target(path="there", slices=slices))
    adapter.reset_parameters(linear)
    if disturb:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter))
    return linear, adapter


def test_the_output_is_the_formula_in_float64():
    linear, adapter = made()
    x = torch.randn(4, 5, 10)
    W, A, B, A0, B0 = (
        t.detach().double()
        for t in (linear.weight, adapter.lora_A, adapter.lora_B.t(), adapter.initial_A, adapter.initial_B.t())
    )
    assert torch.equal(A0, 2 * W[:3])
    assert torch.equal(B0.float(), (W[:, :3].float() - 1))
    wanted = x.double() @ (W + 0.7 * (B @ A - B0 @ A0)).t() + linear.bias.double()
    assert torch.allclose(adapter(linear, x).double(), wanted, atol=1e-5)
    merged = adapter.merged_parameters(linear)["weight"].double()
    assert torch.allclose(merged, W + 0.7 * (B @ A - B0 @ A0), atol=1e-5)


def test_gradients_are_those_of_training_the_pair_over_the_residual():
    linear, adapter = made()
    x, goal = torch.randn(7, 10), torch.randn(7, 12)
    (adapter(linear, x) * goal).sum().backward()
    A, B = (t.detach().clone().requires_grad_() for t in (adapter.lora_A, adapter.lora_B.t()))
    residual = linear.weight.detach() - 0.7 * adapter.initial_B.t() @ adapter.initial_A
    ((x @ (residual + 0.7 * B @ A).t() + linear.bias) * goal).sum().backward()
    assert torch.allclose(adapter.lora_A.grad, A.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(adapter.lora_B.grad, B.grad.t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slices", [(), HALVES], ids=["whole", "slices"])
def test_a_fresh_one_is_the_base_and_a_file_brings_all_four_matrices_back(slices):
    linear, fresh = made(slices, rank=2, disturb=False)
    x = torch.randn(4, 10)
    assert torch.equal(fresh(linear, x), linear(x))
    linear, adapter = made(slices, rank=2)
    held = adapter.export_state()
    k = max(1, len(slices))
    assert held["lora_A.weight"].shape == (4 * k, 10)
    assert held["lora_B.weight"].shape == (12, 4 * k)
    again = Corner(LowRankSettings(rank=2, scaling=0.7), linear, Target(path="there", slices=slices))
    again.import_state(held)
    assert torch.equal(again.lora_A, adapter.lora_A)
    assert torch.equal(again.initial_B, adapter.initial_B)
    # Of these the file holds differences: they come back up to the last bit, and act the same.
    assert torch.allclose(again.initial_A, adapter.initial_A, rtol=0, atol=1e-6)
    assert torch.allclose(again.lora_B, adapter.lora_B, rtol=0, atol=1e-6)
    assert all(torch.equal(value, held[key]) for key, value in again.export_state().items())
    assert torch.equal(again(linear, x), adapter(linear, x))
    if slices:  # what no slice covers is the base's
        assert torch.equal(adapter(linear, x)[:, 2:4], linear(x)[:, 2:4])
        assert not torch.equal(adapter(linear, x)[:, :2], linear(x)[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_difference_gives_a_number_with_that_very_difference(dtype):
    generator = torch.Generator().manual_seed(0)
    size = 10 ** torch.empty(2, 300_000).uniform_(-9, 1, generator=generator)
    x, s = (size * torch.randn(2, 300_000, generator=generator)).to(dtype)
    assert torch.equal(_minuend(s, x - s) - s, x - s)


def test_another_pair_can_be_set_and_one_that_does_not_fit_is_refused():
    linear, adapter = made()
    down, up = torch.randn(3, 10), torch.randn(12, 3)
    adapter.set_initial(down, up)
    assert torch.equal(adapter.initial_A, down)
    assert torch.equal(adapter.lora_B.t(), up)
    x = torch.randn(4, 10)
    assert torch.equal(adapter(linear, x), linear(x))
    with pytest.raises(
        ConfigError, match=r"an initial A or B of shape \(3, 12\) was given, but this place needs \(12, 3\)"
    ):
        adapter.set_initial(down, up.t())


def test_a_rank_that_the_weight_does_not_have_is_refused():
    with pytest.raises(TargetError, match="rank 11 was asked for at 'there', whose weight has rank 10 at most"):
        made(rank=11)
    with pytest.raises(TargetError, match="rank 5 was asked for at 'there', whose weight has rank 4 at most"):
        made(HALVES, rank=5)


def test_randomised_directions_are_the_largest_ones_and_the_same_every_time():
    U, _ = torch.linalg.qr(torch.randn(60, 40))
    V, _ = torch.linalg.qr(torch.randn(50, 40))
    S = 0.7 ** torch.arange(40.0)
    weight = U * S @ V.t()
    state = torch.get_rng_state()
    found = principal_directions(weight, 5, iterations=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(found[1], S[:5], rtol=1e-5)
    assert torch.allclose(found[0] * found[1] @ found[2], U[:, :5] * S[:5] @ V[:, :5].t(), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, principal_directions(weight, 5, iterations=4), strict=True))

"""Products of segments, and the operators that a compiled model runs its experts with."""

import pytest
import torch

from lightning_peft.moe.segments import (
    compiled_segment_mm,
    compiled_segment_outer,
    segment_linear,
    segment_mm,
    segment_outer,
)

ENDS = [2, 2, 6, 7]  # the second segment is empty
WHICH = torch.tensor([0, 0, 2, 2, 2, 2, 3])


def random(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    ).requires_grad_()


def test_each_segment_has_its_matrix():
    rows, weights, others = random(7, 3), random(4, 3, 5), random(7, 5)
    expected = torch.einsum("ni,nio->no", rows, weights[WHICH])
    assert torch.allclose(segment_mm(rows, weights, ENDS), expected)
    assert torch.allclose(segment_linear(rows, weights.transpose(1, 2), ENDS), expected)
    each = torch.einsum("ni,no->nio", rows, others)
    assert torch.allclose(segment_outer(rows, others, ENDS), torch.zeros(4, 3, 5).double().index_add(0, WHICH, each))


@pytest.mark.parametrize(
    ("product", "second"), [(segment_linear, (4, 5, 3)), (segment_mm, (4, 3, 5)), (segment_outer, (7, 5))]
)
def test_first_and_second_derivatives_are_right(product, second):
    inputs = random(7, 3), random(*second)
    assert torch.autograd.gradcheck(lambda a, b: product(a, b, ENDS), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: product(a, b, ENDS), inputs)
    frozen = product(inputs[0], inputs[1].detach(), ENDS)
    assert torch.autograd.grad(frozen.sum(), inputs[0])[0].shape == inputs[0].shape


def test_the_gradient_of_stacked_weights_has_their_layout():
    """Autograd keeps such a gradient as it is; of another layout it would make a copy."""
    weights = random(4, 5, 3)
    segment_linear(random(7, 3), weights, ENDS).sum().backward()
    assert weights.grad.stride() == weights.stride()


def test_the_operators_are_sound_for_autograd_and_compilation():
    rows, weights, ends = random(7, 3), random(4, 3, 5), torch.tensor(ENDS)
    assert torch.equal(compiled_segment_mm(rows, weights, ends), segment_mm(rows, weights, ENDS))
    assert torch.autograd.gradcheck(compiled_segment_mm, (rows, weights, ends))
    torch.library.opcheck(compiled_segment_mm, (rows, weights, ends))
    torch.library.opcheck(compiled_segment_outer, (rows.detach(), random(7, 5).detach(), ends))

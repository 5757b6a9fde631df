"""The operators that a compiled model runs its experts with: products of segments."""

import torch

from lightning_peft.moe.segments import segment_mm, segment_outer


def test_each_segment_has_its_matrix():
    rows, weights = torch.randn(7, 3, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    ends = torch.tensor([2, 2, 6, 7])  # the second segment is empty
    which = torch.tensor([0, 0, 2, 2, 2, 2, 3])
    assert torch.allclose(segment_mm(rows, weights, ends), torch.einsum("ni,nio->no", rows, weights[which]))
    others = torch.randn(7, 5, dtype=torch.float64)
    each = torch.einsum("ni,no->nio", rows, others)
    assert torch.allclose(segment_outer(rows, others, ends), torch.zeros(4, 3, 5).double().index_add(0, which, each))


def test_the_operators_are_sound_for_autograd_and_compilation():
    rows = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 6, 7])
    assert torch.autograd.gradcheck(segment_mm, (rows, weights, ends))
    torch.library.opcheck(segment_mm, (rows, weights, ends))
    torch.library.opcheck(segment_outer, (rows.detach(), torch.randn(7, 5, dtype=torch.float64), ends))

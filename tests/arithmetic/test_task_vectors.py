"""TIES and DARE by hand and against HF PEFT's functions."""

import pytest
import torch
from peft.utils import merge_utils

from lightning_peft.arithmetic.task_vectors import agreeing_mean, combined, kept_at_random, kept_by_magnitude


def test_ties_by_hand():
    tensors = [torch.tensor([3.0, -1.0, 0.0, 2.0]), torch.tensor([-1.0, -5.0, 4.0, -2.0])]
    # Signs of the sums: +, -, +, + (a draw). Means over those that agree, of weight times value.
    found = agreeing_mean(tensors, [1.0, 0.5], "total")
    torch.testing.assert_close(found, torch.tensor([3.0, (-1.0 - 2.5) / 2, 2.0, 2.0]))


def test_magnitudes_keep_the_largest():
    found = kept_by_magnitude(torch.tensor([[1.0, -4.0], [3.0, 0.5]]), 0.5)
    assert found.tolist() == [[0.0, -4.0], [3.0, 0.0]]


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_every_kind_is_that_of_hf_peft(kind, sign):
    tensors = [torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    weights = [0.5, -1.0, 2.0]
    torch.manual_seed(4)
    extra = {"linear": []}.get(kind, [0.6]) + ([sign] if kind.endswith("ties") else [])
    theirs = getattr(merge_utils, "task_arithmetic" if kind == "linear" else kind)
    expected = theirs(tensors, torch.tensor(weights), *extra)
    generator = torch.Generator().manual_seed(4)
    found = combined(kind, tensors, weights, density=0.6, majority_sign=sign, generator=generator)
    torch.testing.assert_close(found, expected)


def test_random_pruning_keeps_the_mean():
    found = kept_at_random(torch.ones(200, 200), 0.25, torch.Generator().manual_seed(0))
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert abs(float(found.mean()) - 1) < 0.05

import pytest
import torch

from lightning_peft.arithmetic import row_blocks
from lightning_peft.arithmetic.row_blocks import Product, plus


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sum_in_blocks_is_the_exact_sum_rounded_once(dtype, transposed, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 40)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 17, generator=g).to(dtype)
    left, right = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((23, 3), (3, 17)))
    product = Product(right.t(), left.t(), 0.5).t() if transposed else Product(left, right, 0.5)
    assert product.shape == weight.shape
    expected = (weight.double() + 0.5 * left @ right).to(dtype)
    merged = plus(weight, product)
    assert merged.dtype == dtype
    # Two roundings: of the product to float32, then of the sum. Where the two cancel, the first is seen in the result.
    largest = torch.maximum(expected.double().abs(), weight.double().abs())
    if dtype == torch.float64:  # there the expected sum is rounded too, term by term
        largest = torch.maximum(largest, weight.abs() + 0.5 * left.abs() @ right.abs())
    assert ((merged.double() - expected.double()).abs() <= torch.finfo(dtype).eps * largest).all()
    if dtype.itemsize == 2:  # in a wider one the first is as large as the second
        assert (merged == expected).double().mean() > 0.98
    again = plus(weight, product.whole())
    assert (
        torch.equal(again, merged) if dtype != torch.float64 else torch.allclose(again, merged, rtol=1e-14, atol=1e-14)
    )


def test_no_block_is_wider_than_it_may_be(monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 100)
    seen = []
    add_to = Product.add_to
    monkeypatch.setattr(Product, "add_to", lambda self, block, start: seen.append(block) or add_to(self, block, start))
    plus(torch.zeros(64, 10, dtype=torch.bfloat16), Product(torch.ones(64, 1), torch.ones(1, 10)))
    assert max(block.numel() for block in seen) <= 100
    assert sum(len(block) for block in seen) == 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_sum_in_place_is_the_same_and_makes_nothing_but_a_block(dtype, paired, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 340)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(230, 17, generator=g).to(dtype)
    product = Product(*(torch.randn(size, generator=g) for size in ((230, 3), (3, 17))), 0.3)
    expected, place = plus(weight, product), weight.data_ptr()
    wide = torch.promote_types(torch.float32, dtype)
    with paired.PeakBytes() as made:
        row_blocks.add_(weight, product)
    assert weight.data_ptr() == place
    assert torch.equal(weight, expected)
    widened = 0 if wide == torch.float32 else 3 * (230 + 17) * wide.itemsize  # A and B
    assert made.peak <= 340 * wide.itemsize + widened

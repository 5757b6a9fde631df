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
    assert ((merged.double() - expected.double()).abs() <= torch.finfo(dtype).eps * largest).all()
    if dtype != torch.float32:
        assert (merged == expected).double().mean() > 0.98
    assert torch.equal(plus(weight, product.whole()), merged)


def test_no_block_is_wider_than_it_may_be(monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 100)
    seen = []
    rows = Product.rows
    monkeypatch.setattr(Product, "rows", lambda self, *where: seen.append(rows(self, *where)) or seen[-1])
    plus(torch.zeros(64, 10, dtype=torch.bfloat16), Product(torch.ones(64, 1), torch.ones(1, 10)))
    assert max(block.numel() for block in seen) <= 100
    assert sum(len(block) for block in seen) == 64

"""How the updates of rows are multiplied without gradients: each way gives what a pass for each adapter gives, from copies that are kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA, adapter_rows, delete_adapter, inject, set_active_adapters
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.arithmetic import low_rank_rows, row_stacks
from lightning_peft.testing.subject import distance

TOLERANCE = 1e-5


def linear(shape: tuple[int, int], ranks: dict[str, int]) -> nn.Module:
    """Return a linear layer with an adapter of each of ``ranks``."""
    model = nn.Sequential(nn.Linear(*shape))
    generator = torch.Generator().manual_seed(3)
    for name, rank in ranks.items():
        inject(model, LoRA(rank=rank, alpha=2 * rank), "0", name=name)
        for parameter in adapters_named(model, name)["0"].parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def alone(model: nn.Module, rows: Sequence[str | None], x: Tensor) -> Tensor:
    """Return what passes with one adapter each give, row by row."""
    results = {}
    for name in set(rows):
        set_active_adapters(model, [] if name is None else name)
        results[name] = model(x)
    return torch.stack([results[name][row] for row, name in enumerate(rows)])


def test_rows_in_every_order_go_the_way_that_suits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear((48, 2048), {"a": 3, "b": 3, "c": 3, "d": 5})
    went: list[object] = []
    find = low_rank_rows._way
    monkeypatch.setattr(low_rank_rows, "_way", lambda *given: went.append(find(*given)) or went[-1])
    base = ["a", "b", "c", None, "a", "b", "c", None, None]
    runs = ["a", "a", "b", "b", "c", "c", "d", "d"]
    for order, tokens, way in (
        (["a", "b", "c", "a", "b", "c"], 1, "at once"),
        (["a", "b", "c", "a", "b", "c"], 2, "batches"),
        (base, 1, "batches"),
        (runs, 2, "batches"),
        (["a", "d", "a", "d", "b", "d"], 1, "zeros"),
        (["a", "d", "a", "d", "b", "d"], 20, "in turn"),
        (["a", "b", "d", None], 75, "pieces"),
        (["a", "a", "a", "b", "b", "b"], 20, "in turn"),
    ):
        x = torch.randn(len(order), tokens, 48, generator=torch.Generator().manual_seed(4))
        monkeypatch.setattr(low_rank_rows, "_RUN", 1000 if way in ("batches", "at once", "in turn") else 300_000)
        with torch.no_grad():
            went.clear()
            with adapter_rows(model, order):
                together = model(x)
            apart = alone(model, order, x)
        assert distance(together, apart) <= TOLERANCE, (order, tokens)
        assert all(torch.equal(together[row], apart[row]) for row, name in enumerate(order) if name is None)
        kinds = [
            "zeros" if isinstance(one, Tensor) else one and ("at once" if one.alike else "batches") for one in went
        ]
        assert kinds == ([] if way == "pieces" else [None if way == "in turn" else way]), (order, tokens)
        distances = [distance(together[row], together[0]) for row, name in enumerate(order) if name != order[0]]
        assert min(distances) > 1e-3


def test_every_change_of_an_adapter_counts_inside_a_block_and_no_copy_outlives_it() -> None:
    model = linear((16, 24), {"a": 2, "b": 2})
    x, rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(4)), ["a", "b", "a", "b"]

    changes: list[Callable[[Any], object]] = [
        lambda adapter: adapter.lora_B.mul_(2.0),
        lambda adapter: setattr(adapter.lora_B, "data", adapter.lora_B + 1.0),
        lambda adapter: setattr(adapter, "lora_A", nn.Parameter(adapter.lora_A + 1.0)),
        lambda adapter: setattr(adapter, "scale", 0.5),
    ]
    with torch.no_grad():
        for change in changes:
            with adapter_rows(model, rows):
                before = model(x)
                change(adapters_named(model, "a")["0"])
                after = model(x)
            assert distance(after, alone(model, rows, x)) <= TOLERANCE
            assert distance(after[0], before[0]) > 1e-3
    stack = row_stacks._stacks[id(model[0].base_layer)][1]
    assert stack.A.numel()
    delete_adapter(model, "a")
    gc.collect()
    assert not stack.A.numel()
    assert not stack.B.numel()
    assert not stack.ways

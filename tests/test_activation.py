"""Which adapters act together at a place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    Adapter,
    DoRA,
    LoRA,
    Method,
    Target,
    adapter_rows,
    inject,
    merge_adapters,
    set_active_adapters,
    unmerge_adapters,
)
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.errors import InjectionError, LightningPEFTError, MergeError


@dataclass(frozen=True, kw_only=True)
class Counting(Method):
    """Counts calls, and changes nothing."""

    name: ClassVar[str] = "counting"
    mergeable: ClassVar[bool] = True
    row_routable: ClassVar[bool] = True
    composable: ClassVar[bool] = False

    def supports(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        return Counter()


class Counter(Adapter):
    only_listens: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def reset_parameters(self, base_layer: nn.Module) -> None:
        pass

    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        self.calls += 1
        return base(x)

    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        return {}


def together(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the three ways to let ``names`` act at one place."""

    def active() -> Tensor:
        set_active_adapters(model, names)
        return model(x)

    def by_rows() -> Tensor:
        with adapter_rows(model, [names] * len(x)):
            return model(x)

    def merged() -> Tensor:
        merge_adapters(model, names)
        try:
            return model(x)
        finally:
            unmerge_adapters(model)

    return {"active": active, "by rows": by_rows, "merged": merged}


def made(**methods: Method) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6))
    for name, method in methods.items():
        inject(model, method, "0", name=name)
    with torch.no_grad():
        for name in methods:
            for parameter in adapters_named(model, name)["0"].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("way", ["active", "by rows", "merged"])
@torch.no_grad()
def test_who_only_listens_stands_beside_an_adapter_that_acts_alone(way: str) -> None:
    model, x = made(alone=DoRA(rank=2), listens=Counting()), torch.randn(3, 6)
    set_active_adapters(model, "alone")
    wanted = model(x)
    found = together(model, ["alone", "listens"], x)[way]()
    torch.testing.assert_close(found, wanted)
    assert adapters_named(model, "listens")["0"].calls == (0 if way == "merged" else 1)


@pytest.mark.parametrize("way", ["active", "by rows", "merged"])
@torch.no_grad()
def test_an_adapter_that_acts_alone_is_refused_beside_one_that_acts(way: str) -> None:
    model, x = made(other=LoRA(rank=2), listens=Counting(), alone=DoRA(rank=2)), torch.randn(3, 6)
    error: type[LightningPEFTError] = MergeError if way == "merged" else InjectionError
    with pytest.raises(error, match=r"\['other', 'alone'\] are .* at '0', but 'dora' acts alone at a place"):
        together(model, ["other", "listens", "alone"], x)[way]()

"""Adapters by rows of a batch: equal to a pass for each adapter, in inference and in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    AdaLoRA,
    BitFit,
    Bottleneck,
    DoRA,
    FullFineTuning,
    LoRA,
    LoRAFA,
    Method,
    NormTuning,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    VeRA,
    adapter_rows,
    adapters_disabled,
    inject,
    merge_adapters,
    set_active_adapters,
    set_row_adapters,
)
from lightning_peft.adapter_layer import adapter_layers, adapters_named
from lightning_peft.errors import AdapterNotFoundError, ConfigError, InjectionError, MergeError
from lightning_peft.testing.subject import distance
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama, token_batch

TOLERANCE = 1e-5

ZOO: dict[str, tuple[Method, str | list[str] | None]] = {
    "small": (LoRA(rank=2, alpha=8), None),
    "large": (LoRA(rank=7, alpha=3), ["all_linear"]),
    "bias": (LoRA(rank=3, bias="all"), None),
    "slices": (LoRA(rank=3), ["query", "value"]),
    "embedding": (LoRA(rank=4, tied="both"), ["embedding"]),
    "rslora": (LoRA(rank=5, rslora=True), None),
    "ada": (AdaLoRA(init_rank=4, target_rank=2), None),
    "fa": (LoRAFA(rank=4), None),
    "dora": (DoRA(rank=3), None),
    "vera": (VeRA(rank=6), None),
    "prefix": (PrefixTuning(num_virtual_tokens=4), None),
    "longer": (PrefixTuning(num_virtual_tokens=6), None),
    "prompt": (PromptTuning(num_virtual_tokens=3), None),
    "bottleneck": (Bottleneck(bottleneck_size=5), None),
    "parallel": (Bottleneck(bottleneck_size=4, placement="parallel"), None),
    "bitfit": (BitFit(), None),
    "norms": (NormTuning(), None),
}

MODELS = {"llama": lambda: tiny_llama(attention_bias=True), "gpt2": tiny_gpt2}


def randomise(model: nn.Module, names: Sequence[str], std: float = 0.05) -> None:
    """Give adapters values that act."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in names:
            for adapter in adapters_named(model, name).values():
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def held(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return ``model`` with those of the zoo."""
    for name in names:
        inject(model, *ZOO[name], name=name)
    randomise(model, names)
    return model


def activate(model: nn.Module, row: str | Sequence[str] | None) -> None:
    set_active_adapters(model, [] if row is None else row)


def alone(model: nn.Module, rows: Sequence[str | None], call: Callable[[], Tensor]) -> Tensor:
    """Return what passes with one adapter each give, row by row."""
    results = {}
    for name in set(rows):
        activate(model, name)
        results[name] = call()
    return torch.stack([results[name][row] for row, name in enumerate(rows)])


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_adapter_in_one_batch_is_a_pass_of_each(kind: str) -> None:
    names = list(ZOO)
    model = held(MODELS[kind](), names)
    rows = [None, *names, None, "large", "small"]
    batch = token_batch(rows=len(rows), length=9)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][::3, :2] = 0
    with torch.no_grad():
        with adapter_rows(model, rows):
            together = model(**batch).logits
        apart = alone(model, rows, lambda: model(**batch).logits)
    seen = batch["attention_mask"].bool()
    for row, name in enumerate(rows):
        assert distance(together[row][seen[row]], apart[row][seen[row]]) <= TOLERANCE, name
    changed = [name for row, name in enumerate(rows) if name and distance(apart[row], apart[0]) < 1e-4]
    assert not changed, f"{changed} do nothing, so the comparison shows nothing"


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_every_kind_are_those_of_a_pass_of_each(kind: str) -> None:
    names = list(ZOO)
    model = held(MODELS[kind](), names)
    set_row_adapters(model, names)
    rows = [None, *names, "large", "small"]
    batch = token_batch(rows=len(rows), length=7)
    goal = torch.randn(len(rows), 7, 128, generator=torch.Generator().manual_seed(1))

    def gradients(row: int | None) -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(**batch).logits if row is None else model(input_ids=batch["input_ids"][row : row + 1]).logits
        wanted = goal if row is None else goal[row : row + 1]
        (logits - wanted).square().sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    with adapter_rows(model, rows):
        together = gradients(None)
    apart: dict[str, Tensor] = {}
    for row, name in enumerate(rows):
        if name is not None:
            activate(model, name)
            for key, gradient in gradients(row).items():
                if f".adapters.{name}." in key:
                    apart[key] = apart.get(key, 0) + gradient
    assert {key.split(".adapters.")[1].split(".")[0] for key in apart} == set(names)
    assert sorted(together) == sorted(apart)
    largest = {
        name: max(float(g.abs().max()) for key, g in apart.items() if f".adapters.{name}." in key) for name in names
    }
    for key, gradient in apart.items():
        name = key.split(".adapters.")[1].split(".")[0]
        assert float((gradient - together[key]).abs().max()) <= TOLERANCE * largest[name], key

"""What is put together from rows of different adapters, where the module around them runs once for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lightning_peft import LoRA, PromptTuning, adapter_rows, inject, set_active_adapters, set_row_adapters
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.errors import InjectionError
from lightning_peft.testing.subject import distance
from lightning_peft.testing.toys import token_batch

TOLERANCE = 1e-5


def alone(model: nn.Module, rows: Sequence[str | None], call: Callable[[], Tensor]) -> Tensor:
    """Return what passes with one adapter each give, row by row."""
    results = {}
    for name in set(rows):
        set_active_adapters(model, [] if name is None else [name])
        results[name] = call()
    return torch.stack([results[name][row] for row, name in enumerate(rows)])


def prompted_t5() -> nn.Module:
    """A small T5 with prompts of two lengths and a LoRA."""
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        vocab_size=128,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    names = ["short", "long"]
    for name, length in zip(names, (2, 5), strict=True):
        inject(model, PromptTuning(num_virtual_tokens=length), name=name)
    inject(model, LoRA(rank=2), name="lora")
    with torch.no_grad():
        for adapter in (adapter for name in (*names, "lora") for adapter in adapters_named(model, name).values()):
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def labelled(model: nn.Module, rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch with as many labels a row as its number says, and these labels."""
    ids = token_batch(rows=rows, length=6)["input_ids"]
    labels = ids[:, :4].clone()
    for row in range(rows):
        labels[row, 1 + row % 3 :] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, labels


@pytest.mark.parametrize("unlabelled", [None, "short"])
def test_a_loss_of_rows_with_prompts_of_their_own_is_the_mean_over_all_labels(unlabelled: str | None) -> None:
    model = prompted_t5()
    rows = ["long", None, "short", "lora", "long", "short"]
    batch, labels = labelled(model, len(rows))
    if unlabelled is not None:
        labels[[number for number, name in enumerate(rows) if name == unlabelled]] = -100
    with torch.no_grad():
        wanted_logits = alone(model, rows, lambda: model(**batch).logits)
    set_row_adapters(model, ["long", "short", "lora"])
    with adapter_rows(model, rows):
        together = model(**batch)
        logits = model(**{**batch, "labels": None}, decoder_input_ids=model._shift_right(labels)).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert distance(together.loss.detach(), wanted.detach()) <= TOLERANCE
    assert distance(together.logits.detach(), wanted_logits) <= TOLERANCE
    together.loss.backward()
    found = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    wanted.backward()
    for key, value in model.named_parameters():
        if value.grad is not None:
            assert distance(found.get(key, torch.zeros_like(value)), value.grad) <= TOLERANCE, key


def test_a_loss_that_is_another_mean_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompted_t5()
    batch, _ = labelled(model, 3)
    forward = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        result = forward(*args, **kwargs)
        result["loss"] = 2 * result["loss"]
        return result

    monkeypatch.setattr(model, "forward", doubled)
    advice = "leave labels out, give decoder_input_ids, and compute the loss from the logits"
    with adapter_rows(model, ["long", "short", None]), pytest.raises(InjectionError, match=advice):
        model(**batch)
    monkeypatch.undo()
    advice = "returns a scalar.*compute the scalar outside, such as a loss from the logits"
    with adapter_rows(model, ["long", "short", None]), pytest.raises(InjectionError, match=advice):
        model(**batch, return_dict=False)

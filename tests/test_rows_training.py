"""A column of the batch names the adapter of each row: in fit and in predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    Adaptation,
    DoRA,
    LoRA,
    PEFTMixin,
    PEFTModule,
    adapter_rows,
    delete_adapter,
    inject,
    merge_adapters,
    rename_adapter,
    set_active_adapters,
    set_row_adapters,
    unload_adapters,
)
from lightning_peft.arithmetic import low_rank_rows
from lightning_peft.errors import ConfigError, InjectionError
from lightning_peft.testing.subject import adapter_parameters, distance
from lightning_peft.testing.toys import tiny_llama, token_batch

ROWS = ["a", "", "b", "a", "b", ""]


def rows() -> list[dict[str, Any]]:
    ids = token_batch(rows=len(ROWS))["input_ids"]
    return [{"input_ids": one, "labels": one, "adapter": name} for one, name in zip(ids, ROWS, strict=True)]


def by_rows(checkpointing: bool = False) -> PEFTModule:
    model = tiny_llama()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    methods = [Adaptation(LoRA(rank=2), name="a"), Adaptation(DoRA(rank=3), name="b")]
    torch.manual_seed(0)
    module = PEFTModule(model, methods, by_rows=True, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    module.configure_model()
    return module


def trained(module: LightningModule) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in module.named_parameters() if ".adapters." in key}


def test_fit_trains_each_adapter_on_its_rows_with_checkpointing_as_without(make_trainer, tmp_path):
    plain, saving = by_rows(), by_rows(checkpointing=True)
    before = trained(plain)
    for module in (plain, saving):
        make_trainer(tmp_path, max_steps=2).fit(module, DataLoader(rows(), batch_size=6))
    after, again = trained(plain), trained(saving)
    assert all(any(not torch.equal(after[k], before[k]) for k in after if f".adapters.{name}." in k) for name in "ab")
    assert all(distance(again[key], after[key]) <= 1e-5 for key in after)

    # A step of "a" alone, on its rows and the share of the loss that is theirs, is the same step.
    alone = by_rows()
    first = by_rows()
    make_trainer(tmp_path, max_steps=1).fit(first, DataLoader(rows(), batch_size=6))
    set_row_adapters(alone.model, [])
    set_active_adapters(alone.model, ["a"])
    ids = torch.stack([row["input_ids"] for row in rows() if row["adapter"] == "a"])
    (alone.model(input_ids=ids, labels=ids).loss * len(ids) / len(ROWS)).backward()
    wanted = {key: p.detach() - 0.5 * p.grad for key, p in alone.named_parameters() if p.grad is not None}
    found = trained(first)
    assert wanted
    assert all(distance(found[key], value) <= 1e-5 for key, value in wanted.items())


def test_an_adapter_that_a_batch_does_not_name_stays_as_it_is(make_trainer, tmp_path):
    module = by_rows()
    before = trained(module)
    only = [row for row in rows() if row["adapter"] != "b"]
    make_trainer(tmp_path, max_steps=2).fit(module, DataLoader(only, batch_size=4))
    after = trained(module)
    assert all(torch.equal(after[key], before[key]) for key in after if ".adapters.b." in key)


def test_predict_gives_each_row_its_adapter(make_trainer, tmp_path):
    module = by_rows()
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(module, DataLoader(rows(), batch_size=6))
    logits = trainer.predict(module, DataLoader(rows(), batch_size=6))[0]
    ids = token_batch(rows=len(ROWS))["input_ids"]
    for name in ("a", "b", ""):
        set_active_adapters(module.model, [name] if name else [])
        with torch.no_grad():
            alone = module.model.eval()(ids).logits
        for row in (row for row, other in enumerate(ROWS) if other == name):
            assert distance(logits[row], alone[row]) <= 1e-5


class Own(PEFTMixin, LightningModule):
    """A LightningModule with a training step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()
        for name in "ab":
            inject(self.model, LoRA(rank=2), name=name)
        set_row_adapters(self.model, ["a", "b"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.batch_rows(batch) as batch:
            return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def test_a_training_step_of_its_own_takes_the_column_too(make_trainer, tmp_path):
    module = Own().train()
    before = trained(module)
    make_trainer(tmp_path, max_steps=1).fit(module, DataLoader(rows(), batch_size=6))
    after = trained(module)
    for name in "ab":
        assert any(not torch.equal(after[key], before[key]) for key in after if f".adapters.{name}." in key)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "adapter 'a' cannot be deleted": lambda model: delete_adapter(model, "a"),
    "adapter 'a' cannot be renamed": lambda model: rename_adapter(model, "a", "c"),
    "adapter 'a' cannot be merged": lambda model: merge_adapters(model, "a"),
    "adapter 'c' cannot go in": lambda model: inject(model, LoRA(rank=1), ["output"], name="c"),
    "adapters cannot be unloaded": unload_adapters,
}


@pytest.mark.parametrize("what", CHANGES)
def test_rows_keep_the_adapters_they_name_until_the_block_is_left(what: str) -> None:
    model = tiny_llama()
    for name in "ab":
        inject(model, LoRA(rank=2), ["query"], name=name)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = token_batch(rows=2)
    with adapter_rows(model, ["a", None]):
        before = model(**batch).logits
    with adapter_rows(model, ["a", None]):
        with pytest.raises(InjectionError, match=f"{what} inside a block of adapter_rows.*leave the block first"):
            CHANGES[what](model)
        assert torch.equal(model(**batch).logits, before)
        delete_adapter(model, "b")  # of which no row has heard
        assert torch.equal(model(**batch).logits, before)
    CHANGES[what](model)


@pytest.mark.parametrize("column", [True, False])
def test_a_batch_in_which_no_row_names_an_adapter_is_refused_in_training(column, make_trainer, tmp_path):
    data = [{key: "" if key == "adapter" else row[key] for key in row if column or key != "adapter"} for row in rows()]
    with pytest.raises(
        ConfigError, match="in the column 'adapter', and batch 0 names none: it has the keys .*'input_ids'"
    ):
        make_trainer(tmp_path, max_steps=1).fit(by_rows(), DataLoader(data, batch_size=6))


def test_ranks_that_differ_much_are_multiplied_apart(monkeypatch):
    """Padded to one rank or not, with rows of the base among them: the same outputs and gradients."""
    names = ["a", "a", None, "b", "b", "c", None]

    def run(limit: int) -> tuple[Tensor, dict[str, Tensor]]:
        monkeypatch.setattr(low_rank_rows, "_RUN", limit)
        model = tiny_llama(attention_bias=True).train()
        torch.manual_seed(0)
        for name, method in {"a": LoRA(rank=1), "b": LoRA(rank=16, bias="lora_only"), "c": LoRA(rank=16)}.items():
            inject(model, method, name=name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
        set_row_adapters(model, ["a", "b", "c"])
        ids = token_batch(rows=len(names))["input_ids"]
        with adapter_rows(model, names):
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
        return out.logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    (padded, wanted), (apart, found) = run(10**12), run(-1)
    assert distance(apart, padded) <= 1e-5
    assert found.keys() == wanted.keys()
    assert all(distance(found[key], value) <= 1e-5 for key, value in wanted.items())
    assert not torch.equal(padded, apart)  # it did go another way

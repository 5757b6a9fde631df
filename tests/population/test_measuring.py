"""What is measured of members where a batch has no label, or where a loss was not finite before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_peft import LoRA, Member, PEFTModule, PopulationModule
from lightning_peft.testing.toys import tiny_llama, token_batch

OPTIONS: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}


def examples(*unlabelled: int) -> DataLoader:
    """Three batches of two rows; those of the given numbers have no label."""
    ids = token_batch(seed=3, rows=6, length=10)["input_ids"]
    labels = [torch.full_like(one, -100) if n // 2 in unlabelled else one for n, one in enumerate(ids)]
    return DataLoader([{"input_ids": i, "labels": one} for i, one in zip(ids, labels, strict=True)], batch_size=2)


def plain(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())


def test_a_batch_without_a_label_is_left_out_as_in_a_run_alone(make_trainer, tmp_path):
    members = [Member(LoRA(rank=2), ["query", "value"], "a", seed=1), Member(LoRA(rank=4), None, "b", seed=2)]
    module = PopulationModule(tiny_llama(), members, **OPTIONS)
    make_trainer(tmp_path, max_epochs=2).fit(module, examples(), examples(1))
    for member in members:
        torch.manual_seed(member.seed)
        alone = PEFTModule(tiny_llama(), member.method, member.targets, name=member.name, **OPTIONS)
        trainer = make_trainer(tmp_path, max_epochs=2)
        trainer.fit(alone, examples(), examples(1))
        standing = module.standings.of[member.name]
        assert standing.status == "finished"
        assert standing.last == pytest.approx(float(trainer.callback_metrics["val_loss"]), abs=1e-5)
    (tested,) = make_trainer(tmp_path).test(module, examples(1), verbose=False)
    assert tested["test_loss/a"] == pytest.approx(module.standings.of["a"].last, abs=1e-6)


def test_a_loss_that_is_not_finite_counts_in_its_own_measurement_only(make_trainer, tmp_path):
    members = [Member(LoRA(rank=2), None, name) for name in "ab"]
    module = PopulationModule(tiny_llama(), members, loss=plain, **OPTIONS)
    for stage, word in (("validate", "val"), ("test", "test")):
        measure = getattr(make_trainer(tmp_path), stage)
        (bad,) = measure(module, examples(1), verbose=False)
        assert torch.tensor([bad[f"{word}_loss/{name}"] for name in "ab"]).isnan().all()
        (good,) = measure(module, examples(), verbose=False)
        assert 0 < good[f"{word}_loss"] == good[f"{word}_loss/a"] < 10
        measure(module, examples(1), verbose=False)
    make_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(module, examples(), examples())
    assert {one.status for one in module.ranking()} == {"finished"}

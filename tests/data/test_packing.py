"""Packing loses no token, and a packed row is learned as its examples are by themselves."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_peft import InstructionDataModule
from lightning_peft.data.collating import PackedCollator, SequenceCollator
from lightning_peft.data.packing import pack_lengths, packed
from lightning_peft.errors import ConfigError
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama


def some_examples(seed, count=None, longest=30):
    draw = random.Random(seed)
    examples = []
    for _ in range(draw.randrange(1, 60) if count is None else count):
        ids = [draw.randrange(3, 128) for _ in range(draw.randrange(2, longest))]
        read = draw.randrange(0, len(ids) - 1)
        examples.append({"input_ids": ids, "labels": [-100] * read + ids[read:]})
    return examples


def tensors(example):
    return {name: torch.tensor(value) for name, value in example.items()}


def segments(row):
    """Take a packed row apart again, by its positions alone."""
    starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    ends = [*starts[1:], len(row["input_ids"])]
    return [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("seed", range(25))
def test_no_token_is_lost_repeated_or_moved_to_another_example(seed):
    examples = some_examples(seed)
    rows = list(packed(examples, 32))
    assert all(len(row["input_ids"]) <= 32 for row in rows)
    found = sorted(part for row in rows for part in segments(row))
    # The first token of an example follows nothing, so that it is the one label that packing takes away.
    assert found == sorted((one["input_ids"], [-100, *one["labels"][1:]]) for one in examples)
    for row in rows:
        assert [p for ids, _ in segments(row) for p in range(len(ids))] == row["position_ids"]


def test_rows_are_about_as_few_as_can_be():
    lengths = [len(one["input_ids"]) for one in some_examples(1, count=500)]
    rows = pack_lengths(lengths, 32)
    assert sorted(number for row in rows for number in row) == list(range(500))
    assert len(rows) <= 1.03 * sum(lengths) / 32
    with pytest.raises(ConfigError, match="an example of 9 tokens does not fit into a row of 8; cut it first"):
        pack_lengths([3, 9], 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("document_mask", ["positions", "dense"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_loss_of_packed_rows_is_that_of_their_examples(make, document_mask, attention):
    # As from_pretrained returns models: with a cache, which would have the positions taken for those of one row.
    model = make(use_cache=True, attn_implementation=attention).double()
    examples = some_examples(3, count=12)
    total, count = 0.0, 0
    for example in examples:
        batch = SequenceCollator(0)([tensors(example)])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + model(**batch).loss.item() * tokens, count + tokens
    batch = PackedCollator(0, document_mask)([tensors(row) for row in packed(examples, 32)])
    assert len(batch["input_ids"]) < len(examples)
    if document_mask == "dense":
        batch["attention_mask"] = batch["attention_mask"].double()
    assert int((batch["labels"][:, 1:] != -100).sum()) == count
    assert model(**batch).loss.item() == pytest.approx(total / count, abs=1e-6)
    seeing_all = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    assert abs(seeing_all - total / count) > 1e-5


def test_real_rows_are_packed_without_loss(data_dir, stories):
    options = {"prompt": "{mr} =>", "completion": " {ref}", "max_train_rows": 300, "max_length": 512}
    plain = InstructionDataModule(stories, str(data_dir / "e2e" / "train.jsonl"), **options)
    full = InstructionDataModule(stories, str(data_dir / "e2e" / "train.jsonl"), packing=True, **options)
    for data in (plain, full):
        data.setup("fit")
    alone = sorted(example["input_ids"].tolist() for example in plain._datasets["train", True])
    rows = [{name: value.tolist() for name, value in row.items()} for row in full._datasets["train", True]]
    assert sorted(ids for row in rows for ids, _ in segments(row)) == alone
    assert len(alone) == 300
    assert len(rows) < 90
    batch = next(iter(full.train_dataloader()))
    assert batch["use_cache"] is False
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape

"""A source text and a target text."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from lightning_peft import Seq2SeqDataModule
from lightning_peft.errors import BadRowError, ConfigError


def set_up(*args, **options):
    data = Seq2SeqDataModule(*args, shuffle=False, **options)
    data.setup("fit")
    return data


def test_real_questions_become_queries(data_dir, stories):
    path = data_dir / "sql" / "advising.jsonl"
    data = set_up(
        stories, str(path), source="sql: {question}", target="{sql}", max_train_rows=16, max_target_length=512
    )
    tokenizer = AutoTokenizer.from_pretrained(stories)
    rows = iter(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:16])
    config = T5Config(vocab_size=512, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    for batch in data.train_dataloader():
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            row = next(rows)
            assert ids[mask.bool()].tolist() == [*tokenizer(f"sql: {row['question']}")["input_ids"], 2]
            assert labels[labels != -100].tolist() == [*tokenizer(row["sql"])["input_ids"], 2]
        assert model(**batch).loss.isfinite()


def test_both_ends_of_a_row_are_cut_with_their_end(byte_tokenizer, jsonl):
    path = jsonl("a.jsonl", [{"source": "abcdef", "target": "uvwxyz"}, {"source": "a", "target": ""}])
    options = {"max_source_length": 4, "max_target_length": 3}
    with pytest.warns(
        UserWarning, match="2 truncated rows cut: .*has a target of 7 tokens, 4 more than max_target_length=3"
    ):
        data = set_up(byte_tokenizer, path, on_bad_rows="report", **options)
    assert data.bad_rows["train"].places["empty"] == [f"'{path}' line 2 has an empty target"]
    (batch,) = data.train_dataloader()
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[*b"abc", 257]], [[*b"uv", 257]])
    assert data.shown(data.first("train", 1)[0]) == [("abc</s>", False), (" → ", False), ("uv</s>", True)]
    with pytest.raises(BadRowError, match="line 1 has a source of 7 tokens, 3 more than max_source_length=4"):
        set_up(byte_tokenizer, path, **options)
    with pytest.raises(ConfigError, match="max_target_length must be an integer of at least 2, got 1"):
        Seq2SeqDataModule("t", "a.jsonl", max_target_length=1)

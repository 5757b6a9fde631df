"""Questions with answers to choose from."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from lightning_peft import MultipleChoiceDataModule
from lightning_peft.errors import BadRowError, ConfigError


def set_up(*args, **options):
    data = MultipleChoiceDataModule(*args, shuffle=False, **options)
    data.setup("fit")
    return data


def test_real_questions_stand_with_each_answer(data_dir, stories):
    path = data_dir / "mc" / "arc_challenge_dev.jsonl"
    data = set_up(stories, str(path), max_train_rows=24, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    rows = iter(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:24])
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[:2] == (4, 4)
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            row = next(rows)
            assert label == row["label"]
            for one, kept, choice in zip(ids, mask, row["choices"], strict=True):
                assert one[kept.bool()].tolist() == tokenizer(row["question"], choice)["input_ids"]


def test_minimal_pairs_are_choices_in_fields_of_their_own(data_dir, stories, jsonl):
    lines = (data_dir / "mc" / "blimp_dev.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    rows = [{**json.loads(line), "ask": "Which is English?", "right": "0"} for line in lines]
    options = {"question_field": "ask", "choices_field": ["good", "bad"], "label_field": "right"}
    data = set_up(stories, jsonl("a.jsonl", rows), **options)
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].shape[:2] == (8, 2)
    assert batch["labels"].tolist() == [0] * 8
    shown = data.shown(data.first("train", 1)[0])
    assert [chosen for _, chosen in shown] == [True, False]
    assert shown[0][0].endswith(f"{rows[0]['good']}\n")


def test_rows_that_cannot_be_used_are_told(byte_tokenizer, jsonl):
    good = {"question": "q", "choices": ["a", "b"], "label": 1}
    bad = {
        "has 3 choices, and num_choices is 2": {**good, "choices": ["a", "b", "c"]},
        "has 2 as the right one of 2 choices": {**good, "label": 2},
        "has no list of texts as 'choices'": {**good, "choices": "ab"},
        "has a choice without text": {**good, "choices": ["a", ""]},
        "has no field 'question'": {"choices": ["a", "b"], "label": 0},
    }
    for message, row in bad.items():
        with pytest.raises(BadRowError, match=f"line 2 {message}"):
            set_up(byte_tokenizer, jsonl("a.jsonl", [good, row]))
    hub = {**good, "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    assert len(set_up(byte_tokenizer, jsonl("a.jsonl", [good, hub]))._datasets["train", True]) == 2
    with pytest.raises(ConfigError, match="num_choices must be an integer of at least 2, got 1"):
        MultipleChoiceDataModule("t", "a.jsonl", num_choices=1)


def test_the_question_is_cut_and_never_the_answer(byte_tokenizer, jsonl):
    rows = [
        {"question": "question", "choices": ["a", "bb"], "label": 0},
        {"question": "q", "choices": ["a" * 9, "b"], "label": 0},
    ]
    with pytest.warns(UserWarning, match="1 empty row left out: .* line 2 has an answer of more than 6 tokens"):
        data = set_up(byte_tokenizer, jsonl("a.jsonl", rows), max_length=6, on_bad_rows="report")
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].tolist() == [[[*b"questa"], [*b"quesbb"]]]


def test_the_right_one_may_be_told_by_its_own_label_or_its_text(bert_tokenizer, jsonl):
    rows = [
        {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "a", "choices": {"text": ["b", "c"], "label": ["1", "2"]}, "answerKey": "1"},  # ARC has both kinds
        {"question": "a", "choices": ["b", "c"], "answerKey": "c"},
        {"question": "a", "choices": ["b", "c"], "answerKey": "0"},
    ]
    data = set_up(bert_tokenizer, jsonl("a.jsonl", rows), label_field="answerKey")
    (batch,) = data.train_dataloader()
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert batch["token_type_ids"].tolist() == [[[0, 0, 0, 1, 1]] * 2] * 4
    numbers = {"question": "a", "choices": ["1", "2", "0"], "label": "1"}
    with pytest.raises(BadRowError, match="has '1' as the right one of 3 choices, which is the text of one and the nu"):
        set_up(bert_tokenizer, jsonl("b.jsonl", [numbers]))
    with pytest.raises(ConfigError, match="max_length=4 has no room for text beside the 3 special tokens"):
        set_up(bert_tokenizer, jsonl("b.jsonl", [numbers]), max_length=4)


def test_questions_are_compared_with_their_choices(byte_tokenizer, jsonl):
    pytest.importorskip("datasketch")
    same = "which of these is true of the moon"
    rows = [{"question": same, "choices": [f"{a} one two three four", f"{a} five six"], "label": 0} for a in "abc"]
    rows[2] = rows[0]
    with pytest.warns(UserWarning, match="1 duplicate row left out: .* line 3 is nearly line 1"):
        data = set_up(byte_tokenizer, jsonl("a.jsonl", rows), max_similarity=0.9, on_bad_rows="report")
    assert len(data._datasets["train", True]) == 2


def test_a_row_that_is_left_out_is_not_counted_as_cut_too(byte_tokenizer, jsonl):
    rows = [
        {"question": "q", "choices": ["a" * 9, "b"], "label": 0},
        {"question": "q", "choices": ["a", "b"], "label": 0},
    ]
    with pytest.warns(UserWarning, match="1 empty row left out"):
        data = set_up(byte_tokenizer, jsonl("a.jsonl", rows), max_length=6, on_bad_rows="report")
    assert dict(data.bad_rows["train"].counts) == {"empty": 1}

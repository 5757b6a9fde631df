"""Texts and words with labels: names, numbers, alignment with tokens, and what is wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from lightning_peft import ClassificationDataModule, TokenClassificationDataModule
from lightning_peft.errors import BadRowError, ConfigError


def set_up(kind, *args, **options):
    data = kind(*args, shuffle=False, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def in_training(data, model):
    """Tell a data module which model is trained, as a trainer does."""
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(model=model),
        distributed_sampler_kwargs={"rank": 0, "num_replicas": 1},
        world_size=1,
        limit_train_batches=1.0,
    )


def test_real_sentences_keep_their_text_and_label(data_dir, stories):
    path = data_dir / "cls" / "sentence_polarity_valid.jsonl"
    data = set_up(ClassificationDataModule, stories, str(path), val_fraction=0.25, split="end", max_train_rows=64)
    assert (data.label_names, data.num_labels) == (["0", "1"], 2)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:64]]
    batches = list(data.train_dataloader())
    assert [label for batch in batches for label in batch["labels"].tolist()] == [row["label"] for row in rows]
    ids = [
        row[mask.bool()].tolist()
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert ids == [tokenizer(row["text"])["input_ids"] for row in rows]


def test_labels_by_name_are_numbered_in_the_order_of_the_alphabet(data_dir, stories):
    train, test = (str(data_dir / "cls" / f"banking77_{part}.jsonl") for part in ("train", "test"))
    data = set_up(ClassificationDataModule, stories, train, test, max_train_rows=20, max_val_rows=20)
    names = sorted({json.loads(line)["label"] for line in Path(train).read_text(encoding="utf-8").splitlines()})
    assert data.label_names == names
    assert len(names) == 77
    first = json.loads(Path(test).read_text(encoding="utf-8").partition("\n")[0])["label"]
    assert next(iter(data.val_dataloader()[0]))["labels"][0] == names.index(first)
    assert data.shown(data.first("train", 1)[0])[-2:] == [(" → ", False), ("card_arrival", True)]


def test_pairs_and_numbers(byte_tokenizer, jsonl):
    rows = [{"a": "x", "b": "yz", "score": 2.5}, {"a": "x", "b": "y", "score": "4"}, {"a": "x", "b": "y", "score": [1]}]
    rows.append({"a": "x", "b": "y", "score": "nan"})
    options = {"text_field": "a", "pair_field": "b", "label_field": "score", "regression": True}
    with pytest.warns(UserWarning, match=r"line 3 has \[1\] as label, not a number.*line 4 has 'nan'"):
        data = set_up(ClassificationDataModule, byte_tokenizer, jsonl("a.jsonl", rows), on_bad_rows="report", **options)
    (batch,) = data.train_dataloader()
    assert batch["labels"].tolist() == [2.5, 4.0]
    assert batch["labels"].dtype == torch.float32
    assert batch["input_ids"].tolist() == [[*b"xyz"], [*b"xy", 257]]
    with pytest.raises(ConfigError, match="regression=True predicts numbers, which have no names"):
        ClassificationDataModule("t", "a.jsonl", labels=["a"], regression=True)


def test_a_pair_that_is_too_long_is_cut_where_it_is_longest(byte_tokenizer, jsonl):
    path = jsonl("a.jsonl", [{"a": "xxxx", "b": "yy", "label": 0}])
    options = {"text_field": "a", "pair_field": "b", "max_length": 4, "labels": ["no"]}
    with pytest.raises(BadRowError, match=r"line 1 has 6 tokens, 2 more than max_length=4; on_bad_rows="):
        set_up(ClassificationDataModule, byte_tokenizer, path, **options)
    with pytest.warns(UserWarning, match="1 truncated row cut"):
        data = set_up(ClassificationDataModule, byte_tokenizer, path, on_bad_rows="report", **options)
    assert data.first("train", 1)[0]["input_ids"].tolist() == [*b"xxyy"]


def test_labels_that_are_unknown_or_mixed_are_told(byte_tokenizer, jsonl):
    path = jsonl("a.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": "goodd"}])
    with pytest.raises(
        BadRowError, match=r"line 2 has the unknown label 'goodd'; did you mean 'good'.* The labels are: good, bad"
    ):
        set_up(ClassificationDataModule, byte_tokenizer, path, labels=["good", "bad"])
    mixed = jsonl("b.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": 1}])
    with pytest.raises(ConfigError, match=r"'label' of .*b.jsonl holds words as well as numbers"):
        set_up(ClassificationDataModule, byte_tokenizer, mixed)
    with pytest.raises(ConfigError, match=r"'topic' of .*b.jsonl holds no labels; name the field with label_field="):
        set_up(ClassificationDataModule, byte_tokenizer, mixed, label_field="topic")
    with pytest.raises(ConfigError, match="in which labels are found; give labels="):
        ClassificationDataModule("t", "a.jsonl", streaming=True)
    with pytest.raises(ConfigError, match=r"labels must be different names, got \['a', 'a'\]"):
        ClassificationDataModule("t", "a.jsonl", labels=["a", "a"])


# -- words -------------------------------------------------------------------------------------------------------------


def tagged(data_dir, count=60):
    """Return real sentences, each word of which says whether it stands in the meaning it was written for."""
    rows = []
    for line in (data_dir / "e2e" / "valid.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        meaning = set(row["mr"].split())
        if not row["ref"].isascii():  # whose bytes are tokens of one place
            continue
        words = row["ref"].split()
        rows.append({"tokens": words, "ner_tags": ["SLOT" if word in meaning else "O" for word in words]})
    return rows


@pytest.mark.parametrize("label_tokens", ["first", "all"])
def test_the_tokens_of_a_real_word_get_its_label_by_their_offsets(data_dir, stories, jsonl, label_tokens):
    rows = tagged(data_dir)
    data = set_up(TokenClassificationDataModule, stories, jsonl("a.jsonl", rows), label_tokens=label_tokens)
    assert data.label_names == ["O", "SLOT"]
    tokenizer = AutoTokenizer.from_pretrained(stories)
    for row, example in zip(rows, data._datasets["train", True], strict=True):
        encoded = tokenizer(row["tokens"], is_split_into_words=True, return_offsets_mapping=True)
        assert example["input_ids"].tolist() == encoded["input_ids"]
        tokens, expected, word, reached = tokenizer.convert_ids_to_tokens(encoded["input_ids"]), [], -1, 0
        for token, (_, end) in zip(tokens, encoded["offset_mapping"], strict=True):
            if token in tokenizer.all_special_tokens:
                expected.append(-100)
                continue
            if begins := token.startswith("▁"):  # the word before was read to its end
                assert word < 0 or reached == len(row["tokens"][word])
                word += 1
            reached = end
            number = data.label_names.index(row["ner_tags"][word])
            expected.append(number if begins or label_tokens == "all" else -100)
        assert (word, reached) == (len(row["tokens"]) - 1, len(row["tokens"][-1]))
        assert example["labels"].tolist() == expected


def test_words_and_labels_that_do_not_fit_are_told(byte_tokenizer, jsonl):
    good = {"tokens": ["ab", "c"], "ner_tags": ["N", "O"]}
    rows = [good, {**good, "ner_tags": ["N"]}, {**good, "tokens": []}, {**good, "tokens": "ab c"}]
    with pytest.warns(UserWarning, match="line 2 has 2 words and 1 labels as 'ner_tags'"):
        data = set_up(TokenClassificationDataModule, byte_tokenizer, jsonl("a.jsonl", rows), on_bad_rows="report")
    assert dict(data.bad_rows["train"].counts) == {"malformed": 2, "empty": 1}
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].tolist() == [[*b"ab c"]]
    assert batch["labels"].tolist() == [[0, -100, 1, -100]]
    assert data.shown(data.first("train", 1)[0]) == [("a/N ", True), ("b ", False), (" /O ", True), ("c ", False)]
    with pytest.raises(ConfigError, match="label_tokens must be first or all, got 'last'"):
        TokenClassificationDataModule("t", "a.jsonl", label_tokens="last")


# -- labels and pairs of other people's files --------------------------------------------------------------------------


def test_the_texts_of_a_pair_are_told_apart_as_the_tokenizer_does_it(bert_tokenizer, jsonl):
    rows = [{"a": "a b", "b": "c", "label": 1}, {"a": "d", "b": "e f g h a", "label": 0}]
    data = set_up(ClassificationDataModule, bert_tokenizer, jsonl("a.jsonl", rows), text_field="a", pair_field="b")
    (batch,) = data.train_dataloader()
    tokenizer = AutoTokenizer.from_pretrained(bert_tokenizer)
    wanted = tokenizer([row["a"] for row in rows], [row["b"] for row in rows], padding=True, return_tensors="pt")
    assert batch.pop("labels").tolist() == [1, 0]
    assert batch.keys() == wanted.keys()
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
    assert batch["token_type_ids"].any()


@pytest.mark.parametrize(
    ("labels", "given", "names", "numbers"),
    [
        (None, ["10", "2", 0], [str(number) for number in range(11)], [10, 2, 0]),  # as of a .csv: not by the alphabet
        (None, [True, False], ["0", "1"], [1, 0]),
        (None, [2.0, 0.0], ["0", "1", "2"], [2, 0]),
        (["no", "yes"], ["1", 0, "yes"], ["no", "yes"], [1, 0, 1]),
        (["1", "2", "3"], [1, "3", 2.0], ["1", "2", "3"], [0, 2, 1]),  # names, and not places among them
        ([4, 5], [5, "4"], ["4", "5"], [1, 0]),
    ],
)
def test_a_number_is_the_label_that_it_names(byte_tokenizer, jsonl, labels, given, names, numbers):
    path = jsonl("a.jsonl", [{"text": "a", "label": one} for one in given])
    data = set_up(ClassificationDataModule, byte_tokenizer, path, labels=labels)
    assert data.label_names == names
    (batch,) = data.train_dataloader()
    assert batch["labels"].tolist() == numbers


@pytest.mark.parametrize(("labels", "label"), [(["1", "2"], 0), (["None", "a"], None), (["a"], 1), (["a"], 0.5)])
def test_what_names_no_label_is_refused(byte_tokenizer, jsonl, labels, label):
    path = jsonl("a.jsonl", [{"text": "a", "label": label}])
    with pytest.raises(BadRowError, match=f"line 1 has the unknown label {label!r}"):
        set_up(ClassificationDataModule, byte_tokenizer, path, labels=labels)


def test_a_length_that_special_tokens_fill_is_refused(bert_tokenizer, jsonl):
    path = jsonl("a.jsonl", [{"text": "a b c", "pair": "d e", "label": 0}])
    for length, pair in ((2, None), (4, "pair")):
        with pytest.raises(ConfigError, match=f"max_length={length} has no room for text beside the {2 + bool(pair)}"):
            set_up(ClassificationDataModule, bert_tokenizer, path, max_length=length, pair_field=pair)
    with pytest.warns(UserWarning, match="1 truncated row cut"):
        data = set_up(
            ClassificationDataModule, bert_tokenizer, path, max_length=5, pair_field="pair", on_bad_rows="report"
        )
    assert data.first("train", 1)[0]["input_ids"].tolist() == [2, 5, 3, 8, 3]


def test_rows_are_compared_by_what_is_classified(byte_tokenizer, jsonl):
    pytest.importorskip("datasketch")
    rows = [{"tokens": words.split(), "ner_tags": ["O"] * 4} for words in ("one two three four", "five six seven ten")]
    data = set_up(TokenClassificationDataModule, byte_tokenizer, jsonl("a.jsonl", rows), max_similarity=0.8)
    assert len(data._datasets["train", True]) == 2
    rows = [{"text": "one two three four", "label": 0, "id": f"a b c d e f {number}"} for number in range(2)]
    with pytest.warns(UserWarning, match="1 duplicate row left out"):
        data = set_up(ClassificationDataModule, byte_tokenizer, jsonl("b.jsonl", rows), max_similarity=0.8)


def test_a_row_that_is_left_out_is_not_counted_as_cut_too(bert_tokenizer, jsonl):
    path = jsonl("a.jsonl", [{"tokens": ["a", "b"], "ner_tags": ["N", "O"]}])
    data = TokenClassificationDataModule(bert_tokenizer, path, on_bad_rows="report", max_length=1)
    message = "line 1 has no token with a label among its first 1"
    with pytest.raises(ConfigError, match=message), pytest.warns(UserWarning, match=message):
        data.setup("fit")
    assert dict(data.bad_rows["train"].counts) == {"empty": 1}


@torch.no_grad()
def test_a_decoder_classifies_padded_rows_by_their_own_last_token(byte_tokenizer, jsonl):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=300, pad_token_id=299, **sizes)).eval()
    path = jsonl("a.jsonl", [{"text": text, "label": 0} for text in ("abcdef", "ab", "c")])
    data = set_up(ClassificationDataModule, byte_tokenizer, path)
    in_training(data, model)
    (batch,) = data.train_dataloader()
    together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = [model(input_ids=torch.tensor([list(text)])).logits for text in (b"abcdef", b"ab", b"c")]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("kind", ["byte", "bert", "stories"])
def test_words_are_read_as_they_are_in_a_text(byte_tokenizer, bert_tokenizer, stories, jsonl, kind):
    folder = {"byte": byte_tokenizer, "bert": bert_tokenizer, "stories": stories}[kind]
    words = ["a", "b", "c", "d"]
    path = jsonl("a.jsonl", [{"tokens": words, "ner_tags": ["N", "O", "N", "O"]}])
    example = set_up(TokenClassificationDataModule, folder, path).first("train", 1)[0]
    assert example["input_ids"].tolist() == AutoTokenizer.from_pretrained(folder)("a b c d")["input_ids"]
    assert [label for label in example["labels"].tolist() if label >= 0] == [0, 1, 0, 1]


@pytest.mark.parametrize(("kind", "typed"), [("Bert", True), ("DistilBert", False)])
def test_a_model_gets_the_types_of_tokens_that_it_takes(bert_tokenizer, jsonl, kind, typed):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    path = jsonl("a.jsonl", [{"text": "a", "pair": "b", "label": 0}])
    data = set_up(ClassificationDataModule, bert_tokenizer, path, pair_field="pair")
    in_training(data, model)
    (batch,) = data.train_dataloader()
    assert ("token_type_ids" in batch) == typed
    assert model(**batch).logits.shape == (1, 2)

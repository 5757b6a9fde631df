"""TextDataModule: what is in the rows, how the sets are named, and which mistakes are told."""

from __future__ import annotations

import json
import random

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_peft import TextDataModule
from lightning_peft.errors import ConfigError

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer whose ids are the bytes of the text, with <s> = 256 and </s> = 257."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos_token="<s>", eos_token="</s>")


def save_tokenizer(folder, **special):
    # Byte-level BPE writes byte b as a printable character; ids in the order of the bytes.
    printable = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    others = iter(range(256, 512))
    vocabulary = {printable.get(b) or chr(next(others)): b for b in range(256)} | {"<s>": BOS, "</s>": EOS}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=byte_level, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows_file(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def text_file(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def all_ids(loader):
    """Return the token ids of a loader in order."""
    return torch.cat([batch["input_ids"].flatten() for batch in loader]).tolist()


def set_up(*args, **kwargs):
    data = TextDataModule(*args, **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("bos", [BOS, *b"ab", BOS, *b"cde", BOS]),
        ("eos", [*b"ab", EOS, *b"cde", EOS, *b"f"]),
        ("none", [*b"abcdefgh"]),
    ],
)
def test_documents_are_packed_with_the_separator_between_them(tokenizer, rows_file, separator, expected):
    path = rows_file("train.jsonl", [{"text": "ab"}, {"text": "cde"}, {"text": "fgh"}])
    data = set_up(tokenizer, path, separator=separator, block_size=4, shuffle=False)
    assert all_ids(data.train_dataloader()) == expected
    for batch in data.train_dataloader():
        assert batch.keys() == {"input_ids", "labels"}
        assert batch["input_ids"].dtype == torch.long
        assert batch["input_ids"].shape == (2, 4)
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()


def test_a_text_file_is_one_document(tokenizer, text_file):
    data = set_up(tokenizer, text_file("a.txt", "x\n\ny"), block_size=5, shuffle=False)
    assert all_ids(data.train_dataloader()) == [BOS, *b"x\n\ny"]


def test_many_documents_are_tokenised_in_pieces_without_loss(tokenizer, rows_file):
    texts = [f"{i:05}," for i in range(1200)]
    path = rows_file("a.jsonl", [{"text": text} for text in texts])
    data = set_up(tokenizer, path, separator="none", block_size=2, shuffle=False)
    assert bytes(all_ids(data.train_dataloader())).decode() == "".join(texts)


def test_limits_count_tokens(tokenizer, text_file):
    path = text_file("a.txt", "0123456789" * 10)
    data = set_up(
        tokenizer, path, val=path, separator="none", block_size=4, max_train_tokens=50, max_val_tokens=9, shuffle=False
    )
    assert bytes(all_ids(data.train_dataloader())) == (b"0123456789" * 5)[:48]
    assert bytes(all_ids(data.val_dataloader()[0])) == b"01234567"


def test_batches_are_as_large_as_asked(tokenizer, text_file):
    path = text_file("a.txt", "x" * 40)
    data = set_up(tokenizer, path, val=path, separator="none", block_size=4, batch_size=4, val_batch_size=5)
    assert [len(batch["labels"]) for batch in data.train_dataloader()] == [4, 4, 2]
    assert [len(batch["labels"]) for batch in data.val_dataloader()[0]] == [5, 5]
    data = TextDataModule(tokenizer, path, batch_size=3)
    assert data.val_batch_size == 3


def test_workers_give_the_same_batches(tokenizer, text_file):
    path = text_file("a.txt", "".join(map(str, range(40))))
    options = {"separator": "none", "block_size": 4, "batch_size": 3, "seed": 7}
    with_workers = set_up(tokenizer, path, num_workers=2, **options)
    without = set_up(tokenizer, path, **options)
    assert all_ids(with_workers.train_dataloader()) == all_ids(without.train_dataloader())


def test_reading_draws_nothing_from_the_global_generator(tokenizer, text_file):
    path = text_file("a.txt", "x" * 40)
    data = set_up(tokenizer, path, val=path, block_size=4)
    before = torch.get_rng_state()
    all_ids(data.train_dataloader())
    all_ids(data.val_dataloader()[0])
    assert torch.equal(before, torch.get_rng_state())


# -- validation sets ---------------------------------------------------------------------------------------------------


def test_validation_sets_keep_their_names_order_and_templates(tokenizer, rows_file, text_file):
    train = rows_file("train.jsonl", [{"mr": "a", "ref": "b"}] * 4)
    val = {
        "e2e": rows_file("valid.jsonl", [{"mr": "c", "ref": "d"}]),
        "stories": rows_file("s.jsonl", [{"text": "xyz"}]),
    }
    template = {"train": "{mr}>{ref}", "e2e": "{mr}={ref}"}
    data = set_up(tokenizer, train, val, template, separator="none", block_size=3, shuffle=False)
    assert data.val_names == data.test_names == ["e2e", "stories"]
    assert bytes(all_ids(data.train_dataloader())) == b"a>b" * 4
    assert [bytes(all_ids(loader)) for loader in data.val_dataloader()] == [b"c=d", b"xyz"]
    assert [bytes(all_ids(loader)) for loader in data.test_dataloader()] == [b"c=d", b"xyz"]


def test_one_template_serves_all_sets(tokenizer, rows_file):
    path = rows_file("a.jsonl", [{"mr": "a", "ref": "b"}])
    data = set_up(tokenizer, path, {"same": path}, "{ref}{mr}", separator="none", block_size=2)
    assert bytes(all_ids(data.train_dataloader())) == bytes(all_ids(data.val_dataloader()[0])) == b"ba"


def test_a_file_without_a_name_gets_that_of_its_stem(tokenizer, text_file):
    path = text_file("plays.txt", "to be")
    assert TextDataModule(tokenizer, path, val=path).val_names == ["plays"]
    assert TextDataModule(tokenizer, path).val_names == []


def test_a_fraction_of_the_training_file_is_held_out_and_comes_first(tokenizer, text_file):
    text = "".join(f"{i:03}\n" for i in range(100))
    path = text_file("plays.txt", text)
    data = set_up(tokenizer, path, {"other": path}, separator="none", block_size=4, shuffle=False, val_fraction=0.2)
    assert data.val_names == ["plays", "other"]
    kept, held_out = all_ids(data.train_dataloader()), all_ids(data.val_dataloader()[0])
    assert bytes(kept + held_out).decode() == text
    assert len(held_out) == 80


def test_validating_alone_does_not_read_the_training_file(tokenizer, text_file):
    data = TextDataModule(tokenizer, "missing.txt", text_file("a.txt", "abcdef"), block_size=4)
    data.setup("validate")
    assert len(data.val_dataloader()[0]) == 1


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size must be an integer of at least 2, got 1"),
        ({"block_size": 8.0}, "block_size must be an integer of at least 2, got 8.0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
        ({"val_batch_size": 0}, "val_batch_size must be an integer of at least 1, got 0"),
        ({"max_train_tokens": 255}, "max_train_tokens must be an integer of at least 256, got 255"),
        ({"max_val_tokens": -1}, "max_val_tokens must be an integer of at least 256, got -1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \[0, 1\), got 1.0"),
        ({"separator": "</s>"}, "separator must be one of bos, eos, none, got '</s>'"),
        ({"template": "{a"}, r"template '\{a' cannot be read"),
        (
            {"template": {"vall": "{a}"}, "val": {"val": "a.txt"}},
            "given for 'vall'; did you mean 'val'.* sets are: train, val",
        ),
        ({"template": {"x": "{a}"}}, "given for 'x', which is not a set. The sets are: train"),
        ({"val": {"train": "a.txt"}}, "'train' cannot be the name of a validation set"),
        ({"val": {"a/b": "a.txt"}}, "'a/b' cannot be the name of a validation set"),
        (
            {"val": {"a": "b.txt"}, "val_fraction": 0.1},
            "set named 'a', which is also the name of what val_fraction holds out",
        ),
    ],
)
def test_an_argument_out_of_range_is_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        TextDataModule("tokenizer", "a.txt", **options)


def test_too_little_text_is_told_with_the_number_of_tokens(tokenizer, text_file):
    path = text_file("a.txt", "abc")
    with pytest.raises(
        ConfigError, match=r"a.txt' gives 4 tokens for 'train', fewer than one row of block_size=8; lower"
    ):
        set_up(tokenizer, path, block_size=8)
    long = text_file("long.txt", "abc" * 9)
    with pytest.raises(ConfigError, match=r"long.txt' gives 1 tokens for 'long', fewer than one row"):
        set_up(tokenizer, long, block_size=8, val_fraction=0.5)


def test_a_missing_file_is_told(tokenizer, text_file):
    with pytest.raises(ConfigError, match=r"no text file 'nowhere.txt'"):
        set_up(tokenizer, "nowhere.txt")
    with pytest.raises(ConfigError, match=r"no text file 'nowhere.jsonl'"):
        set_up(tokenizer, text_file("a.txt", "abcd"), val="nowhere.jsonl", block_size=4)


def test_a_separator_that_the_tokenizer_lacks_is_told(tmp_path, text_file):
    folder = save_tokenizer(tmp_path / "tokenizer", eos_token="</s>")
    with pytest.raises(
        ConfigError, match=r"separator='bos', but the tokenizer .* has no bos token; use separator='eos'"
    ):
        set_up(folder, text_file("a.txt", "abcd"), block_size=4)


def test_a_folder_without_a_tokenizer_is_told(tmp_path, text_file):
    with pytest.raises(ConfigError, match=r"no tokenizer can be loaded from .*empty'; give the folder of one"):
        set_up(str(tmp_path / "empty"), text_file("a.txt", "abcd"))


# -- in Trainer.fit ----------------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """A language model that only notes its batches."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(258, 1)
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return self.embedding(batch["labels"]).mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((self.trainer.datamodule.val_names[dataloader_idx], batch["input_ids"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint after some training batch."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("limit", [1.0, 0.8, 4])
@pytest.mark.parametrize("step", [2, 4, 5, 7])
def test_a_run_resumed_in_the_middle_of_an_epoch_sees_the_next_rows(tmp_path, tokenizer, text_file, step, limit):
    path = text_file("a.txt", "".join(f"{i:03}\n" for i in range(15)))

    def fit(ckpt_path=None, callbacks=()):
        data = TextDataModule(tokenizer, path, {"x": path, "y": path}, separator="none", block_size=4, batch_size=3)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            limit_train_batches=limit,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        module = Recorder()
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module

    whole = fit(callbacks=[SaveAt(step, tmp_path / "last.ckpt")])
    batches = 5 if limit == 1.0 else 4
    assert len(whole.seen) == 2 * batches
    assert whole.seen[:batches] != whole.seen[batches:]
    assert fit(tmp_path / "last.ckpt").seen == whole.seen[step:]
    assert {name for name, _ in whole.validated} == {"x", "y"}


# -- a file for each adapter -------------------------------------------------------------------------------------------


def test_files_by_name_give_every_row_the_name_of_its_adapter(tokenizer, text_file):
    data = TextDataModule(
        tokenizer,
        {"a": text_file("first.txt", "a" * 40), "b": text_file("second.txt", "b" * 24)},
        {"b": text_file("known.txt", "b" * 16), "other": text_file("other.txt", "c" * 16)},
        separator="none",
        block_size=8,
        batch_size=3,
    )
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sorted(name for batch in batches for name in batch["adapter"]) == ["a"] * 5 + ["b"] * 3
    for batch in batches:
        assert len(batch["adapter"]) == len(batch["input_ids"])
        for name, row in zip(batch["adapter"], batch["input_ids"], strict=True):
            assert row.tolist() == [ord(name)] * 8
        assert torch.equal(batch["input_ids"], batch["labels"])
    assert [[batch["adapter"] for batch in loader] for loader in data.val_dataloader()] == [
        [["b", "b"]],
        [[None, None]],
    ]


def test_each_file_holds_out_its_own_end_and_is_cut_at_its_own_limit(tokenizer, rows_file):
    def write(name, letter):
        return rows_file(name, [{"text": letter * 8}] * 6 + [{"text": letter.upper() * 8}] * 2)

    data = TextDataModule(
        tokenizer,
        {"a": write("a.jsonl", "a"), "b": write("b.jsonl", "b")},
        separator="none",
        block_size=8,
        val_fraction=0.25,
        max_train_tokens=32,
    )
    data.setup("fit")
    assert data.val_names == ["a", "b"]
    rows = [(name, row[0]) for batch in data.train_dataloader() for name, row in zip(*read(batch), strict=True)]
    assert sorted(rows) == [("a", ord("a"))] * 4 + [("b", ord("b"))] * 4
    held_out = [
        [(name, row[0]) for batch in loader for name, row in zip(*read(batch), strict=True)]
        for loader in data.val_dataloader()
    ]
    assert held_out == [[("a", ord("A"))] * 2, [("b", ord("B"))] * 2]


def read(batch):
    return batch["adapter"], batch["input_ids"].tolist()


def test_files_by_name_have_templates_by_name_and_names_that_are_free(tokenizer, rows_file, text_file):
    files = {"a": rows_file("a.jsonl", [{"x": "1" * 8}]), "b": rows_file("b.jsonl", [{"y": "2" * 8}])}
    data = TextDataModule(tokenizer, files, template={"a": "{x}", "b": "{y}"}, separator="none", block_size=8)
    data.setup("fit")
    assert sorted(all_ids(data.train_dataloader())) == [ord("1")] * 8 + [ord("2")] * 8
    with pytest.raises(ConfigError, match="template is given for 'c', which is not a set. The sets are: a, b"):
        TextDataModule(tokenizer, files, template={"c": "{x}"})
    with pytest.raises(ConfigError, match="val has a set named 'b', which is also the name of what val_fraction holds"):
        TextDataModule(tokenizer, files, {"b": text_file("b.txt", "b")}, val_fraction=0.5)
    with pytest.raises(ConfigError, match="train must be a file, or several by the names of adapters, got none"):
        TextDataModule(tokenizer, {})


# -- documents that do not see each other, and replay ------------------------------------------------------------------


def test_positions_begin_anew_with_each_document_and_row(tokenizer, rows_file):
    path = rows_file("train.jsonl", [{"text": "ab"}, {"text": "cdefg"}])
    data = set_up(tokenizer, path, block_size=4, batch_size=2, shuffle=False, document_mask="positions")
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].tolist() == [[BOS, *b"ab", BOS], [*b"cdef"]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, *b"ab", -100], [-100, *b"def"]]
    assert batch["use_cache"] is False
    dense = set_up(tokenizer, path, block_size=4, batch_size=2, shuffle=False, document_mask="dense")
    (batch,) = dense.train_dataloader()
    assert (batch["attention_mask"][0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 0, 0, 1],
    ]


@pytest.mark.parametrize("seed", range(8))
def test_full_rows_and_what_is_left_over_are_all_tokens(tokenizer, rows_file, seed):
    draw = random.Random(seed)
    texts = [
        "".join(draw.choices("abc é\n", k=draw.randrange(1, 40))).strip() or "x" for _ in range(draw.randrange(9, 40))
    ]
    block = draw.randrange(2, 30)
    expected = [token for text in texts for token in (BOS, *text.encode())]
    path = rows_file("train.jsonl", [{"text": text} for text in texts])
    for mask in ("none", "positions"):
        data = set_up(tokenizer, path, block_size=block, shuffle=False, document_mask=mask)
        ids = all_ids(data.train_dataloader())
        assert ids == expected[: len(ids)]
        assert len(ids) + data.left_over["train"] == len(expected)
        assert data.left_over["train"] < block


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_replay_makes_up_its_share_of_the_rows(tokenizer, text_file, rows_file, share):
    target = text_file("target.txt", "t" * 400)
    source = rows_file("source.jsonl", [{"story": "s" * 20}] * 3)  # less than is asked for: it begins anew
    data = set_up(
        tokenizer,
        target,
        separator="none",
        block_size=10,
        replay=source,
        replay_share=share,
        template={"replay": "{story}"},
    )
    rows = [row.tolist() for batch in data.train_dataloader() for row in batch["input_ids"]]
    replayed = [row for row in rows if row == [ord("s")] * 10]
    assert len(rows) - len(replayed) == 40
    assert len(replayed) / len(rows) == pytest.approx(share, abs=1 / 40)
    assert rows[: len(rows) - len(replayed)] != [[ord("t")] * 10] * 40  # mixed


def test_a_random_split_holds_out_whole_documents(tokenizer, rows_file):
    path = rows_file("a.jsonl", [{"text": f"{number:03}"} for number in range(40)])
    data = set_up(tokenizer, path, separator="none", block_size=3, val_fraction=0.2, split="random", shuffle=False)
    kept, held_out = (
        [bytes(row.tolist()).decode() for batch in loader for row in batch["input_ids"]]
        for loader in (data.train_dataloader(), data.val_dataloader()[0])
    )
    assert sorted(kept + held_out) == [f"{number:03}" for number in range(40)]
    assert len(held_out) == 8
    assert held_out != [f"{number:03}" for number in range(32, 40)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document_mask": "block"}, "document_mask must be one of none, positions, dense, got 'block'"),
        ({"replay": "b.txt", "replay_share": 1.0}, r"replay_share must lie in \(0, 1\), got 1.0"),
        ({"group_by_length": True}, "fills every row, so there are no lengths"),
        ({"streaming": True}, "'a.txt' is one document, which is read at once; leave streaming out"),
        ({"streaming": True, "max_train_tokens": 256}, "has no count of tokens; give max_train_rows"),
    ],
)
def test_what_packing_and_streaming_cannot_do_is_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        TextDataModule("tokenizer", "a.txt", **options)


def test_documents_that_cannot_be_used_are_counted(tokenizer, rows_file):
    path = rows_file("a.jsonl", [{"text": "abc"}, {"text": " "}, {"txt": "a"}, {"text": "def"}])
    with pytest.raises(ConfigError, match="line 2 has no text; on_bad_rows='report'"):
        set_up(tokenizer, path, block_size=4)
    with pytest.warns(UserWarning, match="1 empty row left out: .* line 2 has no text\n1 malformed row left out"):
        data = set_up(tokenizer, path, block_size=4, on_bad_rows="report", shuffle=False)
    assert all_ids(data.train_dataloader()) == [BOS, *b"abc", BOS, *b"def"]


def test_what_is_shown_as_predicted_begins_with_the_second_token(tokenizer, rows_file):
    data = set_up(tokenizer, rows_file("a.jsonl", [{"text": "abc"}]), block_size=4)
    assert data.shown(data.first("train", 1)[0]) == [("<s>", False), ("abc", True)]


def test_too_little_text_is_told_with_what_was_left_out(tokenizer, rows_file):
    path = rows_file("a.jsonl", [{"story": "abc"}] * 3)
    with pytest.raises(
        ConfigError, match="gives 0 tokens for 'train'.*of its rows, 3 malformed rows left out: .* line 1"
    ):
        set_up(tokenizer, path, block_size=4, on_bad_rows="report")

"""Every data module goes on in the middle of an epoch with the batch that comes next, also while it streams and with workers."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils._pytree import tree_map

from lightning_peft import (
    ClassificationDataModule,
    InstructionDataModule,
    MultipleChoiceDataModule,
    PEFTMixin,
    Seq2SeqDataModule,
    TextDataModule,
    TokenClassificationDataModule,
)
from lightning_peft.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of forking beside the threads of a runner

E2E = {"prompt": "{mr} =>", "completion": " {ref}"}
MODULES = {
    "text": (TextDataModule, "e2e/train.jsonl", {"template": "{mr} => {ref}", "block_size": 64}),
    "masked text": (
        TextDataModule,
        "lm/tinystories_valid.jsonl",
        {"document_mask": "positions", "block_size": 64, "replay": "e2e/valid.jsonl", "template": {"replay": "{ref}"}},
    ),
    "instructions": (InstructionDataModule, "e2e/train.jsonl", E2E),
    "packed instructions": (InstructionDataModule, "e2e/train.jsonl", {**E2E, "packing": True}),
    "grouped": (ClassificationDataModule, "cls/banking77_train.jsonl", {"group_by_length": True}),
    "choices": (MultipleChoiceDataModule, "mc/arc_challenge_dev.jsonl", {}),
    "text to text": (
        Seq2SeqDataModule,
        "sql/advising.jsonl",
        {"source": "{question}", "target": "{sql}", "max_target_length": 512},
    ),
}


def plain(batch):
    return tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, batch)


def make(data_dir, stories, kind, **options):
    module, path, settings = MODULES[kind]
    settings = {**settings, **({"replay": str(data_dir / settings["replay"])} if "replay" in settings else {})}
    common = {"max_train_rows": 40, "batch_size": 3, "on_bad_rows": "report", "seed": 5, **settings, **options}
    data = module(stories, str(data_dir / path), **common)
    data.setup("fit")
    return data


@pytest.mark.filterwarnings("ignore:of the rows of")
@pytest.mark.parametrize("kind", MODULES)
def test_every_module_gives_the_next_batch_again(data_dir, stories, kind):
    # One reading serves all loaders: what is compared is the order, and what a batch is made of.
    data = make(data_dir, stories, kind)
    whole = data.train_dataloader()
    expected = [plain(batch) for batch in whole] + [plain(batch) for batch in whole]
    epoch = len(expected) // 2
    assert expected[:epoch] != expected[epoch:]
    data.num_workers = 2 if kind in ("packed instructions", "grouped") else 0
    first = data.train_dataloader()
    batches = iter(first)
    got = [plain(next(batches)) for _ in range(2)]
    state = first.state_dict()
    again = make(data_dir, stories, kind).train_dataloader() if kind == "instructions" else data.train_dataloader()
    again.load_state_dict(state)
    rest = [plain(batch) for batch in again]
    assert got + rest == expected[:epoch]


@pytest.mark.filterwarnings("ignore:of the rows of")
@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [("instructions", 0), ("instructions", 2), ("packed instructions", 2), ("masked text", 0), ("masked text", 2)],
)
def test_a_stream_gives_the_next_batch_again(data_dir, stories, kind, num_workers):
    options = {"streaming": True, "shuffle_buffer": 8, "num_workers": num_workers}
    data = make(data_dir, stories, kind, **options)
    whole = data.train_dataloader()
    first = [plain(batch) for batch in whole]
    second = [plain(batch) for batch in whole] if num_workers == 0 else []
    assert first != second
    for taken in (1, len(first) // 2, len(first)) if num_workers == 0 and kind == "instructions" else (3,):
        loader = data.train_dataloader()
        batches = iter(loader)
        got = [plain(next(batches)) for _ in range(taken)]
        state = loader.state_dict()
        again = data.train_dataloader()
        again.load_state_dict(state)
        assert got + [plain(batch) for batch in again] == first
        if num_workers == 0:
            assert [plain(batch) for batch in again] == second


def test_a_stream_reads_every_row_once(data_dir, stories):
    def rows(**options):
        loader = make(data_dir, stories, "instructions", **options).train_dataloader()
        return [
            ids[: sum(mask)]
            for batch in map(plain, loader)
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]

    held = rows()
    for options in ({"shuffle_buffer": 8}, {"shuffle_buffer": 500}, {"num_workers": 2}):
        streamed = rows(streaming=True, **options)
        assert sorted(streamed) == sorted(held)
    assert rows(streaming=True, shuffle=False) == rows(shuffle=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_workers_share_the_rows_of_a_streamed_folder_of_files(byte_tokenizer, jsonl, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for part in range(3):
        jsonl(f"set/train-{part}.jsonl", [{"prompt": "p", "completion": chr(97 + part * 7 + i)} for i in range(7)])
    data = InstructionDataModule(
        byte_tokenizer,
        str(tmp_path / "set"),
        streaming=True,
        num_workers=2,
        load_options={"cache_dir": str(tmp_path / "cache")},
    )
    data.setup("fit")
    seen = [chr(row[2]) for batch in data.train_dataloader() for row in batch["input_ids"].tolist()]
    assert sorted(seen) == [chr(97 + number) for number in range(21)]


def test_bad_rows_of_a_stream_are_counted_once_whoever_reads_them(byte_tokenizer, jsonl):
    rows = [{"prompt": "p", "completion": str(number)} for number in range(20)]
    path = jsonl("a.jsonl", [*rows[:9], "{broken", {"prompt": "p", "completion": ""}, *rows[9:], "{broken"])
    for num_workers in (0, 2):
        data = InstructionDataModule(
            byte_tokenizer, path, streaming=True, on_bad_rows="report", num_workers=num_workers, batch_size=4
        )
        data.setup("fit")
        loader = data.train_dataloader()
        with pytest.warns(UserWarning, match="2 malformed rows left out"):
            assert sum(len(batch["labels"]) for batch in loader) == 20
        assert sum(len(batch["labels"]) for batch in loader) == 20
        assert dict(data.bad_rows["train"].counts) == {"malformed": 2, "empty": 1}
        assert len(data.first("train", 20)) == 20
        assert len(data.first("train", 20)) == 20
        with pytest.warns(UserWarning, match="2 malformed rows left out"):  # a second fit
            list(data.train_dataloader())
        assert dict(data.bad_rows["train"].counts) == {"malformed": 2, "empty": 1}


def test_a_stream_is_not_resumed_in_another_order(data_dir, stories):
    state = make(data_dir, stories, "instructions", streaming=True).train_dataloader().state_dict()
    for options, message in (
        ({"num_workers": 2}, "workers=0, here it is 2"),
        ({"seed": 6}, "seed=5, here it is 6"),
        ({"shuffle_buffer": 9}, "shuffle=1024, here it is 9"),
    ):
        loader = make(data_dir, stories, "instructions", streaming=True, **options).train_dataloader()
        with pytest.raises(ConfigError, match=message):
            loader.load_state_dict(state)


# -- in Trainer.fit ----------------------------------------------------------------------------------------------------


class Recorder(PEFTMixin, LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(plain(batch))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("limit", [1.0, 4])
@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_streamed_run_goes_on_in_the_trainer(tmp_path, byte_tokenizer, jsonl, make_trainer, step, limit):
    path = jsonl("a.jsonl", [{"prompt": "p", "completion": str(number)} for number in range(14)])

    def fit(ckpt_path=None, callbacks=()):
        data = InstructionDataModule(byte_tokenizer, path, path, streaming=True, shuffle_buffer=6, batch_size=3)
        trainer = make_trainer(
            tmp_path, max_epochs=3, limit_train_batches=limit, enable_checkpointing=False, callbacks=list(callbacks)
        )
        module = Recorder()
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module.seen

    whole = fit(callbacks=[SaveAt(step, tmp_path / "last.ckpt")])
    batches = 5 if limit == 1.0 else 4
    assert len(whole) == 3 * batches
    assert whole[:batches] != whole[batches : 2 * batches] != whole[2 * batches :]
    assert fit(tmp_path / "last.ckpt") == whole[step:]


def test_token_classification_resumes(byte_tokenizer, jsonl):
    rows = [{"tokens": ["a", str(number)], "ner_tags": ["O", "N"]} for number in range(12)]
    data = TokenClassificationDataModule(byte_tokenizer, jsonl("a.jsonl", rows), batch_size=2)
    data.setup("fit")
    expected = [plain(batch) for batch in data.train_dataloader()]
    loader = data.train_dataloader()
    next(iter(loader))
    again = data.train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert [plain(batch) for batch in again] == expected[1:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_that_gives_nothing_or_a_bad_row_says_so(byte_tokenizer, jsonl, num_workers):
    rows = [{"prompt": "p", "completion": "a"}] * 3
    for path, message in (
        (jsonl("a.jsonl", []), "a.jsonl' gives no rows for 'train'; it has none"),
        (jsonl("b.jsonl", [*rows, "{broken"]), "b.jsonl' line 4 is not JSON"),
    ):
        data = InstructionDataModule(byte_tokenizer, path, streaming=True, num_workers=num_workers)
        data.setup("fit")
        with pytest.raises(ConfigError, match=message):
            list(data.train_dataloader())


def test_workers_share_what_is_replayed(byte_tokenizer, jsonl):
    train = jsonl("a.jsonl", [{"text": "t" * 8}] * 40)
    replay = jsonl("b.jsonl", [{"text": " "}] + [{"text": chr(65 + number) * 8} for number in range(20)])
    options = {"separator": "none", "block_size": 8, "replay_share": 0.2, "on_bad_rows": "report"}
    data = TextDataModule(byte_tokenizer, train, streaming=True, replay=replay, num_workers=2, batch_size=5, **options)
    data.setup("fit")
    with pytest.warns(UserWarning, match="1 empty row left out"):
        rows = [chr(row[0]) for batch in data.train_dataloader() for row in batch["input_ids"].tolist()]
    replayed = [row for row in rows if row != "t"]
    assert (len(rows), len(replayed), len(set(replayed))) == (50, 10, 10)
    assert dict(data.bad_rows["train"].counts) == {"empty": 1}


def test_a_stream_does_not_look_for_text_to_replay_without_end(byte_tokenizer, jsonl):
    train, replay = jsonl("a.jsonl", [{"text": "t" * 8}] * 40), jsonl("b.jsonl", [{"text": "short"}])
    options = {"separator": "none", "block_size": 8, "replay_share": 0.2}
    data = TextDataModule(byte_tokenizer, train, streaming=True, replay=replay, **options)
    data.setup("fit")
    with pytest.raises(ConfigError, match="b.jsonl' gives 5 tokens to replay, fewer than one row of block_size=8"):
        list(data.train_dataloader())

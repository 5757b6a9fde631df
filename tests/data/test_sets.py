"""The sets of a data module: their names, which have rows, and who reads them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_peft import InstructionDataModule, TextDataModule
from lightning_peft.errors import ConfigError

ROWS = [{"prompt": "p", "completion": str(number)} for number in range(5)]


def of(data, batches):
    return sorted(
        data.shown({name: batch[name][row] for name in ("input_ids", "labels")})[-1][0][0]
        for batch in batches
        for row in range(len(batch["labels"]))
    )


def test_what_is_held_out_of_train_jsonl_has_a_name_of_its_own(byte_tokenizer, jsonl):
    data = InstructionDataModule(byte_tokenizer, jsonl("train.jsonl", ROWS), val_fraction=0.4, split="end")
    data.setup("fit")
    assert data.val_names == ["train"]
    held_out = [data.shown(one)[-1][0] for one in data.first("train (held out)", 9)]
    assert held_out == ["3</s>", "4</s>"]
    assert len(data.first("train", 9)) == 3
    assert data.summary().splitlines()[1].startswith("train (held out): 2 rows")
    with pytest.raises(ConfigError, match="there is no set 'valid'. The sets are: train, train .held out."):
        data.first("valid", 1)
    text = TextDataModule(
        byte_tokenizer,
        jsonl("train.jsonl", [{"text": "abcdefghi"}] * 4),
        block_size=8,
        separator="none",
        val_fraction=0.5,
    )
    text.setup("fit")
    assert text.left_over == {"train": 2, "train (held out)": 2}


def test_a_split_that_leaves_nothing_to_train_on_is_told(byte_tokenizer, jsonl):
    path = jsonl("a.jsonl", ROWS[:2])
    with pytest.raises(ConfigError, match=r"gives no rows for 'train'; val_fraction=0.9 holds them all out"):
        InstructionDataModule(byte_tokenizer, path, val_fraction=0.9).setup("fit")


def test_rows_are_evaluated_and_predicted_without_a_fit_before(byte_tokenizer, jsonl):
    path = jsonl("a.jsonl", ROWS)
    for stage in ("validate", "test", "predict"):
        data = InstructionDataModule(byte_tokenizer, path, path)
        data.setup(stage)
        (loader,) = {"validate": data.val_dataloader, "test": data.test_dataloader, "predict": data.predict_dataloader}[
            stage
        ]()
        assert of(data, loader) == ["0", "1", "2", "3", "4"]
        with pytest.raises(
            ConfigError, match="there is nothing to evaluate on; give InstructionDataModule val= or val_f"
        ):
            InstructionDataModule(byte_tokenizer, path).setup(stage)


@pytest.mark.parametrize("options", [{}, {"group_by_length": True}, {"shuffle": False}])
def test_processes_share_the_rows_of_a_module(byte_tokenizer, jsonl, options):
    data = InstructionDataModule(byte_tokenizer, jsonl("a.jsonl", ROWS), batch_size=2, **options)
    data.setup("fit")

    def read(rank, processes, epoch):
        dealt = {"rank": rank, "num_replicas": processes}
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=dealt, world_size=processes, limit_train_batches=1.0)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return of(data, loader)

    for epoch in range(3):
        parts = [read(rank, 2, epoch) for rank in range(2)]
        assert [len(part) for part in parts] == [2, 2]  # of five rows one is left out of an epoch
        assert len({*parts[0], *parts[1]}) == 4
    with pytest.raises(ConfigError, match="6 processes train on 5 rows, so that one has none; use fewer devices"):
        read(0, 6, 0)

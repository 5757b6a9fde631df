"""Every data module is made from YAML as the command line makes it, and gives batches of real rows.

Those for text, instructions and classification are in examples/configs, which are run.
"""

from __future__ import annotations

import json

import pytest

import lightning_peft
from lightning_peft import PEFTCLI, RowsDataModule
from lightning_peft import data as data_package

FILES = {
    "MultipleChoiceDataModule": {"train": "mc/arc_challenge_test.jsonl", "num_choices": 4},
    "Seq2SeqDataModule": {"train": "math/svamp.jsonl", "source": "{Body} {Question}", "target": "{Equation}"},
    "TokenClassificationDataModule": {},
    "ImageFolderDataModule": {},
}


def test_every_data_module_is_tried():
    modules = {
        name for name, kind in vars(data_package).items() if isinstance(kind, type) and issubclass(kind, RowsDataModule)
    }
    run = {"TextDataModule", "InstructionDataModule", "ClassificationDataModule"}
    assert modules == {*FILES, *run, "RowsDataModule"}
    assert modules <= set(lightning_peft.__all__)


@pytest.mark.parametrize("name", FILES)
def test_a_data_module_is_made_from_yaml(name, data_dir, stories, tmp_path):
    settings = dict(FILES[name])
    if name == "ImageFolderDataModule":
        image = pytest.importorskip("PIL.Image").new("RGB", (4, 4))
        (tmp_path / "images" / "a").mkdir(parents=True)
        image.save(tmp_path / "images" / "a" / "1.png")
        settings = {"train": str(tmp_path / "images"), "image_size": 4, "mean": [0.0, 0.0, 0.0]}
    elif name == "TokenClassificationDataModule":
        words = (data_dir / "lm" / "wikitext2_valid.txt").read_text(encoding="utf-8").split()[:300]
        rows = [
            {"tokens": words[i : i + 10], "ner_tags": [str(w.istitle()) for w in words[i : i + 10]]}
            for i in range(0, 300, 10)
        ]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"tokenizer": stories, "train": str(tmp_path / "a.jsonl")}
    else:
        settings |= {"tokenizer": stories, "train": str(data_dir / settings["train"])}
    settings |= {"batch_size": 2, "max_train_rows": 12}
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
        "model": {"base": {"class_path": "CausalLMLoader", "init_args": {"path": stories}}, "method": "lora"},
        "data": {"class_path": name, "init_args": settings},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    data = PEFTCLI(args=["--config", str(tmp_path / "run.yaml")], run=False).datamodule
    assert type(data).__name__ == name
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(batch["labels"]) == min(2, len(data._datasets["train", True]))
    assert any(learned for _, learned in data.shown(data.first("train", 1)[0]))

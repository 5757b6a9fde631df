"""``lightning-peft preview`` shows what is predicted."""

from __future__ import annotations

import json

import pytest

from lightning_peft.cli import main


@pytest.fixture
def configuration(tmp_path, llama_dir):
    rows = [{"prompt": "what is it?", "completion": "a cat"}, {"prompt": "", "completion": "x"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.jsonl").write_text(json.dumps({"prompt": "and you?", "completion": "a dog"}) + "\n")
    settings = {
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
        "model": {"base": {"class_path": "CausalLMLoader", "init_args": {"path": llama_dir}}, "method": "lora"},
        "data": {
            "class_path": "InstructionDataModule",
            "init_args": {
                "tokenizer": llama_dir,
                "train": str(tmp_path / "train.jsonl"),
                "val": str(tmp_path / "valid.jsonl"),
                "on_bad_rows": "report",
            },
        },
    }

    def write(**data):
        settings["data"]["init_args"].update(data)
        (tmp_path / "run.yaml").write_text(json.dumps(settings))
        return str(tmp_path / "run.yaml")

    return write


@pytest.mark.filterwarnings("ignore:of the rows of")
def test_what_is_predicted_is_marked_and_bad_rows_are_told(configuration, capsys):
    path = configuration()
    assert main(["preview", "--config", path]) == 0
    out = capsys.readouterr().out
    assert "train: 1 rows" in out
    assert "1 empty row left out: " in out
    assert "train, row 1: " in out
    # The tokenizer of the fixture knows single letters and no space, and decodes with spaces between.
    marked = out[out.index("[[") + 2 : out.index("]]")]
    assert marked.replace("<unk>", "").replace(" ", "") == "acat</s>"
    assert "\x1b[" not in out


@pytest.mark.filterwarnings("ignore:of the rows of")
def test_colour_can_be_forced_and_other_sets_shown(configuration, capsys):
    assert main(["preview", "--config", configuration(), "--set", "valid", "--colour", "always"]) == 0
    out = capsys.readouterr().out
    learned = out.partition("\x1b[1;32m")[2].partition("\x1b[0m")[0]
    assert learned.replace("<unk>", "").replace(" ", "") == "adog</s>"
    assert "[[" not in out


def test_no_rows_are_refused(configuration, capsys):
    assert main(["preview", "--config", configuration(), "--rows", "0"]) == 2
    assert "preview shows at least one row, got rows=0" in capsys.readouterr().err

"""A model with members is a population, on the command line and in files."""

from __future__ import annotations

import json

import pytest
import yaml

from lightning_peft import PEFTCLI, CausalLMLoader, LoRA, PEFTModule, PopulationModule, load_adapter
from lightning_peft.cli import main
from lightning_peft.cli.yaml_config import has_members


@pytest.fixture
def config(llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return {
        "model": {"base": {"class_path": "CausalLMLoader", "init_args": {"path": llama_dir}}},
        "data": {
            "class_path": "TextDataModule",
            "init_args": {
                "tokenizer": llama_dir,
                "train": str(text),
                "val": {"t": str(text)},
                "block_size": 16,
                "batch_size": 2,
                "max_val_tokens": 128,
            },
        },
        "trainer": {
            "max_steps": 4,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "PopulationCheckpoint", "init_args": {"dirpath": str(tmp_path / "members")}}],
        },
    }


def write(config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


def test_members_of_a_grid_are_trained_from_a_file(config, llama_dir, tmp_path, capsys):
    config["model"] |= {
        "members": {
            "method": {"class_path": "lora", "init_args": {"alpha": 4}},
            "fields": {"rank": [2, 4]},
            "lr": [0.01, 0.001],
            "patience": 2,
        },
        "halving": {"at": [2]},
    }
    assert main(
        ["fit", "--config", write(config, tmp_path), "--model.optimizer", "SGD", "--model.optimizer.lr", "0.1"]
    ) in (0, None)
    results = json.loads((tmp_path / "members" / "results.json").read_text())["members"]
    assert sorted(one["name"] for one in results) == [
        "lora-rank2-lr1e-2",
        "lora-rank2-lr1e-3",
        "lora-rank4-lr1e-2",
        "lora-rank4-lr1e-3",
    ]
    assert sorted(one["status"] for one in results) == ["finished", "finished", "halved", "halved"]
    assert {one["settings"]["lr"] for one in results} == {0.01, 0.001}
    assert results[0]["name"] in capsys.readouterr().out
    model = CausalLMLoader(path=llama_dir).load()
    assert load_adapter(model, tmp_path / "members" / results[0]["name"] / "best").method.name == "lora"


def test_a_list_of_members_may_name_methods_optimizers_and_schedules(config, tmp_path):
    config["model"]["members"] = [
        {"method": "lora", "name": "a", "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}},
        {
            "method": {"class_path": "lora", "init_args": {"rank": 2}},
            "lr_scheduler": {"class_path": "StepLR", "init_args": {"step_size": 1}},
        },
    ]
    cli = PEFTCLI(args=["--config", write(config, tmp_path)], run=False)
    assert isinstance(cli.model, PopulationModule)
    assert list(cli.model.members) == ["a", "lora"]
    assert cli.model.members["lora"].method == LoRA(rank=2)
    grid = {"method": "lora", "seed": [1, 2]}
    cli = PEFTCLI(
        args=["--config", write({**config, "model": {**config["model"], "members": grid}}, tmp_path)], run=False
    )
    assert isinstance(cli.model, PopulationModule)
    assert [member.seed for member in cli.model.members.values()] == [1, 2]


def test_a_model_without_members_is_what_it_was(config, tmp_path):
    config["model"]["method"] = "lora"
    del config["trainer"]["callbacks"]
    cli = PEFTCLI(args=["--config", write(config, tmp_path)], run=False)
    assert type(cli.model) is PEFTModule


def test_a_file_of_other_members_is_refused_with_its_reason(config, tmp_path, capsys):
    config["model"]["members"] = [{"method": "lora", "name": "a"}, {"method": "lora", "name": "a"}]
    assert main(["fit", "--config", write(config, tmp_path)]) == 2
    assert "'a' is given to 2" in capsys.readouterr().err


def test_where_members_are_looked_for(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("fit:\n  model:\n    members: []\n")
    other = tmp_path / "b.yaml"
    other.write_text("model: {method: members}\n")
    assert has_members(["fit", "--config", str(file)])
    assert has_members([f"--config={file}"])
    assert has_members({"fit": {"model": {"members": []}}})
    assert not has_members(["fit", "--config", str(other)])
    assert not has_members(["fit", "--config", str(tmp_path / "missing.yaml")])

"""Every configuration in examples/configs is one that the program accepts, and one of them trains a real model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_peft import PEFTCLI, CausalLMLoader, RowsDataModule, adapter_layers, load_adapter
from lightning_peft.cli import main

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
DATA = "LIGHTNING_PEFT_DATA"


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_there_are_configurations():
    assert {file.name for file in CONFIGS.iterdir()} >= {
        "classification.yaml",
        "continued_pretraining.yaml",
        "hub_llama.yaml",
        "instructions.yaml",
        "qlora.yaml",
        "quickstart.yaml",
        "stories260k_e2e.yaml",
        "stories260k_shakespeare.yaml",
    }


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda config: config.stem)
def test_a_configuration_is_accepted(config, monkeypatch):
    monkeypatch.setenv(DATA, "some/folder")
    # Everything is made, and nothing is run or loaded.
    cli = PEFTCLI(args=["--config", str(config), "--trainer.accelerator=cpu", "--trainer.devices=1"], run=False)
    assert isinstance(cli.datamodule, RowsDataModule)
    assert cli.datamodule.val_names
    assert cli.config.model.lr_scheduler.init_args.T_max == cli.trainer.max_steps
    assert cli.config.model.base.init_args.path == cli.datamodule.tokenizer


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda config: config.stem)
def test_a_configuration_begins_with_how_to_run_it(config):
    text = config.read_text(encoding="utf-8")
    comment = text[: text.index("\n\n")]
    assert f"lightning-peft fit --config examples/configs/{config.name}" in comment
    assert all(line.startswith("#") for line in comment.splitlines())
    assert (DATA in text) == (f"export {DATA}=" in comment)


# Ranks are allocated between steps that one step does not have.
SHORTER = {"adalora": [f"--model.method.init_args.{name}_steps=0" for name in ("initial", "final")]}
ON_REAL_DATA = [file for file in sorted(CONFIGS.glob("*.yaml")) if DATA in file.read_text(encoding="utf-8")]


@pytest.mark.skipif(DATA not in os.environ, reason=f"{DATA} does not name the folder of models and data")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of forking beside the threads of a test runner
@pytest.mark.parametrize("config", ON_REAL_DATA, ids=lambda config: config.stem)
def test_a_configuration_runs(config, working_directory):
    few = ["max_steps=1", "limit_val_batches=1", "val_check_interval=1", "log_every_n_steps=1"]
    few += ["accelerator=cpu", "enable_progress_bar=false"]
    small = ["max_train_tokens=8192", "max_val_tokens=1024"]
    if "TextDataModule" not in config.read_text(encoding="utf-8"):
        small = ["max_train_rows=200", "max_val_rows=8"]
    options = [*(f"--trainer.{option}" for option in few), *(f"--data.init_args.{option}" for option in small)]
    options += SHORTER.get(config.stem, [])
    assert main(["fit", "--config", str(config), *options]) in (0, None)
    assert list(working_directory.rglob("adapter_model.safetensors"))


@pytest.mark.skipif(DATA not in os.environ, reason=f"{DATA} does not name the folder of models and data")
def test_the_real_model_trains_for_a_few_steps(working_directory):
    config = CONFIGS / "stories260k_e2e.yaml"
    few = [
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
    ]
    small = ["--data.init_args.max_train_tokens=8192", "--data.init_args.max_val_tokens=1024"]
    assert main(["fit", "--config", str(config), *few, *small]) in (0, None)
    adapter = working_directory / "runs" / "stories260k_e2e" / "checkpoints" / "last.adapter"
    model = CausalLMLoader(path=f"{os.environ[DATA]}/models/stories260k").load()
    load_adapter(model, adapter)
    assert adapter_layers(model)
    metrics = next((working_directory / "runs").rglob("metrics.csv")).read_text()
    assert "val_loss/e2e" in metrics
    assert "val_loss/stories" in metrics

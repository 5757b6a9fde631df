import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_peft import LoRA
from lightning_peft.cli import PEFTCLI, main

ARGS = ["--model.base", "CausalLMLoader", "--model.base.path", "x", "--data", "TextDataModule"]
ARGS += ["--data.tokenizer", "x", "--data.train", "a.txt"]


class IdleTrainer(Trainer):
    """Validates nothing."""

    @override
    def validate(self, model=None, datamodule=None, ckpt_path: str | None = None) -> None:
        """Do nothing."""


def printed(capsys, *args):
    assert main(["fit", *args, "--print_config"]) == 0
    return capsys.readouterr().out


def test_a_printed_configuration_reads_back_as_itself(capsys, tmp_path):
    args = [*ARGS, "--model.method", "LoRA", "--model.method.rank", "16", "--model.targets", "[query, value]"]
    text = printed(capsys, *args, "--trainer.callbacks+=AdapterCheckpoint", "--model.optimizer.lr", "1e-3")
    config = yaml.safe_load(text)
    assert config["model"]["method"]["class_path"] == "lightning_peft.LoRA"
    assert config["model"]["method"]["init_args"]["rank"] == 16
    assert config["model"]["targets"] == ["query", "value"]
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.001
    assert config["trainer"]["callbacks"][0]["class_path"] == "lightning_peft.AdapterCheckpoint"
    (tmp_path / "run.yaml").write_text(text)
    assert printed(capsys, "--config", str(tmp_path / "run.yaml")) == text


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("model:\n  method: {class_path: LoRA, init_args: {rank: 4, alpha: 8.0}}\n")
    text = printed(capsys, "--config", "run.yaml", *ARGS, "--model.method.rank", "6")
    fields = yaml.safe_load(text)["model"]["method"]["init_args"]
    assert (fields["rank"], fields["alpha"], fields["dropout"]) == (6, 8.0, 0.0)


@pytest.mark.parametrize("args", [["--model.method", "lora"], ["--model.method=lora"]])
def test_a_registry_name_is_the_class(capsys, args):
    assert yaml.safe_load(printed(capsys, *ARGS, *args))["model"]["method"]["class_path"] == "lightning_peft.LoRA"


def test_a_registry_name_in_a_file_is_the_class(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("model:\n  method: lora\n")
    config = yaml.safe_load(printed(capsys, "--config", "run.yaml", *ARGS))
    assert config["model"]["method"]["class_path"] == "lightning_peft.LoRA"


def test_variables_stand_for_their_values(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ACME_CORPUS", "/corpus")
    (tmp_path / "run.yaml").write_text(
        "data:\n  class_path: TextDataModule\n  init_args: {train: '${oc.env:ACME_CORPUS}/a.txt'}\n"
    )
    text = printed(capsys, "--config", "run.yaml", *ARGS[:4], "--model.method=LoRA", "--data.tokenizer=x")
    assert yaml.safe_load(text)["data"]["init_args"]["train"] == "/corpus/a.txt"


def test_the_help_of_a_method_is_its_docstrings(capsys):
    for name in ("LoRA", "lora"):
        assert main(["fit", "--model.method.help", name]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "--model.method.rank RANK Rank of the update, r in the paper. (type: int, default: 8)" in text


def test_a_third_party_method_and_data_module_go_by_their_short_names(capsys, acme):
    args = [
        *ARGS[:4],
        "--model.method",
        "AcmeLoRA",
        "--model.method.tilt",
        "0.5",
        "--data",
        "AcmeData",
        "--data.rows=3",
    ]
    config = yaml.safe_load(printed(capsys, *args))
    assert config["model"]["method"]["class_path"] == "acme_peft.AcmeLoRA"
    assert config["model"]["method"]["init_args"]["tilt"] == 0.5
    assert config["data"] == {"class_path": "acme_peft.AcmeData", "init_args": {"rows": 3, "length": 6}}


def test_hyperparameters_in_a_checkpoint_do_not_override_the_command_line(tmp_path):
    other = {"class_path": "lightning_peft.LoRA", "init_args": {"rank": 3}}
    torch.save({"hyper_parameters": {"method": other, "name": "other"}}, tmp_path / "other.ckpt")
    args = ["validate", *ARGS, "--model.method", "LoRA", "--model.method.rank", "7", "--ckpt_path", "other.ckpt"]
    cli = PEFTCLI(args=[*args, "--trainer.logger=false"], trainer_class=IdleTrainer)
    assert cli.model.method == LoRA(rank=7)
    assert cli.model.adapter_name == "default"


def test_a_module_of_ones_own_takes_the_place_of_ours():
    class Own(LightningModule):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.width = width

    cli = PEFTCLI(Own, args=["--model.width=5", "--trainer.logger=false"], run=False)
    assert (cli.model.width, cli.datamodule) == (5, None)

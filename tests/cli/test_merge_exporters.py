"""``lightning-peft merge`` with the exporter named on the command line."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft import LoRA, MixLoRA, MoEUpcycling, inject, save_adapter
from lightning_peft.cli import main

IDS = torch.arange(12).view(2, 6)

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")


@pytest.fixture
def saved(base, tmp_path):
    """Save an adapter of a method, and return what base and adapter compute."""

    def save(method, targets=None):
        model = AutoModelForCausalLM.from_pretrained(base)
        inject(model, method, targets)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            save_adapter(model, tmp_path / "adapter")
            return model.eval()(IDS).logits

    return save


def test_an_exporter_writes_what_it_writes_and_the_tokenizer(saved, base, tmp_path):
    wanted = saved(MoEUpcycling(experts=4))
    assert main(["merge", "--adapter", "adapter", "--output", "out", "--exporter", "mixtral"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.model_type == "mixtral"
    torch.testing.assert_close(loaded(IDS).logits, wanted)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_options_are_the_fields_of_the_exporter(saved, tmp_path):
    saved(MoEUpcycling(experts=4))
    command = ["merge", "--adapter", "adapter", "--output", "out", "--exporter", "transformers_moe", "--options"]
    assert main([*command, '{"format": "qwen2_moe", "tokens": 8}']) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "qwen2_moe"
    assert json.loads((tmp_path / "out" / "export.json").read_text())["tokens"] == 8


def test_the_tokenizer_is_left_out_where_that_is_asked_for(saved, tmp_path):
    saved(LoRA(rank=2), ["query"])
    assert main(["merge", "--adapter", "adapter", "--output", "out", "--options", '{"tokenizer": false}']) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_an_adapter_of_hf_peft_names_the_base_where_it_stays(saved, tmp_path):
    peft = pytest.importorskip("peft")
    wanted = saved(MixLoRA(experts=4, rank=2, alpha=4.0))
    command = ["merge", "--adapter", "adapter", "--output", "out", "--exporter", "mixtral_peft"]
    assert main(command) == 0
    assert main([*command, "--overwrite"]) == 2  # it is not the folder of a model
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(adapted(IDS).logits, wanted)


def test_what_stood_there_stays_when_the_format_cannot_hold_the_model(saved, tmp_path, capsys):
    saved(MoEUpcycling(experts=4))
    command = ["merge", "--adapter", "adapter", "--output", "out", "--overwrite", "--exporter"]
    assert main([*command, "mixtral"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    saved(MoEUpcycling(experts=4, combine="softmax"))
    assert main([*command, "mixtral"]) == 2
    assert "combine='softmax'" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert main([*command, "transformers_moe"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "qwen2_moe"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_names_and_options_that_nobody_knows_are_refused(saved, tmp_path, capsys):
    saved(LoRA(rank=2), ["query"])
    command = ["merge", "--adapter", "adapter", "--output", "out", "--exporter"]
    assert main([*command, "mixtrl"]) == 2
    assert "did you mean 'mixtral'" in capsys.readouterr().err
    assert main([*command, "mixtral", "--options", '{"tokns": 3}']) == 2
    assert "'mixtral' has no field 'tokns'; did you mean 'tokens'?" in capsys.readouterr().err
    assert main([*command, "mixtral"]) == 2
    assert "none is active in this LlamaForCausalLM" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]

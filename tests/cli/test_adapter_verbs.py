"""``lightning-peft combine``, ``diff``, ``inspect``, ``prune`` and ``to-lora``."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_peft import DoRA, LoRA, combine_adapters, inject, load_adapter, save_adapter, save_adapters, spectrum
from lightning_peft.cli import main

IDS = torch.arange(12).view(2, 6)


def shake(model, name):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture
def model(base, tmp_path):
    """A model with two adapters, which are also in the folders a and b."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, rank in {"a": 2, "b": 3}.items():
        inject(model, LoRA(rank=rank), ["query", "up"], name=name)
        shake(model, name)
        save_adapter(model, tmp_path / name, name=name)
    return model.eval()


def logits(base, folder):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    load_adapter(model, folder)
    return model(IDS).logits


def test_adapters_are_combined_compared_and_pruned(model, base, capsys):
    command = ["combine", "a", "b", "--weights", "0.7", "-0.3", "--method", "cat", "--output", "out"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "out: 4 weights, relative error 0.00e+00"
    combine_adapters(model, {"a": 0.7, "b": -0.3}, method="cat")
    torch.testing.assert_close(logits(base, "out"), model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert main(command) == 2
    assert "--output 'out' is not empty" in capsys.readouterr().err

    assert main(["diff", "out", "a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].split()[:3] == ["weight", "norm", "A"]
    assert lines[-1].startswith("all ")
    assert main(["diff", "a", "a"]) == 0
    distance, cosine = capsys.readouterr().out.splitlines()[-1].split()[3:5]
    assert float(distance) <= 1e-12
    assert cosine == "1"

    assert main(["prune", "out", "--rank", "2", "--output", "small"]) == 0
    capsys.readouterr()
    assert main(["inspect", "small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    label, one = next(iter(spectrum("small").items()))
    assert lines[1].startswith(label)
    assert f"{one.norm:.4g}" in lines[1]
    assert "2 of 2" in lines[1]


def test_every_adapter_of_a_folder_is_looked_at(base, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    for name, rank in (("default", 2), ("other", 3)):
        inject(model, LoRA(rank=rank), ["query"], name=name)
        shake(model, name)
    save_adapters(model, "both")
    assert main(["inspect", "both"]) == 0
    plain = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:]]
    assert main(["inspect", "both", "--weights", "--base", str(base)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [line[0] for line in plain]
    assert {tuple(line[1:]) for line in plain} == {("2", "of", "2"), ("3", "of", "3")}


def test_an_adapter_of_another_method_becomes_lora(base, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    inject(model, DoRA(rank=2), ["query"])
    shake(model, "default")
    save_adapter(model, "dora")
    assert main(["inspect", "dora"]) == 2
    assert "lightning-peft to-lora" in capsys.readouterr().err
    assert main(["to-lora", "--adapter", "dora", "--rank", "16", "--output", "out"]) == 0
    torch.testing.assert_close(logits(base, "out"), model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_model_that_was_trained_in_full_becomes_lora(base, tmp_path, capsys):
    tuned = AutoModelForCausalLM.from_pretrained(base).eval()
    weight = tuned.model.layers[0].mlp.up_proj.weight
    weight.data.addr_(torch.ones(weight.shape[0]), torch.randn(weight.shape[1]), alpha=0.2)
    tuned.save_pretrained("tuned")
    assert main(["to-lora", "--tuned", "tuned", "--base", base, "--rank", "4", "--output", "out"]) == 0
    assert "out: 1 weights" in capsys.readouterr().out
    torch.testing.assert_close(logits(base, "out"), tuned(IDS).logits, rtol=1e-4, atol=1e-5)
    tuned.model.norm.weight.data += 0.1
    tuned.save_pretrained("tuned")
    command = ["to-lora", "--tuned", "tuned", "--base", base, "--rank", "4", "--output", "out2"]
    assert main(command) == 2
    assert "has no update for, such as 'model.norm.weight'" in capsys.readouterr().err
    assert main([*command, "--drop_rest"]) == 0
    assert "left out: model.norm.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["combine", "a", "b", "--weights", "1", "--output", "x"], "got 2 adapters and 1 weights"),
        (["combine", "a", "--weights", "1", "--output", "x", "--method", "tis"], "method must be one of svd, cat"),
        (["prune", "a", "--output", "x"], "give one of rank= and energy="),
        (["to-lora", "--output", "x", "--rank", "2"], "to-lora needs --adapter FOLDER, or --tuned"),
        (["diff", "a", "nowhere"], "'nowhere' is not a folder"),
    ],
)
def test_what_makes_no_sense_is_refused(model, args, message, capsys):
    assert main(args) == 2
    assert message in capsys.readouterr().err

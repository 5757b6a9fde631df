"""``lightning-peft convert``: a file of other software becomes a folder of ours."""

import json

import pytest
import torch

from lightning_peft import load_adapter
from lightning_peft.adapter_files import read_adapter
from lightning_peft.cli import main


@pytest.fixture
def file(base, tmp_path):
    from transformers import AutoModelForCausalLM

    weight = AutoModelForCausalLM.from_pretrained(base).model.layers[0].self_attn.q_proj.weight
    place = "model.layers.0.self_attn.q_proj"
    tensors = {f"{place}.lora_A": torch.ones(2, weight.shape[1]), f"{place}.lora_B": torch.ones(weight.shape[0], 2)}
    torch.save(tensors, tmp_path / "lora.bin")
    return tmp_path / "lora.bin"


def test_a_file_becomes_a_folder_of_ours(base, file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    line = ["convert", "--adapter", str(file), "--output", str(out), "--base", str(base)]
    options = ["--format", "loralib", "--options", json.dumps({"alpha": 6})]
    assert main([*line, *options]) == 0
    assert f"{out}: lora at 1 places" in capsys.readouterr().out
    assert read_adapter(out).own["base"]["digest"]
    assert read_adapter(out).method.alpha == 6
    load_adapter(AutoModelForCausalLM.from_pretrained(base), out)
    assert main([*line, *options]) == 2
    assert "is not a new or empty folder; name another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a file of loralib does not hold alpha"),
        (["--options", '{"alpha": 6}'], "are fields of a format; name it with --format, such as --format loralib"),
        (["--format", "loralip"], "unknown adapter format 'loralip'; did you mean 'loralib'"),
        (["--format", "loralib", "--options", '{"alhpa": 6}'], "'loralib' has no field 'alhpa'; did you mean 'alpha'"),
    ],
)
def test_what_cannot_be_done_is_said(options, message, base, file, tmp_path, capsys):
    line = ["convert", "--adapter", str(file), "--output", str(tmp_path / "out"), "--base", str(base)]
    assert main([*line, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

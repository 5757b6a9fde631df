"""The verb that tells which base this is, and whether an adapter belongs to it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_peft import LoRA, inject, save_adapter
from lightning_peft.cli import main
from lightning_peft.fingerprint import fingerprint


@pytest.fixture(scope="module")
def folders(llama_dir, tmp_path_factory):
    """A base, the same with one element changed that is not sampled, and adapters of the first."""
    root = tmp_path_factory.mktemp("fingerprints")
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 1] += 1e-3
    model.save_pretrained(root / "changed")
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    inject(model, LoRA(rank=2), ["query"])
    save_adapter(model, root / "sampled")
    save_adapter(model, root / "full", fingerprint="complete")
    return llama_dir, root, fingerprint(model).digest


def test_a_base_alone_is_told(folders, capsys):
    base, _, digest = folders
    assert main(["fingerprint", "--base", base]) == 0
    assert f"{base}: sampled {digest}" in capsys.readouterr().out
    assert main(["fingerprint", "--base", base, "--complete"]) == 0
    assert f"sampled {digest}, full " in capsys.readouterr().out


def test_an_adapter_and_its_base_are_the_same(folders, capsys):
    _, root, _digest = folders
    assert main(["fingerprint", "--adapter", str(root / "full")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["base", "adapter", "the"]
    assert lines[0].split("sampled")[1] == lines[1].split("sampled")[1]
    assert lines[2] == "the same: 21 parameters by samples, 21 in full"


def test_a_base_changed_by_one_element_is_seen_in_full_alone(folders, capsys):
    _, root, _ = folders
    changed = str(root / "changed")
    assert main(["fingerprint", "--base", changed, "--adapter", str(root / "sampled")]) == 0
    assert main(["fingerprint", "--base", changed, "--adapter", str(root / "full")]) == 2
    assert "1 of 21 parameters differ, first 'model.layers.0.mlp.up_proj.weight'" in capsys.readouterr().err


def test_a_folder_without_a_fingerprint_is_told(folders, tmp_path, capsys):
    base, root, _ = folders
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / file).write_bytes((root / "full" / file).read_bytes())
    assert main(["fingerprint", "--base", base, "--adapter", str(tmp_path)]) == 2
    assert "holds no fingerprint of its base" in capsys.readouterr().err
    assert main(["fingerprint"]) == 2
    assert "give --base FOLDER_OR_ID" in capsys.readouterr().err

"""``lightning-peft consolidate``: what processes wrote together as one file, or as an adapter folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lightning_peft import LoRA, NormTuning, PEFTModule, load_adapters
from lightning_peft.adapter_files import OWN_CONFIG, WEIGHTS
from lightning_peft.cli import main
from lightning_peft.composition import Adaptation
from lightning_peft.testing import tiny_llama

METHODS = [Adaptation(LoRA(rank=4, init="gaussian"), ["query", "value"]), NormTuning()]


def module(method=METHODS):
    return PEFTModule(tiny_llama(), method, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))


@pytest.fixture
def saved(run, tmp_path):
    """A checkpoint folder of two processes, with the adapter folder beside it, and a folder of the base."""
    run("fsdp folder", module=module(), steps=2, save=tmp_path / "run")
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "run" / "step=2.ckpt"


def test_one_file_resumes_as_the_folder_does(run, saved, tmp_path, capsys):
    output = tmp_path / "new" / "one.ckpt"
    assert main(["consolidate", str(saved), str(output)]) == 0
    printed = capsys.readouterr().out
    assert f"{output}: " in printed
    assert "at step 2" in printed
    assert f"the adapter alone is in {saved.with_suffix('.adapter')}" in printed
    for strategy in ("ddp", "fsdp", "single"):
        folder, file = (run(strategy, module=module(), steps=4, resume=str(path)).losses for path in (saved, output))
        assert folder == file
    assert main(["consolidate", str(saved), str(output)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_it_holds_what_one_process_writes(run, saved, tmp_path):
    run("fsdp", module=module(), steps=2, save=tmp_path / "file")
    assert main(["consolidate", str(saved), str(tmp_path / "one.ckpt")]) == 0
    ours, theirs = (
        torch.load(path, weights_only=True) for path in (tmp_path / "one.ckpt", tmp_path / "file" / "step=2.ckpt")
    )
    assert theirs.keys() <= ours.keys()
    assert ours["lightning_peft"] == theirs["lightning_peft"]
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert all(torch.equal(ours["state_dict"][key], value) for key, value in theirs["state_dict"].items())


def test_the_adapter_folder_is_the_one_beside_it_or_written_over_the_base(saved, tmp_path, capsys):
    beside = saved.with_suffix(".adapter")
    assert main(["consolidate", str(saved), str(tmp_path / "copied"), "--adapter"]) == 0
    assert f"copied from {beside}, which was saved with the checkpoint" in capsys.readouterr().out
    kept = tmp_path / "kept.adapter"
    shutil.move(beside, kept)
    assert main(["consolidate", str(saved), str(tmp_path / "made"), "--adapter"]) == 2
    assert "its base is needed to write one: give --base" in capsys.readouterr().err
    assert main(["consolidate", str(saved), str(tmp_path / "made"), "--adapter", "--base", str(tmp_path / "base")]) == 0
    for name in ("lora", "norm_tuning"):
        wanted = load_file(kept / name / WEIGHTS)
        for folder in ("made", "copied"):
            found = load_file(tmp_path / folder / name / WEIGHTS)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert set(load_adapters(tiny_llama(), tmp_path / "made")) == {"lora", "norm_tuning"}


def test_matrices_that_were_cut_by_columns_are_whole_again(run, tmp_path):
    """Of rank 2 among four processes no other cut gives each of them a part."""
    method, path = LoRA(rank=2, init="gaussian"), tmp_path / "run" / "step=2.ckpt"
    run("fsdp folder", devices=4, module=module(method), steps=2, save=path.parent)
    run("ddp", devices=4, module=module(method), steps=2, save=tmp_path / "file")
    assert main(["consolidate", str(path), str(tmp_path / "one.ckpt")]) == 0
    ours, theirs = (
        torch.load(file, weights_only=True)["state_dict"]
        for file in (tmp_path / "one.ckpt", tmp_path / "file" / "step=2.ckpt")
    )
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-7)
    folder = path.with_suffix(".adapter")
    assert json.loads((folder / OWN_CONFIG).read_text())["base"]["class"] == "LlamaForCausalLM"
    load_adapters(model := tiny_llama(), folder)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(value, ours[f"model.{name}"], rtol=0, atol=0)


def test_what_does_not_fit_is_refused(saved, tmp_path, capsys):
    shutil.rmtree(saved.with_suffix(".adapter"))
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    assert main(["consolidate", str(saved), str(tmp_path / "a"), "--adapter", "--base", str(tmp_path / "other")]) == 2
    assert "was trained over a base with fingerprint" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    (saved / "meta.pt").unlink()
    assert main(["consolidate", str(saved), str(tmp_path / "b.ckpt")]) == 2
    assert "is no whole sharded checkpoint: it has no meta.pt" in capsys.readouterr().err

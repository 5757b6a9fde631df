import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft import load_adapter, merge_adapters
from lightning_peft.cli import main

CONFIG = """
seed_everything: 3
trainer:
  accelerator: cpu
  max_steps: 9
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: AdapterCheckpoint
    init_args: {dirpath: run, filename: last}
model:
  base:
    class_path: CausalLMLoader
    init_args: {path: "${oc.env:ACME_BASE}"}
  method:
    class_path: lora
    init_args: {rank: 4}
  targets: [query, value]
  optimizer:
    class_path: AdamW
    init_args: {lr: 1e-2}
data: AcmeData
"""

# Advice of Lightning on the tiny run.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture
def adapter(base, acme, tmp_path, monkeypatch):
    """An adapter of rank 2, trained for two steps through a file and a command line."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.setenv("ACME_BASE", base)
    assert main(["fit", "--config", "run.yaml", "--trainer.max_steps=2", "--model.method.rank=2"]) == 0
    return tmp_path / "run" / "last.adapter"


def test_fit_trains_what_file_and_command_line_say(adapter, tmp_path):
    written = json.loads((adapter / "lightning_peft.json").read_text())
    assert written["method"] == {"name": "lora", "fields": {**written["method"]["fields"], "rank": 2}}
    assert {place.rpartition(".")[2] for place in written["places"]} == {"q_proj", "v_proj"}
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert "rank: 2" in (tmp_path / "config.yaml").read_text()


def test_fit_runs_twice_in_one_folder(adapter, tmp_path):
    assert main(["fit", "--config", "run.yaml", "--trainer.max_steps=1"]) == 0
    assert "max_steps: 1" in (tmp_path / "config.yaml").read_text()


def test_merge_writes_a_model_that_acts_as_base_and_adapter(adapter, base, tmp_path, capsys):
    capsys.readouterr()
    assert main(["merge", "--adapter", str(adapter), "--output", "merged"]) == 0
    assert re.fullmatch(r"merged \(\d\d\.\d kB\)", capsys.readouterr().out.splitlines()[-1])
    expected = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(expected, adapter)
    merge_adapters(expected)
    ids = torch.arange(12).view(2, 6)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits)
    assert (merged(ids).logits - AutoModelForCausalLM.from_pretrained(base)(ids).logits).abs().max() > 1e-4
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
        == AutoTokenizer.from_pretrained(base).get_vocab()
    )
    assert not [file.name for file in tmp_path.iterdir() if "partial" in file.name]


def test_merge_can_change_the_precision_and_makes_the_folders_it_needs(adapter, tmp_path):
    assert main(["merge", "--adapter", str(adapter), "--output", "a/b/merged", "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a/b/merged").dtype == torch.bfloat16


def test_merge_never_overwrites_what_it_should_not(adapter, base, tmp_path, capsys):
    def refused(output, *more):
        capsys.readouterr()
        assert main(["merge", "--adapter", str(adapter), "--base", base, "--output", str(output), *more]) == 2
        return capsys.readouterr().err

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    assert "--output 'out' is not empty; name another folder, or add --overwrite to replace it" in refused("out")
    assert "--output 'out' is not the folder of a model and is not replaced" in refused("out", "--overwrite")
    assert "which is being merged; name another folder" in refused(base, "--overwrite")
    assert "which is being merged; name another folder" in refused(tmp_path, "--overwrite")
    assert "--output 'run.yaml' is a file; name a folder" in refused("run.yaml")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "x"


def test_merge_replaces_a_model_wholly_when_asked(adapter, tmp_path):
    assert main(["merge", "--adapter", str(adapter), "--output", "merged"]) == 0
    (tmp_path / "merged" / "model-00007.safetensors").write_text("of an older model")
    assert main(["merge", "--adapter", str(adapter), "--output", "merged", "--overwrite"]) == 0
    assert not (tmp_path / "merged" / "model-00007.safetensors").exists()


def test_merge_leaves_nothing_behind_when_it_fails(adapter, base, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_parameter("model.norm.weight").data.add_(1.0)
    model.save_pretrained(tmp_path / "other")
    before = sorted(tmp_path.iterdir())
    args = ["merge", "--adapter", str(adapter), "--output", "merged", "--base", str(tmp_path / "other")]
    assert main(args) == 2
    assert "error: " in (err := capsys.readouterr().err)
    assert "1 of" in err
    assert sorted(tmp_path.iterdir()) == before
    assert main([*args, "--check_base", "false"]) == 0


def test_merge_and_generate_name_a_base_that_is_not_there(adapter, capsys):
    for verb in (["merge", "--output", "merged"], ["generate", "--prompt", "w1"]):
        assert main([*verb, "--adapter", str(adapter), "--base", "nowhere/at-all"]) == 2
        assert (
            "no base model could be loaded from 'nowhere/at-all'; give another with --base" in capsys.readouterr().err
        )


def test_generate_continues_the_prompt(adapter, base, capsys):
    def generated(*args):
        capsys.readouterr()
        assert main(["generate", "--prompt", "w1 w2 w3", "--max_new_tokens", "5", *args]) == 0
        return capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(model, adapter)
    ids = model.eval().generate(torch.tensor([[4, 5, 6]]), max_new_tokens=5, do_sample=False, pad_token_id=2)
    expected = AutoTokenizer.from_pretrained(base).decode(ids[0], skip_special_tokens=True)
    assert generated("--adapter", str(adapter)) == f"{expected}\n"
    assert generated("--base", base).startswith("w1 w2 w3")
    hot = ["--base", base, "--temperature", "5.0"]
    assert generated(*hot, "--seed", "1") == generated(*hot, "--seed", "1") != generated(*hot, "--seed", "2")


def test_a_target_that_matches_nothing_is_an_error_of_the_command_line(base, acme, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.setenv("ACME_BASE", base)
    assert main(["fit", "--config", "run.yaml", "--model.targets=[q_prj]"]) == 2
    err = capsys.readouterr().err
    assert "error: target 'q_prj' matches no module of LlamaForCausalLM; did you mean 'q_proj'" in err
    assert "Traceback" not in err


def test_a_failure_of_another_kind_keeps_its_traceback(base, acme, tmp_path, monkeypatch):
    def training_step(*args):
        raise FloatingPointError("too hot")

    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.setenv("ACME_BASE", base)
    monkeypatch.setattr("lightning_peft.module.PEFTModule.training_step", training_step)
    with pytest.raises(FloatingPointError, match="too hot"):
        main(["fit", "--config", "run.yaml"])

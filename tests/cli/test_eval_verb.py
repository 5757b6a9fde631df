"""The verb that measures a base, with an adapter and without."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_peft import LoRA, Perplexity, inject, load_adapter, save_adapter
from lightning_peft.cli import main
from lightning_peft.evaluation.base_figures import BaseFigures
from lightning_peft.fingerprint import fingerprint


@pytest.fixture(scope="module")
def folders(llama_dir, tmp_path_factory):
    """A base, an adapter that does something, and a file of tasks."""
    root = tmp_path_factory.mktemp("measured")
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    inject(model, LoRA(rank=2), ["query", "value"])
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)
    save_adapter(model, root / "adapter")
    (root / "text.txt").write_text("the cat sat on the mat. " * 20)
    (root / "tasks.yaml").write_text(f"text: {{kind: perplexity, path: {root / 'text.txt'}, block_size: 32}}\n")
    task = Perplexity(path=str(root / "text.txt"), tokenizer=llama_dir, block_size=32)
    return llama_dir, root, task


def test_a_base_alone_is_measured(folders, capsys):
    base, root, task = folders
    assert main(["eval", str(root / "tasks.yaml"), "--base", base]) == 0
    told = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert told["tasks"]["text"]["off"] == task.evaluate(model)
    assert told["fingerprint"] == fingerprint(model).digest
    assert told["adapter"] is None
    assert "on" not in told["tasks"]["text"]


def test_an_adapter_is_measured_on_and_off_and_the_base_is_kept(folders, capsys, tmp_path):
    base, root, task = folders
    words = ["eval", str(root / "tasks.yaml"), "--base", base, "--adapter", str(root / "adapter")]
    assert (
        main([*words, "--adapters", "both", "--output", str(tmp_path / "o.json"), "--cache", str(tmp_path / "c")]) == 0
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "o.json")
    told = json.loads((tmp_path / "o.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base)
    off = task.evaluate(model)
    load_adapter(model, root / "adapter")
    on = task.evaluate(model)
    assert told["tasks"]["text"]["off"] == off
    assert told["tasks"]["text"]["on"] == on
    assert told["tasks"]["text"]["forgetting"] == on["loss"] - off["loss"] != 0.0
    assert BaseFigures(tmp_path / "c", told["fingerprint"]).get(task) == off
    assert main([*words, "--adapters", "on"]) == 0
    assert list(json.loads(capsys.readouterr().out)["tasks"]["text"])[-1] == "on"


def test_tasks_of_the_harness_are_named(folders, capsys, tmp_path):
    base, root, _ = folders
    rows = [{"q": "the cat", "c": ["sat", "ran"], "l": 0}, {"q": "a dog", "c": ["sat", "ran"], "l": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: l\ndoc_to_choice: "{{c}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ["eval", "mine", str(root / "tasks.yaml"), "--base", base, "--include_path", str(tmp_path), "--limit", "2"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)["tasks"]
    assert told["mine"]["off"]["acc"] in (0.0, 0.5, 1.0)
    assert told["mine"]["task"] == "lm_eval"
    assert list(told) == ["mine", "text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.yaml"], "eval needs a model: give --base FOLDER_OR_ID, --adapter FOLDER, or both"),
        (["x.yaml", "--base", "BASE", "--adapters", "both"], "--adapters both needs an adapter to switch off"),
        (["x.yaml", "--base", "BASE"], "there is no file of tasks 'x.yaml'"),
        (["list.yaml", "--base", "BASE"], "'list.yaml' must map labels to tasks, got list"),
        (["plain.yaml", "--base", "BASE"], "'text' must say which task it is, such as `kind: perplexity`"),
        (["typo.yaml", "--base", "BASE"], "unknown evaluation task 'perplexty'; did you mean 'perplexity'"),
        (["less.yaml", "--base", "BASE"], "task 'text' cannot be made: .*path"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, llama_dir, tmp_path, monkeypatch, capsys):
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("[a, b]\n")
    (tmp_path / "plain.yaml").write_text("text: perplexity\n")
    (tmp_path / "typo.yaml").write_text("text: {kind: perplexty}\n")
    (tmp_path / "less.yaml").write_text("text: {kind: perplexity}\n")
    assert main(["eval", *(llama_dir if word == "BASE" else word for word in words)]) == 2
    assert re.search(message if "*" in message else re.escape(message), capsys.readouterr().err)

"""``lightning-peft merge --out_of_core``: every argument of the verb does there what its help says, or is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft import LoRA, QLoRA, inject, save_adapter, save_adapters
from lightning_peft.cli import main
from lightning_peft.testing import tiny_llama


@pytest.fixture
def shards(base, tmp_path):
    """The base in several files, with its tokenizer."""
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def adapter(shards, tmp_path):
    """An adapter that was trained on it."""
    save_adapter(trained(shards, LoRA(rank=2)), tmp_path / "adapter")
    return tmp_path / "adapter"


def trained(base, *methods):
    model = AutoModelForCausalLM.from_pretrained(base)
    for number, method in enumerate(methods):
        inject(model, method, name="default" if len(methods) == 1 else f"number_{number}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def run(*words, output="merged"):
    return main(["merge", "--adapter", "adapter", "--output", output, "--out_of_core", *map(str, words)])


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.fixture
def refused(capsys, tmp_path):
    """Run the verb, see that it fails as a mistake of the user and leaves what was there, and return what it says."""

    def refuse(*words, output="merged"):
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        capsys.readouterr()
        assert run(*words, output=output) == 2
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return refuse


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_folder_is_that_of_a_merge_in_memory_in_every_precision(dtype, adapter, shards, tmp_path, capsys):
    assert main(["merge", "--adapter", "adapter", "--output", "loaded", "--dtype", dtype]) == 0
    assert run("--dtype", dtype) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("merged (")
    assert same(weights(tmp_path / "merged"), weights(tmp_path / "loaded"))
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert {tensor.dtype for tensor in weights(tmp_path / "merged").values()} == {wanted}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == wanted
    found = AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
    assert found == AutoTokenizer.from_pretrained(shards).get_vocab()


def test_the_base_is_the_one_of_the_adapter_or_the_one_that_is_named(adapter, shards, tmp_path):
    assert run() == 0
    shards.rename(tmp_path / "moved")
    assert run("--base", tmp_path / "moved", output="again") == 0
    assert same(weights(tmp_path / "merged"), weights(tmp_path / "again"))


def test_a_base_that_is_not_a_local_folder_is_refused(adapter, refused):
    assert "--out_of_core reads the files of a local folder, and the base 'some/model' is none" in refused(
        "--base", "some/model"
    )


def test_another_base_is_refused_unless_it_is_taken_all_the_same(adapter, shards, refused, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(shards)
    model.get_parameter("model.norm.weight").data.add_(1.0)
    model.save_pretrained(tmp_path / "other")
    assert "was trained on the base" in refused("--base", tmp_path / "other")
    assert run("--base", tmp_path / "other", "--check_base", "false") == 0
    assert torch.equal(weights(tmp_path / "merged")["model.norm.weight"], model.get_parameter("model.norm.weight").data)


def test_files_are_those_of_the_base_unless_a_size_is_given(adapter, shards, tmp_path):
    def sizes(folder):
        return [file.stat().st_size for file in (tmp_path / folder).glob("*.safetensors")]

    names = {file.name for file in shards.glob("model*")}
    assert len(names) > 3
    assert run() == 0
    assert {file.name for file in (tmp_path / "merged").glob("model*")} == names
    assert run("--max_shard_size", "8KB", output="cut") == 0
    assert 1 < len(sizes("cut")) < len(sizes("merged"))
    assert max(sizes("cut")) < 9500
    assert run("--max_shard_size", "5GB", output="one") == 0
    assert [file.name for file in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    assert main(["merge", "--adapter", "adapter", "--output", "loaded", "--max_shard_size", "8KB"]) == 0
    assert len(sizes("loaded")) > 1
    assert main(["merge", "--adapter", "adapter", "--output", "whole"]) == 0
    assert len(sizes("whole")) == 1
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "loaded"))


@pytest.mark.parametrize("way", [["--out_of_core"], []], ids=["from file to file", "in memory"])
def test_a_size_that_is_none_is_refused(way, adapter, capsys, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert main(["merge", "--adapter", "adapter", "--output", "merged", "--max_shard_size", "much", *way]) == 2
    assert "max_shard_size must be a positive number of bytes, or such as '5GB'" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_what_stands_in_the_output_is_replaced_wholly_and_only_when_asked(adapter, shards, refused, tmp_path):
    assert run() == 0
    (tmp_path / "merged" / "model-00099.safetensors").write_text("of an older model")
    assert "--output 'merged' is not empty; name another folder, or add --overwrite to replace it" in refused()
    assert run("--overwrite") == 0
    assert not (tmp_path / "merged" / "model-00099.safetensors").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("x")
    assert "is not the folder of a model and is not replaced" in refused("--overwrite", output="notes")
    assert "which is being merged; name another folder" in refused("--overwrite", output=str(shards))
    assert "is a file; name a folder" in refused(output="notes/thesis.txt")


@pytest.mark.parametrize(
    "words",
    [
        ["--exporter", "adapter"],
        ["--options", '{"max_shard_size": "8KB"}'],
        ["--quantized", "dequantize"],
    ],
    ids=lambda words: words[0],
)
def test_what_needs_the_model_is_refused(words, adapter, refused):
    message = "--out_of_core writes a plain transformers folder, without --exporter, --options or --quantized"
    assert message in refused(*words)


def test_the_words_for_what_is_done_anyway_are_no_mistake(adapter, tmp_path):
    assert run("--exporter", "merged_transformers", "--quantized", "original") == 0
    assert main(["merge", "--adapter", "adapter", "--output", "loaded"]) == 0
    assert same(weights(tmp_path / "merged"), weights(tmp_path / "loaded"))


def test_an_adapter_of_a_quantised_base_goes_into_the_original_weights(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="100KB")
    method = QLoRA(rank=2, compute_dtype="float32")
    save_adapter(trained(tmp_path / "base", method), tmp_path / "adapter")
    assert main(["merge", "--adapter", "adapter", "--output", "loaded"]) == 0
    assert run() == 0
    assert same(weights(tmp_path / "merged"), weights(tmp_path / "loaded"))


def test_a_folder_of_several_adapters_is_merged_whole(shards, tmp_path):
    save_adapters(trained(shards, LoRA(rank=2), LoRA(rank=3)), tmp_path / "adapter")
    assert main(["merge", "--adapter", "adapter", "--output", "loaded"]) == 0
    assert run() == 0
    assert same(weights(tmp_path / "merged"), weights(tmp_path / "loaded"))
    assert not same(weights(tmp_path / "merged"), weights(shards))


def test_an_adapter_that_is_broken_leaves_nothing_behind(adapter, refused):
    file = adapter / "lightning_peft.json"
    content = json.loads(file.read_text())
    content["files"]["adapter_model.safetensors"] = "0" * 64
    file.write_text(json.dumps(content))
    assert "is not the file that lightning_peft.json was written for" in refused()


def test_the_help_names_every_argument(capsys):
    assert main(["merge", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--out_of_core",
        "Merge tensor by tensor from file to file; the model is never in memory. The base must be a local folder.",
        "that of the base's files if out_of_core, else 5GB",
        "Replace the model that stands in the output folder.",
        "refuse a base other than the one the adapter was trained on",
    ):
        assert words in text

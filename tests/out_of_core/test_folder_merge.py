import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from lightning_peft import (
    BitFit,
    DoRA,
    LoRA,
    NormTuning,
    PiSSA,
    TrainableTokens,
    VeRA,
    adapter_layers,
    inject,
    load_adapter,
    merge_adapters,
    merge_folder,
    merged_copy,
    save_adapter,
    save_adapters,
    scale_adapters,
    set_active_adapters,
    unload_adapters,
)
from lightning_peft.errors import BaseMismatchError, ConfigError, MergeError
from lightning_peft.testing import tiny_gpt2, tiny_llama


def folders(where, model, method, targets=None, **options):
    model.save_pretrained(where / "base", **options)
    model = AutoModelForCausalLM.from_pretrained(where / "base")
    inject(model, method, targets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_adapter(model, where / "adapter")
    return where / "base", where / "adapter", where / "merged"


def merged_in_memory(base, adapter, **options):
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    load_adapter(model, adapter)
    merge_adapters(model)
    return unload_adapters(model).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


CASES = {
    "llama": (tiny_llama, LoRA(rank=2), None),
    "gpt2, slices": (tiny_gpt2, LoRA(rank=2), ["query", "value"]),
    "gpt2, biases": (tiny_gpt2, LoRA(rank=2, bias="all"), None),
    "gpt2, tied": (tiny_gpt2, LoRA(rank=2, tied="both"), ["head"]),
    "dora": (tiny_llama, DoRA(rank=2), None),
    "vera": (tiny_gpt2, VeRA(rank=4), None),
    "pissa": (tiny_llama, PiSSA(rank=2), ["query"]),
    "bitfit": (tiny_gpt2, BitFit(), None),
    "norms": (tiny_llama, NormTuning(), None),
    "tokens": (tiny_gpt2, TrainableTokens(tokens=[1, 5]), None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_files_are_what_merging_in_memory_gives(case, tmp_path):
    make, method, targets = case
    base, adapter, output = folders(tmp_path, make().to(torch.bfloat16), method, targets, max_shard_size="60KB")
    merge_folder(base, adapter, output)
    assert same(AutoModelForCausalLM.from_pretrained(output).state_dict(), merged_in_memory(base, adapter))
    weights = {file.name for file in base.iterdir() if file.name.startswith("model")}
    assert {file.name for file in output.iterdir() if file.name.startswith("model")} == weights
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]


def test_weights_are_cast_before_the_merge_and_cut_into_files_as_asked(tmp_path):
    base, adapter, output = folders(tmp_path, tiny_llama(), LoRA(rank=2))
    merge_folder(base, adapter, output, dtype=torch.bfloat16, max_shard_size="40KB")
    expected = merged_in_memory(base, adapter, dtype=torch.bfloat16)
    assert same(AutoModelForCausalLM.from_pretrained(output).state_dict(), expected)
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    shards = list(output.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert max(file.stat().st_size for file in shards) < 44_000
    with pytest.raises(ConfigError, match="max_shard_size must be a positive number of bytes, or such as '5GB'"):
        merge_folder(base, adapter, output, max_shard_size="much")


def test_experts_that_are_several_tensors_are_refused_and_left_alone_beside_other_adapters(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_local_experts=2,
    )
    config.num_key_value_heads = 2
    base, adapter, output = folders(tmp_path, MixtralForCausalLM(config), LoRA(rank=2), ["query"])
    merge_folder(base, adapter, output)
    assert same(AutoModelForCausalLM.from_pretrained(output).state_dict(), merged_in_memory(base, adapter))
    (tmp_path / "other").mkdir()
    base, adapter, output = folders(tmp_path / "other", MixtralForCausalLM(config), LoRA(rank=2), ["experts"])
    with pytest.raises(MergeError, match="experts.gate_up_proj' is adapted, but cannot be read .* as one tensor"):
        merge_folder(base, adapter, output)
    assert not output.exists()


def test_another_base_and_a_non_finite_result_are_refused_and_leave_nothing(tmp_path):
    base, adapter, output = folders(tmp_path, tiny_llama(), LoRA(rank=2))
    tiny_llama(seed=3).save_pretrained(tmp_path / "wrong")
    with pytest.raises(BaseMismatchError, match="was trained on the base"):
        merge_folder(tmp_path / "wrong", adapter, output)
    merge_folder(tmp_path / "wrong", adapter, output, check_base=False)
    with pytest.raises(ConfigError, match="is not empty"):
        merge_folder(base, adapter, output)
    huge = tiny_llama().half()
    huge.save_pretrained(tmp_path / "half")
    inject(huge, LoRA(rank=2), ["query"])
    with torch.no_grad():
        for layer in adapter_layers(huge).values():
            layer.adapters["default"].lora_B.fill_(1e5)
    save_adapter(huge, tmp_path / "huge")
    with pytest.raises(MergeError, match="non-finite"):
        merge_folder(tmp_path / "half", tmp_path / "huge", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]


def test_adapters_act_as_strongly_as_their_folder_says(tmp_path):
    base, _, output = folders(tmp_path, tiny_llama(), LoRA(rank=2), ["query"])
    model = AutoModelForCausalLM.from_pretrained(base)
    for name in ("a", "b"):
        inject(model, LoRA(rank=2), ["query"], name=name)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for name in ("a", "b"):
                layer.adapters[name].lora_B.normal_()
    set_active_adapters(model, ["a", "b"])
    scale_adapters(model, {"a": 0.5})
    save_adapters(model, tmp_path / "several")
    merge_folder(base, tmp_path / "several", output)
    assert same(AutoModelForCausalLM.from_pretrained(output).state_dict(), merged_copy(model).state_dict())

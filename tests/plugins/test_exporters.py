import os
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, adapter_layers, get_registry, inject, load_adapter, save_adapter
from lightning_peft.errors import ConfigError, ExportError, MergeError

IDS = torch.arange(12).view(1, 12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    size = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True)).eval()
    inject(model, LoRA(rank=2), "all_linear")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_merged_folder_is_plain_transformers_and_computes_the_same(model, tmp_path):
    out = model(IDS).logits
    get_registry().exporters["merged_transformers"]().export(model, tmp_path)
    assert torch.equal(model(IDS).logits, out)
    assert len(adapter_layers(model)) == 14
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    assert ((merged(IDS).logits - out).abs().max() / out.abs().max()).item() <= 1e-5


def test_the_adapter_folder_loads_again(model, tmp_path):
    out = model(IDS).logits
    exporter = get_registry().exporters["adapter"]()
    exporter.export(model, tmp_path)
    assert "adapter_config.json" in os.listdir(tmp_path)
    torch.manual_seed(0)
    again = LlamaForCausalLM(model.config).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS).logits, out)


def test_a_model_that_is_not_of_transformers_cannot_become_a_transformers_folder(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2))
    inject(net, LoRA(rank=1), "0")
    with pytest.raises(MergeError, match="Sequential is not a transformers model; merge with merge_adapters"):
        get_registry().exporters["merged_transformers"]().export(net, tmp_path)


def test_gguf_files_need_a_library_that_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ConfigError, match=r"the library gguf, which is not installed: pip install 'lightning-peft\[gguf\]'"
    ):
        get_registry().exporters["gguf_adapter"]().export(model, tmp_path / "out")
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="the library gguf, which is not installed"):
        load_adapter(model, tmp_path / "adapter.gguf", name="other")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_not_written_beside_an_adapter_that_transformers_would_apply_again(model, tmp_path):
    save_adapter(model, tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ExportError, match=r"holds an adapter \(adapter_config.json, lightning_peft.json\).*once more"):
        get_registry().exporters["merged_transformers"]().export(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_second_export_in_one_file_leaves_no_index_of_the_shards_of_the_first(model, tmp_path):
    exporter = get_registry().exporters["merged_transformers"]
    exporter(max_shard_size="4KB").export(model, tmp_path)
    assert "model.safetensors.index.json" in os.listdir(tmp_path)
    exporter().export(model, tmp_path)
    assert [name for name in sorted(os.listdir(tmp_path)) if name.startswith("model")] == ["model.safetensors"]

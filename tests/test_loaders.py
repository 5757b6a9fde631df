import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lightning_peft import CausalLMLoader, LoRA, inject
from lightning_peft.errors import ConfigError

IDS = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(5))


def test_the_model_of_the_folder_is_loaded_in_train_mode(llama_dir, llama):
    model = CausalLMLoader(path=llama_dir).load()
    assert type(model) is LlamaForCausalLM
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), llama.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_get_the_precision_asked_for(dtype, llama_dir):
    model = CausalLMLoader(path=llama_dir, dtype=dtype).load()
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_auto_is_the_precision_of_the_checkpoint(llama, tmp_path):
    llama.to(torch.bfloat16).save_pretrained(tmp_path)
    assert next(CausalLMLoader(path=str(tmp_path)).load().parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_is_used(attention, llama_dir):
    model = CausalLMLoader(path=llama_dir, attn_implementation=attention).load()
    assert model.config._attn_implementation == attention


def gradients(model):
    torch.manual_seed(7)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradient_checkpointing_over_a_frozen_base_gives_every_adapter_its_gradient(llama_dir):
    """Reference: the same model without it, with the same dropout."""
    found = []
    for checkpointing in (False, True):
        model = CausalLMLoader(path=llama_dir, gradient_checkpointing=checkpointing).load()
        assert model.model.layers[0].gradient_checkpointing is checkpointing
        torch.manual_seed(3)
        inject(model, LoRA(rank=2, dropout=0.3), ["all_linear"])
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter)
        found.append(gradients(model))
    plain, recomputed = found
    assert len(plain) == 2 * 2 * 7
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in recomputed.values())
    torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-6)


def test_gradient_checkpointing_turns_the_cache_off(llama_dir):
    assert CausalLMLoader(path=llama_dir, gradient_checkpointing=True).load().config.use_cache is False


def test_a_missing_folder_is_refused_with_its_name():
    with pytest.raises(ConfigError, match="no causal language model could be loaded from 'no/such/folder'"):
        CausalLMLoader(path="no/such/folder").load()


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no causal language model could be loaded from"):
        CausalLMLoader(path=str(tmp_path)).load()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no causal language model could be loaded from"):
        CausalLMLoader(path=str(tmp_path)).load()


def test_what_is_no_causal_language_model_is_refused(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "vit")
    config = Path(tmp_path / "vit" / "config.json")
    config.write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises(ConfigError, match="ViTConfig"):
        CausalLMLoader(path=str(tmp_path / "vit")).load()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"path": "x", "dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"path": ""}, "path must be a folder or a hub id, got ''"),
    ],
)
def test_wrong_arguments_are_refused_before_any_load(options, match, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=match):
        CausalLMLoader(**options)


def test_a_revision_and_remote_code_reach_transformers(monkeypatch):
    seen = {}

    def from_pretrained(path, **options):
        seen.update(options, path=path)
        return copy.deepcopy(nn.Linear(1, 1)), {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    CausalLMLoader(path="a/b", revision="v2", trust_remote_code=True).load()
    assert seen == {
        "path": "a/b",
        "revision": "v2",
        "trust_remote_code": True,
        "dtype": "auto",
        "output_loading_info": True,
    }

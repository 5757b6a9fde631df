"""LoRAMixture and padding: what is in padded places has no effect on balance, statistics or gradients."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from lightning_peft import LoRAMixture, adapter_layers, inject
from lightning_peft.moe.padding import MaskReader
from lightning_peft.moe.statistics import RouterStatistics
from lightning_peft.testing import tiny_llama, token_batch

KINDS = pytest.mark.parametrize("fields", [{}, {"routing": "soft"}], ids=["top_k", "soft"])


def mixed(model, targets=None, **fields):
    torch.manual_seed(1)
    method = LoRAMixture(experts=4, rank=2, balance_coef=1.0, z_coef=1.0, **fields)
    inject(model, method, targets)
    for place in experts(model).values():
        torch.nn.init.normal_(place.lora_B, std=0.1)
    return model


def experts(model):
    held = {path: layer.adapters["default"] for path, layer in adapter_layers(model).items()}
    return {path: one for path, one in held.items() if not isinstance(one, MaskReader)}


def padded(left, token=None):
    ids = token_batch(length=12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if left else slice(8, 12)] = 0
    if token is not None:
        ids = torch.where(mask == 0, token, ids)
    return {"input_ids": ids, "attention_mask": mask}


@KINDS
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_not_counted_at_any_layer_of_a_block(left, attention, fields):
    model = mixed(tiny_llama(attn_implementation=attention), **fields).train()
    places = {path: one for path, one in experts(model).items() if "layers" in path}
    assert len(places) == 2 * 7
    for one in places.values():
        one.statistics = RouterStatistics(4)
    batch = padded(left)
    model(**batch)
    per_token, real = 4 if fields else 2, int(batch["attention_mask"].sum())
    assert real == batch["attention_mask"].numel() - 4
    for path, one in places.items():
        assert float(one.statistics.totals[:4].sum()) == real * per_token, path
        assert float(one.statistics.totals[4]) == real, path
        one.statistics.reset()
    model(**token_batch(length=12))
    assert {float(one.statistics.totals[4]) for one in places.values()} == {real + 4.0}


@KINDS
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_in_padding_changes_no_gradient(left, checkpointing, fields):
    gradients = []
    for token in (5, 77):
        model = mixed(tiny_llama(), **fields).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        batch = padded(left, token)
        model(**batch).logits[batch["attention_mask"].bool()].square().mean().backward()
        gradients.append({path: one.router.grad for path, one in experts(model).items() if "layers" in path})
    for path, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert float((gradients[1][path] - gradient).abs().max() / gradient.abs().max()) <= 1e-5, path


def test_attention_to_an_encoder_is_told_nothing_and_a_bare_layer_has_no_reader():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = mixed(T5ForConditionalGeneration(config))
    told = {path: one.noted for path, one in experts(model).items() if ".block." in path}
    assert {noted for path, noted in told.items() if "EncDecAttention" in path} == {False}
    assert {noted for path, noted in told.items() if "EncDecAttention" not in path} == {True}
    alone = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    inject(alone, LoRAMixture(experts=2, rank=1), ["0", "1"])
    assert not any(one.noted for one in experts(alone).values())

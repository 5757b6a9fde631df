"""Training the last blocks keeps the contract, and trains exactly the parameters of those blocks."""

import copy

import pytest
import torch
from torch import nn

from lightning_peft import Targets, TopLayers, inject, merge_adapters, trainable_summary, unload_adapters
from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.errors import ConfigError, MergeError, TargetError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch


class TestTopLayers(MethodConformance):
    method = TopLayers(num_blocks=1)


class TestWithTheHead(MethodConformance):
    method = TopLayers(num_blocks="all", head=True)
    targets = Targets(include=["block"], layers=[0])


class TestOnMultiheadAttention(MethodConformance):
    method = TopLayers(num_blocks=1)

    def model(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        with torch.no_grad():  # the layers of an encoder are copies of one
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    targets = Targets(include=["layers.0", "layers.1"])

    def inputs(self, seed=0):
        return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed))


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def test_llama_2_7b_trains_its_last_blocks():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = on_meta(LlamaForCausalLM, LlamaConfig())
    inject(model, TopLayers(num_blocks=3, head=True))
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert trainable_summary(model).trainable == 3 * block + 32000 * 4096


def test_roberta_base_trains_its_last_block_and_its_classifier():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = on_meta(RobertaForSequenceClassification, RobertaConfig(num_labels=2))
    inject(model, TopLayers(num_blocks=1, head=True))
    d = 768
    block = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 4 * d
    assert trainable_summary(model).trainable == block + (d * d + d) + (2 * d + 2)


def test_every_stack_of_an_encoder_and_a_decoder_has_its_own_last_blocks():
    from transformers import T5Config, T5ForConditionalGeneration

    model = on_meta(T5ForConditionalGeneration, T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2))
    inject(model, TopLayers(num_blocks=1))
    assert {path.split(".layer.")[0] for path in adapter_layers(model)} == {"encoder.block.2", "decoder.block.2"}


def test_training_equals_training_the_parameters_of_the_block_themselves():
    model = tiny_llama()
    plain = copy.deepcopy(model)
    inject(model, TopLayers(num_blocks=1))
    plain.requires_grad_(False)
    plain.model.layers[1].requires_grad_(True)
    for one in (model, plain):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
        for seed in range(3):
            batch = token_batch(seed)
            loss = one(**batch, labels=batch["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(**token_batch()).logits, plain(**token_batch()).logits)
    merge_adapters(model)
    merged = unload_adapters(model).state_dict()
    assert all(torch.equal(merged[name], value) for name, value in plain.state_dict().items())


def test_a_tied_head_gets_a_copy_of_its_own_and_cannot_be_merged():
    model = tiny_gpt2()
    inject(model, TopLayers(num_blocks=1, head=True))
    assert "lm_head" in adapter_layers(model)
    assert "transformer.wte" not in adapter_layers(model)
    with pytest.raises(MergeError, match=r"lm_head.weight is shared by transformer.wte.weight, lm_head.weight"):
        merge_adapters(model)


def test_too_many_blocks_are_refused():
    with pytest.raises(TargetError, match="num_blocks=3 were asked for, but the targets name 2 in 'model.layers'"):
        inject(tiny_llama(), TopLayers(num_blocks=3))


def test_a_head_that_nobody_knows_is_refused():
    with pytest.raises(TargetError, match="head=True was asked for, but no head is known of Sequential"):
        inject(nn.Sequential(nn.Linear(2, 2)), TopLayers(num_blocks=1, head=True), "0")


def test_a_slice_is_refused():
    with pytest.raises(TargetError, match="TopLayers cannot train a slice of 'transformer.h.0.attn.c_attn' alone"):
        inject(tiny_gpt2(), TopLayers(), "query")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be a positive integer or 'all', got 0"),
        ({"num_blocks": True}, "num_blocks must be a positive integer or 'all', got True"),
        ({"head": 1}, "head must be true or false, got 1"),
    ],
)
def test_wrong_fields_are_refused(field, message):
    with pytest.raises(ConfigError, match=message):
        TopLayers(**field)


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(TopLayers(num_blocks=2), lr=2e-3)
    assert losses[-1] < losses[0] - 0.2, losses

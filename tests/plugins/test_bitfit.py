"""BitFit keeps the contract, trains what the paper counts, and gives what hand-set biases give."""

import pytest
import torch
from torch import nn

from lightning_peft import (
    BitFit,
    LoRA,
    adapter_layers,
    inject,
    merge_adapters,
    set_active_adapters,
    trainable_summary,
)
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.errors import ConfigError, MergeError, TargetError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama


class TestBitFit(MethodConformance):
    method = BitFit()

    def model(self):
        return tiny_llama(attention_bias=True, mlp_bias=True)


class TestOnGPT2(MethodConformance):
    method = BitFit()

    def model(self):
        return tiny_gpt2()


class TestAddingBiases(MethodConformance):
    method = BitFit(add_missing=True)


class TestOnMultiheadAttention(MethodConformance):
    """Its biases are read by the module itself, and its output projection is never called."""

    method = BitFit()

    def model(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    def inputs(self, seed=0):
        return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed))


def on_meta(config):
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)


def test_roberta_base_trains_every_bias():
    from transformers import RobertaConfig

    model = on_meta(RobertaConfig())
    inject(model, BitFit())
    # A layer: query, key, value, output (4 d), up (4 d), down (d), two norms (2 d); then the norm of the embeddings and the pooler.
    d = 768
    assert trainable_summary(model).trainable == 12 * 11 * d + d + d == 102_912


def test_gpt2_medium_trains_every_bias():
    from transformers import GPT2Config

    model = on_meta(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    inject(model, BitFit())
    # A layer: the fused query, key and value (3 d), output (d), up (4 d), down (d), two norms (2 d); then the last norm.
    d = 1024
    assert trainable_summary(model).trainable == 24 * 11 * d + d == 271_360


def test_the_half_of_the_papers_ablation_is_a_choice_of_targets():
    from transformers import RobertaConfig

    model = on_meta(RobertaConfig())
    inject(model, BitFit(), ["query", "up"])
    assert trainable_summary(model).trainable == 12 * (768 + 3072)


def test_a_bias_shared_by_a_head_and_its_decoder_is_trained_once():
    from transformers import RobertaConfig, RobertaForMaskedLM

    with torch.device("meta"):
        model = RobertaForMaskedLM(
            RobertaConfig(
                hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
            )
        )
    injection = inject(model, BitFit())
    assert "lm_head.decoder" in injection.paths
    assert "lm_head" not in injection.paths


def test_added_biases_count_the_outputs_of_linear_layers():
    model = tiny_llama()
    inject(model, BitFit(add_missing=True), "all_linear")
    # q and o: 64 each, k and v: 2 heads of 16, gate and up: 128 each, down: 64; two layers.
    assert trainable_summary(model).trainable == 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)


@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.LayerNorm(4), nn.Conv1d(4, 3, 2), nn.GroupNorm(2, 4)], ids=str)
def test_the_output_is_that_of_the_module_with_the_bias_set_by_hand(module):
    x = torch.randn(2, 4, 4)
    model = nn.Sequential(module)
    inject(model, BitFit())
    wanted = torch.randn(module.bias.shape)
    with torch.no_grad():
        (adapter,) = adapters_named(model, "default").values()
        adapter.import_state({"bias": wanted})
        found = model(x)
        module.bias.copy_(wanted)
    torch.testing.assert_close(found, module(x))


def test_lora_acts_inside_a_trained_bias():
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    base = model(x).detach()
    inject(model, LoRA(rank=2), "0", name="lora")
    inject(model, BitFit(), name="bias")
    with torch.no_grad():
        nn.init.ones_(adapters_named(model, "lora")["0"].lora_B)
        adapters_named(model, "bias")["0"].import_state({"bias": torch.zeros(3)})
    changes = []
    for names in (["lora"], ["bias"], ["lora", "bias"], ["bias", "lora"]):
        set_active_adapters(model, names)
        changes.append(model(x).detach() - base)
    torch.testing.assert_close(changes[2], changes[0] + changes[1])
    torch.testing.assert_close(changes[3], changes[0] + changes[1])


def test_a_model_without_biases_is_refused():
    with pytest.raises(TargetError, match=r"target 're:\.\*' matches 'model', a LlamaModel, which BitFit cannot adapt"):
        inject(tiny_llama(), BitFit())


def test_a_slice_of_a_fused_projection_is_refused():
    with pytest.raises(TargetError, match="BitFit was asked for the query of .*name the whole module, 'c_attn'"):
        inject(tiny_gpt2(), BitFit(), "query")


def test_an_added_bias_cannot_be_merged_and_says_why():
    model = tiny_llama()
    inject(model, BitFit(add_missing=True), "query")
    with pytest.raises(MergeError, match="cannot be merged"):
        merge_adapters(model)
    layer = next(iter(adapter_layers(model).values()))
    with pytest.raises(MergeError, match="a bias for a Linear that has none, .* train with add_missing=False"):
        layer.merge(["default"])


def test_a_wrong_field_is_refused():
    with pytest.raises(ConfigError, match="add_missing must be true or false, got 'yes'"):
        BitFit(add_missing="yes")


def test_a_model_without_biases_is_refused_with_what_to_do():
    with pytest.raises(TargetError, match=r"which BitFit cannot adapt; it has no bias: .* add_missing=True"):
        inject(tiny_llama(), BitFit())
    with pytest.raises(TargetError, match="only linear layers are given a bias"):
        inject(tiny_llama(), BitFit(add_missing=True), "embed_tokens")


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(BitFit(add_missing=True), None)
    assert losses[-1] < losses[0] - 0.2, losses

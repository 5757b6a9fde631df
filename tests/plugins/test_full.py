"""Full fine-tuning keeps the contract, and is what training all parameters of the model itself is."""

import copy

import pytest
import torch
from torch import nn

from lightning_peft import (
    FullFineTuning,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
    materialize_adapters,
    merge_adapters,
    save_adapter,
    trainable_summary,
    unload_adapters,
    unmerge_adapters,
)
from lightning_peft.errors import TargetError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch


class TestFullFineTuning(MethodConformance):
    method = FullFineTuning()


class TestWithTiedEmbeddings(MethodConformance):
    method = FullFineTuning()

    def model(self):
        return tiny_gpt2(n_layer=1)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_training_equals_training_the_model_itself(make, tmp_path):
    model = make()
    plain = copy.deepcopy(model)
    inject(model, FullFineTuning())
    assert trainable_summary(model).trainable == sum(p.numel() for p in plain.parameters())
    for one in (model, plain):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
        for seed in range(3):
            batch = token_batch(seed)
            loss = one(**batch, labels=batch["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model(**token_batch()).logits, plain(**token_batch()).logits)
        again = make()
        load_adapter(again, save_adapter(model, tmp_path))
        assert torch.equal(model(**token_batch()).logits, again(**token_batch()).logits)
    merge_adapters(model)
    merged = unload_adapters(model)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)


def test_tied_weights_stay_one_tensor():
    model = tiny_gpt2()
    inject(model, FullFineTuning())
    assert "transformer.wte.weight" in adapter_state_dict(model)
    assert "lm_head.weight" not in adapter_state_dict(model)
    before = model.transformer.wte.base_layer.weight.detach().clone()
    with torch.no_grad():
        model.transformer.wte.adapters["default"].trained_weight.add_(1.0)
    merge_adapters(model)
    assert model.lm_head.base_layer.weight is model.transformer.wte.base_layer.weight
    assert torch.equal(model.lm_head.base_layer.weight, before + 1.0)
    unmerge_adapters(model)
    assert torch.equal(model.lm_head.base_layer.weight, before)


def test_tied_weights_stay_one_tensor_from_the_meta_device():
    with torch.device("meta"):
        model = tiny_gpt2()
        inject(model, FullFineTuning())
    parameters = sum(parameter.numel() for parameter in tiny_gpt2().parameters())
    assert trainable_summary(model).trainable == parameters
    for path in ("transformer.wte", "lm_head"):
        layer = model.get_submodule(path)
        layer.base_layer.weight = nn.Parameter(torch.zeros(128, 64), requires_grad=False)
    model.transformer.to_empty(device="cpu")
    materialize_adapters(model)
    assert trainable_summary(model).trainable == parameters


def test_a_container_that_lends_a_bias_to_a_layer_inside_is_no_place():
    from transformers import RobertaConfig, RobertaForMaskedLM

    size = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    with torch.device("meta"):
        model = RobertaForMaskedLM(RobertaConfig(**size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inject(model, FullFineTuning())
    assert "lm_head" not in adapter_layers(model)
    assert trainable_summary(model).trainable == parameters


def test_gpt2_medium_trains_all_of_it():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    inject(model, FullFineTuning())
    d = 1024
    block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 4 * d
    assert trainable_summary(model).trainable == 24 * block + 50257 * d + 1024 * d + 2 * d == 354_823_168


def test_parameters_of_the_model_itself_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(TargetError, match=r"cannot train \['scale'\], which Sequential itself holds"):
        inject(model, FullFineTuning())


def test_a_slice_is_refused():
    with pytest.raises(TargetError, match="FullFineTuning cannot train a slice of"):
        inject(tiny_gpt2(), FullFineTuning(), "query")


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(FullFineTuning(), lr=2e-3)
    assert losses[-1] < losses[0] - 0.2, losses

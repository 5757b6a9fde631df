"""Norm tuning keeps the contract, and equals HF PEFT's LN_TUNING: the same tensors give the same logits, folders load both ways."""

import json

import pytest
import torch
from peft import LNTuningConfig, PeftModel, get_peft_model
from torch import nn

from lightning_peft import NormTuning, adapter_state_dict, inject, load_adapter, save_adapter, trainable_summary
from lightning_peft.errors import AdapterConfigError, TargetError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


class TestNormTuning(MethodConformance):
    method = NormTuning()


class TestOnGPT2(MethodConformance):
    method = NormTuning()

    def model(self):
        return tiny_gpt2()


class TestOnARole(MethodConformance):
    method = NormTuning()
    targets = "norm"


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
NORMS = {"llama": ["input_layernorm", "post_attention_layernorm", "norm"], "gpt2": ["ln_1", "ln_2", "ln_f"]}


def disturbed(model):
    """Change every trained parameter, so that the adapter does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(**token_batch()).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kind", MODELS)
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits(kind, tmp_path):
    model = MODELS[kind]()
    inject(model, NormTuning())
    disturbed(model)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(MODELS[kind](), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) <= 1e-5
    assert relative(logits(MODELS[kind]()), logits(model)) > 1e-2


@pytest.mark.parametrize("kind", MODELS)
def test_what_hf_peft_writes_loads_here(kind, tmp_path):
    theirs = disturbed(
        get_peft_model(MODELS[kind](), LNTuningConfig(task_type="CAUSAL_LM", target_modules=NORMS[kind]))
    )
    theirs.save_pretrained(tmp_path)
    model = MODELS[kind]()
    assert load_adapter(model, tmp_path).method == NormTuning()
    assert relative(logits(model), logits(theirs)) <= 1e-5
    # The parameters of both are the same, so nothing was left behind.
    assert sum(t.numel() for t in adapter_state_dict(model).values()) == sum(
        p.numel() for name, p in theirs.named_parameters() if "ln_tuning_layers" in name
    )


def test_what_hf_peft_chooses_for_a_llama_is_what_is_chosen_here(tmp_path):
    get_peft_model(tiny_llama(), LNTuningConfig()).save_pretrained(tmp_path)
    model = tiny_llama()
    assert inject(model, NormTuning()).paths == load_adapter(tiny_llama(), tmp_path).paths


def test_a_configuration_that_cannot_be_honoured_is_refused(tmp_path):
    get_peft_model(tiny_llama(), LNTuningConfig()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "new_setting": ["lm_head"]}))
    with pytest.raises(AdapterConfigError, match=r"does not have HF PEFT's 'new_setting', .* \['lm_head'\]"):
        load_adapter(tiny_llama(), tmp_path)


def test_a_head_that_hf_peft_trained_in_full_is_loaded_too(tmp_path):
    theirs = disturbed(get_peft_model(tiny_llama(), LNTuningConfig(modules_to_save=["lm_head"])))
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    assert [target.path for target in load_adapter(model, tmp_path).saved] == ["lm_head"]
    assert relative(logits(model), logits(theirs)) <= 1e-5
    assert "lm_head.weight" in adapter_state_dict(model)


def test_llama_2_7b_trains_two_norms_a_layer_and_one_at_the_end():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    inject(model, NormTuning())
    assert trainable_summary(model).trainable == (2 * 32 + 1) * 4096 == 266_240


class RootMeanSquareNorm(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))


class SquareNorm(RootMeanSquareNorm):
    def __init__(self, features):
        super().__init__(features)
        self.weight = nn.Parameter(torch.ones(features, features))


@pytest.mark.parametrize(
    ("module", "norm"),
    [
        (nn.LayerNorm((3, 4)), True),
        (nn.RMSNorm(4), True),
        (nn.GroupNorm(2, 4), True),
        (RootMeanSquareNorm(4), True),
        (SquareNorm(4), False),
        (nn.LayerNorm(4, elementwise_affine=False), False),
        (nn.BatchNorm1d(4), False),
        (nn.SyncBatchNorm(4), False),
        (nn.Linear(4, 4), False),
    ],
    ids=str,
)
def test_what_is_a_norm(module, norm):
    assert NormTuning().supports(module) is norm


def test_what_is_no_norm_is_refused():
    with pytest.raises(TargetError, match="target 'q_proj' matches .* which NormTuning cannot adapt"):
        inject(tiny_llama(), NormTuning(), "q_proj")


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(NormTuning())
    assert losses[-1] < losses[0] - 0.2, losses

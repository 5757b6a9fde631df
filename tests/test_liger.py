"""Models whose norms, MLPs and rotary embeddings Liger-Kernel has replaced: adapters act in them as in the model before.

Its kernels need a GPU, and those of 0.8.5 do not run in Triton's interpreter; torch's operations stand in for them, so what is tested is how
its modules and ours call each other.
"""

import pytest
import torch
from torch import nn

from lightning_peft import Bottleneck, LoRA, MixLoRA, NormTuning, inject, merge_adapters
from lightning_peft.errors import TargetError
from lightning_peft.testing import tiny_llama, token_batch

pytest.importorskip("liger_kernel", reason="needs liger-kernel: pip install 'lightning-peft[liger]'")


class Norm:
    @staticmethod
    def apply(x, weight, eps, offset, casting_mode, in_place, row_mode):
        return (weight + offset) * torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps)


class SiLUMul:
    @staticmethod
    def apply(gate, up, gate_multiplier, down_multiplier):
        return torch.nn.functional.silu(gate * gate_multiplier) * up * down_multiplier


@pytest.fixture
def patched(monkeypatch):
    """Make a tiny Llama that Liger-Kernel has patched, and take back what it patched in transformers."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama, rms_norm, swiglu
    from transformers.models.llama import modeling_llama

    for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", Norm)
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", SiLUMul)

    def make(already_made):
        options = {"rope": False, "fused_linear_cross_entropy": False}
        if already_made:
            model = tiny_llama()
            apply_liger_kernel_to_llama(**options, model=model)
        else:
            apply_liger_kernel_to_llama(**options)
            model = tiny_llama()
        assert model.model.norm._get_name() == "LigerRMSNorm"
        assert model.model.layers[0].mlp._get_name() == "LigerSwiGLUMLP"
        return model

    return make


def trained(model, method, targets):
    inject(model, method, targets)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    logits = model(**token_batch()).logits
    logits.square().mean().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("method", "targets", "already_made"),
    [
        (LoRA(rank=4), "all_linear", True),
        (LoRA(rank=4), "all_linear", False),
        (NormTuning(), None, True),
        (NormTuning(), None, False),
        (Bottleneck(bottleneck_size=4), None, True),
        (Bottleneck(bottleneck_size=4), None, False),
        (MixLoRA(rank=2), None, True),
    ],
    ids=lambda one: getattr(one, "name", None),
)
def test_adapters_act_as_without_it(patched, method, targets, already_made):
    before = tiny_llama()
    wanted, gradients = trained(before, method, targets)
    model = patched(already_made)
    model.load_state_dict(tiny_llama().state_dict())
    found, ours = trained(model, method, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_merging_too(patched):
    model = patched(already_made=True)
    wanted, _ = trained(model, LoRA(rank=4), "all_linear")
    merge_adapters(model)
    torch.testing.assert_close(model(**token_batch()).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_mixture_refuses_mlps_whose_class_is_replaced(patched):
    with pytest.raises(TargetError, match="a LigerSwiGLUMLP, which MixLoRA cannot adapt"):
        inject(patched(already_made=False), MixLoRA(rank=2))

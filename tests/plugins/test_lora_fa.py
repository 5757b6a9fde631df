"""LoRA-FA keeps the contract, trains B as LoRA does and nothing else, keeps no input of a layer, and writes LoRA's files."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_peft import (
    LoRA,
    LoRAFA,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
    merge_adapters,
    save_adapter,
    trainable_summary,
)
from lightning_peft.errors import TargetError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


class TestLoRAFA(MethodConformance):
    method = LoRAFA()


class TestSlicesOfAFusedProjection(MethodConformance):
    method = LoRAFA(rank=4, rslora=True)
    targets = ["query", "value", "down"]  # noqa: RUF012

    def model(self):
        return tiny_gpt2()


class TestWithBiasesAndDropout(MethodConformance):
    method = LoRAFA(bias="lora_only", dropout=0.1, rank_pattern={"down": 2})

    def model(self):
        return tiny_llama(attention_bias=True, mlp_bias=True)


def shake(model, std=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def outputs(model):
    return model(**token_batch()).logits


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def adapted(method, make=tiny_llama, targets="all_linear"):
    model = make()
    torch.manual_seed(5)
    inject(model, method, targets)
    return model


def test_the_output_and_the_gradient_of_b_are_loras():
    ours, lora = adapted(LoRAFA(rank=4)), adapted(LoRA(rank=4))
    for path, layer in adapter_layers(ours).items():
        one, other = layer.adapters["default"], adapter_layers(lora)[path].adapters["default"]
        assert torch.equal(one.lora_A, other.lora_A)
        with torch.no_grad():
            one.lora_B.copy_(other.lora_B.normal_(std=0.05))
    assert torch.equal(outputs(ours), outputs(lora))
    for model in (ours, lora):
        outputs(model).square().sum().backward()
    for path, layer in adapter_layers(ours).items():
        one, other = layer.adapters["default"], adapter_layers(lora)[path].adapters["default"]
        assert torch.equal(one.lora_B.grad, other.lora_B.grad)
        assert one.lora_A.grad is None
        assert other.lora_A.grad is not None
        assert [name for name, _ in one.named_parameters()] == ["lora_B"]


def test_a_is_random_is_saved_and_is_not_trained():
    model = adapted(LoRAFA(rank=4))
    before = {path: layer.adapters["default"].lora_A.clone() for path, layer in adapter_layers(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    outputs(model).square().sum().backward()
    optimizer.step()
    for path, layer in adapter_layers(model).items():
        A = layer.adapters["default"].lora_A
        assert torch.equal(A, before[path])
        assert A.std() > 0
        assert f"{path}.lora_A.weight" in adapter_state_dict(model)
        assert "lora_A" in layer.adapters["default"].state_dict()
    lora = trainable_summary(adapted(LoRA(rank=4))).trainable
    assert (
        trainable_summary(model).trainable
        == sum(layer.adapters["default"].lora_B.numel() for layer in adapter_layers(model).values())
        < lora
    )


def saved_storages(model, x):
    """Return the bytes of each tensor that autograd keeps for backward, by storage, without those of the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    return y, {address: size for address, (size, _) in kept.items()}


@pytest.mark.parametrize("kind", [LoRA, LoRAFA])
def test_the_input_of_a_layer_is_kept_by_lora_and_not_by_lora_fa(kind):
    model = nn.Sequential(nn.Linear(256, 256))
    inject(model, kind(rank=4), "0")
    x = torch.randn(64, 256, requires_grad=True)
    y, kept = saved_storages(model, x)
    assert (x.untyped_storage().data_ptr() in kept) == (kind is LoRA)
    if kind is LoRAFA:
        assert sum(kept.values()) <= 64 * 4 * 4  # A x: tokens * rank numbers of four bytes
    y.sum().backward()
    assert torch.allclose(x.grad, model[0].weight.sum(dim=0).expand_as(x), atol=1e-4)  # B is zero


@pytest.mark.parametrize(
    ("make", "targets"),
    [(tiny_llama, "all_linear"), (tiny_gpt2, ["qkv", "up", "down"]), (tiny_gpt2, ["query", "value"])],
)
def test_hf_peft_reads_the_folder_as_lora_and_here_it_is_lora_fa_again(make, targets, tmp_path):
    model = shake(adapted(LoRAFA(rank=4, rslora=True), make, targets))
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert relative(outputs(theirs), outputs(model)) <= 1e-5
    assert relative(outputs(make()), outputs(model)) > 1e-2
    again = make()
    assert load_adapter(again, tmp_path).method == LoRAFA(rank=4, rslora=True)
    assert torch.equal(outputs(again), outputs(model))
    theirs.save_pretrained(tmp_path / "theirs")
    as_lora = make()
    assert type(load_adapter(as_lora, tmp_path / "theirs").method) is LoRA
    assert relative(outputs(as_lora), outputs(model)) <= 1e-5


def test_it_merges():
    model = shake(adapted(LoRAFA(rank=4)))
    out = outputs(model)
    merge_adapters(model)
    assert relative(outputs(model), out) <= 1e-5


@pytest.mark.parametrize(
    "module", [nn.Embedding(4, 4), nn.MultiheadAttention(4, 2), nn.Conv1d(4, 4, 1)], ids=lambda m: type(m).__name__
)
def test_where_nothing_would_be_saved_it_is_refused(module):
    with pytest.raises(TargetError, match=f"'0', an? {type(module).__name__}, which LoRAFA cannot adapt"):
        inject(nn.Sequential(module), LoRAFA(), "0")


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(LoRAFA())
    assert losses[-1] < losses[0] - 0.2, losses

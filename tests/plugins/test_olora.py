"""OLoRA keeps the contract; its start and its training are those of HF PEFT's ``init_lora_weights="olora"``; folders go both ways."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lightning_peft import LoRA, OLoRA, adapter_layers, inject, load_adapter, save_adapter
from lightning_peft.errors import AdapterConfigError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch
from lightning_peft.testing.subject import distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


class TestOLoRA(MethodConformance):
    method = OLoRA(rank=4)


class TestWithBiases(MethodConformance):
    method = OLoRA(rank=4, bias="all", rslora=True)

    def model(self):
        return tiny_gpt2()


TARGETS = ["q_proj", "v_proj", "up_proj"]


def train(model, kind, steps=6, **options):
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **options)
    losses = []
    for step in range(steps):
        batch = token_batch(step % 2)
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model.eval()(**token_batch(5)).logits


def theirs():
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=TARGETS, init_lora_weights="olora")
    return get_peft_model(tiny_llama(), config)


def ours(method=None):
    model = tiny_llama()
    inject(model, method or OLoRA(rank=4, alpha=12), TARGETS)
    return model


def test_it_starts_where_hf_peft_starts():
    peer = dict(theirs().base_model.model.named_modules())
    for path, layer in adapter_layers(ours()).items():
        adapter, held = layer.adapters["default"], peer[path]
        assert torch.allclose(adapter.lora_A, held.lora_A["default"].weight, atol=1e-6)
        assert torch.allclose(adapter.lora_B.t(), held.lora_B["default"].weight, atol=1e-6)
        assert adapter.scaling == held.scaling["default"] == 3.0
        assert torch.allclose(adapter.lora_B @ adapter.lora_B.t(), torch.eye(4), atol=1e-5)
    assert distance(logits(ours()), logits(theirs())) <= 1e-5


@pytest.mark.parametrize(("kind", "options"), [(torch.optim.SGD, {"lr": 0.3}), (torch.optim.AdamW, {"lr": 1e-2})])
def test_it_trains_as_hf_peft_does(kind, options):
    found, wanted = train(ours(), kind, **options), train(theirs(), kind, **options)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found[-1] < found[0] - 0.01
    assert train(ours(LoRA(rank=4, alpha=12)), kind, **options) != pytest.approx(wanted, rel=1e-3)


def test_folders_go_to_hf_peft_and_converted_ones_come_back(tmp_path):
    model = ours()
    train(model, torch.optim.AdamW, lr=1e-2)
    save_adapter(model, tmp_path / "ours")
    assert distance(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")), logits(model)) <= 1e-5
    again = tiny_llama()
    assert load_adapter(again, tmp_path / "ours").method == OLoRA(rank=4, alpha=12)
    assert torch.equal(logits(again), logits(model))

    peer = theirs()
    peer.peft_config["default"].init_lora_weights = True  # so that the start is saved as it is
    peer.save_pretrained(tmp_path / "start")
    peer.peft_config["default"].init_lora_weights = "olora"
    train(peer, torch.optim.AdamW, lr=1e-2)
    wanted = logits(peer)
    peer.save_pretrained(tmp_path / "plain")
    with pytest.raises(AdapterConfigError, match="init_lora_weights='olora' changed the base weights before training"):
        load_adapter(tiny_llama(), tmp_path / "plain")
    peer.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = tiny_llama()
    assert load_adapter(converted, tmp_path / "lora").method == LoRA(rank=8, alpha=24)
    assert distance(logits(converted), wanted) <= 1e-5


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(OLoRA(rank=4))
    assert losses[-1] < losses[0] - 0.2, losses

"""LoRA on tied embeddings: what ``tied`` promises, and HF PEFT's ``ensure_weight_tying`` both ways."""

import copy
import json

import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lightning_peft import (
    LoRA,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
    merge_adapters,
    save_adapter,
    trainable_summary,
    unload_adapters,
    unmerge_adapters,
)
from lightning_peft.errors import AdapterMismatchError, ConfigError, LightningPEFTWarning, MergeError, TargetError
from lightning_peft.registry import get_registry
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft"
)

BOTH = LoRA(rank=3, alpha=7.0, tied="both")


def llama():
    return tiny_llama(tie_word_embeddings=True)


# Sharded, any LoRA on a head gives the model's result as a view, which nobody here changes in place.
VIEW = "ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"


@pytest.mark.filterwarnings(VIEW)
class TestBothOnLlama(MethodConformance):
    method = LoRA(rank=3, alpha=7.0, tied="both")
    targets = ["embedding", "query", "down"]  # noqa: RUF012

    def model(self):
        return llama()


@pytest.mark.filterwarnings(VIEW)
class TestBothOnGPT2(MethodConformance):
    method = LoRA(rank=3, alpha=7.0, tied="both")
    targets = "head"

    def model(self):
        return tiny_gpt2()


def shake(model, std=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


@torch.no_grad()
def logits(model):
    return model(**token_batch()).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("targets", ["embedding", "head", ["embedding", "head"]])
def test_both_are_one_update_of_one_weight(targets):
    model, reference = llama(), llama()
    inject(model, BOTH, targets)
    assert set(adapter_layers(model)) == {"model.embed_tokens", "lm_head"}
    assert trainable_summary(model).trainable == 3 * (128 + 64)
    assert torch.equal(logits(model), logits(reference))
    shake(model)
    files = adapter_state_dict(model)
    A, B = (
        files[f"model.embed_tokens.lora_embedding_{name}"].double() for name in "AB"
    )  # (rank, vocabulary), (dim, rank)
    with torch.no_grad():  # the head is the same parameter
        reference.model.embed_tokens.weight += (7.0 / 3 * (B @ A).t()).float()
    assert relative(logits(model), logits(reference)) <= 1e-5
    assert torch.equal(files["lm_head.lora_A.weight"], B.t().float())
    assert torch.equal(files["lm_head.lora_B.weight"], A.t().float())


def test_the_gradient_is_that_of_both_places():
    model, reference = shake(llama()), shake(llama())
    inject(model, BOTH, "embedding")
    shake(model)
    A, B = (p.detach().double().requires_grad_() for p in model.model.embed_tokens.adapters["default"].parameters())
    model, reference = model.double(), reference.double().requires_grad_(False)
    weight = reference.lm_head.weight + 7.0 / 3 * A @ B
    values = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    out = torch.func.functional_call(reference, values, kwargs=token_batch(), tie_weights=False).logits
    out.square().mean().backward()
    model(**token_batch()).logits.square().mean().backward()
    adapter = model.model.embed_tokens.adapters["default"]
    assert relative(adapter.lora_embedding_A.grad, A.grad) <= 1e-9
    assert relative(adapter.lora_embedding_B.grad, B.grad) <= 1e-9


@pytest.mark.parametrize("make", [llama, tiny_gpt2])
def test_merged_weights_stay_tied_and_unmerge_bit_for_bit(make):
    model = make()
    inject(model, BOTH, ["embedding", "all_linear"])
    adapted, before = logits(shake(model)), model.get_input_embeddings().weight.clone()
    merge_adapters(model)
    assert relative(logits(model), adapted) <= 1e-5
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    unmerge_adapters(model)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert torch.equal(logits(model), adapted)
    merge_adapters(model)
    plain = unload_adapters(model)
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    assert relative(logits(plain), adapted) <= 1e-5


def test_the_merged_folder_is_plain_transformers(tmp_path):
    model = llama()
    inject(model, BOTH, "embedding")
    adapted = logits(shake(model))
    get_registry().exporters["merged_transformers"]().export(model, tmp_path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert relative(logits(merged), adapted) <= 1e-5


@torch.no_grad()
def test_all_places_of_a_t5_share_one_update():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = {"input_ids": torch.arange(1, 9)[None], "decoder_input_ids": torch.arange(1, 9)[None]}
    inject(model, BOTH, "embedding")
    assert set(adapter_layers(model)) == {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
    assert trainable_summary(model).trainable == 3 * (64 + 16)
    adapted = shake(model)(**ids).logits
    assert torch.equal(copy.deepcopy(model)(**ids).logits, adapted)
    merge_adapters(model)
    assert relative(model(**ids).logits, adapted) <= 1e-5


def test_a_copy_trains_its_own_tensors():
    model = llama()
    inject(model, BOTH, "head")
    again = copy.deepcopy(model)
    before = logits(model)
    shake(again)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(again), before)
    head, embedding = again.lm_head.adapters["default"], again.model.embed_tokens.adapters["default"]
    assert head.lora_A is embedding.lora_embedding_B


def test_where_nothing_is_tied_both_is_one(tmp_path):
    model = tiny_llama()
    inject(model, BOTH, "embedding")
    assert set(adapter_layers(model)) == {"model.embed_tokens"}
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ensure_weight_tying"] is False


# -- the other choices -------------------------------------------------------------------------------------------------


def test_one_adapts_the_target_alone_with_a_warning_and_does_not_merge():
    model = llama()
    with pytest.warns(
        LightningPEFTWarning,
        match="the weight of 'lm_head', which is to be adapted, is also that of 'model.embed_tokens': .*tied='both'",
    ):
        inject(model, LoRA(rank=2), "head")
    assert set(adapter_layers(model)) == {"lm_head"}
    with pytest.raises(MergeError, match=r"lm_head.weight is shared by model.embed_tokens.weight, lm_head.weight"):
        merge_adapters(model)


def test_error_names_both_and_leaves_the_model_as_it_was():
    model = llama()
    with pytest.raises(
        TargetError, match="the weight of 'model.embed_tokens', .* is also that of 'lm_head'; use tied='both'"
    ):
        inject(model, LoRA(rank=2, tied="error"), "embedding")
    assert not adapter_layers(model)
    inject(model, LoRA(rank=2, tied="error"), "all_linear")


def test_places_of_one_weight_cannot_differ_in_rank():
    with pytest.raises(
        TargetError, match="'model.embed_tokens' and 'lm_head' share one weight .* but have rank 5 and 3"
    ):
        inject(llama(), LoRA(rank=3, tied="both", rank_pattern={"embedding": 5}), ["embedding", "head"])
    inject(llama(), LoRA(rank=3, tied="both", rank_pattern={"embedding": 5, "head": 5}), ["embedding", "head", "query"])


def test_a_weight_shared_with_another_kind_of_module_is_refused():
    class Lookup(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    head = nn.Linear(4, 4)
    model = nn.ModuleDict({"head": head, "lookup": Lookup(head.weight)})
    with pytest.raises(
        TargetError, match="the weight of 'head' is also that of 'lookup', a Lookup that cannot have one update"
    ):
        inject(model, BOTH, "head")


def test_two_linear_layers_of_one_weight_get_one_update():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    inject(model, BOTH, "0")
    x = torch.randn(3, 4)
    adapted = shake(model)(x)
    merge_adapters(model)
    assert torch.allclose(model(x), adapted, atol=1e-6)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ConfigError, match="LoRA tied must be one of one, both, error, got 'yes'"):
        LoRA(tied="yes")


# -- HF PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["embedding"], ["embedding", "head", "all_linear"], ["head", "query"]])
@pytest.mark.parametrize("make", [llama, tiny_gpt2])
def test_folders_load_both_ways(make, targets, tmp_path):
    targets = [target for target in targets if make is llama or target != "query"]
    ours = make()
    inject(ours, BOTH, targets)
    save_adapter(shake(ours), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    theirs = PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert relative(logits(theirs), logits(ours)) <= 1e-5
    assert relative(logits(make()), logits(ours)) > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    again = make()
    injection = load_adapter(again, tmp_path / "theirs")
    assert injection.method.tied == "both"
    before, after = adapter_state_dict(ours), adapter_state_dict(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_adapter_made_by_hf_peft_from_scratch_loads(tmp_path):
    config = LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(llama(), config)
    with torch.no_grad():
        theirs.get_input_embeddings().lora_embedding_A["default"].normal_(std=0.1)
    theirs.eval().save_pretrained(tmp_path)
    ours = llama()
    load_adapter(ours, tmp_path)
    assert "lm_head" in adapter_layers(ours)
    assert relative(logits(ours), logits(theirs)) <= 1e-5
    assert relative(logits(llama()), logits(theirs)) > 1e-3


def test_copies_that_differ_are_refused(tmp_path):
    model = llama()
    inject(model, BOTH, "embedding")
    save_adapter(shake(model), tmp_path)
    (tmp_path / "lightning_peft.json").unlink()
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] += 1.0
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    other = llama()
    with pytest.raises(AdapterMismatchError, match="other than those of the module that shares this weight"):
        load_adapter(other, tmp_path)
    assert not adapter_layers(other)


def test_an_adapter_of_the_head_alone_loads_as_hf_peft_wrote_it(tmp_path):
    theirs = get_peft_model(llama(), LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    shake(theirs).eval().save_pretrained(tmp_path)
    ours = llama()
    with pytest.warns(LightningPEFTWarning, match="the weight of 'lm_head'"):
        load_adapter(ours, tmp_path)
    assert relative(logits(ours), logits(theirs)) <= 1e-5


def test_a_real_model_learns(data_dir):
    folder = data_dir / "models" / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inject(model, BOTH, "embedding")
    ids = torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

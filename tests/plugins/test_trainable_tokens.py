"""Trainable tokens keep the contract, replace rows and nothing else, and equal HF PEFT's TRAINABLE_TOKENS, with folders both ways."""

import copy
import json

import pytest
import safetensors.torch
import torch
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import (
    LoRA,
    PEFTModule,
    Targets,
    TrainableTokens,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
    materialize_adapters,
    merge_adapters,
    save_adapter,
    set_active_adapters,
    trainable_summary,
    unload_adapters,
    unmerge_adapters,
)
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError, InjectionError, TargetError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

EVERY_THIRD = tuple(range(0, 128, 3))


def tied_llama(**config):
    return tiny_llama(tie_word_embeddings=True, **config)


class TestTrainableTokens(MethodConformance):
    method = TrainableTokens(tokens=EVERY_THIRD)


class TestWithATiedHead(MethodConformance):
    method = TrainableTokens(tokens=EVERY_THIRD[::-1])

    def model(self):
        return tied_llama()


class TestOnGPT2(MethodConformance):
    method = TrainableTokens(tokens=EVERY_THIRD)

    def model(self):
        return tiny_gpt2()


class TestWithAnUntiedHead(MethodConformance):
    method = TrainableTokens(tokens=EVERY_THIRD)
    targets = Targets(include=["embedding", "head"])


MODELS = {"llama": tiny_llama, "tied llama": tied_llama, "gpt2": tiny_gpt2}
EMBEDDINGS = {"llama": "model.embed_tokens", "tied llama": "model.embed_tokens", "gpt2": "transformer.wte"}
TOKENS = [127, 5, 64, int(token_batch()["input_ids"][0, 0])]  # not in order, one of them in the batch


def disturbed(model):
    """Change every trained parameter, so that the adapter does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model, **batch):
    return model(**(batch or token_batch())).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def with_rows(model, path, rows, tokens=TOKENS):
    """Write ``rows`` into the weight of a plain model."""
    with torch.no_grad():
        model.get_submodule(path).weight[tokens] = rows
    return model


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_output_is_that_of_a_model_with_those_rows(kind):
    model = MODELS[kind]()
    inject(model, TrainableTokens(tokens=TOKENS))
    disturbed(model)
    (rows,) = adapter_state_dict(model).values()
    wanted = logits(with_rows(MODELS[kind](), EMBEDDINGS[kind], rows))
    assert relative(logits(model), wanted) <= 1e-5
    assert relative(logits(MODELS[kind]()), wanted) > 1e-2


@pytest.mark.parametrize("kind", MODELS)
def test_a_tied_head_scores_with_the_trained_rows_and_another_head_does_not(kind):
    tokens = sorted(set(range(128)) - set(token_batch()["input_ids"].flatten().tolist()))[
        :5
    ]  # none is read, so only heads matter
    model = MODELS[kind]()
    inject(model, TrainableTokens(tokens=tokens))
    disturbed(model)
    changed = (logits(model) != logits(MODELS[kind]())).flatten(0, 1).any(0).nonzero().flatten().tolist()
    assert changed == ([] if kind == "llama" else tokens)


def test_other_tokens_have_the_embeddings_of_the_base_bit_for_bit():
    model = tiny_llama()
    inject(model, TrainableTokens(tokens=TOKENS))
    disturbed(model)
    ids = torch.arange(128).view(2, 64)
    layer = model.model.embed_tokens
    same = (layer(ids) == layer.base_layer(ids)).all(-1).flatten()
    assert (~same).nonzero().flatten().tolist() == sorted(TOKENS)


def test_only_the_rows_asked_for_are_trained():
    model = tied_llama()
    inject(model, TrainableTokens(tokens=TOKENS))
    assert trainable_summary(model).trainable == len(TOKENS) * 64
    assert {key: tuple(value.shape) for key, value in adapter_state_dict(model).items()} == {
        "model.embed_tokens.trainable_tokens_delta": (4, 64)
    }


def test_training_equals_training_those_rows_of_the_weight_itself():
    """With SGD the trained weight differs from the base in those rows, which are those of the adapter: embedding and head learn."""
    model, plain = tied_llama(), tied_llama()
    inject(model, TrainableTokens(tokens=TOKENS))
    weight = plain.model.embed_tokens.weight
    assert plain.lm_head.weight is weight
    mask = torch.zeros_like(weight)
    mask[TOKENS] = 1.0
    weight.register_hook(lambda gradient: gradient * mask)
    for one, trained in ((model, [p for p in model.parameters() if p.requires_grad]), (plain, [weight])):
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for seed in range(3):
            batch = token_batch(seed)
            one(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            one.zero_grad()
    (rows,) = adapter_state_dict(model).values()
    torch.testing.assert_close(rows, weight[TOKENS].detach(), rtol=1e-5, atol=1e-6)
    assert relative(rows, tied_llama().model.embed_tokens.weight[TOKENS].detach()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gemma3", "bart"])
def test_an_embedding_that_scales_keeps_its_scale(kind, dtype):
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    make = {"gemma3": Gemma3TextScaledWordEmbedding, "bart": BartScaledWordEmbedding}[kind]
    model = nn.Sequential(make(16, 8, 0, embed_scale=1152**0.5))
    model[0].weight.data = model[0].weight.data.to(dtype)  # the scale, where it is a buffer, stays in float32
    plain = copy.deepcopy(model)
    inject(model, TrainableTokens(tokens=[3, 7]), "0")
    ids = torch.arange(16)
    assert torch.equal(model(ids), plain(ids))
    disturbed(model)
    (rows,) = adapter_state_dict(model).values()
    assert torch.equal(model(ids), with_rows(plain, "0", rows.to(dtype), [3, 7])(ids))


def test_embeddings_that_were_resized_are_trained():
    """New tokens are what the method is for: the rows added to the vocabulary learn, the rest of the model does not."""
    model = tied_llama()
    model.resize_token_embeddings(131, mean_resizing=False)
    inject(model, TrainableTokens(tokens=[128, 129, 130]))
    batch = {"input_ids": torch.tensor([[1, 128, 2, 129, 130]])}
    plain = copy.deepcopy(unload_adapters(copy.deepcopy(model)))
    disturbed(model)
    (rows,) = adapter_state_dict(model).values()
    assert relative(logits(model, **batch), logits(plain, **batch)) > 1e-2
    plain = with_rows(plain, "model.embed_tokens", rows, [128, 129, 130])
    assert relative(logits(model, **batch), logits(plain, **batch)) <= 1e-5


# -- tied weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tied_llama, tiny_gpt2])
def test_merged_weights_stay_tied(make):
    model = make()
    inject(model, TrainableTokens(tokens=TOKENS))
    disturbed(model)
    output, (rows,) = logits(model), adapter_state_dict(model).values()
    merge_adapters(model)
    embedding, head = model.get_input_embeddings().base_layer, model.lm_head.base_layer
    assert head.weight is embedding.weight
    assert torch.equal(head.weight[TOKENS], rows)
    assert relative(logits(model), output) <= 1e-5
    unmerge_adapters(model)
    assert torch.equal(head.weight, make().lm_head.weight)
    merge_adapters(model)
    plain = unload_adapters(model)
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


def test_naming_the_tied_head_is_naming_the_embedding(tmp_path):
    one, other = tied_llama(), tied_llama()
    inject(one, TrainableTokens(tokens=TOKENS), "lm_head")
    inject(other, TrainableTokens(tokens=TOKENS))
    assert adapter_state_dict(one).keys() == adapter_state_dict(other).keys()
    output = logits(disturbed(one))
    folder, again = save_adapter(one, tmp_path), tied_llama()
    load_adapter(again, folder)
    assert torch.equal(logits(again), output)
    theirs = PeftModel.from_pretrained(tied_llama(), folder).eval()
    assert relative(logits(theirs), output) <= 1e-5


def test_a_copy_is_tied_within_itself():
    model = tied_llama()
    inject(model, TrainableTokens(tokens=TOKENS))
    twin = copy.deepcopy(model)
    output = logits(model)
    disturbed(twin)
    assert torch.equal(logits(model), output)
    embedding, head = (twin.get_submodule(path).adapters["default"] for path in ("model.embed_tokens", "lm_head"))
    assert head.rows() is embedding.trainable_tokens_delta
    assert trainable_summary(twin).trainable == len(TOKENS) * 64


def test_tied_rows_come_from_the_meta_device():
    with torch.device("meta"):
        model = tied_llama()
        inject(model, TrainableTokens(tokens=TOKENS))
    weight = nn.Parameter(tied_llama().lm_head.weight.detach().clone(), requires_grad=False)
    for path in ("model.embed_tokens", "lm_head"):
        model.get_submodule(path).base_layer.weight = weight
    materialize_adapters(model)
    (rows,) = adapter_state_dict(model).values()
    assert torch.equal(rows, weight[TOKENS])
    head = model.lm_head.adapters["default"]
    assert torch.equal(head.rows(), head.base_rows)
    assert head.places.tolist() == TOKENS


def test_every_place_of_a_t5_that_shares_the_weight_has_the_rows():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, tie_word_embeddings=True)
    plain = T5ForConditionalGeneration(config).eval()
    model = copy.deepcopy(plain)
    inject(model, TrainableTokens(tokens=[3, 9]))
    assert set(adapter_layers(model)) == {
        "shared",
        "encoder.embed_tokens",
        "decoder.embed_tokens",
        "lm_head",
    }
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[9, 1]])}
    assert torch.equal(logits(model, **batch), logits(plain, **batch))
    disturbed(model)
    (rows,) = adapter_state_dict(model).values()
    changed = logits(model, **batch)
    assert relative(changed, logits(plain, **batch)) > 1e-3
    assert relative(changed, logits(with_rows(plain, "shared", rows, [3, 9]), **batch)) <= 1e-5


def test_a_weight_shared_with_something_else_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv = nn.Embedding(8, 4), nn.Conv1d(4, 8, 1)
            self.conv.weight = self.emb.weight

    with pytest.raises(TargetError, match="the weight of 'emb' is also that of 'conv', a Conv1d where"):
        inject(Model(), TrainableTokens(tokens=[1]), "emb")


# -- beside others -----------------------------------------------------------------------------------------------------


def test_lora_elsewhere_and_tokens_act_together():
    model = tied_llama()
    inject(model, LoRA(rank=2), ["query", "value"], name="lora")
    inject(model, TrainableTokens(tokens=TOKENS), name="tokens")
    set_active_adapters(model, ["lora", "tokens"])
    disturbed(model)
    both = logits(model)
    merge_adapters(model)
    assert relative(logits(model), both) <= 1e-5
    assert trainable_summary(model).trainable == 4 * 64 + 2 * 2 * (64 + 64) + 2 * 2 * (64 + 32)


def test_two_at_one_place_are_refused():
    model = tiny_llama()
    for name, token in (("one", 1), ("two", 2)):
        inject(model, TrainableTokens(tokens=[token]), name=name)
    with pytest.raises(InjectionError, match="'trainable_tokens' acts alone at a place"):
        set_active_adapters(model, ["one", "two"])


def test_a_checkpoint_resumes(tmp_path, make_trainer, llama):
    def fit(epochs, checkpoint=None):
        module = PEFTModule(
            copy.deepcopy(llama), TrainableTokens(tokens=[4, 9, 60]), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
        )
        trainer = make_trainer(tmp_path, max_epochs=epochs)
        torch.manual_seed(1)
        trainer.fit(module, DataLoader(torch.arange(32).view(4, 8) + 3, batch_size=2), ckpt_path=checkpoint)
        return trainer, module

    trainer, _ = fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert [(key.rpartition(".")[2], tuple(value.shape)) for key, value in saved.items()] == [
        ("trainable_tokens_delta", (3, 32))
    ]
    whole, resumed = fit(2)[1], fit(2, tmp_path / "one.ckpt")[1]
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
        assert not torch.equal(saved[key], tensor), key


# -- HF PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits(kind, tmp_path):
    model = MODELS[kind]()
    inject(model, TrainableTokens(tokens=TOKENS))
    disturbed(model)
    save_adapter(model, tmp_path)
    assert list(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")) == [
        f"base_model.model.{EMBEDDINGS[kind]}.trainable_tokens_delta"
    ]
    theirs = PeftModel.from_pretrained(MODELS[kind](), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) <= 1e-5
    assert relative(logits(MODELS[kind]()), logits(model)) > 1e-2


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_what_hf_peft_writes_loads_here(kind, named, tmp_path):
    names = [EMBEDDINGS[kind].rpartition(".")[2]] if named else None
    config = TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=TOKENS, target_modules=names)
    theirs = disturbed(get_peft_model(MODELS[kind](), config))
    theirs.save_pretrained(tmp_path)
    model = MODELS[kind]()
    assert load_adapter(model, tmp_path).method == TrainableTokens(tokens=TOKENS)
    assert relative(logits(model), logits(theirs)) <= 1e-5
    assert relative(logits(MODELS[kind]()), logits(model)) > 1e-2


def test_what_hf_peft_writes_for_an_untied_head_loads_here(tmp_path):
    config = TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens", "lm_head"])
    theirs = disturbed(get_peft_model(tiny_llama(), config))
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    assert load_adapter(model, tmp_path).paths == ["model.embed_tokens", "lm_head"]
    assert relative(logits(model), logits(theirs)) <= 1e-5
    again = PeftModel.from_pretrained(tiny_llama(), save_adapter(model, tmp_path / "ours")).eval()
    assert relative(logits(again), logits(model)) <= 1e-5


def test_tied_rows_that_differ_in_a_file_are_refused(tmp_path):
    get_peft_model(tied_llama(), TrainableTokensConfig(token_indices=TOKENS)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    rows = tensors["base_model.model.model.embed_tokens.trainable_tokens_delta"]
    tensors["base_model.model.lm_head.trainable_tokens_delta"] = rows + 1
    safetensors.torch.save_file(tensors, file)
    message = "'lm_head.trainable_tokens_delta' and 'model.embed_tokens.trainable_tokens_delta' differ, but in LlamaForCausalLM"
    with pytest.raises(AdapterMismatchError, match=message):
        load_adapter(tied_llama(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_indices": [1, 1]}, "tokens must be given once each, got 1 twice"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(change, message, tmp_path):
    get_peft_model(tiny_llama(), TrainableTokensConfig(token_indices=[1, 2])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterConfigError, match=message):
        load_adapter(tiny_llama(), tmp_path)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"tokens must list at least one token id, got \[\]"),
        (12, "tokens must list at least one token id, got 12"),
        ("12", "tokens must be ids, integers from 0 on, got '1'"),
        ([1, -1], "tokens must be ids, integers from 0 on, got -1"),
        ([1.0], "tokens must be ids, integers from 0 on, got 1.0"),
        ([True], "tokens must be ids, integers from 0 on, got True"),
        ([3, 4, 3], "tokens must be given once each, got 3 twice"),
    ],
)
def test_tokens_that_make_no_sense_are_refused(tokens, message):
    with pytest.raises(ConfigError, match=message):
        TrainableTokens(tokens=tokens)


def test_tokens_outside_the_vocabulary_are_refused():
    message = (
        r"tokens \[128, 500\] were asked for, but 'model.embed_tokens' has 128 rows \(0 to 127\); resize the embeddings"
    )
    with pytest.raises(TargetError, match=message):
        inject(tiny_llama(), TrainableTokens(tokens=[1, 128, 500]))


def test_a_slice_is_refused():
    from lightning_peft import Slice, Target

    part = Slice(role="query", groups=1, width=12, start=0, stop=4)
    with pytest.raises(TargetError, match="cannot adapt a slice of 'qkv'; name an embedding or a head"):
        TrainableTokens(tokens=[1]).adapter(nn.Linear(4, 12), Target(path="qkv", slices=(part,)))


class Lookup(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 2)


@pytest.mark.parametrize(
    ("module", "able"),
    [
        (nn.Embedding(4, 2), True),
        (nn.Embedding(4, 2, max_norm=1.0), False),
        (Lookup(4, 2), False),
        (nn.Linear(4, 2), True),
        (nn.LayerNorm(4), False),
    ],
    ids=str,
)
def test_what_has_rows_of_tokens(module, able):
    assert TrainableTokens(tokens=[1]).supports(module) is able


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(TrainableTokens(tokens=range(3, 512)), lr=2e-2)
    assert losses[-1] < losses[0] - 0.2, losses

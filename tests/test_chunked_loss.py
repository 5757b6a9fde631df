"""Models of transformers compute the same loss in chunks as without, adapted or not, in training and validation."""

import copy

import pytest
import torch
from torch import nn

from lightning_peft import (
    NF4,
    ChunkedLoss,
    ClassificationTask,
    Int8,
    LoRA,
    PEFTModule,
    PrefixTuning,
    PromptTuning,
    adapter_rows,
    chunked_loss,
    inject,
)
from lightning_peft.errors import ConfigError
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def made(kind, **fields):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "use_cache": False, **fields})
    name = f"{kind}ForConditionalGeneration" if kind == "T5" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()


MODELS = {
    "Llama": tiny_llama,
    "GPT-2, tied": tiny_gpt2,
    "Gemma 2, tied, softcap": lambda: made("Gemma2", final_logit_softcapping=2.0, attn_implementation="eager"),
    "Cohere, scaled": lambda: made("Cohere", logit_scale=0.3, pad_token_id=0),
    "Granite, divided": lambda: made("Granite", logits_scaling=3.0),
    "Mixtral, balance loss": lambda: made(
        "Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
    ),
    "T5": lambda: made(
        "T5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
    ),
}


def batch(rows=3, length=12, ignored=True):
    ids = torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if ignored:
        labels[0, :7] = -100
        labels[-1, -2:] = -100
    return {"input_ids": ids, "labels": labels}


def randomized(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model, inputs, **options):
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = model(**inputs)
    with chunked_loss(model, ChunkedLoss(tokens=5, **options)):
        chunked = model(**inputs)
    assert chunked.logits is None
    pairs = []
    for loss in (plain.loss, chunked.loss):
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs.append([g if g is not None else torch.zeros(1) for g in found])
    return plain, chunked, *pairs


def assert_same(plain, chunked, wanted, found):
    assert abs(float(chunked.loss.detach() / plain.loss.detach()) - 1) <= 1e-6
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= 1e-5 * max(float(other.norm()), 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_head(name):
    model = MODELS[name]()
    inject(model, LoRA(rank=2))
    assert_same(*gradients(randomized(model), batch()))


@pytest.mark.parametrize("name", MODELS)
def test_everything_trained_tied_weights_too(name):
    assert_same(*gradients(MODELS[name](), batch()))


def test_lora_on_the_head():
    model = tiny_llama()
    inject(model, LoRA(rank=2), ["q_proj", "lm_head"])
    plain, chunked, wanted, found = gradients(randomized(model), batch())
    assert_same(plain, chunked, wanted, found)
    assert all(gradient.any() for gradient in found)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("kind", [NF4, Int8])
def test_a_head_in_few_bits(kind, targets):
    model = tiny_llama()
    model.lm_head = (NF4(compute_dtype="float32") if kind is NF4 else kind()).quantize(model.lm_head)
    inject(model, LoRA(rank=2), targets)
    randomized(model).train()
    first = gradients(model, batch())
    assert_same(*first)
    assert len(first[3]) == 4 * len(targets) - 2 * (len(targets) == 2)
    with torch.no_grad(), chunked_loss(model.eval(), ChunkedLoss(tokens=5)):
        chunked = model(**batch())
    with torch.no_grad():
        plain = model(**batch())
    assert abs(float(chunked.loss / plain.loss) - 1) <= 1e-6
    again = gradients(model.train(), batch())
    assert all(torch.equal(one, other) for one, other in zip(first[3], again[3], strict=True))


def test_a_head_in_four_bits_is_unpacked_once_for_all_chunks(monkeypatch):
    model, calls, own = tiny_llama(), [], NF4.unpacked_into.__func__
    model.lm_head = NF4(compute_dtype="float32").quantize(model.lm_head)
    inject(model, LoRA(rank=2), ["q_proj"])
    monkeypatch.setattr(NF4, "unpacked_into", classmethod(lambda *args: calls.append(None) or own(*args)))
    with chunked_loss(model, ChunkedLoss(tokens=5)):
        model(**batch()).loss.backward()
    assert len(calls) == 1
    assert "forward" not in vars(model.lm_head)


def test_one_update_for_a_tied_embedding_and_head():
    model = tiny_gpt2()
    inject(model, LoRA(rank=2, tied="both"), ["wte", "lm_head"])
    assert_same(*gradients(randomized(model), batch()))


def test_a_head_trained_in_full():
    model = tiny_llama()
    inject(model, LoRA(rank=2), modules_to_save=["lm_head"])
    plain, chunked, wanted, found = gradients(randomized(model), batch())
    assert_same(plain, chunked, wanted, found)
    assert any(gradient.shape == (128, 64) for gradient in found)


@pytest.mark.parametrize(
    "method", [PromptTuning(num_virtual_tokens=3), PrefixTuning(num_virtual_tokens=3)], ids=lambda m: m.name
)
def test_virtual_tokens(method):
    model = tiny_llama()
    inject(model, method)
    assert_same(*gradients(model, batch()))


def test_adapters_by_rows_on_the_head():
    model = tiny_llama()
    for name in ("a", "b"):
        inject(model, LoRA(rank=2), ["q_proj", "lm_head"], name=name)
    randomized(model)
    with adapter_rows(model, ["b", None, "a"]):
        assert_same(*gradients(model, batch()))


def test_virtual_tokens_by_rows():
    model = tiny_llama()
    inject(model, PromptTuning(num_virtual_tokens=3), name="a")
    inject(model, PromptTuning(num_virtual_tokens=2), name="b")
    with adapter_rows(model, ["b", None, "a"]):
        assert_same(*gradients(model, batch()))


@pytest.fixture
def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_by_fsdp2(mesh):
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    inject(model, LoRA(rank=2), ["q_proj"], modules_to_save=["lm_head"])
    sharded = copy.deepcopy(randomized(model))
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    model(**batch()).loss.backward()
    with chunked_loss(sharded, ChunkedLoss(tokens=5)):
        sharded(**batch()).loss.backward()
    for one, other in zip(model.parameters(), sharded.parameters(), strict=True):
        if one.requires_grad:
            assert torch.allclose(other.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-7)
    fully_shard(model.lm_head, mesh=mesh)
    with chunked_loss(model), pytest.raises(ConfigError, match="split over processes"):
        model(**batch())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch.compile itself
def test_blocks_may_be_compiled():
    model = tiny_llama()
    inject(model, LoRA(rank=2))
    wanted = model(**batch()).loss
    for block in model.model.layers:
        block.compile(backend="eager")
    with chunked_loss(model):
        assert torch.allclose(model(**batch()).loss, wanted, rtol=1e-6)


def test_the_number_of_items_is_that_of_transformers():
    model, inputs = tiny_llama(), batch()
    inputs["num_items_in_batch"] = torch.tensor(40)
    assert_same(*gradients(model, inputs))


def test_gradient_checkpointing():
    model = tiny_llama()
    inject(model, LoRA(rank=2))
    randomized(model).train()
    plain = gradients(model, batch())
    model.activation_checkpointing_enable()
    again = gradients(model, batch())
    assert_same(*again)
    assert_same(plain[0], again[1], plain[2], again[3])


def test_label_smoothing_while_training_only():
    model, inputs = tiny_llama().train(), batch()
    logits = model(input_ids=inputs["input_ids"]).logits
    wanted = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=0.2
    )
    with chunked_loss(model, ChunkedLoss(label_smoothing=0.2)):
        assert torch.allclose(model(**inputs).loss, wanted, rtol=1e-6)
        assert torch.allclose(model.eval()(**inputs).loss, model(**inputs).loss)
        smoothed = model(**inputs).loss
    assert torch.allclose(smoothed, model(**inputs).loss, rtol=1e-6)


def test_calls_without_labels_and_after_the_block_have_logits():
    model, inputs = tiny_llama(), batch()
    head = model.lm_head
    wanted = model(input_ids=inputs["input_ids"]).logits
    with chunked_loss(model):
        assert torch.equal(model(input_ids=inputs["input_ids"]).logits, wanted)
        assert isinstance(model(**inputs, return_dict=False)[0], torch.Tensor)
        with pytest.raises(TypeError):
            model(**inputs, nonsense=1, input_ids=None)
    assert model.lm_head is head
    assert torch.equal(model(**inputs).logits, wanted)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_an_error_in_forward_puts_the_head_back():
    model, inputs = tiny_llama(), batch()
    head = model.lm_head
    inputs["labels"] = inputs["labels"][:, :-1]
    with chunked_loss(model), pytest.raises(RuntimeError):
        model(**inputs)
    assert model.lm_head is head


class OddLoss(nn.Module):
    """Does something to its logits that no chunk can."""

    def __init__(self, how):
        super().__init__()
        self.body, self.lm_head, self.how = nn.Embedding(16, 8), nn.Linear(8, 16), how

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.body(input_ids))
        return {"loss": self.how(logits, labels, self), "logits": logits}


ODD = {
    "softmax": lambda logits, labels, model: logits.softmax(-1).mean(),
    "function": lambda logits, labels, model: torch.logsumexp(logits, -1).mean(),
    "part of the vocabulary": lambda logits, labels, model: logits[..., :3].float(),
    "weights of classes": lambda logits, labels, model: nn.functional.cross_entropy(
        logits.view(-1, 16), labels.view(-1), torch.ones(16)
    ),
    "without the head": lambda logits, labels, model: model.body.weight.sum(),
}


@pytest.mark.parametrize("how", ODD)
def test_what_cannot_be_done_in_chunks_is_refused(how):
    model, ids = OddLoss(ODD[how]), torch.randint(0, 16, (2, 5))
    head = model.lm_head
    with chunked_loss(model), pytest.raises(ConfigError, match="leave chunked_loss out"):
        model(input_ids=ids, labels=ids)
    assert model.lm_head is head


@torch.no_grad()
def test_a_model_that_returns_a_dict():
    model = OddLoss(
        lambda logits, labels, model: nn.functional.cross_entropy(logits.view(-1, 16), labels.view(-1))
    ).eval()
    ids = torch.randint(0, 16, (2, 5))
    wanted = model(input_ids=ids, labels=ids)
    with chunked_loss(model):
        found = model(ids, labels=ids)
    assert found.keys() == {"loss"}
    assert torch.allclose(found["loss"], wanted["loss"])
    assert torch.equal(found.predicted_tokens, wanted["logits"].argmax(-1))


def test_models_without_a_head_and_compiled_ones_are_refused():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with (
        pytest.raises(ConfigError, match="LlamaForSequenceClassification has none"),
        chunked_loss(LlamaForSequenceClassification(LlamaConfig(**SIZES))),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="compile its blocks"),
        chunked_loss(torch.compile(tiny_llama(), backend="eager")),
    ):
        pass


@pytest.mark.parametrize("options", [{"tokens": 0}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}])
def test_settings_are_checked(options):
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        ChunkedLoss(**options)


def test_options_that_need_logits_are_refused():
    with pytest.raises(ConfigError, match="chunked_loss"):
        PEFTModule(tiny_llama(), LoRA(), loss=nn.functional.cross_entropy, chunked_loss=True)
    with pytest.raises(ConfigError, match="chunked_loss"):
        PEFTModule(tiny_llama(), LoRA(), task=ClassificationTask(num_labels=2), chunked_loss=True)


@pytest.mark.parametrize("weighting", ["batches", "tokens"])
def test_a_fit_is_that_without_chunks(weighting, make_trainer, tmp_path):
    base = tiny_llama()
    batches = [{key: value[:, torch.randperm(12)] for key, value in batch(rows=2).items()} for _ in range(6)]
    figures, weights = [], []
    for option in (False, ChunkedLoss(tokens=5)):
        torch.manual_seed(0)
        module = PEFTModule(
            copy.deepcopy(base), LoRA(rank=2), ["q_proj", "lm_head"], chunked_loss=option, loss_weighting=weighting
        )
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer = make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
        trainer.fit(module, loader, loader)
        figures.append(
            {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(("val", "train"))}
        )
        weights.append([p.detach().clone() for p in module.parameters() if p.requires_grad])
        predicted = trainer.predict(module, loader)
        assert predicted[0].shape == (2, 12, 128)
    assert figures[0].keys() == figures[1].keys() >= {"val_loss", "val_perplexity", "val_token_accuracy", "train_loss"}
    for name, value in figures[0].items():
        assert figures[1][name] == pytest.approx(value, rel=1e-4), name
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_the_option_in_a_configuration():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--chunked_loss", type=bool | ChunkedLoss, default=False)
    assert parser.parse_args(["--chunked_loss=true"]).chunked_loss is True
    read = parser.instantiate(parser.parse_args(["--chunked_loss.tokens=64"]))
    assert read.chunked_loss == ChunkedLoss(tokens=64)

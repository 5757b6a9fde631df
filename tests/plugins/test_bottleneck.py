"""Bottleneck adapters: numbers against references built from plain torch modules and hooks, sizes against the papers, families."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import (
    Bottleneck,
    CausalLMLoader,
    LoRA,
    Targets,
    active_adapters,
    adapter_layers,
    adapters_disabled,
    delete_adapter,
    drop_adapters,
    inject,
    load_adapter,
    save_adapter,
    set_active_adapters,
    trainable_summary,
)
from lightning_peft.errors import AdapterNotFoundError, ConfigError, InjectionError, TargetError
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 128,
}
ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "swish": nn.SiLU(), "tanh": nn.Tanh()}


def tiny_bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3)).eval()


def tiny_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def tiny_vit():
    torch.manual_seed(0)
    config = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**config, image_size=16, patch_size=8, num_labels=3)
    ).eval()


def tiny_opt():
    config = transformers.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        vocab_size=128,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
    )
    return transformers.OPTForCausalLM(config).eval()


def t5_batch():
    return {**token_batch(), "decoder_input_ids": token_batch(1)["input_ids"][:, :5]}


def images():
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def randomised(model, seed=0):
    """Give every tensor of the adapters a random value, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return model


# -- each placement against a computation by hand ----------------------------------------------------------------------


def by_hand(adapter, method):
    """The formula of the papers from torch's own modules, with the tensors of ``adapter``."""
    state = {key: value.detach() for key, value in adapter.named_parameters()}
    width, size = state["up_weight"].shape
    down, up, norm = nn.Linear(width, size).double(), nn.Linear(size, width).double(), nn.LayerNorm(width).double()
    with torch.no_grad():
        for layer, name in ((down, "down"), (up, "up"), (norm, "norm")):
            if f"{name}_weight" in state:
                layer.weight.copy_(state[f"{name}_weight"])
                layer.bias.copy_(state[f"{name}_bias"])
    steps = {
        "none": [down, ACTIVATIONS[method.activation], up],
        "before": [norm, down, ACTIVATIONS[method.activation], up],
        "after": [down, ACTIVATIONS[method.activation], up, norm],
    }[method.layer_norm]
    f = nn.Sequential(*steps).requires_grad_(False)
    return lambda x: method.scale * f(x)


def behind(module, f):
    """Make ``module`` return its output plus ``f`` of it."""
    module.register_forward_hook(
        lambda module, args, out: (out[0] + f(out[0]), *out[1:]) if isinstance(out, tuple) else out + f(out)
    )


def beside(reader, writer, f):
    """Make ``writer`` return its output plus ``f`` of what ``reader`` is given first."""
    seen = []
    reader.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    writer.register_forward_hook(
        lambda module, args, out: (out[0] + f(seen.pop()), *out[1:]) if isinstance(out, tuple) else out + f(seen.pop())
    )


def llama_behind(model, f):
    for index, layer in enumerate(model.model.layers):
        behind(layer.self_attn.o_proj, f[f"model.layers.{index}.self_attn.o_proj"])
        behind(layer.mlp.down_proj, f[f"model.layers.{index}.mlp.down_proj"])


def llama_blocks(model, f):
    for index, layer in enumerate(model.model.layers):
        behind(layer, f[f"model.layers.{index}"])


def llama_beside(model, f):
    for index, layer in enumerate(model.model.layers):
        beside(layer.self_attn, layer.self_attn, f[f"model.layers.{index}.self_attn"])
        beside(layer.mlp, layer.mlp, f[f"model.layers.{index}.mlp"])


def gpt2_beside(model, f):
    for index, layer in enumerate(model.transformer.h):
        beside(layer.mlp, layer.mlp, f[f"transformer.h.{index}.mlp"])


def bert_behind(model, f):
    for index, layer in enumerate(model.bert.encoder.layer):
        behind(layer.attention.output.dense, f[f"bert.encoder.layer.{index}.attention.output.dense"])
        behind(layer.output.dense, f[f"bert.encoder.layer.{index}.output.dense"])


def bert_beside(model, f):
    """Into the output of the last linear layer, before the residual connection and the norm, from what the sub-layer reads."""
    for index, layer in enumerate(model.bert.encoder.layer):
        place = f"bert.encoder.layer.{index}"
        beside(layer.attention.self, layer.attention.output.dense, f[f"{place}.attention.output"])
        beside(layer.intermediate, layer.output.dense, f[f"{place}.output"])


def t5_behind(model, f):
    for path, module in model.named_modules():
        if path.endswith(("Attention.o", "DenseReluDense.wo")):
            behind(module, f[path])


BOTH = ("attention", "mlp")


@pytest.mark.parametrize(
    ("make", "batch", "method", "reference"),
    [
        (tiny_llama, token_batch, Bottleneck(), llama_behind),
        (tiny_llama, token_batch, Bottleneck(scale=0.5, activation="swish", layer_norm="after"), llama_behind),
        (tiny_llama, token_batch, Bottleneck.lin(activation="tanh"), llama_blocks),
        (tiny_llama, token_batch, Bottleneck.scaled_parallel(sublayers=BOTH, layer_norm="before"), llama_beside),
        (tiny_gpt2, token_batch, Bottleneck.parallel(activation="silu"), gpt2_beside),
        (tiny_bert, token_batch, Bottleneck.houlsby(), bert_behind),
        (tiny_bert, token_batch, Bottleneck.scaled_parallel(sublayers=BOTH), bert_beside),
        (tiny_t5, t5_batch, Bottleneck(bottleneck_size=3), t5_behind),
    ],
)
def test_the_output_is_that_of_the_formula_computed_by_hand(make, batch, method, reference):
    model, plain = make().double(), make().double()
    inject(model, method)
    randomised(model)
    layers = adapter_layers(model)
    reference(plain, {path: by_hand(layer.adapters["default"], method) for path, layer in layers.items()})
    torch.testing.assert_close(logits(model, batch()), logits(plain, batch()), rtol=0, atol=1e-11)
    assert (logits(model, batch()) - logits(make().double(), batch())).abs().max() > 1e-3


def test_the_layer_norm_of_berts_sublayers_comes_after_the_adapter():
    model = tiny_bert()
    inject(model, Bottleneck())
    layer = model.bert.encoder.layer[0]
    assert list(adapter_layers(layer)) == ["attention.output.dense", "output.dense"]
    inject(model, Bottleneck.parallel(sublayers=BOTH), name="beside")
    kinds = {type(held.base_layer).__name__ for held in adapter_layers(layer).values() if held.active}
    assert kinds == {"BertSelfOutput", "BertOutput"}


# -- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "batch", "places"),
    [
        (tiny_llama, token_batch, 4),
        (tiny_gpt2, token_batch, 4),
        (tiny_bert, token_batch, 4),
        (tiny_t5, t5_batch, 10),
        (tiny_vit, images, 4),
    ],
)
@pytest.mark.parametrize(
    "method", [Bottleneck(), Bottleneck.scaled_parallel(sublayers=BOTH)], ids=["houlsby", "scaled"]
)
def test_every_kind_of_model_starts_as_the_base_and_trains(make, batch, places, method):
    model = make()
    base = logits(model, batch())
    inject(model, method)
    assert len(adapter_layers(model)) == places
    assert torch.equal(logits(model, batch()), base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    labels = torch.zeros(base.shape[:-1], dtype=torch.long)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(**batch()).logits.flatten(0, -2), labels.flatten())
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with adapters_disabled(model):
        assert torch.equal(logits(model, batch()), base)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5, tiny_vit])
def test_the_roles_of_whole_modules_can_be_targets(make):
    model = make()
    inject(model, Bottleneck(bottleneck_size=4), ["attention", "mlp"])
    paths = list(adapter_layers(model))
    assert paths
    assert not any(path.endswith(("proj", ".o", ".wo", "fc2")) for path in paths)


def test_cross_attention_can_be_left_out():
    model = tiny_t5()
    inject(model, Bottleneck(), Targets(include=["output", "down"], exclude=["EncDecAttention.o"]))
    assert len(adapter_layers(model)) == 8


# -- sizes, of the papers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "per_layer"),
    [
        (Bottleneck.houlsby(bottleneck_size=64), 2 * (2 * 768 * 64 + 64 + 768)),
        (Bottleneck.pfeiffer(), 2 * 768 * 48 + 48 + 768),
        (Bottleneck.lin(bottleneck_size=64), 2 * 768 * 64 + 64 + 768 + 2 * 768),
        (Bottleneck.scaled_parallel(bottleneck_size=512), 2 * 768 * 512 + 512 + 768),
        (Bottleneck.scaled_parallel(), 2 * 768 * 384 + 384 + 768),
    ],
)
def test_the_number_of_parameters_on_roberta_base_is_that_of_the_papers(method, per_layer):
    with torch.device("meta"):
        model = transformers.RobertaModel(transformers.RobertaConfig())
        inject(model, method)
    assert trainable_summary(model).trainable == 12 * per_layer


def test_a_bottleneck_is_never_empty():
    model = tiny_llama()
    inject(model, Bottleneck(reduction_factor=1000))
    assert adapter_layers(model)["model.layers.0.mlp.down_proj"].adapters["default"].down_weight.shape == (1, 64)


# -- AdapterDrop -------------------------------------------------------------------------------------------------------


def test_the_first_layers_can_be_left_without_adapters():
    model = tiny_t5()
    inject(model, Bottleneck(drop_layers=1))
    assert all(".block.1." in path for path in adapter_layers(model))
    assert len(adapter_layers(model)) == 5
    with pytest.raises(TargetError, match="drop_layers=2 leaves none of the 4 places"):
        inject(tiny_llama(), Bottleneck(drop_layers=2))


def test_adapters_of_the_first_layers_can_be_dropped_for_inference_and_brought_back():
    model, fewer = tiny_llama(), tiny_llama()
    inject(model, Bottleneck())
    randomised(model)
    inject(fewer, Bottleneck(drop_layers=1))
    for path, layer in adapter_layers(fewer).items():
        layer.adapters["default"].load_state_dict(adapter_layers(model)[path].adapters["default"].state_dict())
    whole = logits(model, token_batch())
    drop_adapters(model, 1)
    assert active_adapters(model) == ["default"]
    assert torch.equal(logits(model, token_batch()), logits(fewer, token_batch()))
    drop_adapters(model, 0)
    assert torch.equal(logits(model, token_batch()), whole)
    drop_adapters(model, 2)
    assert torch.equal(logits(model, token_batch()), logits(tiny_llama(), token_batch()))
    set_active_adapters(model, "default")
    assert torch.equal(logits(model, token_batch()), whole)


def test_dropping_one_adapter_leaves_the_others_active():
    model = tiny_llama()
    inject(model, Bottleneck(), name="a")
    inject(model, LoRA(rank=2), "down", name="b")
    set_active_adapters(model, ["a", "b"])
    drop_adapters(model, 1, name="a")
    active = {path: layer.active for path, layer in adapter_layers(model).items()}
    assert active["model.layers.0.mlp.down_proj"] == ("b",)
    assert active["model.layers.1.mlp.down_proj"] == ("a", "b")
    assert active["model.layers.0.self_attn.o_proj"] == ()


def test_dropping_what_is_not_there_is_refused():
    model = tiny_llama()
    inject(model, Bottleneck())
    with pytest.raises(AdapterNotFoundError, match="no such adapter"):
        drop_adapters(model, 1, name="other")
    with pytest.raises(ConfigError, match="integer of at least 0, got -1"):
        drop_adapters(model, -1)
    set_active_adapters(model, [])
    with pytest.raises(InjectionError, match=r"not active.*set_active_adapters\(model, 'default'\) first"):
        drop_adapters(model, 1)


# -- with the rest of the library --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [Bottleneck(), Bottleneck.scaled_parallel(sublayers=BOTH)], ids=["houlsby", "scaled"]
)
def test_generation_with_a_cache_is_that_of_whole_forwards(method):
    model = tiny_llama()
    inject(model, method)
    randomised(model)
    prompt = token_batch(rows=2, length=5)["input_ids"]
    mask = torch.ones_like(prompt)
    found = model.generate(
        prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0
    )
    wanted = prompt
    while wanted.shape[1] < found.shape[1]:
        wanted = torch.cat([wanted, logits(model, {"input_ids": wanted})[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, wanted)


def test_a_lora_adapter_of_another_name_acts_at_the_same_time():
    model, plain = tiny_llama().double(), tiny_llama().double()
    method = Bottleneck()
    inject(model, method, name="a")
    randomised(model)
    inject(model, LoRA(rank=2), ["query", "value"], name="b")
    randomised(model, seed=1)
    set_active_adapters(model, ["a", "b"])
    # The reference: a base that has LoRA alone, with the formula behind its layers.
    inject(plain, LoRA(rank=2), ["query", "value"], name="b")
    for path, layer in adapter_layers(plain).items():
        layer.adapters["b"].load_state_dict(adapter_layers(model)[path].adapters["b"].state_dict())
    llama_behind(
        plain, {p: by_hand(x.adapters["a"], method) for p, x in adapter_layers(model).items() if "a" in x.adapters}
    )
    torch.testing.assert_close(logits(model, token_batch()), logits(plain, token_batch()), rtol=0, atol=1e-11)
    model(**token_batch()).logits.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4 * 4 + 4 * 2
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_at_one_place_with_lora_the_bottleneck_reads_what_lora_gives():
    model, plain = tiny_llama().double(), tiny_llama().double()
    method = Bottleneck.pfeiffer()
    inject(model, LoRA(rank=2), "down", name="b")
    randomised(model, seed=1)
    inject(model, method, name="a")
    randomised(model)
    set_active_adapters(model, ["b", "a"])
    inject(plain, LoRA(rank=2), "down", name="b")
    for path, layer in adapter_layers(plain).items():
        held = adapter_layers(model)[path].adapters
        layer.adapters["b"].load_state_dict(held["b"].state_dict())
        behind(layer, by_hand(held["a"], method))
    torch.testing.assert_close(logits(model, token_batch()), logits(plain, token_batch()), rtol=0, atol=1e-11)


@pytest.mark.parametrize("make", [tiny_bert, tiny_vit])
def test_saved_loaded_and_deleted_on_other_families(make, tmp_path):
    model, again, batch = make(), make(), images() if make is tiny_vit else token_batch()
    inject(model, Bottleneck.scaled_parallel(sublayers=BOTH, layer_norm="before"))
    randomised(model)
    loaded = load_adapter(again, save_adapter(model, tmp_path))
    assert loaded.method == Bottleneck.scaled_parallel(sublayers=BOTH, layer_norm="before")
    assert torch.equal(logits(again, batch), logits(model, batch))
    delete_adapter(again, "default")
    assert torch.equal(logits(again, batch), logits(make(), batch))


@pytest.mark.parametrize("method", [Bottleneck(), Bottleneck.scaled_parallel()], ids=["houlsby", "scaled"])
def test_a_real_pretrained_model_learns(data_dir, method):
    folder = data_dir / "models" / "stories260k"
    model = CausalLMLoader(path=str(folder)).load()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with (data_dir / "e2e" / "train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(96)]
    tokens = [tokenizer(f"{row['mr']} => {row['ref']}")["input_ids"][:96] for row in rows]
    stream = torch.tensor([token for row in tokens for token in row])
    batches = stream[: 12 * 8 * 64].view(12, 8, 64)  # the last two are held out

    def loss(batch):
        return model(input_ids=batch, labels=batch).loss

    def held_out():
        with torch.no_grad():
            return (loss(batches[-1]) + loss(batches[-2])).item() / 2

    inject(model, method)
    before = held_out()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for batch in batches[:-2]:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    after = held_out()
    print(f"held-out loss {before:.3f} -> {after:.3f}")
    assert after < before - 0.3


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor must be a positive number, got 0"),
        ({"reduction_factor": float("inf")}, "reduction_factor must be a positive number, got inf"),
        ({"bottleneck_size": 0}, "bottleneck_size must be a positive integer, got 0"),
        ({"bottleneck_size": True}, "bottleneck_size must be a positive integer, got True"),
        ({"activation": "mish"}, "activation must be one of relu, gelu, silu, swish, tanh, got 'mish'"),
        ({"placement": "around"}, "placement must be one of sequential, parallel, got 'around'"),
        ({"layer_norm": True}, "layer_norm must be one of none, before, after, got True"),
        ({"init": "zeros"}, "init must be one of kaiming, gaussian, got 'zeros'"),
        ({"dtype": "float16"}, "dtype must be one of float32, base, got 'float16'"),
        ({"scale": 0}, "scale must be a finite number other than zero, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"drop_layers": -1}, "drop_layers must be an integer of at least 0, got -1"),
        ({"sublayers": ["ffn"]}, r"sublayers must name some of attention, mlp, block, got \['ffn'\]"),
        ({"sublayers": []}, r"sublayers must name some of attention, mlp, block, got \[\]"),
    ],
)
def test_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Bottleneck(**fields)


def test_a_slice_of_a_fused_projection_is_refused():
    with pytest.raises(
        TargetError, match="cannot adapt a slice of 'transformer.h.0.attn.c_attn'; name the whole module"
    ):
        inject(tiny_gpt2(), Bottleneck(), "query")


def test_a_parallel_adapter_needs_a_module_for_its_sublayer():
    with pytest.raises(TargetError, match=r"around it is 'model.decoder.layers.0', a OPTDecoderLayer; use placement="):
        inject(tiny_opt(), Bottleneck.parallel())
    with pytest.raises(TargetError, match="around it is 'the whole model', a Sequential"):
        inject(nn.Sequential(nn.Linear(4, 4)), Bottleneck.parallel(), "0")


def test_modules_without_a_width_of_their_own_are_refused():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 3)

    for module in (nn.LayerNorm(8), nn.Embedding(8, 8), nn.ModuleList([nn.Linear(8, 8)]), Router()):
        assert not Bottleneck().supports(module)


def test_a_module_that_returns_something_else_is_refused():
    model = tiny_llama()
    inject(model, Bottleneck(), "model")
    with pytest.raises(InjectionError, match="returns a BaseModelOutputWithPast, not a tensor or a tuple"):
        logits(model, token_batch())


def test_a_module_whose_input_is_not_known_is_refused():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pixels):
            return self.linear(pixels)

    model = nn.ModuleDict({"mixer": Mixer()})
    inject(model, Bottleneck.parallel(), "mixer")
    assert model["mixer"](torch.zeros(1, 4)).shape == (1, 4)
    with pytest.raises(InjectionError, match=r"without a first argument or hidden_states, with \['pixels'\]"):
        model["mixer"](pixels=torch.zeros(1, 4))

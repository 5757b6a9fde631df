"""VeRA keeps the contract, is its formula, and equals HF PEFT's VERA: the same tensors give the same logits, folders load both ways."""

import copy
import json

import pytest
import safetensors.torch
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import (
    NF4,
    PEFTModule,
    Targets,
    VeRA,
    adapter_layers,
    adapter_state_dict,
    delete_adapter,
    inject,
    load_adapter,
    materialize_adapters,
    merge_adapters,
    save_adapter,
    set_active_adapters,
    trainable_summary,
)
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError, MergeError, TargetError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::UserWarning:peft",
    "ignore:Specified to not (save|load) vera_A and vera_B:UserWarning",
    "ignore:fan_in_fan_out is set to:UserWarning",
)


class TestVeRA(MethodConformance):
    method = VeRA(rank=16)


class TestOnGPT2(MethodConformance):
    method = VeRA(rank=16, dropout=0.1)

    def model(self):
        return tiny_gpt2()


class TestWithoutSavingTheProjection(MethodConformance):
    method = VeRA(rank=16, save_projection=False, projection_seed=5, d_initial=1.0)
    targets = Targets(include=["query", "value"])


class TestOnSlicesOfAFusedLayer(MethodConformance):
    method = VeRA(rank=16, d_initial=1.0)
    targets = Targets(include=["query", "value"])

    def model(self):
        return tiny_gpt2()


_PAIR = ("vera_A", "vera_B")
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
# Layers of different widths: grouped keys and values, an MLP of twice the width, a fused projection of three times the width.
PLACES = {"llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def disturbed(model):
    """Change every trained parameter, so that the adapter does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(**token_batch()).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def adapter_at(model, path, name="default"):
    return adapter_layers(model)[path].adapters[name]


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_the_output_is_that_of_the_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 6)).double()
    inject(model, VeRA(rank=5, projection_seed=9), ["0", "1"])
    disturbed(model)
    A, B = adapter_at(model, "0").vera_A, adapter_at(model, "0").vera_B
    assert (A.shape, B.shape) == ((5, 20), (20, 5))
    x = wanted = torch.randn(3, 12, dtype=torch.float64)
    for path, (inputs, outputs) in {"0": (12, 20), "1": (20, 6)}.items():
        base, adapter = model.get_submodule(path).base_layer, adapter_at(model, path)
        d, b = torch.diag(adapter.vera_lambda_d), torch.diag(adapter.vera_lambda_b)
        wanted = wanted @ (base.weight + b @ B[:outputs] @ d @ A[:, :inputs]).t() + base.bias
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_a_slice_is_the_whole_layer_with_zeros_elsewhere():
    whole, part = tiny_gpt2(), tiny_gpt2()
    inject(whole, VeRA(rank=8), "c_attn")
    inject(part, VeRA(rank=8), ["query", "value"])
    disturbed(part)
    assert part.transformer.h[0].attn.c_attn.adapters["default"].vera_lambda_b.shape == (128,)
    for path, adapter in ((path, layer.adapters["default"]) for path, layer in adapter_layers(whole).items()):
        with torch.no_grad():
            adapter.vera_lambda_d.copy_(adapter_at(part, path).vera_lambda_d)
            query, value = adapter_at(part, path).vera_lambda_b.split(64)
            adapter.vera_lambda_b.copy_(torch.cat([query, torch.zeros(64), value]))
    assert torch.equal(logits(whole), logits(part))
    assert relative(logits(part), logits(tiny_gpt2())) > 1e-3


def test_initial_values_are_those_of_the_paper():
    model = tiny_llama()
    inject(model, VeRA(rank=8, d_initial=0.3))
    for layer in adapter_layers(model).values():
        adapter = layer.adapters["default"]
        assert torch.equal(adapter.vera_lambda_b, torch.zeros(layer.base_layer.out_features))
        assert torch.equal(adapter.vera_lambda_d, torch.full((8,), 0.3))


@pytest.mark.parametrize("rank", [1, 256])
def test_the_number_of_parameters_is_that_of_the_paper(rank):
    """L_tuned (d_model + r), table 1 of the paper: queries and values of Llama-2-7B's width here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4))
        inject(model, VeRA(rank=rank), ["query", "value"])
    assert trainable_summary(model).trainable == 4 * 2 * (4096 + rank)


# -- the shared pair ---------------------------------------------------------------------------------------------------


def held_pairs(model):
    return [name for name, _ in model.named_buffers() if name.endswith(_PAIR)]


def test_there_is_one_pair_and_all_layers_use_it():
    model = tiny_llama()
    inject(model, VeRA(rank=8))
    leader = "model.layers.0.self_attn.q_proj.adapters.default"
    assert held_pairs(model) == [f"{leader}.vera_A", f"{leader}.vera_B"]
    disturbed(model)
    before = [layer.adapters["default"].pair() for layer in adapter_layers(model).values()]
    with torch.no_grad():
        model.get_submodule(leader).vera_A.zero_()
    assert all(float(A.abs().max()) == 0 for A, _ in before)
    assert relative(logits(model), logits(tiny_llama())) < 1e-6


def test_a_copy_and_a_model_in_another_precision_use_their_own_pair():
    model = tiny_llama()
    inject(model, VeRA(rank=8))
    disturbed(model)
    output = logits(model)
    twin = copy.deepcopy(model).double()
    assert {matrix.dtype for path in adapter_layers(twin) for matrix in adapter_at(twin, path).pair()} == {
        torch.float64
    }
    for buffer in twin.buffers():
        buffer.zero_()
    assert torch.equal(logits(model), output)


def test_deleting_takes_the_pair_along_and_leaves_that_of_another_adapter():
    model = tiny_llama()
    inject(model, VeRA(rank=8), name="one")
    disturbed(model)
    output = logits(model)
    inject(model, VeRA(rank=4, projection_seed=1), ["up"], name="two")
    delete_adapter(model, "two")
    assert len(held_pairs(model)) == 2
    set_active_adapters(model, "one")
    assert torch.equal(logits(model), output)
    delete_adapter(model, "one")
    assert not held_pairs(model)


@pytest.mark.parametrize("save_projection", [True, False])
def test_the_pair_is_drawn_when_an_adapter_comes_from_the_meta_device(save_projection):
    method = VeRA(rank=8, save_projection=save_projection, projection_seed=3)
    plain = tiny_llama()
    inject(plain, method)
    with torch.device("meta"):
        model = tiny_llama()
        inject(model, method)
    for (_, layer), (_, there) in zip(adapter_layers(model).items(), adapter_layers(plain).items(), strict=True):
        layer.base_layer.weight = nn.Parameter(there.base_layer.weight.detach().clone(), requires_grad=False)
    materialize_adapters(model)
    for path in adapter_layers(plain):
        for here, there in zip(adapter_at(model, path).pair(), adapter_at(plain, path).pair(), strict=True):
            assert torch.equal(here, there)


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_checkpoint_holds_the_pair_once_or_not_at_all_and_resumes(save_projection, tmp_path, make_trainer, llama):
    def fit(epochs, checkpoint=None):
        method = VeRA(rank=8, save_projection=save_projection)
        module = PEFTModule(copy.deepcopy(llama), method, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        trainer = make_trainer(tmp_path, max_epochs=epochs)
        torch.manual_seed(1)
        trainer.fit(module, DataLoader(torch.arange(32).view(4, 8) + 3, batch_size=2), ckpt_path=checkpoint)
        return trainer, module

    trainer, _ = fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    pairs = [key for key in checkpoint["state_dict"] if key.endswith(_PAIR)]
    assert len(pairs) == (2 if save_projection else 0)
    whole, resumed = fit(2)[1], fit(2, tmp_path / "one.ckpt")[1]
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key
    for key in pairs:  # what the checkpoint holds counts, not what is drawn anew
        checkpoint["state_dict"][key] *= 2
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    changed = fit(2, tmp_path / "changed.ckpt")[1].state_dict()
    for key in pairs:
        assert torch.equal(changed[key], 2 * whole.state_dict()[key])


# -- HF PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits(kind, save_projection, tmp_path):
    model = MODELS[kind]()
    inject(model, VeRA(rank=12, projection_seed=7, save_projection=save_projection), PLACES[kind])
    disturbed(model)
    save_adapter(model, tmp_path)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {"base_model.vera_A", "base_model.vera_B"} & names == (
        {"base_model.vera_A", "base_model.vera_B"} if save_projection else set()
    )
    theirs = PeftModel.from_pretrained(MODELS[kind](), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) <= 1e-5
    assert relative(logits(MODELS[kind]()), logits(model)) > 1e-2


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_what_hf_peft_writes_loads_here(kind, save_projection, tmp_path):
    config = VeraConfig(
        task_type="CAUSAL_LM",
        r=12,
        target_modules=PLACES[kind],
        projection_prng_key=7,
        save_projection=save_projection,
        vera_dropout=0.1,
        d_initial=0.2,
        fan_in_fan_out=kind == "gpt2",
    )
    theirs = disturbed(get_peft_model(MODELS[kind](), config))
    theirs.save_pretrained(tmp_path)
    model = MODELS[kind]()
    method = load_adapter(model, tmp_path).method
    assert method == VeRA(rank=12, projection_seed=7, save_projection=save_projection, dropout=0.1, d_initial=0.2)
    assert relative(logits(model), logits(theirs)) <= 1e-5
    assert relative(logits(MODELS[kind]()), logits(model)) > 1e-2
    # Every tensor they train was taken.
    trained = sum(p.numel() for name, p in theirs.named_parameters() if "vera_lambda" in name)
    ours = [t for key, t in adapter_state_dict(model).items() if "vera_lambda" in key]
    assert sum(t.numel() for t in ours) == trained


def test_the_random_pair_is_bit_for_bit_that_of_hf_peft():
    theirs = get_peft_model(tiny_llama(), VeraConfig(r=12, target_modules=PLACES["llama"], projection_prng_key=7))
    model = tiny_llama()
    inject(model, VeRA(rank=12, projection_seed=7), PLACES["llama"])
    leader = adapter_at(model, "model.layers.0.self_attn.q_proj")
    assert torch.equal(leader.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(leader.vera_B, theirs.base_model.vera_B["default"])


def test_a_model_of_more_than_ten_layers_keeps_its_leader(tmp_path):
    """In a file the places are sorted as text, where layer 10 comes before layer 2."""
    model, again = (tiny_llama(num_hidden_layers=12) for _ in range(2))
    inject(model, VeRA(rank=4), ["model.layers.2.mlp.up_proj", "model.layers.10.mlp.up_proj"])
    disturbed(model)
    load_adapter(again, save_adapter(model, tmp_path))
    assert held_pairs(again) == held_pairs(model)
    assert torch.equal(logits(again), logits(model))


def test_a_file_without_the_pair_it_promises_is_refused(tmp_path):
    model = tiny_llama()
    inject(model, VeRA(rank=4))
    save_adapter(model, tmp_path)
    (tmp_path / "lightning_peft.json").unlink()
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["base_model.vera_B"]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(AdapterMismatchError, match=r"Missing: .*vera_B"):
        load_adapter(tiny_llama(), tmp_path)


def test_a_file_of_another_model_is_refused(tmp_path):
    model = tiny_llama()
    inject(model, VeRA(rank=4))
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterMismatchError, match="none of the places .* is in GPT2LMHeadModel, .* wrong base"):
        load_adapter(tiny_gpt2(), tmp_path, check_base=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "vera_only"}, "VeRA trains no biases, but the adapter has bias='vera_only'"),
        ({"r": 0}, "VeRA rank must be an integer of at least 1, got 0"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(change, message, tmp_path):
    get_peft_model(tiny_llama(), VeraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterConfigError, match=message):
        load_adapter(tiny_llama(), tmp_path)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": True}, "rank must be an integer of at least 1, got True"),
        ({"projection_seed": -1}, "projection_seed must be an integer of at least 0, got -1"),
        ({"d_initial": 0.0}, "d_initial must be a finite number other than zero, which could not learn, got 0.0"),
        ({"d_initial": float("inf")}, "d_initial must be a finite number .* got inf"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"save_projection": 1}, "save_projection must be true or false, got 1"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        VeRA(**fields)


def test_what_is_not_linear_is_refused():
    with pytest.raises(TargetError, match="matches 'model.embed_tokens', a Embedding, which VeRA cannot adapt"):
        inject(tiny_llama(), VeRA(), "embed_tokens")


def test_packed_weights_cannot_be_merged_into():
    model = nn.Sequential(NF4(compute_dtype="float32").quantize(nn.Linear(64, 64)))
    inject(model, VeRA(rank=4), "0")
    with pytest.raises(MergeError, match="a quantised base cannot be merged into"):
        merge_adapters(model)


def test_values_outside_the_slices_are_refused(tmp_path):
    model = tiny_gpt2()
    inject(model, VeRA(rank=4), "query")
    disturbed(model)
    adapter = next(iter(adapter_layers(model).values())).adapters["default"]
    state = adapter.export_state()
    state["vera_lambda_b"] = torch.ones(192)
    with pytest.raises(AdapterConfigError, match="vera_lambda_b has values outside the slices it adapts"):
        adapter.import_state(state)


# -- a real model ------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(VeRA(rank=64), lr=5e-2)
    assert losses[-1] < losses[0] - 0.2, losses

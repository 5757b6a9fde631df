"""Compacter: numbers against ``torch.kron`` in float64, sizes against the paper, the shared A_i through copies and files."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_peft import (
    Bottleneck,
    Compacter,
    LoRA,
    active_adapters,
    adapter_layers,
    adapter_state_dict,
    drop_adapters,
    inject,
    load_adapter,
    materialize_adapters,
    save_adapter,
    set_active_adapters,
    trainable_summary,
)
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}


class TestCompacter(MethodConformance):
    method = Compacter()


class TestCompacterPlusPlus(MethodConformance):
    method = Compacter.plus_plus(bottleneck_size=8, rank=2, dropout=0.1, init="gaussian")


class TestPHMAdapter(MethodConformance):
    """Neither factorized nor shared, as the paper's PHM-Adapter."""

    method = Compacter(factorized=False, share_rule=False, phm_dim=2, reduction_factor=8)


class TestBesideTheSublayersInThePrecisionOfTheBase(MethodConformance):
    method = Compacter(placement="parallel", factorized=False, scale=2.0, activation="relu", dtype="base")
    adapter_dtype = None


class TestCompacterOnGPT2(MethodConformance):
    """GPT-2's projections are ``Conv1D``."""

    method = Compacter(placement="parallel", share_rule=False)

    def model(self):
        return tiny_gpt2()


class TestCompacterWithoutTheFirstLayerOnGPT2(MethodConformance):
    method = Compacter(phm_dim=8, drop_layers=1)

    def model(self):
        return tiny_gpt2()


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(token_batch() if batch is None else batch)).logits


def randomised(model, seed=0):
    """Give every trained tensor a random value, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)
    return model


# -- the formula -------------------------------------------------------------------------------------------------------


def kronecker_weight(rule, factors):
    return sum(torch.kron(a, b) for a, b in zip(rule, factors, strict=True))


def by_hand(state, place, method):
    """The formula of the paper from a state dict of the adapter, with W made by ``torch.kron``."""
    shared = next((value for key, value in state.items() if key.endswith(".rule")), None)
    layers = []
    for side in ("down", "up"):
        held = {key.removeprefix(f"{place}.{side}_"): value for key, value in state.items() if key.startswith(place)}
        A = shared if method.share_rule else held["rule"]
        B = [s @ t for s, t in zip(held["s"], held["t"], strict=True)] if method.factorized else held["B"]
        W = kronecker_weight(A, B)
        linear = nn.Linear(W.shape[1], W.shape[0]).double()
        linear.weight.data, linear.bias.data = W, held["bias"]
        layers.append(linear)
    f = nn.Sequential(layers[0], ACTIVATIONS[method.activation], layers[1]).requires_grad_(False)
    return lambda x: method.scale * f(x)


def behind(module, f):
    module.register_forward_hook(lambda module, args, out: out + f(out))


def beside(module, f):
    module.register_forward_hook(lambda module, args, out: out + f(args[0]))


@pytest.mark.parametrize("share_rule", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank": 3, "phm_dim": 2, "bottleneck_size": 6, "activation": "relu"},
        {"factorized": False, "bottleneck_size": 8, "scale": 0.5, "activation": "tanh"},
        {"factorized": False, "phm_dim": 16, "reduction_factor": 2, "activation": "silu"},
        {"phm_dim": 1, "rank": 2, "bottleneck_size": 3},
    ],
    ids=str,
)
def test_the_output_is_that_of_the_sum_of_kronecker_products(fields, share_rule):
    method = Compacter(share_rule=share_rule, **fields)
    model, plain = tiny_llama().double(), tiny_llama().double()
    base = logits(plain)
    inject(model, method)
    randomised(model)
    state = adapter_state_dict(model)
    for index, layer in enumerate(plain.model.layers):
        behind(layer.self_attn.o_proj, by_hand(state, f"model.layers.{index}.self_attn.o_proj", method))
        behind(layer.mlp.down_proj, by_hand(state, f"model.layers.{index}.mlp.down_proj", method))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-10)
    assert (logits(model) - base).abs().max() > 1e-3


def test_a_parallel_adapter_reads_the_input_of_the_sublayer():
    method = Compacter.plus_plus(placement="parallel", scale=4.0)
    model, plain = tiny_llama().double(), tiny_llama().double()
    inject(model, method)
    randomised(model)
    state = adapter_state_dict(model)
    for index, layer in enumerate(plain.model.layers):
        beside(layer.mlp, by_hand(state, f"model.layers.{index}.mlp", method))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "fields", [{}, {"rank": 4}, {"factorized": False}, {"init": "gaussian", "rank": 2, "phm_dim": 8}], ids=str
)
def test_the_down_projection_starts_as_random_as_it_says_and_the_up_projection_at_zero(fields):
    method = Compacter(bottleneck_size=256, **fields)
    model = nn.Sequential(nn.Linear(1024, 1024))
    inject(model, method, "0")
    state = {key.removeprefix("0."): value for key, value in adapter_state_dict(model).items()}
    B = state["down_s"] @ state["down_t"] if method.factorized else state["down_B"]
    deviation = 0.01 if method.init == "gaussian" else nn.Linear(1024, 256).weight.std().item()
    assert kronecker_weight(state["rule"], B).std().item() == pytest.approx(deviation, rel=0.35)
    zero = [key for key, value in state.items() if not value.any()]
    assert zero == [key for key in state if key in ("down_bias", "up_bias", "up_s", "up_B")]


# -- sizes, of the paper -----------------------------------------------------------------------------------------------


def t5_base(method):
    config = transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
        # The paper has no adapter at cross-attention.
        places = ["re:.*SelfAttention.o", "re:.*DenseReluDense.wo"]
        inject(model, method, places if "attention" in method.sublayers else places[1:])
    return model


@pytest.mark.parametrize(
    ("method", "formula", "places"),
    [
        # For L blocks of width k and a bottleneck of d: 4 L (k + d) + n^3, half of that sum for Compacter++,
        # and 4 L (k d / n + n^3) for the PHM-Adapter.
        (Compacter(), lambda blocks, k, d, n: 4 * blocks * (k + d) + n**3, 2),
        (Compacter(rank=2), lambda blocks, k, d, n: 2 * 4 * blocks * (k + d) + n**3, 2),
        (Compacter.plus_plus(), lambda blocks, k, d, n: 2 * blocks * (k + d) + n**3, 1),
        (
            Compacter(phm_dim=12, factorized=False, share_rule=False),
            lambda blocks, k, d, n: 4 * blocks * (k * d // n + n**3),
            2,
        ),
    ],
)
def test_the_number_of_parameters_is_that_of_the_papers_formula_and_the_biases(method, formula, places):
    model = t5_base(method)
    biases = places * 24 * (768 + 24)
    assert trainable_summary(model).trainable == formula(24, 768, 24, method.phm_dim) + biases


def test_compacter_plus_plus_trains_the_share_of_t5_base_that_the_paper_reports():
    """0.047 %, in the abstract; the paper trains the layer norms of T5 too."""
    model = t5_base(Compacter.plus_plus())
    norms = sum(p.numel() for name, p in model.named_parameters() if "layer_norm" in name)
    summary = trainable_summary(model)
    base = summary.total - summary.trainable
    assert round(100 * (summary.trainable + norms) / base, 3) == 0.047


def test_a_bottleneck_is_a_multiple_of_phm_dim_and_never_empty():
    for width, factor, n, size in (
        (768, 32, 4, 24),
        (768, 32, 5, 20),
        (64, 32, 4, 4),
        (64, 1000, 2, 2),
        (96, 2.5, 8, 32),
    ):
        assert Compacter(reduction_factor=factor, phm_dim=n).size_for(width) == size


# -- the shared A_i ----------------------------------------------------------------------------------------------------


def rules(model, name="default"):
    return {path: layer.adapters[name].rule_of("down") for path, layer in adapter_layers(model).items()}


def test_one_rule_is_registered_once_and_read_everywhere():
    model = tiny_llama()
    inject(model, Compacter())
    assert len({id(rule) for rule in rules(model).values()}) == 1
    assert [name for name, _ in model.named_parameters() if name.endswith("rule")] == [
        "model.layers.1.mlp.down_proj.adapters.default.rule"
    ]
    assert [key for key in model.state_dict() if key.endswith("rule")] == [
        "model.layers.1.mlp.down_proj.adapters.default.rule"
    ]
    inject(model, Compacter(), name="other")
    assert rules(model)["model.layers.0.mlp.down_proj"] is not rules(model, "other")["model.layers.0.mlp.down_proj"]
    inject(model, Compacter(share_rule=False), name="apart")
    adapters = [layer.adapters["apart"] for layer in adapter_layers(model).values()]
    assert len({id(adapter.rule_of(side)) for adapter in adapters for side in ("down", "up")}) == 8


def test_the_gradient_of_the_rule_is_the_sum_over_all_adapters():
    shared, apart = tiny_llama().double(), tiny_llama().double()
    inject(shared, Compacter())
    inject(apart, Compacter(share_rule=False))
    randomised(shared)
    for path, layer in adapter_layers(apart).items():
        there = adapter_layers(shared)[path].adapters["default"]
        for name, parameter in layer.adapters["default"].named_parameters():
            with torch.no_grad():
                parameter.copy_(there.rule_of("down") if name.endswith("rule") else there.get_parameter(name))
    for model in (shared, apart):
        model(**token_batch()).logits.square().mean().backward()
    parts = [parameter.grad for name, parameter in apart.named_parameters() if name.endswith("rule")]
    found = rules(shared)["model.layers.0.mlp.down_proj"].grad
    assert len(parts) == 8
    torch.testing.assert_close(found, sum(parts), rtol=1e-9, atol=0)


def test_a_deep_copy_shares_its_own_rule():
    model = tiny_llama()
    inject(model, Compacter())
    randomised(model)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert len({id(rule) for rule in rules(twin).values()}) == 1
    assert not {id(rule) for rule in rules(twin).values()} & {id(rule) for rule in rules(model).values()}
    with torch.no_grad():
        rules(twin)["model.layers.0.mlp.down_proj"].mul_(2)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_averaged_weights_are_those_of_one_average_rule():
    model = tiny_llama().double()
    inject(model, Compacter())
    averaged = AveragedModel(model)
    states = []
    for seed in (1, 2):
        randomised(model, seed)
        averaged.update_parameters(model)
        states.append(model.state_dict())
        states[-1] = {key: value.clone() for key, value in states[-1].items()}
    mean = {key: (states[0][key] + states[1][key]) / 2 for key in states[0]}
    again = tiny_llama().double()
    inject(again, Compacter())
    again.load_state_dict(mean)
    torch.testing.assert_close(logits(averaged.module), logits(again), rtol=0, atol=1e-10)


def test_loaded_from_a_folder_all_adapters_share_the_rule(tmp_path):
    # Eleven layers, of which the tenth comes before the second in the order of the alphabet.
    model, again = (tiny_llama(num_hidden_layers=11) for _ in range(2))
    inject(model, Compacter(), ["down", "output"])
    randomised(model)
    load_adapter(again, save_adapter(model, tmp_path))
    assert len({id(rule) for rule in rules(again).values()}) == 1
    assert torch.equal(logits(again), logits(model))


def test_built_without_memory_all_adapters_share_the_rule():
    model = tiny_llama()
    with torch.device("meta"):
        empty = tiny_llama()
        inject(empty, Compacter())
    for path, layer in adapter_layers(empty).items():
        layer.base_layer = model.get_submodule(path)
    materialize_adapters(empty)
    found = rules(empty)
    assert len({id(rule) for rule in found.values()}) == 1
    assert all(not rule.is_meta and 0.3 < rule.std() < 0.7 for rule in found.values())  # 1 / sqrt(4)


# -- AdapterDrop -------------------------------------------------------------------------------------------------------


def test_adapters_of_the_first_layers_can_be_dropped_for_inference_and_brought_back():
    method = Compacter()
    model, plain = tiny_llama().double(), tiny_llama().double()
    inject(model, method)
    randomised(model)
    whole = logits(model)
    state = adapter_state_dict(model)
    last = plain.model.layers[1]
    behind(last.self_attn.o_proj, by_hand(state, "model.layers.1.self_attn.o_proj", method))
    behind(last.mlp.down_proj, by_hand(state, "model.layers.1.mlp.down_proj", method))
    drop_adapters(model, 1)
    assert active_adapters(model) == ["default"]
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-10)
    model(**token_batch()).logits.square().mean().backward()
    assert rules(model)["model.layers.0.mlp.down_proj"].grad.any()  # what is left can be trained further
    drop_adapters(model, 2)
    assert torch.equal(logits(model), logits(tiny_llama().double()))
    set_active_adapters(model, "default")
    assert torch.equal(logits(model), whole)


def test_drop_adapters_is_found_where_it_was():
    from lightning_peft.plugins.bottleneck import drop_adapters as there

    assert there is drop_adapters


def test_a_lora_and_a_bottleneck_adapter_act_at_the_same_time():
    model = tiny_llama()
    outputs = []
    for name, method in (("a", Compacter()), ("b", Bottleneck()), ("c", LoRA(rank=2))):
        inject(model, method, ["output", "down"], name=name)
        randomised(model, len(outputs))
        outputs.append(logits(model))
    set_active_adapters(model, ["a", "b", "c"])
    model(**token_batch()).logits.square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 1 + 4 * 6 + 4 * 4 + 4 * 2
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert not any(torch.equal(logits(model), output) for output in outputs)


@pytest.mark.parametrize("method", [Compacter(), Compacter(factorized=False, share_rule=False)], ids=["LPHM", "PHM"])
def test_the_loss_of_a_real_model_falls(trained_on_e2e, method):
    losses = trained_on_e2e(method)
    assert losses[-1] < losses[0] - 0.2, losses


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phm_dim": 0}, "Compacter phm_dim must be a positive integer, got 0"),
        ({"phm_dim": 4.0}, "Compacter phm_dim must be a positive integer, got 4.0"),
        ({"rank": 0}, "Compacter rank must be a positive integer, got 0"),
        ({"factorized": "yes"}, "Compacter factorized must be true or false, got 'yes'"),
        ({"share_rule": 1}, "Compacter share_rule must be true or false, got 1"),
        ({"bottleneck_size": 6}, "Compacter bottleneck_size must be a multiple of phm_dim=4, got 6"),
        ({"bottleneck_size": 0}, "Compacter bottleneck_size must be a positive integer, got 0"),
        ({"factorized": False, "rank": 2}, "Compacter rank=2 is that of factorized layers, and factorized is false"),
        ({"reduction_factor": 0}, "Compacter reduction_factor must be a positive number, got 0"),
        ({"activation": "mish"}, "Compacter activation must be one of relu, gelu, silu, swish, tanh, got 'mish'"),
        ({"sublayers": ["ffn"]}, r"Compacter sublayers must name some of attention, mlp, block, got \['ffn'\]"),
    ],
)
def test_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Compacter(**fields)


def test_a_width_that_phm_dim_does_not_divide_is_refused_before_anything_changes():
    model = tiny_llama()
    with pytest.raises(
        TargetError,
        match="phm_dim=3 does not divide the width 64 of 'model.layers.0.self_attn.o_proj', a Linear; choose",
    ):
        inject(model, Compacter(phm_dim=3))
    assert not adapter_layers(model)


def test_a_slice_of_a_fused_projection_is_refused():
    with pytest.raises(TargetError, match="Compacter cannot adapt a slice of 'transformer.h.0.attn.c_attn'; name the"):
        inject(tiny_gpt2(), Compacter(), "query")

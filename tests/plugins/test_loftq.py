"""LoftQ keeps the contract, starts closer to the full-precision model than QLoRA, and its folders come back over the same packed weights."""

import json

import numpy
import pytest
import torch
from peft import PeftModel
from torch import nn

from lightning_peft import (
    NF4,
    CausalLMLoader,
    Int8,
    LoftQ,
    LoRA,
    QLoRA,
    adapter_layers,
    adapter_names,
    inject,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_active_adapters,
)
from lightning_peft.errors import BaseMismatchError, ConfigError, InjectionError, MergeError, TargetError
from lightning_peft.plugins.loftq import quantized_with_error
from lightning_peft.testing import MethodConformance, tiny_llama, token_batch
from lightning_peft.testing.subject import base_tensors, differing, distance

# torch.compile makes an instance of bitsandbytes' autograd function to trace it, and then warns of that.
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

EXACT = LoftQ(rank=8, compute_dtype="float32")


class TestLoftQ(MethodConformance):
    method = LoftQ(compute_dtype="float32")


class TestInSeveralRoundsOverInt8(MethodConformance):
    method = LoftQ(rank=4, iterations=3, quantization="int8", rank_pattern={"down": 2}, skip=["gate"], rslora=True)


def train(model, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        batch = token_batch(step)
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model.train()(**token_batch()).logits  # in eval mode int8 rounds the inputs too


def stories(data_dir):
    return CausalLMLoader(path=str(data_dir / "models" / "stories260k")).load()


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [NF4(compute_dtype="float32"), Int8()])
def test_one_round_is_the_quantised_weight_and_the_largest_part_of_its_error(quantizer):
    linear = nn.Linear(64, 96)
    packed, A, B = quantized_with_error(quantizer, linear, 5, 1)
    plain = quantizer.quantize(linear)
    assert torch.equal(packed.weight, plain.weight)
    error = (linear.weight - quantizer.dequantized(plain)).detach().double().numpy()
    left, values, right = numpy.linalg.svd(error)
    wanted = torch.from_numpy(left[:, :5] * values[:5] @ right[:5])
    assert distance(B @ A, wanted) <= 1e-4
    assert torch.equal(linear.bias, packed.bias)


def test_every_round_comes_closer_to_the_weight_and_packs_what_the_last_one_left():
    linear, quantizer = nn.Linear(128, 96), NF4()

    def off(iterations):
        packed, A, B = quantized_with_error(quantizer, linear, 16, iterations)
        return (
            float(torch.linalg.matrix_norm(linear.weight.detach() - quantizer.dequantized(packed) - B @ A)),
            packed,
            A,
            B,
        )

    found = {rounds: off(rounds) for rounds in (1, 2, 5)}
    assert found[5][0] < found[2][0] < found[1][0]
    rest = nn.Linear(128, 96)
    rest.weight = nn.Parameter(linear.weight.detach() - found[1][3] @ found[1][2])
    assert torch.equal(quantizer.quantize(rest).weight, found[2][1].weight)


@pytest.mark.parametrize("base", ["tiny", "real"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_fresh_model_is_closer_to_full_precision_than_qloras(base, quantization, iterations, request):
    make = tiny_llama if base == "tiny" else lambda: stories(request.getfixturevalue("data_dir"))
    options = {"rank": 16, "quantization": quantization, "skip": "down"}
    options |= {} if quantization == "int8" else {"compute_dtype": "float32"}
    wanted, errors = logits(make()), []
    for method in (QLoRA(**options), LoftQ(**options, iterations=iterations)):
        model = make()
        inject(model, method)
        errors.append(float((logits(model) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.9 * errors[0], errors


def test_pattern_ranks_and_layers_that_stay_as_they_are():
    model = tiny_llama()
    inject(model, LoftQ(rank=4, rank_pattern={"value": 2}, skip=["down"], compute_dtype="float32", rslora=True))
    layers = adapter_layers(model)
    value = layers["model.layers.0.self_attn.v_proj"].adapters["default"]
    assert value.lora_A.shape[0] == 2
    assert value.lora_B.any()
    plain = layers["model.layers.0.mlp.down_proj"]
    assert plain.base_layer.weight.dtype == torch.float32
    assert not plain.adapters["default"].lora_B.any()  # nothing was lost there
    dense = NF4().dequantized(layers["model.layers.0.self_attn.v_proj"].base_layer)
    full = tiny_llama().model.layers[0].self_attn.v_proj.weight
    left = full - dense - value.scaling * value.lora_B.t() @ value.lora_A
    values = torch.linalg.svdvals(full - dense)
    assert torch.linalg.matrix_norm(left).item() == pytest.approx(values[2:].norm().item(), rel=1e-4)


def test_with_several_rounds_every_quantised_layer_needs_its_adapter():
    with pytest.raises(
        InjectionError,
        match="LoftQ with iterations=2 quantises 'model.layers.0.self_attn.k_proj' for an adapter that it does not get",
    ):
        inject(tiny_llama(), LoftQ(iterations=2, compute_dtype="float32"), ["query", "value"])
    model = tiny_llama()
    inject(model, EXACT, ["query", "value"])  # one round packs as QLoRA does, so the others are as they should be
    own = tiny_llama()
    QLoRA(compute_dtype="float32").prepare(own)
    assert not differing(base_tensors(own), base_tensors(model))


def test_a_base_that_was_quantised_before_and_another_rank_are_refused():
    model = tiny_llama()
    QLoRA(compute_dtype="float32").prepare(model)
    with pytest.raises(
        InjectionError, match="'model.layers.0.mlp.down_proj' is quantised already and its full weight is gone"
    ):
        inject(model, EXACT)
    model = tiny_llama()
    inject(model, EXACT)
    with pytest.raises(InjectionError, match="was asked for; use rank 8 there, or load the base again"):
        inject(model, LoftQ(rank=4, compute_dtype="float32"), name="other")
    inject(model, EXACT, name="second")  # it starts where the first started
    with pytest.raises(InjectionError, match="acts alone at a place"):
        set_active_adapters(model, ["default", "second"])
    with pytest.raises(MergeError, match="belongs to no other base either; keep the adapter active instead"):
        merge_adapters(model)


def test_slices_are_refused():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    with pytest.raises(TargetError, match="LoftQ cannot adapt a slice of '.*query_key_value'; name the whole module"):
        inject(GPTNeoXForCausalLM(config), EXACT, ["query"])


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [EXACT, LoftQ(rank=4, iterations=3, quantization="int8")], ids=["nf4", "int8"])
def test_a_folder_loads_over_the_full_precision_base_which_is_quantised_again(method, tmp_path):
    model = tiny_llama()
    inject(model, method)
    train(model)
    save_adapter(model, tmp_path)
    packed = json.loads((tmp_path / "lightning_peft.json").read_text())["base"]["packed"]
    assert packed.keys() == adapter_layers(model).keys()
    again = tiny_llama()
    assert load_adapter(again, tmp_path).method == method
    assert not differing(base_tensors(model), base_tensors(again))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore:QLoRA with quantization=.nf4. was asked for, but the base is quantised as fp4")
def test_other_packed_weights_are_refused(tmp_path):
    model = tiny_llama()
    inject(model, EXACT)
    save_adapter(model, tmp_path)
    for other in (
        QLoRA(quantization="fp4", compute_dtype="float32"),
        QLoRA(block_size=128, skip="re:.*(attn|gate|up).*", compute_dtype="float32"),
    ):
        base = tiny_llama()
        other.prepare(base)
        with pytest.raises(
            BaseMismatchError,
            match=r"packed weights that are not those of this LlamaForCausalLM: \d+ of 14 layers differ",
        ):
            load_adapter(base, tmp_path)
        assert not adapter_names(base)
        load_adapter(base, tmp_path, check_base=False)
    same = tiny_llama()
    QLoRA(compute_dtype="float32").prepare(same)
    assert load_adapter(same, tmp_path).method == QLoRA(rank=8, compute_dtype="float32")
    assert torch.equal(logits(same), logits(model))


def test_one_changed_code_is_noticed(tmp_path):
    model = tiny_llama()
    inject(model, EXACT)
    save_adapter(model, tmp_path)
    base = tiny_llama()
    EXACT.prepare(base)
    base.model.layers[1].mlp.up_proj.weight.data.view(-1)[77] ^= 1
    with pytest.raises(BaseMismatchError, match="1 of 14 layers differ, first 'model.layers.1.mlp.up_proj'"):
        load_adapter(base, tmp_path)


def test_hf_peft_gives_the_same_outputs_over_the_same_packed_base(tmp_path):
    model = tiny_llama()
    inject(model, EXACT)
    train(model)
    save_adapter(model, tmp_path)
    base = tiny_llama()
    EXACT.prepare(base)
    assert distance(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model)) <= 1e-5


# -- settings, and a real model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "LoftQ iterations must be a positive integer, got 0"),
        ({"alpha": -1.0}, "LoftQ alpha must be positive, got -1.0"),
        (
            {"quantization": "int8", "block_size": 64},
            "LoftQ block_size=64 was given, but the quantizer 'int8' has no such",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LoftQ(**options)


def test_lora_reads_hf_pefts_files_still():
    from lightning_peft import get_registry

    assert get_registry().method_for_peft_type("LORA") is LoRA


@pytest.mark.filterwarnings("ignore:LoftQ leaves 5 of 35 linear layers unquantised")
def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(EXACT)
    assert losses[-1] < losses[0] - 0.2, losses

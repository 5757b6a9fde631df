import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft import FP4, NF4, Int8, LoRA, inject
from lightning_peft.errors import ConfigError, InjectionError

# The 16 values of NormalFloat4 as printed in appendix E of the QLoRA paper (arXiv:2305.14314).
CODE_BOOK = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(128, 64, bias=bias)


@pytest.mark.parametrize("double", [False, True])
def test_every_weight_is_a_value_of_the_published_code_book_times_the_scale_of_its_block(double):
    quantizer = NF4(double_quantization=double, compute_dtype="float32")
    layer = linear()
    dense = quantizer.dequantized(quantizer.quantize(layer))
    blocks, original = dense.reshape(-1, 64), layer.weight.detach().reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scales).unsqueeze(-1).sub(torch.tensor(CODE_BOOK)).abs().amin(-1)
    assert nearest.max() < 1e-3
    if not double:
        assert torch.allclose(scales, original.abs().amax(1, keepdim=True))
    assert (blocks - original).abs().max() <= 0.17 * original.abs().max()


def test_the_quantised_layer_is_the_product_with_the_dequantised_weight_and_the_original_is_left_alone():
    quantizer = NF4(compute_dtype="float32")
    layer = linear()
    before = layer.weight.clone()
    packed = quantizer.quantize(layer)
    x = torch.randn(3, 128)
    assert torch.allclose(packed(x), x @ quantizer.dequantized(packed).t() + layer.bias, atol=1e-5)
    assert torch.equal(layer.weight, before)
    assert packed.weight.numel() == layer.weight.numel() // 2


def test_gradients_after_an_eval_pass_are_those_before_it():
    quantizer = NF4(compute_dtype="bfloat16")
    model = nn.Sequential(quantizer.quantize(linear()), nn.Tanh(), quantizer.quantize(nn.Linear(64, 64)))
    inject(model, LoRA(rank=2), "all_linear")
    x = torch.randn(3, 128)

    def gradients():
        model.train().zero_grad()
        model(x).float().square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    before = gradients()
    with torch.no_grad():
        model.eval()(x)
    assert len(before) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 65}, "NF4 block_size must be a power of two from 64 to 4096, got 65"),
        ({"compute_dtype": "int8"}, "NF4 compute_dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_a_setting_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        NF4(**options)


def test_a_width_that_is_not_a_multiple_of_the_block_is_refused_as_it_would_be_read_back_wrongly():
    with pytest.raises(
        InjectionError, match="NF4 needs in_features to be a multiple of block_size=64, got a layer of 100"
    ):
        NF4().quantize(nn.Linear(100, 64))


# -- FP4 and Int8 ------------------------------------------------------------------------------------------------------

FP4_MAGNITUDES = [0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0]
"""Two bits of exponent and one of mantissa, divided by the largest, 12; the lowest is a subnormal number."""


@pytest.mark.parametrize("double", [False, True])
def test_every_fp4_weight_is_a_floating_point_number_of_four_bits_times_the_scale_of_its_block(double):
    quantizer = FP4(double_quantization=double, compute_dtype="float32")
    dense = quantizer.dequantized(quantizer.quantize(linear()))
    blocks = dense.reshape(-1, 64).abs()
    scales = blocks.amax(1, keepdim=True)
    nearest = (blocks / scales).unsqueeze(-1).sub(torch.tensor(FP4_MAGNITUDES)).abs().amin(-1)
    assert nearest.max() < 1e-3
    assert len((blocks / scales).mul(1000).round().unique()) == 8


def test_every_int8_weight_is_the_nearest_of_255_multiples_of_the_scale_of_its_row():
    layer = linear()
    weight = layer.weight.detach()
    dense = Int8().dequantized(Int8().quantize(layer))
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((dense - weight).abs() / steps).max() < 0.5 + 127 / 2048  # half a step, and the rounding of float16
    codes = dense / steps
    assert (codes - codes.round()).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [NF4, FP4, Int8])
def test_in_training_every_layer_is_the_product_with_its_dequantised_weight(kind, bias, dtype):
    quantizer = Int8() if kind is Int8 else kind(compute_dtype=str(dtype).removeprefix("torch."))
    layer = linear(bias).to(dtype)
    before = [parameter.clone() for parameter in layer.parameters()]
    packed = quantizer.quantize(layer).train()
    x = torch.randn(3, 5, 128, dtype=dtype, requires_grad=True)
    dense = quantizer.dequantized(packed).to(dtype)
    held = [parameter.detach().clone() for parameter in packed.parameters()]
    wanted = F.linear(x, dense, layer.bias)
    y = packed(x)
    assert y.dtype == dtype
    assert torch.equal(y, wanted)
    gradients = [torch.autograd.grad(output.sum(), x)[0] for output in (y, wanted)]
    assert torch.allclose(*gradients, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    packed.eval()
    with torch.no_grad():
        y = packed(x)
    # LLM.int8() rounds the input to eight bits too; bfloat16 rounds once more.
    tolerance = 2e-2 if kind is Int8 or dtype == torch.bfloat16 else 1e-6
    assert (y - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert torch.equal(quantizer.dequantized(packed).to(dtype), dense)
    assert all(torch.equal(a, b) for a, b in zip(held, packed.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_outliers_are_multiplied_in_full_precision():
    layer = linear()
    x = torch.randn(4, 128)
    x[:, 7] = 60.0
    wanted = layer(x)
    with torch.no_grad():
        off = {t: float((Int8(threshold=t).quantize(layer).eval()(x) - wanted).abs().max()) for t in (0.0, 6.0)}
    assert off[6.0] < 0.5 * off[0.0]


def stored_bits(packed):
    """Bits of every tensor that a 4-bit layer keeps of its weight."""
    state = packed.weight.quant_state
    tensors = [packed.weight.data, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return 8 * sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind", [NF4, FP4])
@pytest.mark.parametrize(
    ("double", "bits"), [(True, 4.127), (False, 4.5)]
)  # section 3 of the paper: 32/64, or 8/64 + 32/(64*256)
def test_a_weight_of_4096_by_4096_takes_as_many_bits_as_published(kind, double, bits):
    layer = nn.Linear(4096, 4096, bias=False, device="meta").to_empty(device="cpu")
    nn.init.ones_(layer.weight)
    packed = kind(double_quantization=double).quantize(layer)
    assert stored_bits(packed) / layer.weight.numel() == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("kind", [NF4, FP4, Int8])
def test_a_quantised_layer_is_frozen_keeps_its_mode_and_lives_through_a_copy(kind):
    layer = linear().eval()
    packed = kind().quantize(layer)
    assert not packed.training
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    twin = copy.deepcopy(packed)
    x = torch.randn(2, 128)
    assert torch.equal(twin(x), packed(x))
    assert torch.equal(kind().dequantized(twin), kind().dequantized(packed))


@pytest.mark.parametrize("threshold", [-1.0, float("inf"), "6"])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ConfigError, match="Int8 threshold must be 0 or a positive number, got"):
        Int8(threshold=threshold)

import pytest
import torch
from torch import nn

from lightning_peft import NF4, LoRA, inject
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

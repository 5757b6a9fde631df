"""Merging into quantised bases: refused unless asked for, measured, and undone bit for bit."""

import pytest
import torch

from lightning_peft import (
    LoftQ,
    LoRA,
    QLoRA,
    adapter_layers,
    adapters_disabled,
    inject,
    merge_adapters,
    unmerge_adapters,
)
from lightning_peft.errors import MergeError
from lightning_peft.fingerprint import packed_digests
from lightning_peft.merging import outputs
from lightning_peft.quantized_layers import dense_weight, packed_layers, packing_quantizer
from lightning_peft.testing import tiny_llama, token_batch

BATCH = token_batch()
METHODS = {
    "nf4": QLoRA(rank=4, compute_dtype="float32"),
    "fp4 in large blocks": QLoRA(
        rank=4, quantization="fp4", block_size=128, double_quantization=False, skip=["re:.*attn.*", "gate", "up"]
    ),
    "int8": QLoRA(rank=4, quantization="int8"),
    "loftq": LoftQ(rank=4, compute_dtype="float32"),
}


def trained(method, **config):
    model = tiny_llama(**config)
    inject(model, method)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_report_is_what_the_weights_say_and_unmerging_restores_every_bit(method):
    model = trained(method)
    out, packed = outputs(model, BATCH), packed_digests(model)
    with pytest.raises(MergeError, match=r"quantized='dequantize' or quantized='requantize'"):
        merge_adapters(model)
    # W and D from the unmerged model, by hand.
    wanted = {}
    for path, module in packed_layers(model).items():
        adapter = adapter_layers(model)[path].adapters["default"]
        wanted[path] = (
            dense_weight(module).double(),
            adapter.scaling * (adapter.lora_B.double().t() @ adapter.lora_A.double()),
        )
    settings = {path: packing_quantizer(module).settings_of(module) for path, module in packed_layers(model).items()}
    report = merge_adapters(model, quantized="requantize", probe=BATCH)
    now = packed_layers(model)
    assert report.weights.keys() == wanted.keys() == now.keys()
    for path, (W, D) in wanted.items():
        off = (dense_weight(now[path]).double() - (W + D)).norm()
        assert report.weights[path].weight == pytest.approx((off / (W + D).norm()).item(), rel=1e-3)
        assert report.weights[path].lost == pytest.approx((off / D.norm()).item(), rel=1e-3)
        assert packing_quantizer(now[path]).settings_of(now[path]) == settings[path]
    assert 0 < report.max_logit_error == (outputs(model, BATCH) - out).abs().max().item()
    assert "of the update" in str(report)
    with adapters_disabled(model):
        base = outputs(model, BATCH)
        assert packed_digests(model) == packed
    assert packed_digests(model) == packed  # that of the base, whatever is merged
    unmerge_adapters(model)
    assert packed_digests(model) == packed
    assert torch.equal(outputs(model, BATCH), out)
    with adapters_disabled(model):
        assert torch.equal(outputs(model, BATCH), base)


def test_the_settings_that_are_read_from_a_layer_are_those_it_was_made_with():
    for method in METHODS.values():
        model = trained(method)
        for module in packed_layers(model).values():
            assert packing_quantizer(module).settings_of(module) == method.quantizer


@pytest.mark.parametrize("method", [METHODS["nf4"], METHODS["loftq"]], ids=["nf4", "loftq"])
def test_a_dequantised_merge_loses_next_to_nothing_and_is_undone(method):
    model = trained(method)
    out = outputs(model, BATCH)
    report = merge_adapters(model, quantized="dequantize", probe=BATCH)
    assert not packed_layers(model)
    assert max(error.lost for error in report.weights.values()) < 1e-6
    assert report.max_logit_error <= 1e-5 * report.max_logit
    unmerge_adapters(model)
    assert len(packed_layers(model)) == 14
    assert torch.equal(outputs(model, BATCH), out)


def test_several_adapters_are_quantised_once_from_the_base_as_it_was():
    model = trained(QLoRA(rank=4, compute_dtype="float32"))
    inject(model, LoRA(rank=2), name="b")
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.adapters["b"].lora_B.normal_(std=0.05)
    from lightning_peft import set_active_adapters

    set_active_adapters(model, ["default", "b"])
    merge_adapters(model, ["default", "b"], quantized="requantize")
    at_once = {path: dense_weight(module) for path, module in packed_layers(model).items()}
    unmerge_adapters(model)
    merge_adapters(model, "default", quantized="requantize")
    merge_adapters(model, "b", quantized="requantize")
    assert all(torch.equal(at_once[path], dense_weight(module)) for path, module in packed_layers(model).items())
    with pytest.raises(MergeError, match="merged already"):
        merge_adapters(model, "b", quantized="requantize")


def test_a_refused_merge_leaves_the_packed_layers_where_they_are():
    model = trained(QLoRA(rank=4, compute_dtype="float32"))
    packed, held = packed_digests(model), packed_layers(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.adapters["default"].lora_A[0, 0] = float("nan")
    for keep in (True, False):
        with pytest.raises(MergeError, match="non-finite"):
            merge_adapters(model, quantized="requantize", keep_originals=keep)
        assert packed_digests(model) == packed
        assert all(module is held[path] for path, module in packed_layers(model).items())


def test_a_quantizer_that_does_not_say_its_settings_is_not_guessed_at(monkeypatch):
    from lightning_peft import NF4

    model = trained(QLoRA(rank=4, compute_dtype="float32"))
    monkeypatch.setattr(NF4, "settings_of", classmethod(lambda cls, module: None))
    with pytest.raises(MergeError, match="'nf4' does not say with which settings it packed this Linear4bit"):
        merge_adapters(model, quantized="requantize")
    assert len(merge_adapters(model, quantized="dequantize").weights) == 14

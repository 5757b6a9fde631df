"""Products with packed weights: the numbers of bitsandbytes' own layers, each weight unpacked once in a pass, and nothing else kept."""

import contextlib
import copy
import importlib.util
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_peft import FP4, NF4, Int8, LoRA, QLoRA, adapter_layers, inject
from lightning_peft.errors import InjectionError
from lightning_peft.packed_products import called_reason, free_scratch, packed_product, scratch
from lightning_peft.quantized_layers import dequantized_path, unpacking_product
from lightning_peft.testing import tiny_llama, token_batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def packed_layer(quantizer=None, shape=(128, 96), bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(*shape, bias=bias, dtype=dtype).requires_grad_(False)
    return (quantizer or NF4(compute_dtype="float32")).quantize(linear)


def inputs(width=128, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return torch.randn(2, 5, width, dtype=dtype, requires_grad=True)


def values(layer, x, slope):
    """What the layer itself makes of x and its gradient, and what is made without calling it."""
    called = layer(x)
    computed = unpacking_product(layer)(layer, x).view(called.shape)
    return [(y, *torch.autograd.grad(y, x, slope)) for y in (called, computed)]


@contextlib.contextmanager
def counted(monkeypatch):
    """Count how often a weight is unpacked."""
    calls = []

    def count(kind):
        own = kind.unpacked_into.__func__

        def unpacked_into(cls, out, weight):
            calls.append(weight.shape)
            own(cls, out, weight)

        patch.setattr(kind, "unpacked_into", classmethod(unpacked_into))

    with monkeypatch.context() as patch:
        count(NF4)
        yield calls


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_outputs_are_those_of_bitsandbytes_bit_for_bit_and_gradients_to_rounding(base, compute):
    for kind, double, bias in ((NF4, True, True), (NF4, False, False), (FP4, True, False), (FP4, False, True)):
        layer = packed_layer(kind(double_quantization=double, compute_dtype=compute), bias=bias, dtype=DTYPES[base])
        x = inputs(dtype=DTYPES[base])
        (y, dx), (own, own_dx) = values(layer, x, torch.randn(2, 5, 96, dtype=x.dtype))
        assert own.dtype == x.dtype
        assert torch.equal(y, own)
        if base in ("float32", compute):
            assert torch.equal(dx, own_dx)
        else:  # bitsandbytes rounds the weight of backward to the precision that was packed first
            assert (dx - own_dx).abs().max() <= 2**-7 * dx.abs().max()


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_the_weight_of_backward_is_that_of_forward(base):
    layer = packed_layer(NF4(compute_dtype="float32"), dtype=base, bias=False)
    x = inputs()
    y = packed_product(NF4, layer, x)
    slope = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, slope)
    W = packed_product(NF4, layer, torch.eye(128)).t()  # (out, in), as forward multiplies with it
    torch.testing.assert_close(dx.view(-1, 128), slope @ W, rtol=1e-5, atol=1e-5)


def test_derivatives_of_any_order():
    layer = packed_layer()
    dense = nn.Linear(128, 96)
    dense.weight, dense.bias = nn.Parameter(NF4().dequantized(layer)), layer.bias
    x = inputs()

    def third(f):
        y = f(x).tanh()
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        return torch.autograd.grad(second.square().sum(), x)[0]

    torch.testing.assert_close(
        third(lambda x: packed_product(NF4, layer, x).view(2, 5, 96)), third(dense), rtol=1e-4, atol=1e-6
    )


def train(model, batch=None):
    batch = batch or token_batch()
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def adapted(method=None, seed=0, **options):
    """An adapted model, and one with the same adapters in which every quantised layer is called."""
    model = tiny_llama(**options)
    inject(model, method or QLoRA(rank=2, compute_dtype="float32"))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    called = copy.deepcopy(model)
    for layer in adapter_layers(called).values():
        layer.base_layer.register_forward_hook(lambda *_: None)
    return model.train(), called.train()


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_a_model_trains_as_where_its_layers_are_called(quantization, monkeypatch):
    model, called = adapted(QLoRA(rank=2, quantization=quantization, compute_dtype="float32"))
    with counted(monkeypatch) as calls:
        loss, gradients = train(model)
        assert bool(calls) == (quantization == "nf4")  # FP4 is not counted
        calls.clear()
        plain_loss, wanted = train(called)
        assert not calls
    assert torch.equal(loss, plain_loss)
    assert len(gradients) == 28
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_to_the_precision_of_the_layer_or_to_another(dtype, monkeypatch):
    model, called = adapted(QLoRA(rank=2, compute_dtype="bfloat16"))
    with counted(monkeypatch) as calls, torch.autocast("cpu", dtype):
        loss, gradients = train(model)
        assert bool(calls) == (dtype is torch.bfloat16)
        plain_loss, wanted = train(called)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-3, atol=0)
    for name, gradient in gradients.items():  # two ways of rounding to 16 bits
        assert (gradient - wanted[name]).norm() <= 6e-2 * wanted[name].norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_unpacks_once_more_and_changes_nothing(reentrant, monkeypatch):
    model, _ = adapted()
    _, wanted = train(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with counted(monkeypatch) as calls:
        _, gradients = train(model)
    assert len(calls) == 14 * 3
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())


def test_dropout_where_autocast_is_of_another_precision_than_the_packed_layers():
    model = tiny_llama()
    inject(model, QLoRA(rank=4, dropout=0.3, compute_dtype="float32"))
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.05)
    ids, found = token_batch()["input_ids"], []
    for autocast in (False, True):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(input_ids=ids, labels=ids).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append(torch.cat([one.flatten() for one in torch.autograd.grad(loss, trained)]))
    assert 0 < (found[1] - found[0]).norm() <= 0.05 * found[0].norm()


def test_threads_do_not_meet():
    layers = [packed_layer(seed=seed) for seed in range(4)]
    x, slope = inputs(), torch.randn(2, 5, 96)
    wanted = [torch.autograd.grad(layer(x), x, slope)[0] for layer in layers]
    wrong, start = [], threading.Barrier(len(layers))

    def work(index):
        start.wait()
        for _ in range(60):
            own = x.detach().requires_grad_()
            y = packed_product(NF4, layers[index], own).view(2, 5, 96)
            if not torch.equal(torch.autograd.grad(y, own, slope)[0], wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_within_a_call_has_memory_of_its_own(monkeypatch):
    outer, inner, x = packed_layer(), packed_layer(seed=5), inputs()
    wanted, own = outer(x), NF4.unpacked_into.__func__
    inside = []

    def unpacked_into(cls, out, weight):
        own(cls, out, weight)
        if not inside:
            inside.append(None)
            inside[0] = packed_product(NF4, inner, x)

    monkeypatch.setattr(NF4, "unpacked_into", classmethod(unpacked_into))
    assert torch.equal(packed_product(NF4, outer, x).view(wanted.shape), wanted)
    assert torch.equal(inside[0].view(wanted.shape), inner(x))


# -- where layers are called -------------------------------------------------------------------------------------------


# torch.compile makes an instance of bitsandbytes' autograd function to trace it, and then warns of that.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")
def test_a_compiled_model_calls_its_layers_and_its_graph_is_whole(monkeypatch):
    model, called = adapted(num_hidden_layers=1)
    with counted(monkeypatch) as calls:
        compiled = torch.compile(model.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
        x = torch.randn(1, 7, 64)
        found = compiled(x)
        assert not calls
    torch.testing.assert_close(found, called.model.layers[0].mlp(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["subclass", "empty", "func", "traced", "make_fx"])
def test_calls_of_which_somebody_keeps_a_record_go_through_the_layer(how):
    layer, x = packed_layer(), inputs().detach()
    reasons, product = [], unpacking_product(layer)

    def record(x):
        reasons.append(called_reason(x))
        assert product(layer, x) is None
        return x

    if how == "subclass":
        record(x.as_subclass(type("Own", (torch.Tensor,), {})))
    elif how == "empty":
        record(x[:0])
    elif how == "func":
        torch.func.vmap(record)(x)
    elif how == "traced":
        torch.jit.trace(record, (x,), check_trace=False)
    else:
        from torch.fx.experimental.proxy_tensor import make_fx

        make_fx(record)(x)
    assert len(reasons) == 1
    assert isinstance(reasons[0], str)


def test_each_layer_says_why_it_is_called():
    assert dequantized_path(packed_layer()) is None
    assert dequantized_path(Int8().quantize(nn.Linear(64, 32))) == "the quantizer 'int8' unpacks into memory of its own"
    other = packed_layer()
    other.bias.requires_grad_()
    assert dequantized_path(other) == "its bias is trained"
    assert packed_product(NF4, other, inputs()) is None
    large = packed_layer(NF4(block_size=2048), shape=(2048, 32))
    assert dequantized_path(large) == "bitsandbytes unpacks (32, 2048) in blocks of 2048 by other code"

    def changed(change):
        layer = packed_layer()
        change(layer)
        assert packed_product(NF4, layer, inputs()) is None
        return NF4.packed_weight(layer)

    def plain(layer):
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)

    class Own(type(packed_layer())):
        def forward(self, x):
            return super().forward(x)

    assert changed(plain) == "its weight is sharded, or not quantised yet"
    assert changed(lambda layer: setattr(layer, "__class__", Own)) == "a Own computes in a way of its own"
    assert "precision of an input" in changed(lambda layer: setattr(layer, "compute_type_is_set", False))
    assert "multiplies in torch.float64" in changed(lambda layer: setattr(layer, "compute_dtype", torch.float64))
    assert "by other code" in changed(lambda layer: setattr(layer.weight.quant_state, "shape", (128, 96)))


def test_another_version_of_bitsandbytes_is_called(monkeypatch):
    import bitsandbytes

    from lightning_peft.plugins import quantizers

    assert quantizers._unpacking("nf4", torch.bfloat16) is not None
    quantizers._unpacking.cache_clear()
    monkeypatch.setattr(bitsandbytes, "__version__", "0.51.0")
    try:
        assert dequantized_path(packed_layer()) == "bitsandbytes 0.51.0 has no function for it that is known here"
    finally:
        quantizers._unpacking.cache_clear()


def test_layers_that_were_repacked_for_inference_serve_it_and_refuse_training():
    layer = packed_layer(NF4(compute_dtype="bfloat16"))
    layer.weight.quant_state.packing_format_for_cpu = True
    assert NF4.packed_weight(layer.eval()) == "bitsandbytes repacked its weight for inference"
    layer.train()
    with torch.no_grad():
        assert packed_product(NF4, layer, inputs()) is None
    with pytest.raises(InjectionError, match="whose weight bitsandbytes repacked for inference in a forward in eval"):
        packed_product(NF4, layer, inputs())


# -- how often, and what stays -----------------------------------------------------------------------------------------


def test_each_weight_is_unpacked_once_in_forward_and_once_in_backward(monkeypatch):
    model, _ = adapted()
    batch = token_batch()
    with counted(monkeypatch) as calls:
        loss = model(**batch, labels=batch["input_ids"]).loss
        assert len(calls) == 14
        loss.backward()
    # Nothing below the first layer's query, key and value wants a gradient.
    assert len(calls) == 14 + 14 - 3


def test_a_graph_keeps_nothing_but_the_packed_weight_which_is_there_anyway():
    layer, kept = packed_layer(bias=False), []
    with saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        packed_product(NF4, layer, inputs())
    assert [one.data_ptr() for one in kept] == [layer.weight.data_ptr()]
    kept.clear()
    with saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        packed_product(NF4, layer, inputs().detach())
    assert not kept


def test_a_weight_that_changes_between_forward_and_backward_is_noticed():
    layer, x = packed_layer(), inputs()
    y = packed_product(NF4, layer, x)
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_memory_is_the_processor_s_whatever_the_default_device_is():
    free_scratch()
    with torch.device("meta"), scratch((2, 3), torch.float32) as lent:
        assert lent.device.type == "cpu"
    free_scratch()


def test_one_piece_of_memory_serves_all_layers_and_can_be_freed():
    free_scratch()
    model, _ = adapted(intermediate_size=192)
    for _ in range(2):
        train(model)
    assert free_scratch() == 192 * 64 * 4  # the largest weight, in float32
    assert free_scratch() == 0
    with scratch((3, 4), torch.float32) as one, scratch((3, 4), torch.float32) as other:
        assert one.data_ptr() != other.data_ptr()
        first = one.data_ptr()
        other_first = other.data_ptr()
    with scratch((2, 2), torch.float32) as again:
        assert again.data_ptr() in (first, other_first)
    free_scratch()


def test_memory_taken_in_inference_mode_serves_training_too():
    free_scratch()
    layer, x = packed_layer(), inputs()
    with torch.inference_mode():
        packed_product(NF4, layer, x)
    packed_product(NF4, layer, x).sum().backward()
    assert x.grad is not None


@pytest.fixture
def paired(monkeypatch):
    file = Path(__file__).parents[1] / "benchmarks" / "paired.py"
    spec = importlib.util.spec_from_file_location("paired", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "paired", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def beside_hf_peft(dtype=torch.bfloat16):
    """HF PEFT's and our model over the same quantised base of 16 bits, with the same adapters."""
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(hidden_size=128, intermediate_size=256).to(dtype)
    QLoRA(compute_dtype="bfloat16").prepare(base)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    theirs.is_loaded_in_4bit = True
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peer = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=linears)).train()
    inject(ours, LoRA(rank=4, alpha=8.0), "all_linear")
    with torch.no_grad():
        for path, layer in adapter_layers(ours).items():
            other = peer.base_model.model.get_submodule(path)
            assert type(other).__module__ == "peft.tuners.lora.bnb"
            other.lora_B["default"].weight.normal_(std=0.05)
            layer.adapters["default"].lora_A.copy_(other.lora_A["default"].weight)
            layer.adapters["default"].lora_B.copy_(other.lora_B["default"].weight.t())
    return peer, ours.train()


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")
def test_gradients_after_an_eval_pass_are_right_where_those_of_hf_peft_are_not():
    from bitsandbytes.functional import has_avx512bf16

    peer, ours = beside_hf_peft()
    for layer in peer.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # as bitsandbytes makes its layers
            layer.support_avx512bf16_for_cpu = has_avx512bf16()
    changes = []
    for model in (ours, peer):
        _, before = train(model)
        with torch.no_grad():
            model.eval()(**token_batch())
        _, after = train(model.train())
        changes.append([float((after[name] - one).norm() / one.norm()) for name, one in before.items()])
    own, theirs = changes
    assert len(own) == 28
    assert max(own) <= 1e-6
    if not has_avx512bf16():
        pytest.skip(
            "HF PEFT's gradients are wrong only on a CPU with AVX512-BF16, where bitsandbytes repacks weights in eval"
        )
    assert max(theirs) > 0.5


def test_fewer_bytes_at_a_time_and_kept_for_backward_than_hf_peft(paired):
    batch = token_batch(rows=8, length=64)
    figures = []
    for model in beside_hf_peft():
        train(model, batch)
        model.zero_grad(set_to_none=True)
        free_scratch()
        parameters, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

        def keep(one, kept=kept, parameters=parameters):
            if one.untyped_storage()._cdata not in parameters:
                kept[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
            return one

        with saved_tensors_hooks(keep, lambda one: one):
            loss = model(**batch, labels=batch["input_ids"]).loss
        figures.append([sum(kept.values())])
        del loss
        figures[-1].append(paired.peak_bytes(lambda model=model: train(model, batch)))
    (peer_kept, peer_peak), (own_kept, own_peak) = figures
    assert own_kept / peer_kept <= 0.7
    assert own_peak / peer_peak <= 0.9

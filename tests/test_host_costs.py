"""What does not vary from run to run: operations, bytes and files, beside those of HF PEFT."""

import copy
import itertools

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import LoRA, adapter_layers, inject, load_adapter, merge_adapters, save_adapter, unload_adapters
from lightning_peft.adapter_layer import base_parameters
from lightning_peft.arithmetic.row_blocks import BLOCK
from lightning_peft.errors import MergeError
from lightning_peft.initial_values import comes_from_file
from lightning_peft.testing import tiny_llama
from lightning_peft.weight_files import safetensors_parts

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Operations(TorchDispatchMode):
    """Counts operations that compute or copy; views cost no memory traffic."""

    VIEWS = frozenset({"view", "t", "transpose", "reshape", "_unsafe_view", "alias", "detach", "slice"})

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def both(width=32, dtype=torch.float32):
    """Return the bare linear layer, one of ours and one of HF PEFT's around it, all three of the same values."""
    bare = nn.Sequential(nn.Linear(width, width).to(dtype)).requires_grad_(False)
    ours, theirs = copy.deepcopy(bare), copy.deepcopy(bare)
    inject(ours, LoRA(rank=4, alpha=8.0), ["0"])
    peer = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    layer, other = ours[0].adapters["default"], peer.base_model.model[0]
    with torch.no_grad():
        nn.init.normal_(layer.lora_B)
        other.lora_A["default"].weight.copy_(layer.lora_A)
        other.lora_B["default"].weight.copy_(layer.lora_B.t())
    return bare, ours.eval(), peer.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerged_lora_adds_fewer_operations_than_that_of_hf_peft(dtype):
    bare, ours, theirs = both(dtype=dtype)
    x = torch.randn(3, 5, 32).to(dtype)
    counted, outputs = {}, {}
    for name, model in {"bare": bare, "ours": ours, "theirs": theirs}.items():
        with torch.no_grad(), Operations() as seen:
            outputs[name] = model(x)
        counted[name] = seen.names
    added = {name: len(counted[name]) - len(counted["bare"]) for name in ("ours", "theirs")}
    # A x, and B times it added in place; in 16 bits a cast, two products and a sum beside HF PEFT's, which casts there and back.
    assert added["ours"] == (2 if dtype == torch.float32 else 4), counted
    assert added["ours"] < added["theirs"], counted
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert (outputs["ours"] - outputs["theirs"]).norm() <= tolerance * outputs["theirs"].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32), (2, 3, 4, 32), (0, 32)], ids=str)
def test_a_forward_that_keeps_nothing_returns_what_a_training_forward_does(shape, dtype):
    _, ours, _ = both(dtype=dtype)
    x = torch.randn(shape).to(dtype)
    expected = ours(x).detach()
    with torch.no_grad():
        found = ours(x)
        turned = ours(x.expand(2, *shape).transpose(0, -2)) if x.dim() > 1 else None
    assert found.shape == expected.shape
    assert torch.allclose(
        found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5 if dtype == torch.float32 else 5e-2
    )
    if turned is not None:
        assert torch.allclose(turned.transpose(0, -2)[0], found, rtol=2e-2, atol=5e-2)


def test_a_forward_that_keeps_nothing_is_left_where_somebody_listens_or_casts():
    _, ours, _ = both()
    x, seen = torch.randn(4, 32), []
    with torch.no_grad():
        expected = ours(x)
        handle = ours[0].base_layer.register_forward_hook(
            lambda module, args, output: seen.append(len(args)) or 2 * output
        )
        doubled = ours(x)
        handle.remove()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = ours(x)
    assert seen == [1]
    assert not torch.allclose(doubled, expected)
    assert cast.dtype == torch.bfloat16
    assert torch.allclose(cast.float(), expected, rtol=5e-2, atol=1e-1)


def test_injecting_copies_nothing_of_the_base_and_makes_the_adapters_only(paired):
    model = tiny_llama()
    before = {name: parameter.data_ptr() for name, parameter in base_parameters(model)}
    with paired.PeakBytes() as made:
        inject(model, LoRA(rank=4), LINEARS)
    assert {name: parameter.data_ptr() for name, parameter in base_parameters(model)} == before
    adapters = sum(p.nbytes for layer in adapter_layers(model).values() for p in layer.adapters["default"].parameters())
    assert made.peak == adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_in_place_takes_a_block_of_memory_and_hf_peft_a_weight(dtype, paired):
    width = 1024
    model = nn.Sequential(*[nn.Linear(width, width, bias=False).to(dtype) for _ in range(2)])
    other = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["0", "1"]))
    inject(model, LoRA(rank=4), ["0", "1"])
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.adapters["default"].lora_B.normal_(std=0.01)
    places = [layer.base_layer.weight.data_ptr() for layer in adapter_layers(model).values()]
    exact = [
        layer.base_layer.weight.detach().double()
        + one.scaling * one.lora_B.detach().double().t() @ one.lora_A.detach().double()
        for layer in adapter_layers(model).values()
        for one in [layer.adapters["default"]]
    ]
    with paired.PeakBytes() as ours:
        merge_adapters(model, keep_originals=False)
    with paired.PeakBytes() as theirs:
        other.merge_adapter()
    weight = width * width * dtype.itemsize
    assert [layer.base_layer.weight.data_ptr() for layer in adapter_layers(model).values()] == places
    assert (
        ours.peak <= 4 * BLOCK + 2 * 8 * 4 * width
    )  # float32 numbers of a block; norms of the rows of A and B in float64
    assert theirs.peak >= weight
    for layer, wanted in zip(adapter_layers(model).values(), exact, strict=True):
        found = layer.base_layer.weight.detach().double()
        assert ((found - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-7).all()


def test_merging_in_place_and_by_replacing_give_the_same_bits_and_nothing_non_finite_is_written():
    models = [tiny_llama() for _ in range(2)]
    for model in models:
        torch.manual_seed(1)
        inject(model, LoRA(rank=4), LINEARS)
        with torch.no_grad():
            for layer in adapter_layers(model).values():
                layer.adapters["default"].lora_B.normal_(std=0.02)
    merge_adapters(models[0], keep_originals=False)
    merge_adapters(models[1])
    pairs = zip(*([p for _, p in base_parameters(model)] for model in models), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    huge = nn.Sequential(nn.Linear(4, 4, bias=False).half())
    inject(huge, LoRA(rank=1, alpha=1.0), ["0"])
    with torch.no_grad():
        huge[0].base_layer.weight.fill_(60000.0)
        huge[0].adapters["default"].lora_A.fill_(100.0)
        huge[0].adapters["default"].lora_B.fill_(100.0)
    before = huge[0].base_layer.weight.clone()
    with pytest.raises(MergeError, match="non-finite"):
        merge_adapters(huge, keep_originals=False)
    assert torch.equal(huge[0].base_layer.weight, before)


def test_a_saved_adapter_is_as_large_as_that_of_hf_peft_and_written_tensor_by_tensor(tmp_path, paired):
    model = tiny_llama()
    peer = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=LINEARS))
    inject(model, LoRA(rank=4), LINEARS)
    with paired.PeakBytes() as made:
        save_adapter(model, tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    sizes = [(tmp_path / who / "adapter_model.safetensors").stat().st_size for who in ("ours", "theirs")]
    assert abs(sizes[0] - sizes[1]) <= 64
    tensors = safetensors.torch.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert (
        made.peak < 2 * sum(t.nbytes for t in tensors.values()) / 3
    )  # the samples of the base, and one matrix at a time


def test_the_file_is_that_of_safetensors_bit_for_bit():
    kinds = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    shapes = ((3, 5), (7,), (), (0, 4))
    tensors = {
        f'b.{kind}.{shape} \u00fc"': torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()]
        .reshape(shape)
        .to(kind)
        for kind, shape in itertools.product(kinds, shapes)
    }
    metadata = {"format": "pt"}
    assert b"".join(safetensors_parts(tensors, metadata)) == safetensors.torch.save(tensors, metadata=metadata)
    shared = torch.randn(4, 6)
    views = {"a": shared.t(), "b": shared, "c": torch.tensor([True])}  # and a dtype that is left to safetensors
    found = safetensors.torch.load(b"".join(safetensors_parts(views, metadata)))
    assert all(torch.equal(found[name], value) for name, value in views.items())


def test_loading_draws_no_values_that_the_file_holds(tmp_path, monkeypatch):
    model = tiny_llama()
    inject(model, LoRA(rank=4), LINEARS)
    save_adapter(model, tmp_path)
    expected = {path: layer.adapters["default"].lora_A.clone() for path, layer in adapter_layers(model).items()}
    unload_adapters(model)
    drawn = []
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda *args, **kwargs: drawn.append(args))
    load_adapter(model, tmp_path)
    assert not drawn
    assert not comes_from_file()
    assert all(
        torch.equal(layer.adapters["default"].lora_A, expected[path]) for path, layer in adapter_layers(model).items()
    )
    inject(model, LoRA(rank=4), LINEARS, name="other")
    assert len(drawn) == len(expected)

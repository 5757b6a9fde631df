"""What each layer of a model does is told, and what a fused block cannot serve takes another way with the same numbers."""

import fnmatch

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_peft import (
    NF4,
    DoRA,
    LoRA,
    NormTuning,
    adapter_layers,
    compute_paths,
    fuse_blocks,
    inject,
    set_active_adapters,
)
from lightning_peft.arithmetic.recomputing import LayerNorm, made, recipe_of
from lightning_peft.testing.sharding import _one_process
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama

IDS = torch.randint(1, 128, (2, 8), generator=torch.Generator().manual_seed(1))
DOWN = "model.layers.0.mlp.down_proj"
NORM = "model.layers.0.post_attention_layernorm"


def adapted(method=None, targets="all_linear", model=None, name="default"):
    model = tiny_llama() if model is None else model
    torch.manual_seed(3)
    inject(model, method or LoRA(rank=2), targets, name=name)
    for path, parameter in model.named_parameters():
        if "lora_B" in path and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def path_of(model, place):
    return next((row.path, row.why) for row in compute_paths(model).rows if row.place == place)


def gradients(model):
    trained = [one for one in model.parameters() if one.requires_grad]
    torch.manual_seed(5)
    return torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, trained)


def assert_same(model):
    wanted = gradients(model)
    for one, other in zip(wanted, gradients(fuse_blocks(model)), strict=True):
        assert float((one - other).norm()) <= 2e-6 * max(float(one.norm()), 1e-6)


def test_before_and_after_fusing_and_the_table():
    model = adapted(targets=["down"])
    assert path_of(model, NORM) == ("plain", "fuse_blocks was not called")
    fuse_blocks(model)
    assert path_of(model, NORM) == ("fused", "")
    assert path_of(model, DOWN) == ("lean", "")
    line = next(line for line in str(compute_paths(model)).splitlines() if line.startswith(DOWN))
    assert line.split() == [DOWN, "linear", "lean"]


def test_hooks_on_the_base_layer_are_called():
    model = adapted()
    seen = []
    model.get_submodule(DOWN).base_layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    assert_same(model)
    before = len(seen)
    gradients(model)
    assert len(seen) == before + 1
    path, why = path_of(model, DOWN)
    assert path == "beside"
    assert "listens" in why


def test_several_adapters_at_a_place():
    model = adapted()
    adapted(model=model, name="other", targets=["down", "query"])
    set_active_adapters(model, ["default", "other"])
    assert_same(model)
    assert path_of(model, DOWN) == ("beside", "2 adapters act")
    set_active_adapters(model, [])
    assert path_of(model, DOWN) == ("plain", "no adapter acts")


def test_another_kind_of_update():
    model = adapted(DoRA(rank=2))
    assert_same(model)
    assert path_of(model, DOWN) == ("plain", "WeightDecomposedLinear computes in a way of its own")


def test_slices_of_a_fused_projection():
    model = adapted(model=tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), targets=["query", "down"])
    assert_same(model)
    path, why = path_of(model, "transformer.h.0.attn.c_attn")
    assert path == "plain"
    assert "slices" in why


def test_a_norm_that_is_trained():
    model = adapted(NormTuning(), targets=None)
    assert_same(model)
    model = fuse_blocks(adapted())
    model.get_submodule(NORM).weight.requires_grad_(True)
    assert path_of(model, NORM) == ("plain", "its weight is trained")
    assert all(one.any() for one in gradients(model))


def test_a_base_weight_that_is_trained_too():
    model = adapted()
    adapter_layers(model)[DOWN].base_layer.weight.requires_grad_(True)
    assert_same(model)
    assert path_of(model, DOWN) == ("beside", "the weight of the layer is trained too")


def test_a_quantised_base():
    pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    quantizer = NF4(compute_dtype="float32")
    for path in (DOWN, "model.layers.1.mlp.gate_proj"):
        model.set_submodule(path, quantizer.quantize(model.get_submodule(path)))
    adapted(model=model)
    assert_same(model)
    assert path_of(model, DOWN)[0] == "beside"


def test_a_forward_that_somebody_replaced_and_a_norm_with_another_formula():
    model = tiny_llama()
    mlp, norm = model.model.layers[0].mlp, model.model.layers[1].input_layernorm
    mlp.forward = lambda x, own=mlp.forward: 2 * own(x)

    class Doubled(type(norm)):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    norm.__class__ = Doubled
    adapted(model=model)
    assert_same(model)
    assert path_of(model, "model.layers.0.mlp") == ("plain", "its forward was replaced")
    assert "something else than its family states" in path_of(model, "model.layers.1.input_layernorm")[1]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
@pytest.mark.parametrize("units", ["*.mlp", "*norm", "*_proj", "model.layers.*"])
def test_units_of_fsdp_that_cut_blocks(units):
    model = adapted()
    wanted = {name: one.clone() for (name, _), one in zip(trained(model), gradients(model), strict=True)}
    fuse_blocks(model)
    with _one_process():
        mesh = init_device_mesh("cpu", (1,))
        for path, module in list(model.named_modules()):
            if fnmatch.fnmatch(path, units) and (units != "model.layers.*" or path.count(".") == 2):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found = {name: one.grad.full_tensor() for name, one in trained(model)}
    for name, one in wanted.items():
        assert torch.allclose(found[name], one, rtol=1e-4, atol=1e-7)


def trained(model):
    return [(name, one) for name, one in model.named_parameters() if one.requires_grad]


def test_a_tensor_that_was_written_to_is_kept_itself():
    x = torch.randn(2, 4, requires_grad=True)
    y = made(LayerNorm(1e-5), x)
    assert recipe_of(y) is not None
    assert recipe_of(y.view(-1)) is None
    with torch.no_grad():
        assert recipe_of(y) is None
    y.mul_(2)
    assert recipe_of(y) is None

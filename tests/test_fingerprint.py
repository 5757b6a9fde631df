import copy

import pytest
import torch
from torch import nn

from lightning_peft import NF4, LoRA, inject, load_adapter, merge_adapters, save_adapter
from lightning_peft.errors import BaseMismatchError
from lightning_peft.fingerprint import (
    SAMPLES,
    Fingerprint,
    fingerprint,
    full_differences,
    full_digests,
    quantized_names,
    to_json,
)


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    with torch.no_grad():
        model[1].weight.mul_(1e-5)  # values that float16 holds badly
    return model


def test_every_parameter_gives_its_shape_and_samples():
    assert fingerprint(nn.LayerNorm(3)).tensors == {"weight": "3:803f803f803f", "bias": "3:000000000000"}
    assert len(fingerprint(net()).tensors["1.weight"]) == len("64x64:") + 4 * SAMPLES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_of_one_checkpoint_in_any_precision_agree(stored, dtype):
    checkpoint = net().to(stored)
    one, other = fingerprint(checkpoint), fingerprint(copy.deepcopy(checkpoint).to(dtype))
    assert one.differences(other) == other.differences(one) == []


def test_one_changed_weight_at_a_sampled_place_is_seen():
    model, before = net(), fingerprint(net())
    with torch.no_grad():
        model[0].weight[-1, -1] *= 1.05
    assert before.differences(fingerprint(model)) == ["0.weight"]
    assert before.digest != fingerprint(model).digest


def test_another_initialisation_differs_in_every_random_parameter():
    assert fingerprint(net()).differences(fingerprint(net(1))) == ["0.weight", "1.bias", "1.weight"]


def test_another_shape_or_name_is_a_difference():
    one, other = fingerprint(nn.LayerNorm(4)), fingerprint(nn.LayerNorm(5))
    assert one.differences(other) == ["bias", "weight"]
    assert one.differences(fingerprint(nn.RMSNorm(4))) == ["bias"]


@pytest.mark.parametrize("entry", ["", "4", "4:zz", "4:00", "4:0000", "5:803f803f803f803f", 7, None])
def test_an_entry_that_cannot_be_read_is_a_difference(entry):
    good = Fingerprint({"weight": "4:803f803f803f803f"})
    assert good.differences(Fingerprint({"weight": entry})) == ["weight"]


def test_adapters_and_merging_do_not_count():
    model, before = net(), fingerprint(net())
    inject(model, LoRA(rank=2), ["1"])
    nn.init.ones_(model[1].adapters["default"].lora_B)
    assert fingerprint(model) == before
    weight = model[1].base_layer.weight.detach().clone()
    merge_adapters(model)
    assert not torch.equal(model[1].base_layer.weight, weight)
    assert fingerprint(model) == before


def test_a_model_on_the_meta_device_has_none():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    assert fingerprint(model) is None
    assert to_json(model) == {"digest": None, "tensors": {}, "quantized": []}


def test_packed_weights_are_left_out_on_both_sides():
    model, before = net(), fingerprint(net())
    model[1] = NF4(compute_dtype="float32").quantize(model[1])
    assert quantized_names(model) == {"1.weight"}
    assert "1.weight" not in fingerprint(model).tensors
    assert before.differences(fingerprint(model)) == ["1.weight"]
    assert before.differences(fingerprint(model), quantized_names(model)) == []


def test_a_tied_weight_counts_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    assert list(fingerprint(model).tensors) == ["0.weight"]


def test_a_sharded_weight_has_the_fingerprint_of_the_whole():
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model, before = net(), fingerprint(net())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, [Shard(0)]))
        assert fingerprint(model) == before
    finally:
        dist.destroy_process_group()


def test_a_full_fingerprint_sees_every_element_and_not_the_width_of_a_float():
    model = nn.Linear(40, 40).to(torch.bfloat16)
    before = full_digests(model)
    assert full_digests(copy.deepcopy(model).float()) == before
    with torch.no_grad():
        model.weight[0, 1] *= 1.5
    assert fingerprint(model).differences(fingerprint(model)) == []
    assert full_differences(before, model) == ["weight"]


def test_adapters_and_merging_do_not_count_in_a_full_fingerprint():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    before = full_digests(model)
    inject(model, LoRA(rank=2), ["0"])
    with torch.no_grad():
        model[0].adapters["default"].lora_B.fill_(1.0)
    merge_adapters(model)
    assert full_digests(model) == before


def test_a_folder_with_a_full_fingerprint_is_refused_over_a_base_changed_by_one_element(tmp_path):
    base = nn.Sequential(nn.Linear(40, 6), nn.Linear(6, 3))
    other = copy.deepcopy(base)
    with torch.no_grad():
        other[0].weight[0, 1] += 1e-3
    adapted = copy.deepcopy(base)
    inject(adapted, LoRA(rank=2), ["0"])
    save_adapter(adapted, tmp_path / "sampled")
    save_adapter(adapted, tmp_path / "full", fingerprint="complete")
    load_adapter(copy.deepcopy(other), tmp_path / "sampled")
    with pytest.raises(
        BaseMismatchError,
        match="full fingerprint [0-9a-f]{16}, but .* has [0-9a-f]{16}: 1 of 4 parameters differ, first '0.weight'",
    ):
        load_adapter(copy.deepcopy(other), tmp_path / "full")
    load_adapter(other, tmp_path / "full", check_base=False)
    load_adapter(base, tmp_path / "full")

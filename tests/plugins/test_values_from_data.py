"""Values from data over packed weights, and in several processes, which get the same from what each has seen."""

import pytest
import torch
import torch.distributed as dist

from lightning_peft import EVA, LoRAGA, QLoRA, adapter_layers, adapter_state_dict, initialize_from_data, inject
from lightning_peft.testing import tiny_llama, token_batch
from lightning_peft.testing.subject import base_tensors, differing

BATCHES = [{**token_batch(seed, rows=6), "labels": token_batch(seed, rows=6)["input_ids"]} for seed in range(4)]


def started(method, data, seed=0):
    model = tiny_llama()
    torch.manual_seed(seed)
    inject(model, method, ["q_proj", "down_proj"])
    initialize_from_data(model, data)
    return {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}


def process(rank, method, folder):
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    torch.save(started(method, BATCHES[rank::2], seed=rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork where there is a GPU")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    "method",
    [EVA(rank=4, tau=1.0), LoRAGA(rank=4), LoRAGA(rank=4, batches=1), LoRAGA(rank=4, direction="random")],
    ids=["eva", "lora_ga", "lora_ga on one batch", "lora_ga at random"],
)
def test_two_processes_start_as_one_that_sees_all_batches(method, tmp_path):
    torch.multiprocessing.start_processes(process, (method, tmp_path), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not differing(first, second)
    # One batch of each process is two of a single one.
    alone = LoRAGA(rank=4, batches=2) if method == LoRAGA(rank=4, batches=1) else method
    wanted = started(alone, BATCHES)
    if method == LoRAGA(rank=4, direction="random"):
        assert all(torch.allclose(first[name].norm(), wanted[name].norm(), rtol=1e-4) for name in wanted)
        return
    for name, tensor in wanted.items():
        assert torch.allclose(first[name].abs(), tensor.abs(), atol=1e-4), name  # but for signs, which are open
    one = started(method, BATCHES[::2])
    assert any(
        one[name].shape != first[name].shape or not torch.allclose(one[name].abs(), first[name].abs(), atol=1e-2)
        for name in wanted
    )


@pytest.mark.parametrize("method", [EVA(rank=4), LoRAGA(rank=4, scale="weight_svd")], ids=["eva", "lora_ga"])
def test_a_quantised_base_gives_values_and_stays_as_it_is(method):
    model = tiny_llama()
    QLoRA().prepare(model)
    before = base_tensors(model)
    inject(model, method, ["q_proj", "down_proj"])
    fresh = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    with torch.no_grad():
        output = model(**token_batch()).logits
    initialize_from_data(model, BATCHES)
    assert not differing(before, base_tensors(model))
    with torch.no_grad():
        assert torch.equal(model(**token_batch()).logits, output)
    for path, layer in adapter_layers(model).items():
        assert layer.base_layer.weight.dtype == torch.uint8
        old, new = fresh[f"{path}.lora_A.weight"], adapter_state_dict(model)[f"{path}.lora_A.weight"]
        assert old.shape != new.shape or not torch.equal(old, new)
        if method.name == "lora_ga":
            assert layer.adapters["default"].lora_B.any()

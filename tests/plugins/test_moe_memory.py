"""Upcycling and memory: at no time is there more than what stays, and a little of one layer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lightning_peft import CausalLMLoader, MoEUpcycling, PEFTModule, adapter_layers, inject
from lightning_peft.moe.mixture import MixtureOfExperts
from lightning_peft.moe.size import upcycled_size
from lightning_peft.testing import tiny_llama

EVERYTHING = [{}, {"dtype": "base"}, {"train": "all"}, {"reinit": 0.5}, {"expert_noise": 0.1}, {"granularity": 2}]


def storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


class Live(TorchDispatchMode):
    """The most bytes of tensors at one time: those of ``model`` and all that operations return, views counted once."""

    def __init__(self, model):
        super().__init__()
        self.base, self.made, self.peak = storages(model), {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.base:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.made = {key: held for key, held in self.made.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(self.base.values()) + sum(size for _, size in self.made.values()))
        return result


def layer_bytes(model):
    """Return the bytes of the experts of one layer."""
    held = [one.adapters["default"] for one in adapter_layers(model).values()]
    found = next(one for one in held if isinstance(one, MixtureOfExperts))
    return sum(tensor.nbytes for tensor in found.tensors().values())


@pytest.mark.parametrize("fields", EVERYTHING, ids=str)
def test_a_loaded_model_is_upcycled_in_the_memory_of_the_result_and_one_layer(fields):
    model = tiny_llama(num_hidden_layers=6).to(torch.bfloat16)
    with Live(model) as live:
        inject(model, MoEUpcycling(experts=4, **fields))
    result = sum(storages(model).values())
    assert result <= live.peak <= result + layer_bytes(model)
    size = upcycled_size(model)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert size.held_bytes + buffers == result  # the dense MLPs are in it, once


def test_a_real_model_is_upcycled_in_the_memory_of_the_result_and_one_layer(data_dir):
    path = str(data_dir / "models" / "stories260k")
    plain = AutoModelForCausalLM.from_pretrained(path)
    module = PEFTModule(CausalLMLoader(path=path), MoEUpcycling(experts=8))
    module.configure_model()
    for place, layer in adapter_layers(module.model).items():
        mixture = layer.adapters["default"]
        if isinstance(mixture, MixtureOfExperts):
            down = plain.get_submodule(place).down_proj.weight
            assert torch.equal(mixture.get_parameter("down_proj"), down.expand(8, -1, -1))
    with Live(plain) as live:
        inject(plain, MoEUpcycling(experts=8))
    assert live.peak <= sum(storages(plain).values()) + layer_bytes(plain)


MEASURE = """
import sys
import threading
import time

from lightning_peft import CausalLMLoader, MoEUpcycling, PEFTModule


def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def upcycled(path):
    module = PEFTModule(CausalLMLoader(path=path, dtype="float32"), MoEUpcycling(experts=2))
    module.configure_model()
    return module


small, large = sys.argv[1:]
upcycled(small)  # what is imported and allocated once is not measured
start, highest, done = anonymous(), [0], threading.Event()


def watch():
    while not done.is_set():
        highest[0] = max(highest[0], anonymous())
        time.sleep(0.0005)


watcher = threading.Thread(target=watch)
watcher.start()
module = upcycled(large)
done.set()
watcher.join()
print(highest[0] - start, sum(p.nbytes for p in module.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux")
def test_a_checkpoint_in_shards_is_upcycled_in_the_memory_of_the_result_and_one_shard(tmp_path):
    """Memory of the process that is no mapped file, while 55 MB of float32 and their 100 MB of experts are made."""
    tiny_llama().save_pretrained(tmp_path / "small")
    wide = tiny_llama(num_hidden_layers=4, hidden_size=512, intermediate_size=2048).to(torch.bfloat16)
    dense = 4 * sum(parameter.numel() for parameter in wide.parameters())
    wide.save_pretrained(tmp_path / "large", max_shard_size="6MB")
    del wide
    shards = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert len(shards) > 3
    # Every large tensor in memory of its own, which goes back to the system when the tensor is freed.
    environment = ["MALLOC_MMAP_THRESHOLD_=65536", "MALLOC_ARENA_MAX=1"]
    command = ["env", *environment, sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr
    peak, result = map(int, out.stdout.split())
    assert dense > 50e6
    assert result > 2.5 * dense
    assert (
        0.95 * result < peak < result + 2 * max(shards) + 4e6
    )  # a shard is of bfloat16, and 4 MB are room for the rest
    assert peak < result + 0.5 * dense

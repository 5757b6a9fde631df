"""What a merge from file to file holds, in a process of its own: private memory and mapped files together."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft import LoRA, inject, save_adapter
from lightning_peft.testing import tiny_llama

MEASURE = """
import sys, threading, time
from pathlib import Path

from transformers import AutoModelForCausalLM

from lightning_peft import load_adapter, merge_adapters, merge_folder


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssFile:")))


def growth(act):
    start, highest, done = resident(), [0], threading.Event()

    def watch():
        while not done.is_set():
            highest[0] = max(highest[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = act()
    done.set()
    watcher.join()
    return highest[0] - start


def from_file_to_file(folder):
    return merge_folder(folder / "base", folder / "adapter", folder / "merged")


def in_memory(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    load_adapter(model, folder / "adapter")
    merge_adapters(model)
    return model


small, large = map(Path, sys.argv[1:])
from_file_to_file(small), in_memory(small)  # what is imported and allocated once is not measured
print(growth(lambda: from_file_to_file(large)), growth(lambda: in_memory(large)))
"""


def write(folder, model, **options):
    """Write a base and an adapter of small numbers, and return the sizes of the shards."""
    model.save_pretrained(folder / "base", **options)
    inject(model, LoRA(rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.01)
    save_adapter(model, folder / "adapter")
    return [file.stat().st_size for file in (folder / "base").glob("*.safetensors")]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux")
def test_a_folder_of_many_shards_is_merged_in_the_memory_of_about_one(tmp_path):
    write(tmp_path / "small", tiny_llama())
    wide = tiny_llama(num_hidden_layers=6, hidden_size=768, intermediate_size=2048).to(torch.bfloat16)
    shards = write(tmp_path / "large", wide, max_shard_size="20MB")
    assert len(shards) > 3
    # Every large tensor in memory of its own, which goes back to the system when the tensor is freed.
    environment = ["MALLOC_MMAP_THRESHOLD_=65536", "MALLOC_ARENA_MAX=1", "OMP_NUM_THREADS=1"]
    command = ["env", *environment, sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    from_file_to_file, in_memory = map(int, done.stdout.split())
    assert in_memory > 0.9 * sum(shards)
    assert from_file_to_file < 1.5 * max(shards)

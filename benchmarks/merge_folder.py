"""Peak memory and time of ``merge_folder`` over a model folder of the shape of a 7B model in bfloat16.

::

    OMP_NUM_THREADS=1 python benchmarks/merge_folder.py            # 13.5 GB of shards, and as much again for the result
    OMP_NUM_THREADS=1 python benchmarks/merge_folder.py --layers 4

The weights are one block of random numbers over and over, as their values do not matter. Where the disk has less than two and a half times
the size free, nothing is done. The merge runs in a process of its own, and the kernel's counters of that process are reported (Linux):

* ``VmHWM``, the largest resident set: private memory and mapped files together, those of the libraries too. It is exact.
* ``RssAnon`` and ``RssFile``: how much of it is private memory and how much mapped files, looked at a hundred times a second.

What the process holds after its imports, before the merge, is reported beside it. The page cache of the system, through which files are
read and written, belongs to no process and is not counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, inject, merge_folder, save_adapter

CHILD = "--merge"


def main() -> None:
    """Write the base and the adapter, merge them in another process, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32, help="decoder layers; 32 is 7B")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter on all linear layers")
    parser.add_argument("--shard", type=float, default=2e9, help="bytes of one shard of the base")
    parser.add_argument("--folder", default=None, help="where to write; the folder for temporary files if not given")
    options = parser.parse_args()
    config = LlamaConfig(num_hidden_layers=options.layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    size = sum(2 * parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        free = shutil.disk_usage(temporary).free
        if free < 2.5 * size:
            print(
                f"skipped: needs {2.5 * size / 1e9:.0f} GB on the disk, {free / 1e9:.0f} GB are free; try fewer --layers"
            )
            return
        folder = Path(temporary)
        shards = write_base(model, config, folder / "base", options.shard)
        write_adapter(model, folder / "adapter", options.rank)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, CHILD, temporary], capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
        report = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{size / 1e9:.1f} GB in {shards} shards, rank {options.rank}: {seconds:.0f} s with start-up, merge {report['seconds']:.0f} s"
        )
        for label, key in (("largest resident set", "VmHWM"), ("private", "RssAnon"), ("mapped files", "RssFile")):
            print(
                f"{label}: {report['peak'][key] / 1e9:.2f} GB, after the imports {report['imports'][key] / 1e9:.2f} GB"
            )


def write_base(model: torch.nn.Module, config: LlamaConfig, folder: Path, limit: float) -> int:
    """Write the shards of ``model``, which is on the meta device, and return how many there are."""
    folder.mkdir()
    config.save_pretrained(folder)
    noise = (torch.randn(2**23) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    shards: list[list[tuple[str, torch.Tensor]]] = [[]]
    for name, parameter in model.named_parameters():
        if sum(2 * held.numel() for _, held in shards[-1]) + 2 * parameter.numel() > limit and shards[-1]:
            shards.append([])
        shards[-1].append((name, parameter))
    weight_map = {}
    for number, held in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name, parameter in held:
            stop = offset + 2 * parameter.numel()
            header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, stop]}
            weight_map[name], offset = file, stop
        content = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(content).to_bytes(8, "little") + content)
            for start in range(0, offset, len(noise)):
                out.write(noise[: min(len(noise), offset - start)])
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(shards)


def write_adapter(model: torch.nn.Module, folder: Path, rank: int) -> None:
    """Write an adapter of small random numbers for ``model``."""
    inject(model, LoRA(rank=rank))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad:
                module._parameters[name] = torch.nn.Parameter(torch.randn(parameter.shape) * 0.01)
    save_adapter(model, folder)


def memory() -> dict[str, int]:
    """Return what the kernel counts of this process, in bytes."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: 1024 * int(line[1]) for line in lines if line[0] in ("VmHWM:", "RssAnon:", "RssFile:")}


def merge(folder: Path) -> None:
    """Merge, and print what it took."""
    imports = peak = memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            now = memory()
            peak = {key: max(peak[key], now[key]) for key in now}

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    merge_folder(folder / "base", folder / "adapter", folder / "merged")
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    peak["VmHWM"] = memory()["VmHWM"]
    print(json.dumps({"seconds": seconds, "peak": peak, "imports": imports}))


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        merge(Path(sys.argv[2]))
    else:
        main()

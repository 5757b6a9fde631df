"""What a step moves between 2 to 1,000 GPUs, computed, and what gloo moves between two processes here, measured.

::

    python benchmarks/scaling.py figure                      # docs/figures/scaling.svg
    python benchmarks/scaling.py table                       # the tables of docs/scaling.md
    OMP_NUM_THREADS=1 python benchmarks/scaling.py measure   # bandwidth and latency of gloo between two processes

Models are Llamas without weights, on the meta device, with LoRA of rank 16 in float32 on all linear layers, and a base in bfloat16 or
with its linear layers in NF4. No GPU takes part: times come from nominal bandwidths, see ``lightning_peft.strategies.cost.Links``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

from lightning_peft import LoRA, inject
from lightning_peft.strategies.cost import Cost, Tensors, step_cost, tensors_of
from lightning_peft.strategies.expert_cost import expert_cost

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "scaling.svg"
PROCESSES = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
PER_NODE, RANK = 8, 16
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
"""Those of Llama 3."""
BASES = ("bfloat16", "NF4")
STRATEGIES: dict[str, dict[str, Any]] = {
    "peft_ddp": {"strategy": "peft_ddp"},
    "peft_fsdp": {},
    "peft_fsdp, not resharded": {"reshard_after_forward": False},
    "peft_fsdp, a replica a node": {"replicate": 0},
}


def llama(**shape: Any) -> torch.nn.Module:
    """Return a Llama on the meta device in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False, **shape}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)


@cache
def tensors(size: str, base: str) -> list[Tensors]:
    """Return what a model holds."""
    model = llama(**SHAPES[size])
    inject(model, LoRA(rank=RANK), targets="all_linear")
    held = tensors_of(model)
    return [part for one in held for part in packed(one)] if base == "NF4" else held


def packed(one: Tensors) -> list[Tensors]:
    """Return a frozen matrix of a block as NF4 with double quantisation: half a byte an element, and scales that are not sharded."""
    if one.role != "frozen" or one.unit is None or one.columns == 1:
        return [one]
    elements = one.elements()
    blocks = elements // 64
    return [
        Tensors(rows=elements // 2, bytes_per_element=1, unit=one.unit),
        Tensors(rows=blocks, bytes_per_element=1, role="constant"),
        Tensors(rows=blocks // 256, bytes_per_element=4, role="constant"),
    ]


def cost(size: str, base: str, strategy: str, processes: int) -> Cost | None:
    """Return what a step costs; None where the strategy needs more processes than one node has."""
    settings = dict(STRATEGIES[strategy])
    if settings.get("replicate") == 0:
        if processes <= PER_NODE:
            return None
        settings["replicate"] = processes // PER_NODE
    return step_cost(tensors(size, base), processes=processes, per_node=PER_NODE, **settings)


def figure() -> None:
    """Draw bytes sent over the number of processes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "lightning_peft", "svg.fonttype": "none"})
    drawing = Figure(figsize=(10, 6), layout="constrained")
    axes = drawing.subplots(len(BASES), len(SHAPES), sharex=True, sharey=True)
    for row, base in zip(axes, BASES, strict=True):
        for ax, size in zip(row, SHAPES, strict=True):
            for strategy, style in zip(STRATEGIES, ("o-", "s-", "^--", "d:"), strict=True):
                points = [(n, one.sent_bytes / 1e9) for n in PROCESSES if (one := cost(size, base, strategy, n))]
                ax.plot(*zip(*points, strict=True), style, label=strategy, markersize=4)
            ax.set(xscale="log", yscale="log", title=f"{size}, base in {base}")
            ax.grid(alpha=0.3)
        row[0].set_ylabel("GB sent by a process in a step")
    for ax in axes[-1]:
        ax.set_xlabel("processes")
    axes[0][0].legend(fontsize=8)
    FIGURE.parent.mkdir(exist_ok=True)
    drawing.savefig(FIGURE, metadata={"Date": None})
    print(FIGURE)


def rows(base: str) -> list[str]:
    """Return the table of one kind of base: for each size and strategy bytes, time and memory."""
    counts = (8, 64, 1000)
    found = [
        "| model | strategy | " + " | ".join(f"{n}: sent, GB | s | held, GB" for n in counts) + " |",
        "|---|---|" + "---|" * 3 * len(counts),
    ]
    for size in SHAPES:
        for strategy in STRATEGIES:
            cells = []
            for n in counts:
                one = cost(size, base, strategy, n)
                cells += (
                    [digits(one.sent_bytes / 1e9), digits(one.seconds), digits(one.memory_bytes / 1e9)]
                    if one
                    else [""] * 3
                )
            found.append(f"| {size} | {strategy} | " + " | ".join(cells) + " |")
    return found


def experts() -> list[str]:
    """Return the table of expert parallelism."""
    found = [
        "| layer | experts, top k | tokens a process | group | tokens, GB | their gradients, GB | FSDP2, GB | fewer bytes up to, tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, hidden, intermediate, layers in (("1B", 2048, 8192, 16), ("8B", 4096, 14336, 32)):
        for number, top_k, group in ((8, 2, 8), (64, 2, 8), (64, 2, 64)):
            for tokens in (4096, 65536):
                shape = {"hidden": hidden, "intermediate": intermediate, "layers": layers}
                one = expert_cost(**shape, experts=number, top_k=top_k, tokens=tokens, processes=64, group=group)
                cells = [one.exchanged_bytes, one.averaged_bytes, one.sharded_bytes]
                found.append(
                    f"| {name} | {number}, {top_k} | {tokens:,} | {group} | "
                    + " | ".join(digits(cell / 1e9) for cell in cells)
                    + f" | {one.tokens_where_equal:,.0f} |"
                )
    return found


def digits(number: float) -> str:
    """Return a number with three digits, and no exponent."""
    text = f"{number:.3g}"
    return f"{number:,.0f}" if "e" in text else text


def _pinging(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    small, large, half = torch.ones(1), torch.ones(2**24), torch.ones(2**23)
    calls = {
        "all_reduce of 4 B": (lambda: dist.all_reduce(small), 200, None),
        "all_reduce of 64 MiB": (lambda: dist.all_reduce(large), 10, large.nbytes),
        "all_gather of 64 MiB": (lambda: dist.all_gather_into_tensor(large, half), 10, large.nbytes // 2),
    }
    for name, (call, times, sent) in calls.items():
        taken = []
        for _ in range(times + 2):
            dist.barrier()
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
        middle = statistics.median(taken[2:])
        if rank == 0:
            rate = "" if sent is None else f"{sent / middle / 1e9:.2f} GB/s"
            print(f"| {name} | {middle * 1e6:,.0f} µs | {rate} |", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure() -> None:
    """Print what gloo does between two processes of this machine."""
    print(
        f"{os.cpu_count()} cores, torch {torch.__version__}\n\n| | median | sent by each process |\n|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("fork")
        started = [context.Process(target=_pinging, args=(rank, f"{folder}/store")) for rank in range(2)]
        for one in started:
            one.start()
        for one in started:
            one.join()


def table() -> None:
    """Print the tables of the page."""
    for base in BASES:
        print(f"base in {base}\n", *rows(base), "", sep="\n")
    print(*experts(), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("figure", "table", "measure"))
    {"figure": figure, "table": table, "measure": measure}[parser.parse_args().what]()

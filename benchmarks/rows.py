"""What adapters by rows cost: one batch with eight adapters, beside the same batch with one, and beside HF PEFT's ``adapter_names``.

    OMP_NUM_THREADS=1 python benchmarks/rows.py                # a table of ratios, and the limits they are held to
    OMP_NUM_THREADS=2 python benchmarks/rows.py --threads 2 --clock wall

A Llama of random weights, LoRA on all linear layers, forward without gradients. The arms take turns, there and back in each round
(A B ... B A), and what counts is the median; ``one adapter`` runs twice a round under two names, and the ratio of the two says how
far the machine can be trusted. The base without adapters runs too: what a pass adds to it is what adapters cost. Before anything is timed, the results of all arms are compared row by row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_peft import LoRA, adapter_layers, adapter_rows, inject, set_active_adapters

LIMITS = {"x one adapter": 1.3, "HF PEFT x eight adapters, over the base": 3.0}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(args: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_hidden_layers": args.layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_attention_heads=8, use_cache=False, **sizes)).eval()


@torch.no_grad()
def ours(args: argparse.Namespace, names: list[str]) -> nn.Module:
    model = llama(args)
    for name in names:
        inject(model, LoRA(rank=args.rank, alpha=2.0 * args.rank), LINEARS, name=name)
    torch.manual_seed(1)
    for layer in adapter_layers(model).values():
        for name in names:
            layer.adapters[name].lora_B.normal_(std=0.02)
    return model


@torch.no_grad()
def theirs(args: argparse.Namespace, names: list[str], source: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEARS)
    model = get_peft_model(llama(args), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for path, layer in adapter_layers(source).items():
        other = model.base_model.model.get_submodule(path)
        for name in names:
            tensors = layer.adapters[name].disk_tensors()
            other.lora_A[name].weight.copy_(tensors["lora_A.weight"])
            other.lora_B[name].weight.copy_(tensors["lora_B.weight"])
    return model.eval()


def arms_of(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    names = [f"adapter{number}" for number in range(args.adapters)]
    rows = [names[row % args.adapters] for row in range(args.rows)]
    ids = torch.randint(0, 1024, (args.rows, args.tokens), generator=torch.Generator().manual_seed(2))
    model = ours(args, names)
    peer = theirs(args, names, model)

    def one() -> Tensor:
        return model(ids).logits

    def many() -> Tensor:
        with adapter_rows(model, rows):
            return model(ids).logits

    def peft() -> Tensor:
        return peer(input_ids=ids, adapter_names=rows).logits

    base = llama(args)

    def frozen() -> Tensor:
        return base(ids).logits

    set_active_adapters(model, names[0])
    together, single, other = many(), one(), peft()
    scale = float(other.abs().max())
    assert float((together - other).abs().max()) <= 1e-5 * scale, "rows differ from those of HF PEFT"
    own = [row for row, name in enumerate(rows) if name == names[0]]
    assert float((together[own] - single[own]).abs().max()) <= 1e-5 * scale, "rows differ from a pass of their adapter"
    return {
        "frozen base": frozen,
        "one adapter": one,
        "one adapter again": one,
        "eight adapters": many,
        "HF PEFT": peft,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rows": 16, "adapters": 8, "hidden": 512, "layers": 8, "rank": 8, "tokens": 16, "rounds": 10, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    arms = arms_of(args)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name in [*arms, *reversed(arms)]:
            start = clock()
            arms[name]()
            times[name].append(clock() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{vars(args)}, torch {torch.__version__}\n\n| pass | median ms | x one adapter |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1e3 * seconds:.0f} | {seconds / medians['one adapter']:.2f} |")
    cost = medians["eight adapters"] / medians["one adapter"]
    added = {name: medians[name] - medians["frozen base"] for name in ("eight adapters", "HF PEFT")}
    gain = added["HF PEFT"] / added["eight adapters"]
    print(f"\neight adapters cost {cost:.2f} x one adapter: {'held' if cost <= LIMITS['x one adapter'] else 'MISSED'}")
    held = "held" if gain >= LIMITS["HF PEFT x eight adapters, over the base"] else "MISSED"
    print(f"HF PEFT adds {gain:.2f} x what eight adapters add to the frozen base: {held}")


if __name__ == "__main__":
    main()

"""What a step of a population costs: eight LoRAs trained at once on one base, beside eight steps of a run with one LoRA.

    OMP_NUM_THREADS=1 python benchmarks/population.py
    OMP_NUM_THREADS=1 python benchmarks/population.py --tokens 8 --rows 1        # small batches, where one forward gains most
    python benchmarks/population.py --device cuda --clock wall --hidden 2048 --layers 16

A Llama of random weights, LoRA on all linear layers, forward, backward and optimizer. A step of the population trains every member on every
row; so do eight steps of runs alone. The two take turns, there and back in each round (A B ... B A), and what counts is the median;
``eight alone`` runs twice a round under two names, and the ratio of the two says how far the machine can be trusted. Before anything is
timed, the gradients of all members are compared with those of their runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_peft import LoRA, Member, PEFTModule, PopulationModule
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.optimization import parameter_groups
from lightning_peft.population.optimizers import PopulationOptimizer


def llama(args: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_hidden_layers": args.layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_attention_heads=8, use_cache=False, **sizes)).to(
        args.device
    )


def arms_of(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    ranks = [2 ** (1 + number % 5) if args.mixed else args.rank for number in range(args.members)]
    members = [Member(LoRA(rank=rank), None, f"m{number}", seed=number) for number, rank in enumerate(ranks)]
    module = PopulationModule(llama(args), members)
    module.configure_model()
    module.to(args.device)
    names = list(module.members)
    optimizer = PopulationOptimizer(
        {name: torch.optim.AdamW(parameter_groups(module, name), lr=1e-4) for name in names}
    )
    runs = [run_of(args, member) for member in members]
    ids = torch.randint(0, 1024, (args.rows, args.tokens), generator=torch.Generator().manual_seed(2)).to(args.device)
    batch = {"input_ids": ids, "labels": ids}

    def together() -> None:
        losses, _ = module.member_losses(batch, names)
        torch.stack(list(losses.values())).sum().backward()

    def one(alone: PEFTModule) -> None:
        alone.compute_loss(alone.predict_outputs(batch), batch).backward()

    together()
    for name, (alone, _) in zip(names, runs, strict=True):
        one(alone)
        mine = adapters_named(module, name)
        for path, adapter in adapters_named(alone, name).items():
            for key, parameter in adapter.named_parameters():
                found, wanted = mine[path].get_parameter(key).grad, parameter.grad
                assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-12, f"{path}.{key} differs"

    def population() -> None:
        optimizer.zero_grad()
        together()
        optimizer.step()
        _wait(args)

    def eight_alone() -> None:
        for alone, own in runs:
            own.zero_grad()
            one(alone)
            own.step()
        _wait(args)

    return {"alone": eight_alone, "alone again": eight_alone, "population": population}


def run_of(args: argparse.Namespace, member: Member) -> tuple[PEFTModule, torch.optim.Optimizer]:
    base = llama(args)
    torch.manual_seed(member.seed or 0)
    alone = PEFTModule(base, member.method, name=str(member.name))
    alone.configure_model()
    alone.to(args.device)
    return alone, torch.optim.AdamW(parameter_groups(alone), lr=1e-4)


def _wait(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"members": 8, "rows": 4, "tokens": 32, "hidden": 256, "layers": 4, "rank": 8, "rounds": 5, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mixed", action="store_true", help="ranks 2, 4, 8, 16, 32 in turn instead of one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    arms = arms_of(args)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for call in arms.values():
        call()
    for _ in range(args.rounds):
        for name in [*arms, *reversed(arms)]:
            start = clock()
            arms[name]()
            times[name].append(clock() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{vars(args)}, torch {torch.__version__}\n\n| {args.members} steps | median ms | x alone |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1e3 * seconds:.0f} | {seconds / medians['alone']:.2f} |")


if __name__ == "__main__":
    main()

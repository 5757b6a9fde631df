"""What mixtures of experts cost, as ratios: the arithmetic here, that of transformers, and the dense MLP.

::

    OMP_NUM_THREADS=1 python benchmarks/moe.py                 # a table, and the limits it is held to
    OMP_NUM_THREADS=1 python benchmarks/moe.py --rounds 20 --experts 8 32

One step is forward and backward, with the gradients of all weights. Contestants take turns, each round one step of each, and what
counts is CPU time on one thread, the least over the rounds; so other work on the machine cancels out of the ratios.
The limit is the dense MLP on top_k * n tokens: the same products, without any routing. ``products alone`` are the products of matrices
of equally loaded experts and of the dense MLP, nothing else: what smaller matrices cost on this machine whoever calls them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.moe.expert_weights import ExpertWeights
from lightning_peft.moe.experts import run_experts
from lightning_peft.moe.routing import ExpertChoiceRouter, TopKRouter

LIMITS = {8: 1.15, 32: 1.35}
"""Experts to how many times the limit the routed experts may cost."""


def dense_step(x: Tensor, up: Tensor, down: Tensor) -> Callable[[], None]:
    def step() -> None:
        gate, value = F.linear(x, up).chunk(2, dim=-1)
        F.linear(F.silu(gate) * value, down).square().mean().backward()

    return step


def routed_step(x: Tensor, gate: Tensor, weights: ExpertWeights, router, implementation: str) -> Callable[[], None]:
    def step() -> None:
        assignment = router.route(F.linear(x, gate))
        run_experts(x, assignment, weights, F.silu, implementation=implementation).square().mean().backward()

    return step


def transformers_step(
    x: Tensor, gate: Tensor, weights: ExpertWeights, top_k: int, implementation: str
) -> Callable[[], None]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, d, ff = weights.down.shape
    config = MixtralConfig(hidden_size=d, intermediate_size=ff, num_local_experts=experts, num_experts_per_tok=top_k)
    config._experts_implementation = implementation
    module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = nn.Parameter(weights.gate_up.detach()), nn.Parameter(weights.down.detach())

    def step() -> None:
        module.zero_grad(set_to_none=True)
        top, chosen = torch.softmax(F.linear(x, gate).float(), -1).topk(top_k, dim=-1)
        module(x, chosen, top / top.sum(-1, keepdim=True)).square().mean().backward()

    return step


def products_step(n: int, d: int, ff: int, experts: int, dtype: torch.dtype) -> Callable[[], None]:
    up, down = torch.randn(experts, 2 * ff, d, dtype=dtype), torch.randn(experts, d, ff, dtype=dtype)
    to_up, to_down = torch.empty_like(up), torch.empty_like(down)
    x, hidden, inner, y = (torch.randn(n, width, dtype=dtype) for width in (d, 2 * ff, ff, d))
    to_x, to_hidden, to_inner, to_y = (torch.empty_like(one) for one in (x, hidden, inner, y))
    parts = [slice(start, start + n // experts) for start in range(0, n, n // experts)]

    def step() -> None:
        for e, rows in enumerate(parts):
            torch.mm(x[rows], up[e].t(), out=to_hidden[rows])
            torch.mm(inner[rows], down[e].t(), out=to_y[rows])
            torch.mm(y[rows].t(), inner[rows], out=to_down[e])
            torch.mm(y[rows], down[e], out=to_inner[rows])
            torch.mm(hidden[rows].t(), x[rows], out=to_up[e])
            torch.mm(hidden[rows], up[e], out=to_x[rows])

    return step


def contestants(n: int, d: int, ff: int, experts: int, top_k: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x, gate = new(n, d), new(experts, d)
    weights = ExpertWeights(new(experts, 2 * ff, d), new(experts, d, ff))
    one = new(2 * ff, d), new(d, ff)
    many = x.detach().repeat(top_k, 1).requires_grad_()
    leaves = [x, gate, many, weights.gate_up, weights.down, *one]
    steps = {
        "dense": dense_step(x, *one),
        "limit": dense_step(many, *one),
        "products alone, dense": products_step(top_k * n, d, ff, 1, dtype),
        "products alone": products_step(top_k * n, d, ff, experts, dtype),
        "unbind": routed_step(x, gate, weights, TopKRouter(top_k=top_k), "unbind"),
        "grouped_mm": routed_step(x, gate, weights, TopKRouter(top_k=top_k), "grouped_mm"),
        "expert choice": routed_step(x, gate, weights, ExpertChoiceRouter(capacity=float(top_k)), "unbind"),
        "transformers eager": transformers_step(x, gate, weights, top_k, "eager"),
        "transformers grouped_mm": transformers_step(x, gate, weights, top_k, "grouped_mm"),
    }
    return {name: afresh(step, leaves) for name, step in steps.items()}


def afresh(step: Callable[[], None], leaves: list[Tensor]) -> Callable[[], None]:
    """Return ``step`` without gradients of the step before, as a training loop has it."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        step()

    return run


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the least CPU time of a step of each, in seconds."""
    least = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number:  # the first round warms up
                least[name] = min(least[name], time.process_time() - start)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"n={options.tokens} d={options.width} ff={options.inner} K={options.top_k} {options.dtype}, torch {torch.__version__}\n"
    )
    print("| experts | contestant | ms | x dense | x limit | x transformers eager |\n|---|---|---|---|---|---|")
    for experts in options.experts:
        steps = contestants(
            options.tokens, options.width, options.inner, experts, options.top_k, getattr(torch, options.dtype)
        )
        least = measure(steps, options.rounds)
        for name, seconds in least.items():
            ratios = " | ".join(f"{seconds / least[other]:.2f}" for other in ("dense", "limit", "transformers eager"))
            print(f"| {experts} | {name} | {1e3 * seconds:.0f} | {ratios} |", flush=True)
        if experts in LIMITS:
            ratio = least["unbind"] / least["limit"]
            print(
                f"| {experts} | held to {LIMITS[experts]} x limit: {'yes' if ratio <= LIMITS[experts] else 'NO'} | | | | |"
            )


if __name__ == "__main__":
    main()

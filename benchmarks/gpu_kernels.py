"""Kernels for low-rank updates beside the plain path and HF PEFT, on one linear layer: time by CUDA events, and peak bytes.

::

    python benchmarks/gpu_kernels.py                                              # 4096 x 4096 and 4096 x 14336, on the GPU
    python benchmarks/gpu_kernels.py --what rows --tokens 1 64                    # eight adapters in 16 rows
    TRITON_INTERPRET=1 python benchmarks/gpu_kernels.py --device cpu --allocator asis --widths 64x64 --tokens 16 --rounds 2

The last line tries the program: there Triton's interpreter runs the kernels, which takes thousands of times as long. ``layer`` is forward and
backward of LoRA on a frozen layer in bfloat16, ``nf4`` the same on one that bitsandbytes has packed, ``rows`` forward alone. *frozen* is the
layer without an adapter, with the gradient of its input: below it nothing can come. *graph* replays a CUDA graph of the arm with kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from paired import Arm, Row, compare, parser, publish
from torch import Tensor, nn

from lightning_peft import LoRA, adapter_rows, inject
from lightning_peft.arithmetic import gpu_low_rank

WHATS = ("layer", "nf4", "rows")
ADAPTERS = 8


def linear(args: argparse.Namespace, what: str, width_in: int, width_out: int) -> nn.Module:
    """Return a frozen layer ``0`` in a model, the same each time."""
    torch.manual_seed(0)
    if what == "nf4":
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(width_in, width_out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        return nn.Sequential(layer).to(args.device).requires_grad_(False)
    return (
        nn.Sequential(nn.Linear(width_in, width_out, bias=False)).to(args.device, torch.bfloat16).requires_grad_(False)
    )


def peer(args: argparse.Namespace, model: nn.Module, names: list[str], *, float32: bool) -> nn.Module:
    """Return ``model`` adapted by HF PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=["0"])
    adapted = get_peft_model(model, config, adapter_name=names[0], autocast_adapter_dtype=float32)
    for name in names[1:]:
        adapted.add_adapter(name, config)
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.02)
    return adapted


def ours(args: argparse.Namespace, model: nn.Module, names: list[str]) -> nn.Module:
    for name in names:
        inject(model, LoRA(rank=args.rank, alpha=2.0 * args.rank), "0", name=name)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def by_kernels(args: argparse.Namespace, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return ``call`` with kernels asked for, on the CPU too."""

    def run() -> Tensor:
        gpu_low_rank.asked, gpu_low_rank.DEVICES = True, (args.device,)
        try:
            return call()
        finally:
            gpu_low_rank.asked, gpu_low_rank.DEVICES = False, ("cuda",)

    return run


def captured(args: argparse.Namespace, call: Callable[[], Tensor]) -> Arm:
    """Return the replay of a CUDA graph of ``call``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def layer(args: argparse.Namespace, what: str, width_in: int, width_out: int, tokens: int) -> dict[str, Arm]:
    """Forward and backward of one adapted layer."""
    x = torch.randn(1, tokens, width_in, device=args.device, dtype=torch.bfloat16).requires_grad_()
    direction = torch.randn(1, tokens, width_out, device=args.device, dtype=torch.bfloat16)

    def step(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            x.grad = None
            model(x).backward(direction)
            return x.grad

        return run

    model = ours(args, linear(args, what, width_in, width_out), ["default"])
    arms: dict[str, Any] = {
        "HF PEFT": step(peer(args, linear(args, what, width_in, width_out), ["default"], float32=True)),
        "HF PEFT, bf16 adapters": step(peer(args, linear(args, what, width_in, width_out), ["default"], float32=False)),
        "frozen": step(linear(args, what, width_in, width_out)),
        "plain": step(model),
        "kernels": by_kernels(args, step(model)),
    }
    check(arms["plain"](), arms["kernels"]())
    if args.device == "cuda" and what == "layer":
        arms["kernels, graph"] = captured(args, arms["kernels"])
    return arms


def rows(args: argparse.Namespace, width_in: int, width_out: int, tokens: int) -> dict[str, Arm]:
    """Forward of rows that have adapters of their own."""
    names = [f"a{number}" for number in range(ADAPTERS)]
    of_rows = [names[row % ADAPTERS] for row in range(2 * ADAPTERS)]
    x = torch.randn(len(of_rows), tokens, width_in, device=args.device, dtype=torch.bfloat16)
    model, frozen = (
        ours(args, linear(args, "rows", width_in, width_out), names),
        linear(args, "rows", width_in, width_out),
    )
    other = peer(args, linear(args, "rows", width_in, width_out), names, float32=False).eval()

    @torch.no_grad()
    def mixed() -> Tensor:
        with adapter_rows(model, of_rows):
            return model(x)

    arms = {
        "HF PEFT": torch.no_grad()(lambda: other(x, adapter_names=of_rows)),
        "frozen": torch.no_grad()(lambda: frozen(x)),
        "plain": mixed,
        "kernels": by_kernels(args, mixed),
    }
    check(arms["plain"](), arms["kernels"]())
    return arms


def check(wanted: Tensor, found: Tensor) -> None:
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 2e-2, "kernels and plain path differ"


def measure(args: argparse.Namespace) -> Iterator[Row]:
    for what in args.what:
        for widths in args.widths:
            width_in, width_out = map(int, widths.split("x"))
            for tokens in args.tokens:
                arms = (
                    rows(args, width_in, width_out, tokens)
                    if what == "rows"
                    else layer(args, what, width_in, width_out, tokens)
                )
                case = f"{what}, {widths}, rank {args.rank}, {tokens} tokens"
                yield from compare(case, arms, rounds=args.rounds, bound="frozen", device=args.device, memory=True)


if __name__ == "__main__":
    options = parser(__doc__, rank=16)
    options.set_defaults(device="cuda")
    options.add_argument("--what", nargs="+", choices=WHATS, default=list(WHATS))
    options.add_argument(
        "--widths", nargs="+", default=["4096x4096", "4096x14336"], help="of the input x of the output"
    )
    options.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 2048, 8192], help="of a row, in rows")
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is here, so nothing was measured; --help says how to try the program on a CPU")
    publish(chosen, measure)

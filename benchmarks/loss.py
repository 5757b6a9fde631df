"""What a loss in chunks costs beside the plain loss of transformers, which HF PEFT's models compute too: time and peak bytes.

    OMP_NUM_THREADS=1 python benchmarks/loss.py                          # the head and the loss alone, vocabularies of 32k and 128k
    OMP_NUM_THREADS=1 python benchmarks/loss.py --whole                  # a whole step of an adapted Llama, beside HF PEFT's
    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 python benchmarks/loss.py

Forward and backward. The arms of a round run in random order, and what counts is the median of their ratios to the plain loss in the same
round, with a 95 % bootstrap interval; the plain loss runs twice a round, and the ratio of the two says how far the machine can be trusted.
CPU time where the model is on a CPU, events where it is on CUDA. Peak bytes are counted by a dispatch mode: all storages that operations
made, while they live; base weights and optimizer are not among them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_peft import LoRA, adapter_layers, inject
from lightning_peft.losses_in_chunks import ChunkedLoss, chunked_loss

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and (storage := one.untyped_storage())._cdata not in given:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def llama(args: argparse.Namespace, vocabulary: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=8, use_cache=False, **sizes)
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).requires_grad_(False)


def alone(args: argparse.Namespace, vocabulary: int) -> dict[str, Callable[[], Tensor]]:
    """The head and the loss: no layers, and a gradient to what goes into the head."""
    model = llama(args, vocabulary, 0)
    ids = torch.randint(0, vocabulary, (1, args.tokens), device=args.device)
    embeddings = torch.randn(1, args.tokens, args.hidden, device=args.device, dtype=model.dtype).requires_grad_()

    def plain() -> Tensor:
        return torch.autograd.grad(model(inputs_embeds=embeddings, labels=ids).loss, embeddings)[0]

    def chunked(size: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with chunked_loss(model, ChunkedLoss(tokens=size)):
                loss = model(inputs_embeds=embeddings, labels=ids).loss
            return torch.autograd.grad(loss, embeddings)[0]

        return run

    arms = {f"chunks of {size}": chunked(size) for size in args.chunks}
    check(plain(), [arm() for arm in arms.values()], model.dtype)
    return {"plain": plain, "plain again": plain, **arms}


def whole(args: argparse.Namespace, vocabulary: int) -> dict[str, Callable[[], Tensor]]:
    """A step of a Llama with LoRA on all linear layers, without the optimizer."""
    from peft import LoraConfig, get_peft_model

    model = llama(args, vocabulary, args.layers)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)
    peer = get_peft_model(llama(args, vocabulary, args.layers), config)
    inject(model, LoRA(rank=8, alpha=16.0), LINEARS)
    with torch.no_grad():
        for path, layer in adapter_layers(model).items():
            other = peer.base_model.model.get_submodule(path)
            other.lora_B["default"].weight.normal_(std=0.02)
            layer.adapters["default"].lora_A.copy_(other.lora_A["default"].weight)
            layer.adapters["default"].lora_B.copy_(other.lora_B["default"].weight.t())
    ids = torch.randint(0, vocabulary, (1, args.tokens), device=args.device)
    first = next(iter(adapter_layers(model).values())).adapters["default"].lora_A

    def step(one: nn.Module, watched: Tensor) -> Tensor:
        one.zero_grad(set_to_none=True)
        one(input_ids=ids, labels=ids).loss.backward()
        return watched.grad

    def chunked(size: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with chunked_loss(model, ChunkedLoss(tokens=size)):
                return step(model, first)

        return run

    theirs = next(p for n, p in peer.named_parameters() if "lora_A" in n)
    arms = {f"chunks of {size}": chunked(size) for size in args.chunks}
    check(step(peer, theirs), [arm() for arm in arms.values()], model.dtype)
    return {
        "HF PEFT": lambda: step(peer, theirs),
        "HF PEFT again": lambda: step(peer, theirs),
        "ours, plain": lambda: step(model, first),
        **{f"ours, {name}": arm for name, arm in arms.items()},
    }


def check(wanted: Tensor, found: list[Tensor], dtype: torch.dtype) -> None:
    allowed = 1e-4 if dtype == torch.float32 else 5e-2
    for one in found:
        assert float((one - wanted).float().norm() / wanted.float().norm()) < allowed, "gradients differ"


def seconds(arm: Callable[[], Tensor], device: str) -> float:
    if device != "cuda":
        start = time.process_time()
        arm()
        return time.process_time() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    arm()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak(arm: Callable[[], Tensor]) -> int:
    with PeakBytes() as counted:
        arm()
    return counted.peak


def interval(ratios: list[float]) -> tuple[float, float]:
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 512, "layers": 8, "tokens": 1024, "rounds": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--chunks", type=int, nargs="+", default=[256])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole", action="store_true", help="a whole step instead of the head and the loss alone")
    parser.add_argument("--json", help="a file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{vars(args)}, torch {torch.__version__}\n")
    print("| vocabulary | arm | median ms | time ratio [95 %] | peak MB | peak ratio |\n|---|---|---|---|---|---|")
    table = []
    for vocabulary in args.vocabularies:
        arms = (whole if args.whole else alone)(args, vocabulary)
        bytes_of = {name: peak(arm) for name, arm in arms.items()}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(args.rounds):
            for name in random.sample(list(arms), len(arms)):
                times[name].append(seconds(arms[name], args.device))
        first = next(iter(arms))
        for name, found in times.items():
            ratios = [one / other for one, other in zip(found, times[first], strict=True)]
            row = {
                "vocabulary": vocabulary,
                "arm": name,
                "ms": 1e3 * statistics.median(found),
                "ratio": statistics.median(ratios),
            }
            row |= {
                "interval": interval(ratios),
                "peak": bytes_of[name],
                "peak ratio": bytes_of[name] / bytes_of[first],
            }
            table.append(row)
            low, high = row["interval"]
            print(
                f"| {vocabulary:,} | {name} | {row['ms']:.0f} | {row['ratio']:.3f} [{low:.3f}, {high:.3f}] | {row['peak'] / 1e6:.0f} | "
                f"{row['peak ratio']:.3f} |",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "torch": torch.__version__, "rows": table}, file, indent=1)


if __name__ == "__main__":
    main()

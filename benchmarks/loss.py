"""What a loss in chunks costs beside the plain loss of transformers, which HF PEFT's models compute too: time and peak bytes.

    python benchmarks/loss.py                          # the head and the loss alone, vocabularies of 32k and 128k
    python benchmarks/loss.py --whole                  # a whole step of an adapted Llama, beside HF PEFT's

Forward and backward, measured as ``paired`` says. Peak bytes: all storages that operations made, while they live; base weights and optimizer
are not among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from paired import Row, compare, parser, publish
from torch import Tensor, nn

from lightning_peft import LoRA, adapter_layers, inject
from lightning_peft.losses_in_chunks import ChunkedLoss, chunked_loss

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    return {"plain": plain, **arms}


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
        "ours, plain": lambda: step(model, first),
        **{f"ours, {name}": arm for name, arm in arms.items()},
    }


def check(wanted: Tensor, found: list[Tensor], dtype: torch.dtype) -> None:
    allowed = 1e-4 if dtype == torch.float32 else 5e-2
    for one in found:
        assert float((one - wanted).float().norm() / wanted.float().norm()) < allowed, "gradients differ"


def measure(args: argparse.Namespace) -> Iterator[Row]:
    for vocabulary in args.vocabularies:
        arms = (whole if args.whole else alone)(args, vocabulary)
        case = f"{args.dtype}, vocabulary {vocabulary:,}"
        yield from compare(case, arms, rounds=args.rounds, device=args.device, memory=True)


if __name__ == "__main__":
    options = parser(__doc__, hidden=512, layers=8, tokens=1024)
    options.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000])
    options.add_argument("--chunks", type=int, nargs="+", default=[256])
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--whole", action="store_true", help="a whole step instead of the head and the loss alone")
    publish(options.parse_args(), measure)

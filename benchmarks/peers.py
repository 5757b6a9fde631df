"""LoRA of torchtune and LitGPT on one linear layer, beside HF PEFT and ours, where they are installed.

    python benchmarks/peers.py

Forward and backward of a linear layer with the same A and B in every arm, float32 and bfloat16. AdapterHub's ``adapters`` replaces whole models of
transformers and needs a version of its own, so it is measured on a GPT-2 where it imports beside the one that is installed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from paired import Row, compare, parser, publish
from torch import nn

from lightning_peft import LoRA, inject


def ours(width: int, rank: int) -> tuple[nn.Module, Any, Any]:
    box = nn.Sequential(nn.Linear(width, width))
    inject(box, LoRA(rank=rank, alpha=2 * rank), ["0"])
    held = box[0].adapters["default"]
    return box, held.lora_A, held.lora_B.t()


def hf_peft(width: int, rank: int) -> tuple[nn.Module, Any, Any]:
    import peft

    box = nn.Sequential(nn.Linear(width, width))
    made = peft.get_peft_model(box, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]))
    layer = made.base_model.model[0]
    return made, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def torchtune(width: int, rank: int) -> tuple[nn.Module, Any, Any]:
    from torchtune.modules.peft import LoRALinear

    layer = LoRALinear(width, width, rank=rank, alpha=2 * rank, use_bias=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora" in name)
    return layer, layer.lora_a.weight, layer.lora_b.weight


def litgpt(width: int, rank: int) -> tuple[nn.Module, Any, Any]:
    from litgpt.lora import LoRALinear

    layer = LoRALinear(width, width, r=rank, lora_alpha=2 * rank)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora" in name)
    return layer, layer.lora_A, layer.lora_B


LIBRARIES: dict[str, Callable[[int, int], tuple[nn.Module, Any, Any]]] = {
    "HF PEFT": hf_peft,
    "ours": ours,
    "torchtune": torchtune,
    "LitGPT": litgpt,
}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    warnings.simplefilter("ignore")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        weight, A, B = (
            torch.randn(shape) * 0.02 for shape in ((args.hidden, args.hidden), (8, args.hidden), (args.hidden, 8))
        )
        x = torch.randn(args.tokens, args.hidden, device=args.device, dtype=dtype).requires_grad_()
        arms, outputs = {}, {}
        for name, make in LIBRARIES.items():
            try:
                layer, down, up = make(args.hidden, 8)
            except ImportError as error:
                print(f"{name}: not installed ({error})")
                continue
            with torch.no_grad():
                down.copy_(A)
                up.copy_(B)
                for key, parameter in layer.named_parameters():
                    if "lora" not in key.lower():
                        parameter.copy_(weight if parameter.dim() == 2 else torch.zeros_like(parameter))
            layer.to(args.device)
            for key, parameter in layer.named_parameters():
                if "lora" not in key.lower() or name in (
                    "torchtune",
                    "LitGPT",
                ):  # their adapters have the dtype of the base
                    parameter.data = parameter.data.to(dtype)

            def step(layer: nn.Module = layer, x: torch.Tensor = x) -> torch.Tensor:
                layer.zero_grad(set_to_none=True)
                x.grad = None
                y = layer(x)
                y.sum().backward()
                return y.detach()

            arms[name], outputs[name] = step, step().float()
        for name, found in outputs.items():
            error = float((found - outputs["HF PEFT"]).norm() / outputs["HF PEFT"].norm())
            assert error < (1e-5 if dtype == torch.float32 else 2e-2), f"{name} computes something else: {error}"
        case = f"one linear of {args.hidden}, {args.tokens} tokens, {str(dtype).removeprefix('torch.')}"
        yield from compare(case, arms, rounds=args.rounds, device=args.device, memory=True)


if __name__ == "__main__":
    publish(parser(__doc__, hidden=2048, tokens=256).parse_args(), measure)

"""What LoRA that is not merged adds to a forward of one row, beside what HF PEFT adds; the three models share their tensors."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from paired import Row, compare
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.adapter_layer import adapter_layers

METHOD = LoRA(rank=8, alpha=16.0)


def fill_like(peer: nn.Module, ours: nn.Module, name: str = "default") -> None:
    """Give both libraries the same adapter, whose B is not zero."""
    with torch.no_grad():
        for path, layer in adapter_layers(ours).items():
            other = peer.base_model.model.get_submodule(path)
            A, B = (getattr(other, which)[name].weight for which in ("lora_A", "lora_B"))
            B.normal_(std=0.02)
            layer.adapters[name].lora_A.copy_(A)
            layer.adapters[name].lora_B.copy_(B.t())


def latency_rows(args: argparse.Namespace) -> Iterator[Row]:
    shapes = ((f"1 x 128 of {args.gpt_width} wide", args.gpt_width, 128), ("host-bound, 1 x 16 of 64 wide", 64, 16))
    for label, width, length in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            arms = latency_arms(width, length, dtype, args.gpt_layers)
            case = f"unmerged GPT-2, {args.gpt_layers} blocks, {label}, {str(dtype).removeprefix('torch.')}"
            yield from compare(case, arms, rounds=2 * args.rounds, bound="bare")


def latency_arms(width: int, length: int, dtype: torch.dtype, layers: int) -> dict[str, Callable[[], Any]]:
    """Forward of a bare GPT-2, under HF PEFT and under ours: three models of the same tensors."""
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "n_embd": width,
        "n_layer": layers,
        "n_head": max(1, width // 64),
        "n_positions": length,
        "vocab_size": 512,
    }

    def made() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(use_cache=False, **sizes)).to(dtype).eval().requires_grad_(False)

    bare, theirs, ours = made(), made(), made()
    for other in (theirs, ours):
        for name, parameter in bare.named_parameters():
            other.get_parameter(name).data = parameter.data
    names = ["c_attn", "c_proj", "c_fc"]
    peer = peft.get_peft_model(
        theirs, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, fan_in_fan_out=True, task_type="CAUSAL_LM")
    ).eval()
    inject(ours, METHOD, names)
    ours.eval()
    fill_like(peer, ours)
    ids = torch.randint(0, 512, (1, length))

    def run(model: Any) -> Callable[[], Any]:
        def forward() -> Any:
            with torch.inference_mode():
                return model(input_ids=ids).logits

        return forward

    found = run(ours)().float(), run(peer)().float(), run(bare)().float()
    assert (found[0] - found[1]).norm() < (1e-4 if dtype == torch.float32 else 5e-2) * found[1].norm()
    assert not torch.equal(found[0], found[2])
    return {"HF PEFT": run(peer), "ours": run(ours), "bare": run(bare)}

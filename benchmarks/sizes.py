"""How the cost of a LoRA step grows with width, depth, rank, sequence and number of adapters, beside HF PEFT and beside the frozen model.

    python benchmarks/sizes.py
    python benchmarks/sizes.py --axes width adapters --rounds 8

A Llama in float32 with LoRA on all linear layers; around one middle point, one size changes at a time. A step is forward and backward of one batch,
without the optimizer. ``adapters`` loads more of them, one of which acts; its second table is a switch from one to another.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from host import LINEARS, llama
from host_latency import fill_like
from paired import Row, compare, parser, publish

from lightning_peft import LoRA, inject
from lightning_peft.activation import set_active_adapters

MIDDLE = {"width": 256, "depth": 4, "rank": 8, "sequence": 256, "adapters": 1}
AXES: dict[str, tuple[int, ...]] = {
    "width": (128, 256, 512, 1024),
    "depth": (2, 4, 8, 16),
    "rank": (2, 8, 32, 128),
    "sequence": (32, 128, 512, 1024),
    "adapters": (1, 8, 32),
}
QUICK = {axis: sizes[:2] for axis, sizes in AXES.items()}


def arms(
    width: int, depth: int, rank: int, sequence: int, adapters: int, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arms of a step, and those of a switch among adapters."""
    import peft

    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": depth}
    heads = {"num_attention_heads": max(1, width // 64), "num_key_value_heads": max(1, width // 64)}
    bare, theirs, ours = (llama(device, vocab_size=512, **sizes, **heads) for _ in range(3))
    for other in (theirs, ours):  # one base for all
        for name, parameter in bare.named_parameters():
            other.get_parameter(name).data = parameter.data
    names = [f"adapter_{number}" for number in range(adapters)]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS)
    peer = peft.get_peft_model(theirs, config, adapter_name=names[0])
    for name in names[1:]:
        peer.add_adapter(name, config)
    for name in names:
        inject(ours, LoRA(rank=rank, alpha=2 * rank), LINEARS, name=name)
        fill_like(peer, ours, name)
    peer.set_adapter(names[0])
    set_active_adapters(ours, names[0])
    ids = torch.randint(0, 512, (1, sequence), device=device)
    inputs = bare.model.embed_tokens(ids)

    def step(model: Any) -> Callable[[], Any]:
        def run() -> Any:
            model.zero_grad(set_to_none=True)
            # Activations need gradients all the way down in every arm, as they do where a layer below is adapted.
            model(inputs_embeds=inputs.detach().requires_grad_(), labels=ids).loss.backward()

        return run

    def switch(change: Callable[[str], Any]) -> Callable[[], None]:
        def run() -> None:
            for name in (*names[:4], names[0]):
                change(name)

        return run

    steps = {"HF PEFT": step(peer), "ours": step(ours), "frozen": step(bare)}
    return steps, {"HF PEFT": switch(peer.set_adapter), "ours": switch(lambda name: set_active_adapters(ours, name))}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    warnings.simplefilter("ignore")
    for axis in args.axes or AXES:
        for size in (QUICK if args.short else AXES)[axis]:
            point = {**MIDDLE, axis: size}
            steps, switches = arms(**point, device=args.device)
            case = f"a step, {axis} {size}"
            yield from compare(case, steps, rounds=args.rounds, bound="frozen", device=args.device, memory=True)
            if axis == "adapters":
                yield from compare(f"switches, {axis} {size}", switches, rounds=args.rounds)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--axes", nargs="+", choices=tuple(AXES), help="some of the sizes")
    options.add_argument("--short", action="store_true", help="the smallest two of each size")
    publish(options.parse_args(), measure)

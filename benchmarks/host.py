"""What the library costs around the arithmetic, beside HF PEFT: inject, save, load, switch, merge, unmerged latency, hooks, import.

    python benchmarks/host.py                                  # all, minutes; the largest model has 1.1 billion weights (2.2 GB)
    python benchmarks/host.py --only inject merge --rounds 10
    python benchmarks/host.py --hidden 64 --layers 2           # a small model in place of the one of 1.1 billion weights

CPU time, measured as ``paired`` says. Both libraries work on one and the same base, so its tensors are shared. Overhead, in tables of latency, is
what unmerged LoRA adds to the bare model, as a share of what HF PEFT adds.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from host_latency import METHOD, fill_like, latency_rows
from host_trainer import trainer_rows
from paired import Row, Staged, compare, parser, publish
from torch import nn

from lightning_peft import delete_adapter, inject, load_adapter, merge_adapters, save_adapter, unload_adapters
from lightning_peft.activation import set_active_adapters
from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.arithmetic.row_blocks import Product

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """Return a frozen Llama of these sizes; weights are random, and the same values come again and again in large ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes)).to(dtype).eval().requires_grad_(False)
    if device == "meta":
        return model
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    values = torch.randn(2**20, dtype=torch.float32).mul_(0.02).to(dtype)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), values.numel()):
            part = flat[start : start + values.numel()]
            part.copy_(values[: part.numel()])
    return model


def large(args: argparse.Namespace) -> Any:
    """The model of 1.1 billion weights in bfloat16, or a small one where ``--hidden`` and ``--layers`` say so; made once."""
    if "large" not in vars(args):
        heads = {"num_attention_heads": max(2, args.hidden // 64), "num_key_value_heads": max(2, args.hidden // 512)}
        sizes = {
            "hidden_size": args.hidden,
            "intermediate_size": args.hidden * 11 // 4,
            "num_hidden_layers": args.layers,
        }
        args.large = llama(dtype=torch.bfloat16, vocab_size=args.vocabulary, **sizes, **heads)
        args.about = f"Llama {sum(p.numel() for p in args.large.parameters()) / 1e9:.2g}B bfloat16"
    return args.large


def config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)


# -- inject ------------------------------------------------------------------------------------------------------------


def inject_rows(args: argparse.Namespace) -> Iterator[Row]:
    import peft

    def arms(model: Any) -> dict[str, Staged]:
        def theirs(**how: Any) -> Staged:
            made: list[Any] = []
            return Staged(
                gc.collect,
                lambda _: made.append(peft.get_peft_model(model, config(), **how)),
                lambda _: made.pop().unload(),
            )

        ours = Staged(gc.collect, lambda _: inject(model, METHOD, LINEARS), lambda _: unload_adapters(model))
        by_role = Staged(gc.collect, lambda _: inject(model, METHOD), lambda _: unload_adapters(model))
        low = theirs(low_cpu_mem_usage=True)
        return {"HF PEFT": theirs(), "HF PEFT, low_cpu_mem_usage": low, "ours": ours, "ours, all_linear": by_role}

    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    meta = llama("meta", torch.bfloat16, vocab_size=32000, **sizes)
    yield from compare("inject r=8, all linears, Llama 7B on meta", arms(meta), rounds=args.rounds)
    model = large(args)
    found = {name: arm for name, arm in arms(model).items() if "low_cpu" not in name}
    yield from compare(f"inject r=8, all linears, {args.about}", found, rounds=args.rounds)


# -- save and load -----------------------------------------------------------------------------------------------------


def save_rows(args: argparse.Namespace) -> Iterator[Row]:
    import peft

    model = large(args)
    with tempfile.TemporaryDirectory() as folder:
        inject(model, METHOD, LINEARS)
        save_adapter(model, f"{folder}/ours")
        unload_adapters(model)
        peer = peft.get_peft_model(model, config())
        peer.save_pretrained(f"{folder}/theirs")
        # Of one model both can save only in turn: the adapters of the other are out of it meanwhile.
        peer = peer.unload()

        def with_theirs() -> Any:
            made = peft.PeftModel.from_pretrained(model, f"{folder}/theirs")
            gc.collect()
            return made

        def with_ours() -> Any:
            load_adapter(model, f"{folder}/ours", check_base=False)
            gc.collect()

        arms = {
            "HF PEFT": Staged(
                with_theirs, lambda made: made.save_pretrained(f"{folder}/theirs"), lambda made: made.unload()
            ),
            "ours": Staged(
                with_ours, lambda _: save_adapter(model, f"{folder}/ours"), lambda _: unload_adapters(model)
            ),
        }
        yield from compare(f"save, {args.about}", arms, rounds=args.rounds)
        yield from load_rows(args, folder)


def load_rows(args: argparse.Namespace, folder: str) -> Iterator[Row]:
    import peft

    model, made = large(args), []
    arms = {
        "HF PEFT": Staged(
            gc.collect,
            lambda _: made.append(peft.PeftModel.from_pretrained(model, f"{folder}/theirs")),
            lambda _: made.pop().unload(),
        ),
        "ours": Staged(gc.collect, lambda _: load_adapter(model, f"{folder}/ours"), lambda _: unload_adapters(model)),
        "ours, their folder": Staged(
            gc.collect, lambda _: load_adapter(model, f"{folder}/theirs"), lambda _: unload_adapters(model)
        ),
    }
    yield from compare(f"load a new adapter, {args.about}", arms, rounds=args.rounds)


# -- many --------------------------------------------------------------------------------------------------------------


def many_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The k-th adapter, beside the first of either library, and a switch among all of them."""
    import peft

    sizes = {"hidden_size": args.many_hidden, "intermediate_size": 11 * args.many_hidden // 4, "num_hidden_layers": 8}
    model = llama(vocab_size=512, num_attention_heads=8, **sizes)
    alone = llama(vocab_size=512, num_attention_heads=8, **sizes)
    peer_base = llama(vocab_size=512, num_attention_heads=8, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        inject(model, METHOD, LINEARS)
        save_adapter(model, folder)
        unload_adapters(model)
        peer = peft.PeftModel.from_pretrained(peer_base, folder, adapter_name="adapter_0")
        load_adapter(model, folder, name="adapter_0")
        names = [f"adapter_{number}" for number in range(args.adapters)]
        for name in names[1:]:
            load_adapter(model, folder, name=name)
            peer.load_adapter(folder, adapter_name=name)

        def theirs(_: Any) -> None:
            peer.load_adapter(folder, adapter_name="last")
            peer.set_adapter("last")  # what ours does too

        arms = {
            "HF PEFT": Staged(
                lambda: (peer.delete_adapter(names[-1]), gc.collect()), theirs, lambda _: back(theirs=True)
            ),
            "ours": Staged(
                lambda: (delete_adapter(model, names[-1]), gc.collect()),
                lambda _: load_adapter(model, folder, name="last"),
                lambda _: back(theirs=False),
            ),
            "ours, the first": Staged(
                gc.collect, lambda _: load_adapter(alone, folder, name="last"), lambda _: unload_adapters(alone)
            ),
        }

        def back(*, theirs: bool) -> None:
            if theirs:
                peer.delete_adapter("last")
                peer.load_adapter(folder, adapter_name=names[-1])
            else:
                delete_adapter(model, "last")
                load_adapter(model, folder, name=names[-1])

        about = f"Llama 8 x {args.many_hidden}"
        yield from compare(f"load adapter {args.adapters}, {about}", arms, rounds=args.rounds)

    def through(switch: Callable[[str], None]) -> Callable[[], None]:
        def run() -> None:
            for name in names[:8]:
                switch(name)

        return run

    switches = {"HF PEFT": through(peer.set_adapter), "ours": through(lambda name: set_active_adapters(model, name))}
    yield from compare(f"8 switches among {args.adapters}, {about}", switches, rounds=args.rounds)


# -- merge -------------------------------------------------------------------------------------------------------------


def merge_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Merging in place; the weights stay merged, which changes nothing of what the next round costs."""
    import peft

    model = large(args)

    def theirs_before() -> Any:
        made = peft.get_peft_model(model, config())
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=1e-4)
        gc.collect()
        return made

    def theirs_after(made: Any) -> None:
        for module in made.modules():
            if hasattr(module, "merged_adapters"):
                module.merged_adapters = []
        made.unload()

    def ours_before() -> None:
        inject(model, METHOD, LINEARS)
        with torch.no_grad():
            for layer in adapter_layers(model).values():
                layer.adapters["default"].lora_B.normal_(std=1e-4)
        gc.collect()

    def ours(*, keep: bool) -> Staged:
        return Staged(
            ours_before, lambda _: merge_adapters(model, keep_originals=keep), lambda _: unload_adapters(model)
        )

    arms = {
        "HF PEFT": Staged(theirs_before, lambda made: made.merge_adapter(), theirs_after),
        "ours, in place": ours(keep=False),
        "ours, originals kept": ours(keep=True),
    }
    print(f"merging errors to float64, relative: {merge_errors(model)}", file=sys.stderr)
    yield from compare(f"merge, {args.about}", arms, rounds=max(5, args.rounds // 2), memory=True)


def merge_errors(model: Any) -> dict[str, float]:
    """Return how far the merged linears of one block are from the sum in float64, as a share of what merging changes."""
    import copy

    import peft

    block = nn.ModuleDict({"block": copy.deepcopy(model.model.layers[0])})
    before = {name: value.double() for name, value in block.state_dict().items()}
    peer = peft.get_peft_model(copy.deepcopy(block), config())
    inject(block, METHOD, LINEARS)
    fill_like(peer, block)
    exact = {}
    for path, layer in adapter_layers(block).items():
        one = layer.adapters["default"]
        change = Product(one.lora_B.detach().double().t(), one.lora_A.detach().double(), one.scaling).whole()
        exact[path] = before[f"{path}.weight"] + change
    merge_adapters(block, keep_originals=False)
    peer.merge_adapter()
    found = {"HF PEFT": 0.0, "ours": 0.0}
    for path, layer in adapter_layers(block).items():
        weights = {
            "ours": layer.base_layer.weight,
            "HF PEFT": peer.base_model.model.get_submodule(path).base_layer.weight,
        }
        for who, weight in weights.items():
            norm = exact[path].norm()
            found[who] = max(found[who], float((weight.detach().double() - exact[path]).norm() / norm))
    return found


# -- import ------------------------------------------------------------------------------------------------------------

IMPORTS = {
    "import lightning": "import lightning",
    "import lightning_peft": "import lightning_peft",
    "lightning_peft, PEFTModule, LoRA, inject": "import lightning; from lightning_peft import PEFTModule, LoRA, inject",
    "import peft": "import peft",
}


def import_rows(args: argparse.Namespace) -> Iterator[Row]:
    def child(code: str) -> Callable[[], float]:
        def run() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        return run

    arms = {label: child(code) for label, code in IMPORTS.items()}
    yield from compare("a new process", arms, rounds=max(5, args.rounds // 2), clock=lambda arm: arm())


CASES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "inject": inject_rows,
    "save": save_rows,
    "many": many_rows,
    "merge": merge_rows,
    "latency": latency_rows,
    "trainer": trainer_rows,
    "import": import_rows,
}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    warnings.simplefilter("ignore")
    for name in args.only or CASES:
        yield from CASES[name](args)


if __name__ == "__main__":
    sizes = {"hidden": 2048, "layers": 22, "vocabulary": 32000, "adapters": 40, "many_hidden": 512}
    options = parser(__doc__, **sizes, gpt_width=1024, gpt_layers=24, steps=2000)
    options.add_argument("--only", nargs="+", choices=tuple(CASES), help="some of the cases")
    publish(options.parse_args(), measure)

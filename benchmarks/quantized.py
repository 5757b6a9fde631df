"""What QLoRA costs beside HF PEFT over bitsandbytes: one linear layer, and a whole step.

    python benchmarks/quantized.py                     # one layer of 4096 x 4096 under 64, 256 and 1024 tokens
    python benchmarks/quantized.py --whole             # a Llama of 2 layers, hidden 1024, 512 tokens
    python benchmarks/quantized.py --profile           # where the time of each arm goes, instead of how much it is

Forward and backward in bfloat16, NF4 without double quantisation, LoRA of rank 8, measured as ``paired`` says. The arms share the weights of the base. *bitsandbytes alone* is the
frozen quantised layer or model, *dense* the same without quantisation: the bound. Both have gradients of activations as far down as LoRA needs them. Peak bytes count
what our layers unpack into, though it is there already at every step but the first.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from paired import Arm, Row, compare, parser, peak_bytes, publish
from torch import Tensor, nn

from lightning_peft import NF4, LoRA, adapter_layers, inject
from lightning_peft.packed_products import free_scratch

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEER, OURS, BNB, DENSE = "HF PEFT", "ours", "bitsandbytes alone", "dense, frozen"


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with the same tensors."""
    return copy.deepcopy(model, {id(one): one for one in (*model.parameters(), *model.buffers())})


def quantized(model: nn.Module, double: bool) -> nn.Module:
    """Return a copy of ``model`` with the linear layers of its blocks packed and all else shared."""
    packed, quantizer = sharing(model), NF4(double_quantization=double)
    for path, module in list(packed.named_modules()):
        if path.rpartition(".")[2] in LINEARS:
            packed.set_submodule(path, quantizer.quantize(module))
    return packed.requires_grad_(False)


def adapted(packed: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """Return HF PEFT's and our adapted model over the same base, with the same values."""
    from peft import LoraConfig, get_peft_model

    theirs, ours = sharing(packed), sharing(packed)
    theirs.is_loaded_in_4bit = True
    peer = get_peft_model(theirs, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS))
    inject(ours, LoRA(rank=rank, alpha=2.0 * rank), "all_linear")
    with torch.no_grad():
        for path, layer in adapter_layers(ours).items():
            other = peer.base_model.model.get_submodule(path)
            assert type(other).__module__ == "peft.tuners.lora.bnb", type(other)
            other.lora_B["default"].weight.normal_(std=0.02)
            layer.adapters["default"].lora_A.copy_(other.lora_A["default"].weight)
            layer.adapters["default"].lora_B.copy_(other.lora_B["default"].weight.t())
    return peer, ours


def one_layer(args: argparse.Namespace, tokens: int) -> dict[str, Arm]:
    """Forward and backward of one layer, to its input and the adapter."""
    torch.manual_seed(0)
    dense = nn.Sequential()
    dense.add_module("q_proj", nn.Linear(args.size, args.size, bias=False, dtype=torch.bfloat16, device=args.device))
    packed = quantized(dense.requires_grad_(False), args.double)
    peer, ours = adapted(packed, args.rank)
    x, slope = (torch.randn(tokens, args.size, dtype=torch.bfloat16, device=args.device) for _ in range(2))
    x.requires_grad_()

    def step(model: nn.Module) -> Tensor:
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(x).backward(slope)
        assert x.grad is not None
        return x.grad

    same(step(peer), step(ours))
    return {
        name: lambda m=model: step(m)
        for name, model in zip((PEER, OURS, BNB, DENSE), (peer, ours, packed, dense), strict=True)
    }


def whole(args: argparse.Namespace, tokens: int) -> dict[str, Arm]:
    """A step of a Llama without the optimizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 11 * args.hidden // 4, "num_hidden_layers": args.layers}
    config = LlamaConfig(vocab_size=args.vocabulary, num_attention_heads=8, use_cache=False, **sizes)
    dense = LlamaForCausalLM(config).to(args.device, torch.bfloat16).requires_grad_(False)
    packed = quantized(dense, args.double)
    peer, ours = adapted(packed, args.rank)
    ids = torch.randint(0, args.vocabulary, (1, tokens), device=args.device)
    for model in (packed, dense):
        first = model.model.layers[0].self_attn
        for layer in (first.q_proj, first.k_proj, first.v_proj):
            layer.register_forward_hook(lambda module, inputs, y: y.requires_grad_())
    watched = {
        id(peer): next(p for name, p in peer.named_parameters() if "lora_A" in name),
        id(ours): next(iter(adapter_layers(ours).values())).adapters["default"].lora_A,
    }

    def step(model: nn.Module) -> Tensor | None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        return watched[id(model)].grad if id(model) in watched else None

    same(step(peer), step(ours))
    return {
        name: lambda m=model: step(m)
        for name, model in zip((PEER, OURS, BNB, DENSE), (peer, ours, packed, dense), strict=True)
    }


def same(wanted: Tensor | None, found: Tensor | None) -> None:
    assert wanted is not None
    assert found is not None
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 2e-2, "gradients differ"


def profile(case: str, arms: dict[str, Arm], rows: int = 12) -> None:
    """Print where the CPU time of each arm goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    for name, arm in arms.items():
        for _ in range(3):
            arm()
        with profiling(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(5):
                arm()
        print(
            f"{case}: {name}\n{found.key_averages().table(sort_by='self_cpu_time_total', row_limit=rows, max_name_column_width=40)}"
        )


def measure(args: argparse.Namespace) -> Iterator[Row]:
    for tokens in args.tokens or ([512] if args.whole else [64, 256, 1024]):
        arms = (whole if args.whole else one_layer)(args, tokens)
        shape = f"Llama {args.layers} x {args.hidden}" if args.whole else f"{args.size} x {args.size}"
        case = f"{shape}, {tokens} tokens{', double' if args.double else ''}"
        if args.profile:
            profile(case, arms)
            continue

        def counted(arm: Arm) -> int:
            free_scratch()
            return peak_bytes(arm, args.device)

        rows = compare(case, arms, rounds=args.rounds, bound=DENSE, device=args.device)
        peaks = {name: counted(arm) for name, arm in arms.items()}
        for row in rows:
            if row.arm in peaks:
                row.peak, row.peak_ratio = peaks[row.arm], peaks[row.arm] / peaks[PEER]
        yield from rows


if __name__ == "__main__":
    options = parser(__doc__, size=4096, hidden=1024, layers=2, vocabulary=1000, rank=8)
    options.add_argument("--tokens", type=int, nargs="+")
    options.add_argument("--whole", action="store_true", help="a whole step instead of one layer")
    options.add_argument("--double", action="store_true", help="quantise the scales too")
    options.add_argument("--profile", action="store_true", help="in this process; with --allocator asis")
    publish(options.parse_args(), measure)

"""What mixtures of low-rank experts cost beside the frozen MLP they stand around: forward and backward of one gated MLP.

    OMP_NUM_THREADS=1 python benchmarks/moe_lora.py            # prints a table of ratios
    OMP_NUM_THREADS=1 python benchmarks/moe_lora.py --width 256 --inner 1024 --tokens 2048

The arms take turns, and each is measured by its fastest round in time of the processor, so that other programs disturb little.
``materialised`` makes the weights W + s B_e A_e of all experts at every step and runs them as a mixture of whole experts.
"""

import argparse
import time
from types import SimpleNamespace

import torch
from torch import nn

from lightning_peft import LoRA, LoRAMixture, MixLoRA, inject
from lightning_peft.moe.expert_weights import ExpertWeights
from lightning_peft.moe.experts import run_experts


def mlp(args):
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    config = SimpleNamespace(hidden_size=args.width, intermediate_size=args.inner, mlp_bias=False, hidden_act="silu")
    model = nn.ModuleDict({"mlp": LlamaMLP(config)})
    return model.requires_grad_(False)


def mixed(args, method, targets="mlp"):
    model = mlp(args)
    inject(model, method, targets)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return model.train()["mlp"]


def materialised(args, method):
    layer = mixed(args, method)
    base, adapter = layer.base_layer, layer.adapters["default"]

    def whole(name):
        A, B = adapter.pair(name)
        return getattr(base, f"{name}_proj").weight + adapter.scaling * (B.transpose(1, 2) @ A)

    def run(x):
        weights = ExpertWeights(torch.cat([whole("gate"), whole("up")], dim=1), whole("down"))
        return run_experts(x, adapter.assign(x, None), weights, nn.functional.silu)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 1024), ("inner", 2816), ("tokens", 512), ("experts", 8), ("rank", 16), ("rounds", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    fields = {"experts": args.experts, "rank": args.rank, "dropout": 0.0}
    linears = ["gate_proj", "up_proj", "down_proj"]
    arms = {
        "frozen MLP": mlp(args)["mlp"],
        "LoRA": mixed(args, LoRA(rank=args.rank), linears),
        "MixLoRA, segments": mixed(args, MixLoRA(**fields, implementation="segments")),
        "MixLoRA, wide": mixed(args, MixLoRA(**fields, implementation="wide")),
        "LoRAMixture, top 2": mixed(args, LoRAMixture(**fields), linears),
        "LoRAMixture, soft": mixed(args, LoRAMixture(**fields, routing="soft"), linears),
        "materialised": materialised(args, MixLoRA(**fields)),
    }
    x = torch.randn(args.tokens, args.width, requires_grad=True)
    gradient = torch.randn(args.tokens, args.width)
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(args.rounds + 1):  # one to warm up
        for name, arm in arms.items():
            start = time.process_time()
            arm(x).backward(gradient)
            best[name] = min(best[name], time.process_time() - start)
    sizes = f"width {args.width}, inner {args.inner}, {args.tokens} tokens, E={args.experts}, K=2, rank {args.rank}"
    print(f"{sizes}, {torch.get_num_threads()} thread(s)")
    for name, seconds in best.items():
        print(f"{name:20} {seconds * 1e3:9.1f} ms  {seconds / best['frozen MLP']:6.2f} x")


if __name__ == "__main__":
    main()

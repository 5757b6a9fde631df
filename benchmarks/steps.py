"""What a training step with LoRA on all linear layers costs beside HF PEFT's, and beside the frozen model.

    python benchmarks/steps.py                                   # every case, both allocators
    python benchmarks/steps.py --cases float32 bfloat16          # some
    python benchmarks/steps.py --cases peak --rounds 4           # peak bytes of 8 layers with a vocabulary of 32k

A step is forward, loss and backward. All arms share the tensors of one base, and their adapters have the same values; gradients are compared
before anything is timed. ``bound`` is the frozen model without adapters whose gradients go exactly as far down as LoRA needs them: the targeted
outputs that need no gradient of their own are leaves. No arm can be cheaper, and the overhead of an arm is its distance to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from paired import Row, compare, parser, publish
from torch import Tensor, nn

from lightning_peft import ChunkedLoss, LoRA, adapter_layers, chunked_loss, fuse_blocks, inject

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEER = "HF PEFT"


@dataclass(frozen=True)
class Case:
    """A shape, and which arms run on it."""

    dtype: torch.dtype = torch.float32
    hidden: int = 512
    inner: int = 1376
    layers: int = 2
    vocabulary: int = 1000
    batch: int = 4
    tokens: int = 256
    rank: int = 8
    dropout: float = 0.0
    compiled: bool = False
    chunked: bool = True
    memory: bool = False
    rounds: int | None = None


_HALF = torch.bfloat16
_TINY = Case(hidden=64, inner=172, batch=1, tokens=32, chunked=False)
CASES = {
    "float32": Case(),
    "bfloat16": Case(dtype=_HALF),
    "dropout": Case(dropout=0.05, chunked=False, memory=True),
    "tiny": _TINY,
    "tiny bfloat16": replace(_TINY, dtype=_HALF),
    "compiled": Case(compiled=True),
    "compiled bfloat16": Case(dtype=_HALF, compiled=True),
    "peak": Case(layers=8, vocabulary=32_000, memory=True, rounds=3),
    "peak bfloat16": Case(layers=8, vocabulary=32_000, memory=True, dtype=_HALF, rounds=3),
}


class Steps:
    """The arms of one case."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        torch.manual_seed(0)
        self.state = self._llama().state_dict()
        self.ids = torch.randint(0, case.vocabulary, (case.batch, case.tokens), device=device)
        self.values: dict[str, tuple[Tensor, Tensor]] = {}

    def _llama(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        case = self.case
        sizes = {"hidden_size": case.hidden, "intermediate_size": case.inner, "num_hidden_layers": case.layers}
        heads = max(1, case.hidden // 64)
        config = LlamaConfig(vocab_size=case.vocabulary, num_attention_heads=heads, use_cache=False, **sizes)
        return LlamaForCausalLM(config).to(self.device, case.dtype).requires_grad_(False)

    def base(self) -> nn.Module:
        """Return a model that shares the tensors of all others."""
        model = self._llama()
        model.load_state_dict(self.state, assign=True)
        return model.requires_grad_(False).train()

    def peer(self, *, cast: bool = True) -> nn.Module:
        """Return HF PEFT's."""
        from peft import LoraConfig, get_peft_model

        case = self.case
        config = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=LINEARS, lora_dropout=case.dropout)
        torch.manual_seed(1)
        model = get_peft_model(self.base(), config, autocast_adapter_dtype=cast)
        for name, one in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(one, std=0.02)
        return model.train()

    def ours(self, peer: nn.Module) -> nn.Module:
        """Return ours, with the values of ``peer``."""
        model = self.base()
        inject(model, LoRA(rank=self.case.rank, alpha=2.0 * self.case.rank, dropout=self.case.dropout), LINEARS)
        with torch.no_grad():
            for path, layer in adapter_layers(model).items():
                other: Any = peer.base_model.model.get_submodule(path)  # type: ignore[union-attr]
                layer.adapters["default"].lora_A.copy_(other.lora_A["default"].weight)
                layer.adapters["default"].lora_B.copy_(other.lora_B["default"].weight.t())
        return model.train()

    def bound(self) -> nn.Module:
        """Return the frozen model with the gradients that LoRA needs."""

        def leaf(module: nn.Module, args: Any, y: Tensor) -> None:
            if not y.requires_grad:
                y.requires_grad_()

        model = self.base()
        for name, module in model.named_modules():
            if name.split(".")[-1] in LINEARS and ".layers.0." in name:
                module.register_forward_hook(leaf)
        return model

    def step(self, model: nn.Module, *, chunked: bool = False) -> Callable[[], None]:
        """Return a step of ``model``."""

        def run() -> None:
            for one in trained:
                one.grad = None
            if chunked:
                with chunked_loss(model, ChunkedLoss()):
                    loss = model(input_ids=self.ids, labels=self.ids).loss
            else:
                loss = model(input_ids=self.ids, labels=self.ids).loss
            loss.backward()

        trained = [one for one in model.parameters() if one.requires_grad]
        return run

    def arms(self) -> dict[str, Callable[[], None]]:
        """Return the arms by name, HF PEFT first and the bound last."""
        case, peer = self.case, self.peer()
        models = {PEER: peer}
        if case.dtype != torch.float32 and not case.compiled:
            models["HF PEFT, adapters in 16 bits"] = self.peer(cast=False)
        models["ours"] = self.ours(peer)
        models["ours, fused blocks"] = fuse_blocks(self.ours(peer))
        models["bound"] = self.bound()
        self.check(models)
        if case.compiled:
            del models["ours, fused blocks"]
            compiled = {f"{name}, compiled": torch.compile(self.again(name, peer)) for name in models}
            models = {PEER: peer, **compiled}  # type: ignore[dict-item]
        found = {name: self.step(model) for name, model in models.items()}
        if case.chunked and not case.compiled:
            found["ours, fused blocks, loss in chunks"] = self.step(models["ours, fused blocks"], chunked=True)
        last = next(name for name in found if name.startswith("bound"))
        found[last] = found.pop(last)
        return found

    def again(self, name: str, peer: nn.Module) -> nn.Module:
        """Return a new model of an arm."""
        return {PEER: self.peer, "ours": lambda: self.ours(peer), "bound": self.bound}[name]()

    def check(self, models: dict[str, nn.Module]) -> None:
        """Compare the gradients of the last layer with those of HF PEFT; with dropout they are random."""
        if self.case.dropout:
            return
        found = {}
        for name, model in models.items():
            self.step(model)()
            grads = [one.grad for path, one in model.named_parameters() if "lora_A" in path]
            found[name] = torch.cat([one.flatten().float() for one in grads]) if grads else None
        wanted = found[PEER]
        assert wanted is not None
        allowed = 1e-4 if self.case.dtype == torch.float32 else 5e-2
        for name, one in found.items():
            assert one is None or float((one - wanted).norm() / wanted.norm()) < allowed, f"{name}: gradients differ"


def measure(args: argparse.Namespace) -> Iterator[Row]:
    for name in args.cases:
        case = CASES[name]
        arms = Steps(case, args.device).arms()
        bound = next(arm for arm in arms if arm.startswith("bound"))
        rounds = min(args.rounds, case.rounds or args.rounds)
        yield from compare(name, arms, rounds=rounds, bound=bound, device=args.device, memory=case.memory)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    publish(options.parse_args(), measure)

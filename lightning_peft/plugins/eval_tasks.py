"""Evaluation tasks: what a model knows, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.errors import ConfigError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import EvalTask


@dataclass(frozen=True, kw_only=True)
class Perplexity(EvalTask):
    """Loss and perplexity a token of a causal language model on a text file.

    The text is cut into blocks of ``block_size`` tokens; every token but the first of a block is predicted.
    """

    name: ClassVar[str] = "perplexity"

    path: str
    """A text file, UTF-8."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    block_size: int = 256
    """Tokens in a block."""
    batch_size: int = 8
    """Blocks in a batch."""
    max_tokens: int | None = None
    """Read only so many tokens; all if None."""

    def __post_init__(self) -> None:
        for label in ("block_size", "batch_size"):
            value = getattr(self, label)
            if not isinstance(value, int) or value < (2 if label == "block_size" else 1):
                raise ConfigError(f"Perplexity {label} is too small: {value!r}")

    @override
    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        blocks = self._blocks()
        device = next(model.parameters()).device
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            total, count = 0.0, 0
            for start in range(0, len(blocks), self.batch_size):
                ids = blocks[start : start + self.batch_size].to(device)  # (batch, block)
                logits: Tensor = model(input_ids=ids).logits  # (batch, block, vocabulary)
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
                total, count = total + loss.item(), count + ids[:, 1:].numel()
        finally:
            for module in training:
                module.training = True
        mean = total / count
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": float(count)}

    def _blocks(self) -> Tensor:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.tokenizer)
        ids = tokenizer(Path(self.path).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        ids = ids[: self.max_tokens]
        if len(ids) < self.block_size:
            raise ConfigError(f"{self.path!r} has {len(ids)} tokens, fewer than one block of {self.block_size}")
        return torch.tensor(ids[: len(ids) // self.block_size * self.block_size]).view(-1, self.block_size)


@hookimpl
def register_eval_tasks() -> list[type[EvalTask]]:
    """Register the built-in tasks."""
    return [Perplexity]

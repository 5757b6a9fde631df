"""Perplexity: how likely a text is to a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from lightning_peft.evaluation.live_models import device_of, logits_of, measuring
from lightning_peft.evaluation.text_blocks import check_blocks, token_blocks
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import EvalTask


@dataclass(frozen=True, kw_only=True)
class Perplexity(EvalTask):
    """Loss and perplexity a token of a causal language model on a text file.

    The text is cut into blocks of ``block_size`` tokens; every token but the first of a block is predicted. Figures: ``loss``,
    ``perplexity``, ``tokens``.
    """

    name: ClassVar[str] = "perplexity"

    path: str
    """A ``.txt`` file, which is one document, or a ``.jsonl``, ``.csv`` or ``.parquet`` file, whose rows are one each; UTF-8."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    block_size: int = 256
    """Tokens in a block."""
    batch_size: int = 8
    """Blocks in a batch."""
    max_tokens: int | None = None
    """Use only so many tokens; all if None."""
    max_examples: int | None = None
    """Read only so many rows; all if None."""
    template: str = "{text}"
    """How a row of a ``.jsonl`` becomes text."""
    separator: str = "none"
    """Token before (``bos``) or after (``eos``) each document, or ``none``."""

    def __post_init__(self) -> None:
        check_blocks("Perplexity", self.block_size, self.batch_size, self.max_tokens, self.max_examples, self.separator)

    @override
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        blocks = token_blocks(
            self.path,
            self.tokenizer,
            self.block_size,
            template=self.template,
            separator=self.separator,
            max_tokens=self.max_tokens,
            max_examples=self.max_examples,
        )
        total, count = 0.0, 0
        with measuring(model):
            for ids in torch.split(blocks, self.batch_size):
                ids = ids.to(device_of(model))  # (batch, block)
                logits = logits_of(model, ids)[:, :-1]  # (batch, block - 1, vocabulary)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
                total, count = total + loss.item(), count + ids[:, 1:].numel()
        mean = total / count
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": float(count)}


@hookimpl
def register_eval_tasks() -> list[type[EvalTask]]:
    """Register perplexity."""
    return [Perplexity]

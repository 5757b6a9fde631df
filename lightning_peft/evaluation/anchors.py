"""How far a model has moved from its base on a text: the divergence of their predictions, both from the one model.

::

    KL(base || tuned) = sum_v p_base(v) (log p_base(v) - log p_tuned(v))        nats a token, mean over all positions
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.activation import adapters_disabled
from lightning_peft.evaluation.live_models import device_of, logits_of, measuring
from lightning_peft.evaluation.text_blocks import check_blocks, token_blocks


@dataclass(frozen=True, kw_only=True)
class AnchorText:
    """A text on which the predictions of a model are compared with those of its base."""

    path: str
    """A ``.txt``, ``.jsonl``, ``.csv`` or ``.parquet`` file of what the model should still do as before."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    block_size: int = 128
    """Tokens in a block."""
    batch_size: int = 4
    """Blocks in a batch; logits of two batches are in memory at once."""
    max_tokens: int | None = 4096
    """Use only so many tokens; all if None."""
    max_examples: int | None = None
    """Read only so many rows; all if None."""
    template: str = "{text}"
    """How a row becomes text."""
    separator: str = "none"
    """Token before (``bos``) or after (``eos``) each document, or ``none``."""

    def __post_init__(self) -> None:
        check_blocks("AnchorText", self.block_size, self.batch_size, self.max_tokens, self.max_examples, self.separator)

    def batches(self) -> Iterator[Tensor]:
        """Yield batches (batch, block) of token ids."""
        blocks = token_blocks(
            self.path,
            self.tokenizer,
            self.block_size,
            template=self.template,
            separator=self.separator,
            max_tokens=self.max_tokens,
            max_examples=self.max_examples,
        )
        yield from torch.split(blocks, self.batch_size)


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Return what ``model`` predicts at each position of ``ids`` (batch, block): (batch, block, vocabulary), float32."""
    return F.log_softmax(logits_of(model, ids.to(device_of(model))).float(), dim=-1)


def divergence(model: nn.Module, anchor: AnchorText, base: Callable[[int], Tensor] | None = None) -> dict[str, float]:
    """Return how far the predictions of ``model`` are from those of its base.

    The base is the model with its adapters disabled, batch by batch, so that nothing of it is kept.

    Args:
        model: a causal language model, adapted; it is left as it was.
        anchor: the text.
        base: returns the :func:`log_probabilities` of the base for the batch of a number, where adapters cannot be disabled.

    Returns:
        ``kl``: KL(base || tuned) in nats a token; ``agreement``: share of positions where both find the same token likeliest; ``tokens``.
    """
    total, same, count = 0.0, 0, 0
    with measuring(model):
        for number, ids in enumerate(anchor.batches()):
            if base is None:
                with adapters_disabled(model):
                    expected = log_probabilities(model, ids)
            else:
                expected = base(number)
            found = log_probabilities(model, ids)
            expected = expected.to(found.device)
            total += F.kl_div(found, expected, reduction="sum", log_target=True).item()
            same += int((found.argmax(-1) == expected.argmax(-1)).sum())
            count += ids.numel()
    return {"kl": max(0.0, total / count), "agreement": same / count, "tokens": float(count)}

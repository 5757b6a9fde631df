"""Log-likelihoods of continuations, as lm-evaluation-harness takes them from a causal language model.

::

    context        continuation
    0  1  2  3  |  4  5  6        tokens
    input 0 .. 5                  the last token is not read
    scored:        4  5  6        log p(4 | 0..3) + log p(5 | 0..4) + log p(6 | 0..5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.live_models import device_of, logits_of


class Scored(NamedTuple):
    """The score of one continuation."""

    total: float
    """Sum of the log-likelihoods of its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""


def prefix_token(tokenizer: Any) -> int:
    """Return the token that stands before a text without context.

    Raises:
        ConfigError: the tokenizer has no token of beginning or end.
    """
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise ConfigError(
            "a text without context is scored after the token of beginning or end, and the tokenizer has neither"
        )
    return int(found)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of ``text`` with those that the tokenizer adds before it, but no second token of beginning.

    A token of end that the tokenizer adds is left out: nothing could follow the text.
    """
    begins = tokenizer.bos_token_id is not None and text.startswith(tokenizer.decode(tokenizer.bos_token_id))
    plain: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if begins:
        return plain
    found: list[int] = tokenizer.encode(text)
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    while len(found) > len(plain) and found[-1] in ends and found[-len(plain) - 1 : -1] == plain:
        found = found[:-1]
    return found


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and of what follows it, cut from those of the whole text.

    Spaces at the end of the context go to the continuation. An empty context is the token of beginning, or else of end.

    Raises:
        ConfigError: the continuation has no tokens.
    """
    if context:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
    if context:
        before = encode(tokenizer, context)
        after = encode(tokenizer, context + continuation)[len(before) :]
        before = before or [prefix_token(tokenizer)]  # it holds nothing that the tokenizer knows
    else:
        before, after = [prefix_token(tokenizer)], tokenizer.encode(continuation, add_special_tokens=False)
        if after[:1] == before:
            after = after[1:]
    if not after:
        raise ConfigError(f"{continuation!r} adds no token to its context {context[-40:]!r}, so it has no likelihood")
    return before, after


@torch.no_grad()
def score(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int, max_length: int
) -> list[Scored]:
    """Return the score of each pair of context and continuation, in their order.

    Contexts that are too long lose their beginning. Inputs are sorted by length and padded on the right, which a causal model does
    not see; what several pairs have in common is run once. Probabilities are taken in float32.

    Raises:
        ConfigError: a continuation alone is longer than ``max_length``.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}  # input to the continuations that end it
    for index, (context, continuation) in enumerate(pairs):
        if len(continuation) > max_length:
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens is longer than the {max_length} of the model"
            )
        tokens = [*context, *continuation][-(max_length + 1) :]
        waiting.setdefault(tuple(tokens[:-1]), []).append((index, list(continuation)))
    found: list[Scored | None] = [None] * len(pairs)
    inputs = sorted(waiting, key=lambda tokens: (-len(tokens), tokens))
    device = device_of(model)
    for start in range(0, len(inputs), batch_size):
        rows = inputs[start : start + batch_size]
        longest = len(rows[0])
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)  # (batch, longest)
        logits = logits_of(model, ids)  # (batch, longest, vocabulary)
        for row, of_row in zip(rows, logits, strict=True):
            for index, continuation in waiting[row]:
                wanted = torch.tensor(continuation, device=of_row.device)
                own = of_row[len(row) - len(continuation) : len(row)]  # (continuation, vocabulary)
                likelihoods = F.log_softmax(own.float(), dim=-1).gather(1, wanted[:, None])
                found[index] = Scored(float(likelihoods.sum()), bool((own.argmax(-1) == wanted).all()))
    return [one for one in found if one is not None]

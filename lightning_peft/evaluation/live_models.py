"""A model in eval mode, without gradients, for the time of a measurement; afterwards it is what it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.random_state import random_state, set_random_state

LONGEST = 2048
"""Tokens in an input where neither the model nor the tokenizer says how many it takes."""


@contextlib.contextmanager
def measuring(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Put ``model`` into eval mode without gradients for a ``with`` block.

    Afterwards every module is in the mode it was in, and the generators of python, numpy and torch are where they were, so that
    training goes on as it would have.

    Args:
        model: the model.
        seed: start the generators of python, numpy and torch here; where they are if None.
    """
    import random

    import numpy as np

    training = [module for module in model.modules() if module.training]
    before = random_state()
    model.eval()
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        set_random_state(before)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits (batch, tokens, vocabulary) of a causal language model for token ids (batch, tokens).

    Raises:
        ConfigError: it returns logits of another shape, as a model with another head does, or has no place for so many tokens.
    """
    with room_for(model, ids):
        outputs: Any = model(input_ids=ids)
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"a causal language model must return logits for each of {tuple(ids.shape)} tokens; {type(model).__name__} returned {found}"
        )
    return logits


@contextlib.contextmanager
def room_for(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Say what is wrong where a table of positions or tokens of ``model`` ends before those of ``ids`` (batch, tokens) do.

    Raises:
        ConfigError: in place of the IndexError of such a table.
    """
    try:
        yield
    except IndexError as error:
        positions = longest_input(model, None)
        raise ConfigError(
            f"{type(model).__name__} cannot read {ids.shape[1]} tokens with numbers up to {int(ids.max())}: it has {positions} positions, of which "
            "soft prompts take some, and tokens as many as its own tokenizer; give a smaller block_size, max_length or max_new_tokens, or the "
            "tokenizer of the model"
        ) from error


def device_of(model: nn.Module) -> torch.device:
    """Return the device that the inputs of ``model`` go to."""
    return next(model.parameters()).device


@functools.lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Any:
    """Return the tokenizer of a folder or hub id; it is shared, so nobody may change it.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer could be loaded from {path!r}: {error}") from error


def longest_input(model: nn.Module, tokenizer: Any) -> int:
    """Return how many tokens ``model`` takes: what its configuration says, else the tokenizer, else 2048."""
    config: Any = getattr(model, "config", None)
    for part in (getattr(config, "text_config", None), config):
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            if isinstance(found := getattr(part, name, None), int):
                return found
    said = getattr(tokenizer, "model_max_length", None)
    return said if isinstance(said, int) and said < 10**9 else LONGEST

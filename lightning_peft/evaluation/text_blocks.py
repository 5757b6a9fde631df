"""Text in blocks of tokens, for losses and divergences."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.live_models import load_tokenizer
from lightning_peft.field_checks import is_whole
from lightning_peft.source_rows.reading import first_rows
from lightning_peft.source_rows.templates import filled

SEPARATORS = ("none", "bos", "eos")
"""What may stand between documents."""


def check_blocks(
    name: str, block_size: int, batch_size: int, max_tokens: int | None, max_examples: int | None, separator: str
) -> None:
    """Refuse settings of :func:`token_blocks` that are out of their range; ``name`` is whose they are, for messages."""
    for label, value, least in (("block_size", block_size, 2), ("batch_size", batch_size, 1)):
        if not is_whole(value, least):
            raise ConfigError(f"{name} {label} is too small: {value!r}")
    for label, limit in (("max_tokens", max_tokens), ("max_examples", max_examples)):
        if limit is not None and not is_whole(limit, 1):
            raise ConfigError(f"{name} {label} must be at least 1, or left out, got {limit!r}")
    if separator not in SEPARATORS:
        raise ConfigError(f"{name} separator must be one of {', '.join(SEPARATORS)}, got {separator!r}")


def token_blocks(
    path: str,
    tokenizer: str,
    block_size: int,
    *,
    template: str = "{text}",
    separator: str = "none",
    max_tokens: int | None = None,
    max_examples: int | None = None,
) -> Tensor:
    """Return the documents of a file one after the other, as blocks (blocks, block_size) of token ids.

    Args:
        path: a ``.txt``, which is one document, or a ``.jsonl``, ``.csv`` or ``.parquet``, each row of which is one.
        tokenizer: folder or hub id of the tokenizer.
        block_size: tokens in a block; what is left at the end is dropped.
        template: how a row becomes text.
        separator: token before (``bos``) or after (``eos``) each document.
        max_tokens: use only so many tokens; all if None.
        max_examples: read only so many rows; all if None.

    Raises:
        ConfigError: the file cannot be read, is shorter than a block, or the tokenizer has no such separator.
    """
    stamp = Path(path).stat() if Path(path).is_file() else None
    key = (stamp.st_mtime_ns, stamp.st_size) if stamp else None
    return _blocks(path, key, tokenizer, block_size, template, separator, max_tokens, max_examples)


@functools.lru_cache(maxsize=8)
def _blocks(
    path: str,
    stamp: object,
    tokenizer: str,
    block_size: int,
    template: str,
    separator: str,
    max_tokens: int | None,
    max_examples: int | None,
) -> Tensor:
    """Read and tokenise, once for each state of a file: a run measures on the same text many times."""
    words = load_tokenizer(tokenizer)
    between = {"none": None, "bos": words.bos_token_id, "eos": words.eos_token_id}[separator]
    if between is None and separator != "none":
        raise ConfigError(f"the tokenizer {tokenizer!r} has no {separator} token; give another separator")
    ids: list[int] = []
    for row in first_rows(path, max_examples):
        found = words(filled(template, row), add_special_tokens=False, verbose=False)["input_ids"]
        ids += {"none": found, "bos": [between, *found], "eos": [*found, between]}[separator]
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    ids = ids[:max_tokens]
    if len(ids) < block_size:
        raise ConfigError(f"{path!r} has {len(ids)} tokens, fewer than one block of {block_size}")
    return torch.tensor(ids[: len(ids) // block_size * block_size]).view(-1, block_size)

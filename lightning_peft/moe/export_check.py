"""Whether an exported folder computes what the live model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-6}
"""Largest difference of logits, relative to the largest logit. Half precision has another measure, see :func:`difference`."""
HALF_TOLERANCE = 5e-2


def probe(config: Any, tokens: int) -> Tensor:
    """Return random token ids (2, tokens), the same at every call."""
    length = min(tokens, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits (batch, sequence, vocabulary) of ``model`` in eval mode; its modes are left as they were."""
    with in_eval(model):
        found: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return found


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return how far ``found`` (batch, sequence, vocabulary) is from ``wanted``, as a share of the largest logit.

    In half precision a rounded router may send a token to other experts, rightly, so there it is the median over tokens.
    """
    found, wanted = found.double(), wanted.double().to(found.device)
    size = wanted.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    largest = (found - wanted).abs().amax(-1) / size  # (batch, sequence)
    largest = torch.where(largest.isnan(), torch.inf, largest)
    return float(largest.max())


def median_difference(found: Tensor, wanted: Tensor) -> float:
    """Return the median over tokens of what :func:`difference` is the largest of."""
    found, wanted = found.double(), wanted.double().to(found.device)
    size = wanted.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float(((found - wanted).abs().amax(-1) / size).nan_to_num(torch.inf).median())

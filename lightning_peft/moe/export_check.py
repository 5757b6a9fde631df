"""Whether an exported folder computes what the live model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ExportError

EXACT_TOLERANCE = 2e-6
"""Largest difference of any logit, as a share of the largest logit, in float32 and float64."""
HALF_TOLERANCE = 5e-2
"""The same in half precision, for the median over tokens: a rounded router may well send one to other experts."""


def probe(config: Any, tokens: int) -> Tensor:
    """Return random token ids (2, tokens), the same at every call."""
    length = min(tokens, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Have ``model`` in eval mode for the time of a ``with`` block, and every module in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits (batch, sequence, vocabulary) of ``model`` in eval mode, on the CPU."""
    with _in_eval(model):
        found: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return found.cpu()


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return how far logits ``found`` (batch, sequence, vocabulary) are from ``wanted``, as a share of the largest of these.

    It is the largest over tokens, in half precision the median over tokens.
    """
    exact = wanted.dtype in (torch.float32, torch.float64)
    found, wanted = found.double(), wanted.double()
    size = wanted.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    shares = ((found - wanted).abs().amax(-1) / size).nan_to_num(torch.inf)  # (batch, sequence)
    return float(shares.max() if exact else shares.median())


def check(found: Tensor, wanted: Tensor, what: str, tolerance: float | None = None) -> float:
    """Return the difference of logits ``found`` from ``wanted``.

    Raises:
        ExportError: it is more than ``tolerance``, by default what the precision explains.
    """
    exact = wanted.dtype in (torch.float32, torch.float64)
    allowed = tolerance or (EXACT_TOLERANCE if exact else HALF_TOLERANCE)
    share = difference(found, wanted)
    if not share <= allowed:
        raise ExportError(
            f"{what} was read again and gives logits that differ by {share:.1e} of the largest, more than the {allowed:.0e} allowed in "
            f"{wanted.dtype}; nothing was kept. Export in float64, where rounding is no excuse, or set tolerance= if that is what it is"
        )
    return share

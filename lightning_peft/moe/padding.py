"""Which tokens are padding, told by attention to the feed-forward network that follows it in a block.

A feed-forward network is not given the attention mask. Attention in the same block is, so a :class:`MaskReader` around it notes
what it sees, and the mixture behind takes the note::

    block     x ── norm ── READER(attention(x, mask)) ──(+)── norm ── MIXTURE ──(+)──
                              └────────────── note ───────────────────┘

A note lives from attention to the mixture of the same block. Under gradient checkpointing both run again in backward, with the
same arguments, so the note is the same; nothing stays between two forwards.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.parameter_copies import ParameterCopies
from lightning_peft.interfaces import Adapter
from lightning_peft.row_batches import current_rows

_MASK_NAMES = ("attention_mask", "mask", "key_padding_mask")
"""How attention calls its mask; true means "attend", but for the last, where it means padding."""


@dataclass(frozen=True)
class TokenGrid:
    """How the tokens of a forward lie."""

    shape: tuple[int, int]
    """(batch, sequence)."""
    mask: Tensor | None
    """Which tokens are real (batch * sequence,), bool; None for all."""


class _Notes(threading.local):
    """Notes by the rows of the batch that attention ran on: None for all of them."""

    def __init__(self) -> None:
        self.grids: dict[tuple[int, ...] | None, TokenGrid] = {}

    def put(self, grid: TokenGrid | None) -> None:
        rows = current_rows()
        if rows is None:
            self.grids.clear()
        self.grids.pop(rows, None)
        if grid is not None:
            self.grids[rows] = grid


_notes = _Notes()


def take_note(tokens: int) -> TokenGrid | None:
    """Return what attention noted, if it is about that many ``tokens``, and forget it."""
    grid = _notes.grids.pop(current_rows(), None)
    return grid if grid is not None and grid.shape[0] * grid.shape[1] == tokens else None


def mask_argument(module: nn.Module) -> tuple[str, int] | None:
    """Return name and place of the argument in which ``module`` takes its attention mask, or None."""
    names = list(inspect.signature(module.forward).parameters)
    return next(((name, names.index(name)) for name in _MASK_NAMES if name in names), None)


def real_tokens(mask: Tensor | None, shape: tuple[int, int], *, inverted: bool = False) -> Tensor | None:
    """Return which tokens are real (batch * sequence,), bool, or None where the mask does not tell.

    A token is real where it may attend to itself. With a cache the keys are more than the tokens at hand; then nothing is said.

    Args:
        mask: (batch, sequence), or (batch or 1, heads or 1, sequence or 1, keys); bool and integers say where to attend, floats of
            four dimensions are added to the scores, so that zero says so, unless some are positive.
        shape: (batch, sequence) of the tokens.
        inverted: whether true says where not to attend.

    Example:
        >>> real_tokens(torch.tensor([[1, 1, 0]]), (1, 3))
        tensor([ True,  True, False])
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] != shape[1]:
        return None
    real = mask != 0
    if mask.dim() == 4 and mask.is_floating_point():
        real = torch.where((mask > 0).any(), mask > 0, mask == 0)  # DeBERTa's has ones, all others are added to scores
    if mask.dim() == 4:
        real = real[:, 0]
        if real.shape[1] not in (1, shape[1]):
            return None
        real = real[:, 0] if real.shape[1] == 1 else real.diagonal(dim1=-2, dim2=-1)  # (batch or 1, sequence)
    if real.shape[0] not in (1, shape[0]):
        return None
    real = ~real if inverted else real
    return real.expand(shape).reshape(-1)


def note_mask(argument: tuple[str, int], *args: Any, **kwargs: Any) -> None:
    """Note the grid of tokens that attention was called with."""
    name, place = argument
    x = args[0] if args else kwargs.get("hidden_states")
    mask = args[place] if len(args) > place else kwargs.get(name)
    if not isinstance(x, Tensor) or x.dim() != 3:
        _notes.put(None)
        return
    shape = (x.shape[0], x.shape[1])
    _notes.put(TokenGrid(shape, real_tokens(mask, shape, inverted=name == "key_padding_mask")))


class MaskReader(Adapter):
    """Notes the attention mask for the mixture of the same block, and changes nothing.

    Args:
        module: attention.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        argument = mask_argument(module)
        assert argument is not None
        self.argument = argument

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of attention."""
        note_mask(self.argument, *args, **kwargs)
        return base(*args, **kwargs)

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        """There is nothing to reset."""


class MaskReadingCopies(ParameterCopies):
    """Trained copies of attention's own parameters, where the mask is read too."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(module, names)
        argument = mask_argument(module)
        assert argument is not None
        self.argument = argument

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of attention."""
        note_mask(self.argument, *args, **kwargs)
        return super().forward(base, *args, **kwargs)


class Bypass(Adapter):
    """Hands its input on instead of running the module: for the parts of an MLP that a mixture behind them replaces."""

    @override
    def forward(self, base: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``x`` as it is."""
        return x

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        """There is nothing to reset."""

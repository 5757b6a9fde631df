"""Which tokens are padding, told by attention to the feed-forward network that follows it in a block.

A feed-forward network is not given the attention mask. Attention in the same block is, so a :class:`MaskReader` around it notes
what it sees, and the mixture behind takes the note::

    block     x ── norm ── READER(attention(x, mask)) ──(+)── norm ── MIXTURE ──(+)──
                              └────────────── note ───────────────────┘

A note lives from attention to the mixture of the same block. Under gradient checkpointing both run again in backward, with the
same arguments, so the note is the same. Mixtures at single linear layers are several in a block: they read the note without taking
it, and only behind or in the attention that wrote it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.parameter_copies import ParameterCopies
from lightning_peft.interfaces import Adapter
from lightning_peft.row_batches import current_rows

_MASK_NAMES = ("attention_mask", "mask", "key_padding_mask")
"""How attention calls its mask; true means "attend", but for the last, where it means padding."""
_CACHE_NAMES = ("past_key_values", "layer_past")
"""How attention calls its cache of keys and values."""


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
        self.grids: dict[tuple[int, ...] | None, TokenGrid] = {}  # to be taken
        self.kept: dict[tuple[int, ...] | None, TokenGrid] = {}  # to be read

    def put(self, grid: TokenGrid | None) -> None:
        rows = current_rows()
        for notes in (self.grids, self.kept):
            if rows is None:
                notes.clear()
            notes.pop(rows, None)
            if grid is not None:
                notes[rows] = grid


_notes = _Notes()


def take_note(tokens: int) -> TokenGrid | None:
    """Return what attention noted, if it is about that many ``tokens``, and forget it."""
    grid = _notes.grids.pop(current_rows(), None)
    return grid if grid is not None and grid.shape[0] * grid.shape[1] == tokens else None


def read_note(tokens: int) -> TokenGrid | None:
    """Return what attention noted, if it is about that many ``tokens``, and leave it to others of the same block."""
    grid = _notes.kept.get(current_rows())
    return grid if grid is not None and grid.shape[0] * grid.shape[1] == tokens else None


def mask_argument(module: nn.Module) -> tuple[str, int] | None:
    """Return name and place of the argument in which ``module`` takes its attention mask, or None."""
    return _argument(module, _MASK_NAMES)


def _argument(module: nn.Module, known: tuple[str, ...]) -> tuple[str, int] | None:
    names = list(inspect.signature(module.forward).parameters)
    return next(((name, names.index(name)) for name in known if name in names), None)


def real_tokens(
    mask: Tensor | None, shape: tuple[int, int], *, inverted: bool = False, start: int | Tensor | None = None
) -> Tensor | None:
    """Return which tokens are real (batch * sequence,), bool, or None where the mask does not tell.

    A token is real where it may attend to itself.

    Args:
        mask: (batch, keys), or (batch or 1, heads or 1, sequence or 1, keys); bool and integers say where to attend, floats of
            four dimensions are added to the scores, so that zero says so, unless some are positive.
        shape: (batch, sequence) of the tokens.
        inverted: whether true says where not to attend.
        start: which key is that of the first token, where a cache makes the keys more than the tokens; None where nobody knows.

    Example:
        >>> real_tokens(torch.tensor([[1, 1, 0]]), (1, 3))
        tensor([ True,  True, False])
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    keys, sequence = mask.shape[-1], shape[1]
    if keys == sequence:
        start = 0
    if start is None or keys < sequence or (isinstance(start, int) and start + sequence > keys):
        return None
    real = mask != 0
    if mask.dim() == 4 and mask.is_floating_point():
        real = torch.where((mask > 0).any(), mask > 0, mask == 0)  # DeBERTa's has ones, all others are added to scores
    own = torch.arange(sequence, device=mask.device) + start  # the key of each token
    if mask.dim() == 4:
        real = real[:, 0]
        if real.shape[1] not in (1, sequence):
            return None
        rows = own * 0 if real.shape[1] == 1 else own - start
        real = real[:, rows, own]  # (batch or 1, sequence)
    else:
        real = real[:, own]
    if real.shape[0] not in (1, shape[0]):
        return None
    real = ~real if inverted else real
    return real.expand(shape).reshape(-1)


@dataclass(frozen=True)
class MaskArguments:
    """How a kind of attention is told what is padding."""

    mask: tuple[str, int]
    """Name and place of the mask."""
    cache: tuple[str, int] | None
    """Name and place of the cache of keys and values."""
    layer: int | None
    """Which layer of the cache is that of the attention."""

    @classmethod
    def of(cls, module: nn.Module) -> MaskArguments:
        """Return those of ``module``, which takes a mask."""
        mask = mask_argument(module)
        assert mask is not None
        layer = getattr(module, "layer_idx", None)
        return cls(mask, _argument(module, _CACHE_NAMES), layer if isinstance(layer, int) else None)

    def note(self, *args: Any, **kwargs: Any) -> None:
        """Note the grid of tokens that attention was called with."""
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.dim() != 3:
            _notes.put(None)
            return
        mask, cache = (_given(argument, args, kwargs) for argument in (self.mask, self.cache))
        shape, inverted = (x.shape[0], x.shape[1]), self.mask[0] == "key_padding_mask"
        real = real_tokens(mask, shape, inverted=inverted, start=self._held(cache))
        _notes.put(TokenGrid(shape, real))

    def _held(self, cache: Any) -> int | Tensor | None:
        """Return how many tokens the cache holds before the call; None where its keys are not those of all tokens."""
        if self.layer is None or not callable(getattr(cache, "get_seq_length", None)):
            return None
        windows = getattr(cache, "is_sliding", None)
        if isinstance(windows, list) and any(windows[self.layer : self.layer + 1]):
            return None
        held: int | Tensor = cache.get_seq_length(self.layer)
        return held


def _given(argument: tuple[str, int] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if argument is None:
        return None
    name, place = argument
    return args[place] if len(args) > place else kwargs.get(name)


class MaskReader(Adapter):
    """Notes the attention mask for the mixture of the same block, and changes nothing.

    Args:
        module: attention.
    """

    only_listens: ClassVar[bool] = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.arguments = MaskArguments.of(module)

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of attention."""
        self.arguments.note(*args, **kwargs)
        return base(*args, **kwargs)

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        """There is nothing to reset."""


class MaskReadingCopies(ParameterCopies):
    """Trained copies of attention's own parameters, where the mask is read too."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(module, names)
        self.arguments = MaskArguments.of(module)

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of attention."""
        self.arguments.note(*args, **kwargs)
        return super().forward(base, *args, **kwargs)


class Bypass(Adapter):
    """Hands its input on instead of running the module: for the parts of an MLP that a mixture behind them replaces."""

    hands_on = True

    @override
    def forward(self, base: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``x`` as it is."""
        return x

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        """There is nothing to reset."""

"""Batches by rows: what modules are called with is taken apart by rows of the batch, and what they return put together again.

::

    hidden_states (4, seq, width)      rows 0, 2 ──> module with one adapter ──┐
    attention_mask (4, 1, seq, seq)    rows 1, 3 ──> module with another ──────┴──> (4, seq, width) in the old order

A tensor belongs to the rows if it has as many as the first argument has. One of a single row, such as a mask or positions that all
rows share, stays whole. A first dimension of k times as many rows means k consecutive entries a row: beams, or flattened tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.errors import InjectionError
from lightning_peft.interfaces import Adapter

_LEADING = ("hidden_states", "input_ids", "inputs_embeds", "x", "input")
"""Names under which the first argument may be given."""
_IGNORED = -100
"""The label that a loss leaves out."""


@dataclass(frozen=True)
class AdapterRows:
    """Which adapter of one place acts on which row of the batch, as :meth:`Adapter.grouped_rows` functions are told."""

    adapters: tuple[Adapter, ...]
    """The adapters, each once."""
    index: tuple[int, ...]
    """Row to the place of its adapter in ``adapters``; -1 for a row that gets the base."""
    held: dict[Any, Any] = field(default_factory=dict)
    """Lives as long as rows are chosen: what is made of parameters may be kept here while no gradients are wanted."""

    def numbers(self, values: Sequence[int], device: torch.device) -> Tensor:
        """Return ``values`` as a tensor, which is made once."""
        key = (tuple(values), device, torch.is_inference_mode_enabled())
        if key not in self.held:
            self.held[key] = torch.tensor(list(values), device=device)
        found: Tensor = self.held[key]
        return found


class _Current(threading.local):
    rows: tuple[int, ...] | None = None


_current = _Current()


def current_rows() -> tuple[int, ...] | None:
    """Return which rows of the batch a module is being run on, where a place around it split the batch; else None."""
    return _current.rows


class on_rows:  # noqa: N801 - reads as a verb
    """Say, for the time of a ``with`` block, that modules are run on ``rows`` of the batch only."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows, self.before = rows, _current.rows

    def __enter__(self) -> None:
        self.before, _current.rows = _current.rows, self.rows

    def __exit__(self, *error: object) -> None:
        _current.rows = self.before


def entries_per_row(rows: int, place: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return how many consecutive entries of the first dimension belong to one row; 0 where all rows share what is given.

    Raises:
        InjectionError: the first argument cannot be shared out to so many rows.
    """
    first: Tensor | None = args[0] if args and isinstance(args[0], Tensor) and args[0].dim() > 1 else None
    if first is None:
        first = next(_tensors(args), None)
    if first is None:
        named = [kwargs[name] for name in _LEADING if isinstance(kwargs.get(name), Tensor)]
        first = next(iter(named), None) if named else next(_tensors(kwargs), None)
    if first is None or first.dim() == 0:
        raise InjectionError(
            f"adapters were chosen for {rows} rows, but the module at {place!r} is called without a tensor that has rows"
        )
    if first.shape[0] == 1 and rows > 1:
        return 0
    if first.shape[0] % rows:
        raise InjectionError(
            f"adapters were chosen for {rows} rows, but the module at {place!r} is called with a first dimension of {first.shape[0]}, which is "
            f"not a multiple of it; give adapter_rows as many names as the batch has rows, and run forward and backward under the same ones"
        )
    return first.shape[0] // rows


class RowSplit:
    """The way of one call's arguments to groups of rows, and of the results back.

    Args:
        groups: the rows of each group, ascending, every row in one of them.
        per_row: from :func:`entries_per_row`.
        place: path of the module, for messages.
        ragged: what is returned beside the first tensor may be longer for some rows; the others get zeros in front.
    """

    def __init__(self, groups: Sequence[Sequence[int]], per_row: int, place: str, *, ragged: bool = False) -> None:
        self.groups, self.per_row, self.place, self.ragged = groups, per_row, place, ragged
        self.rows = sum(len(group) for group in groups)
        order = [row for group in groups for row in group]
        self.sorted = order == list(range(self.rows))
        self.inverse = sorted(range(self.rows), key=order.__getitem__)
        self.caches: dict[int, _Caches] = {}

    def take(self, value: Any, group: int, name: str = "") -> Any:
        """Return what of ``value``, an argument, belongs to the rows of a group."""
        if isinstance(value, Tensor):
            entries, total = self._entries(value, name), self.rows * self.per_row
            return value if not entries or not total else _select(value, self.groups[group], entries)
        if isinstance(value, Mapping):
            return {key: self.take(item, group, key) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            items = [self.take(item, group) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if hasattr(value, "get_seq_length") and hasattr(value, "update"):
            caches = self.caches.setdefault(id(value), _Caches(value, self))
            return caches.part(group)
        return value

    def _entries(self, value: Tensor, name: str) -> int:
        """Return how many entries of a tensor belong to one row; 0 where it is no matter of rows."""
        length = self.rows * self.per_row
        if name == "attn_mask":  # of nn.MultiheadAttention: (queries, keys), or (batch * heads, queries, keys)
            return value.shape[0] // self.rows if value.dim() == 3 and value.shape[0] % self.rows == 0 else 0
        # Tensors of one dimension number positions (cache_position) or bounds (cu_seq_lens).
        return self.per_row if value.dim() > 1 and value.shape[0] == length else 0

    def join(self, results: Sequence[Any]) -> Any:
        """Return one result for the whole batch from one of each group."""
        for caches in self.caches.values():
            caches.commit()
        return self._join(results, first=True)

    def join_with_loss(self, results: Sequence[Any], labels: Tensor) -> Any:
        """Return one result for the whole batch from one of each group, each with the mean loss of its part of ``labels``.

        The loss of the batch is the mean over all labels but those of -100, which transformers leaves out of a loss.

        Raises:
            InjectionError: the loss of a group is another one than that mean.
        """
        counts, losses = [], []
        for group, result in enumerate(results):
            part, logits, loss = self.take(labels, group), result.get("logits"), result["loss"]
            counts.append(int((part != _IGNORED).sum()))
            if not counts[-1]:
                continue  # such a mean is not a number
            fits = isinstance(logits, Tensor) and logits.shape[:-1] == part.shape
            with torch.no_grad():
                mean = F.cross_entropy(logits.float().flatten(0, -2), part.flatten()) if fits else None
            if mean is None or not torch.allclose(loss.detach().float(), mean, rtol=2e-2, atol=1e-4):
                raise InjectionError(
                    f"the module at {self.place!r} is run by rows of different adapters and returns a loss that is not the mean over its labels, so that "
                    "the losses are no one loss; leave labels out, give decoder_input_ids, and compute the loss from the logits"
                )
            losses.append(loss * counts[-1])
        others = [{key: value for key, value in result.items() if key != "loss"} for result in results]
        whole = torch.stack(losses).sum() / sum(counts) if losses else results[0]["loss"]
        return type(results[0])(loss=whole, **self._join(others, first=True))

    def _join(self, results: Sequence[Any], *, first: bool) -> Any:
        one = results[0]
        if isinstance(one, Tensor):
            return self._join_tensors(results, pad=not first)
        if isinstance(one, Mapping):
            return type(one)(
                **{
                    key: self._join([result[key] for result in results], first=first and not number)
                    for number, key in enumerate(one)
                }
            )
        if isinstance(one, (tuple, list)):
            items = [
                self._join(items, first=first and not number) for number, items in enumerate(zip(*results, strict=True))
            ]
            return type(one)(*items) if hasattr(one, "_fields") else type(one)(items)
        if hasattr(one, "get_seq_length") and hasattr(one, "update"):
            return None  # each group made a cache of its own, of which there is no whole
        if all(result is one or result == one for result in results[1:]):
            return one
        raise InjectionError(
            f"the module at {self.place!r} returns a {type(one).__name__} that differs between rows of different adapters and has no rows "
            "itself; run these adapters in batches of their own"
        )

    def _join_tensors(self, parts: Sequence[Tensor], *, pad: bool) -> Tensor:
        counts = [len(group) for group in self.groups]
        if any(part.dim() == 0 for part in parts):
            raise InjectionError(
                f"the module at {self.place!r} returns a scalar, which cannot be put together from rows of different adapters; run them in "
                "batches of their own, or compute the scalar outside, such as a loss from the logits"
            )
        each = [
            part.shape[0] // count if part.shape[0] % count == 0 else 0
            for part, count in zip(parts, counts, strict=True)
        ]
        entries = max(each)
        whole = [
            part.expand(count * max(entries, 1), *part.shape[1:]) if part.shape[0] == 1 else part
            for part, count in zip(parts, counts, strict=True)
        ]
        if pad:  # weights of attention, of prefixes of different lengths
            whole = _padded(whole, range(1, whole[0].dim()) if self.ragged else [-1])
        fits = all(part.shape[0] == count * max(entries, 1) for part, count in zip(whole, counts, strict=True))
        if not fits or len({part.shape[1:] for part in whole}) > 1:
            raise InjectionError(
                f"the module at {self.place!r} returns tensors of shapes {sorted({tuple(part.shape) for part in parts})} for rows of different "
                "adapters, which are no one batch; run these adapters in batches of their own"
            )
        together = torch.cat(whole)
        return together if self.sorted else _select(together, self.inverse, max(entries, 1))


class _Caches:
    """Parts of a cache of keys and values, which the calls of the groups fill and which then go into it as one.

    Args:
        cache: the cache of the model.
        split: whose rows it has.
    """

    def __init__(self, cache: Any, split: RowSplit) -> None:
        self.cache, self.split = cache, split
        self.parts: dict[int, _CachePart] = {}

    def part(self, group: int) -> _CachePart:
        """Return what stands for the cache in the call of one group."""
        return self.parts.setdefault(group, _CachePart(self, group))

    def past(self, layer: int, group: int, new: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values that the cache holds of the rows of a group."""
        cache = getattr(self.cache, "self_attention_cache", self.cache)
        layers = getattr(cache, "layers", None)
        if layers is None or (layer < len(layers) and type(layers[layer]).__name__ != "DynamicLayer"):
            kind = type(cache).__name__ if layers is None else type(layers[layer]).__name__
            raise InjectionError(
                f"attention at {self.split.place!r} has adapters of its own for some rows, and a cache of the kind {kind}, which cannot be "
                "split by rows; use transformers' DynamicCache without sliding windows, or no cache"
            )
        if layer >= len(layers) or not layers[layer].get_seq_length():
            return None
        held = layers[layer]
        entries = held.keys.shape[0] // self.split.rows
        rows = self.split.groups[group]
        return _select(held.keys, rows, entries), _select(held.values, rows, entries)

    def commit(self) -> None:
        """Put what the groups have made into the cache."""
        parts = [self.parts[group] for group in sorted(self.parts)]
        given = [part.given for part in parts]
        if not any(given):
            return
        if not all(given):
            raise InjectionError(
                f"only some rows of {self.split.place!r} filled the cache; run these adapters in batches of their own"
            )
        keys, values = (self.split._join_tensors([pair[side] for pair in given if pair], pad=False) for side in (0, 1))
        cache = getattr(self.cache, "self_attention_cache", self.cache)
        cache.update(keys, values, *parts[0].options[0], **parts[0].options[1])


class _NoPartError(InjectionError, AttributeError):
    """What a part of a cache does not have; an attribute error too, so that code may ask."""


class _CachePart:
    """Stands for a cache in the call of one group of rows."""

    def __init__(self, caches: _Caches, group: int) -> None:
        self._caches, self._group = caches, group
        self.given: tuple[Tensor, Tensor] | None = None
        self.options: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values (rows, heads, length, head_dim) and return all of these rows."""
        self.given, self.options = (key, value), ((layer_idx, *args), kwargs)
        past = self._caches.past(layer_idx, self._group, key)
        if past is None:
            return key, value
        return torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise _NoPartError(
            f"the module at {self._caches.split.place!r} is run by rows of different adapters and asks its cache for {name!r}, which parts of "
            "a cache do not have; adapters around it, such as prompts, cannot generate by rows: run them in batches of their own"
        )


def _padded(parts: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """Return tensors of the largest of their sizes in ``dims``, with zeros in front."""
    widths = [0] * parts[0].dim()
    for dim in dims:
        widths[dim] = max(part.shape[dim] for part in parts if part.dim() == len(widths))
    missing = [[max(width - size, 0) for width, size in zip(widths, part.shape, strict=False)] for part in parts]
    return [
        F.pad(part, [number for lack in reversed(lacks) for number in (lack, 0)]) if any(lacks) else part
        for part, lacks in zip(parts, missing, strict=True)
    ]


def _select(tensor: Tensor, rows: Sequence[int], entries: int) -> Tensor:
    """Return the entries of ``rows`` of a tensor of which each row has so many."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] * entries : (rows[-1] + 1) * entries]
    grouped = tensor.reshape(-1, entries, *tensor.shape[1:]) if entries != 1 else tensor
    return grouped.index_select(0, torch.tensor(rows, device=tensor.device)).reshape(-1, *tensor.shape[1:])


def _tensors(value: Any) -> Any:
    """Yield tensors in arguments, those of one dimension after the others."""
    items: Sequence[Any] = list(value.values()) if isinstance(value, Mapping) else value
    found = [item for item in items if isinstance(item, Tensor)]
    yield from sorted(found, key=lambda tensor: tensor.dim() < 2)


def call_by_rows(
    groups: Sequence[tuple[Sequence[int], Callable[..., Any]]],
    per_row: int,
    place: str,
    narrowed: Callable[[Sequence[int]], Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    ragged: bool = False,
) -> Any:
    """Run each group's function on its rows of the arguments, and return the results as one batch.

    Args:
        groups: rows and what runs on them.
        per_row: from :func:`entries_per_row`.
        place: path of the module, for messages.
        narrowed: makes a context manager in which modules inside know of these rows alone.
        args: positional arguments of the module.
        kwargs: named arguments of the module.
        ragged: as in :class:`RowSplit`.
    """
    split = RowSplit([rows for rows, _ in groups], per_row, place, ragged=ragged)
    results: list[Any] = []
    for number, (rows, call) in enumerate(groups):
        taken = [split.take(value, number) for value in args]
        named = {key: split.take(value, number, key) for key, value in kwargs.items()}
        with narrowed(rows):
            results.append(call(*taken, **named))
    labels = kwargs.get("labels")
    if ragged and isinstance(labels, Tensor) and all(_has_loss(result) for result in results):
        return split.join_with_loss(results, labels)
    return split.join(results)


def _has_loss(result: Any) -> bool:
    return isinstance(result, Mapping) and isinstance(result.get("loss"), Tensor) and result["loss"].dim() == 0

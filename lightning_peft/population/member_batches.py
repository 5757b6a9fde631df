"""One batch for all members, and the loss of each on its own rows.

::

    input_ids (rows, seq)  ──>  (members * rows, seq)      member a: rows 0 .. n-1    member b: rows n .. 2n-1    ...

A model of transformers computes its loss by its ``loss_function``; for the time of a forward that is one which calls it once for each
member, on its rows alone: what is counted, masked and averaged is what a run of that member alone would see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapter_training import ADAPTER_COLUMN
from lightning_peft.batch_parts import field_of, predicts_the_next_token, rows_of
from lightning_peft.errors import ConfigError

_OWN = "_loss_function"
"""Attribute of a transformers model that holds a loss other than that of its class."""


def repeated(batch: Any, times: int) -> Any:
    """Return ``batch`` with its rows ``times`` times, one after the other as a whole.

    Raises:
        ConfigError: it is no mapping, tuple or tensor, or names adapters for its rows itself.
    """
    if isinstance(batch, Mapping):
        if ADAPTER_COLUMN in batch:
            raise ConfigError(
                f"the batch names an adapter for each row in its column {ADAPTER_COLUMN!r}, but in a population every member gets every row; "
                "leave the column out"
            )
        rows = rows_of(batch)
        return {key: _tiled(value, rows, times) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return _tiled(batch, rows_of(batch), times)
    if isinstance(batch, (tuple, list)) and any(isinstance(item, Tensor) for item in batch):
        rows = rows_of(batch)
        return tuple([_tiled(item, rows, times) for item in batch])
    raise ConfigError(
        f"a population repeats the rows of each batch, a dict, a tuple or a tensor, for its members; got {type(batch).__name__}"
    )


def _tiled(value: Any, rows: int, times: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != rows or times == 1:
        return value
    return value.repeat(times, *[1] * (value.dim() - 1))


def parts_of(value: Any, members: int, rows: int) -> list[Any]:
    """Return what of ``value``, with ``members * rows`` rows, belongs to each member; what has no rows goes to each."""
    if isinstance(value, Tensor):
        fits = value.dim() > 0 and len(value) == members * rows
        return list(torch.split(value, rows)) if fits else [value] * members
    if isinstance(value, Mapping):
        columns = {key: parts_of(item, members, rows) for key, item in value.items()}
        kind: Callable[..., Any] = dict if type(value) is dict else type(value)
        return [kind(**{key: column[number] for key, column in columns.items()}) for number in range(members)]
    if isinstance(value, (tuple, list)):
        lists = [parts_of(item, members, rows) for item in value]
        made = [[items[number] for items in lists] for number in range(members)]
        return [type(value)(*one) if hasattr(value, "_fields") else type(value)(one) for one in made]
    return [value] * members


def losses_of(loss: Callable[[Any, Any], Tensor], outputs: Any, target: Any, members: int, rows: int) -> list[Tensor]:
    """Return the loss of each member, by a function of the outputs for its rows and of the target of the batch.

    Raises:
        ConfigError: the outputs have no rows, or the loss of a member is no scalar.
    """
    if isinstance(outputs, Tensor) and (outputs.dim() == 0 or len(outputs) != members * rows):
        raise ConfigError(
            f"the model returns {tuple(outputs.shape)} for {members} members of {rows} rows each; a population needs outputs whose first dimension "
            "is that of the batch"
        )
    found = [loss(part, target) for part in parts_of(outputs, members, rows)]
    for one in found:
        if not isinstance(one, Tensor) or one.dim():
            raise ConfigError(f"the loss of a member must be a scalar tensor, got {getattr(one, 'shape', one)!r}")
    return found


class OwnLosses:
    """Stands for the ``loss_function`` of a model for the time of a forward.

    Args:
        model: the model.
        members: how many.
        rows: of each.
    """

    def __init__(self, model: nn.Module, members: int, rows: int) -> None:
        self.model, self.members, self.rows = model, members, rows
        self.call: Callable[..., Tensor] | None = getattr(model, "loss_function", None)
        self.found: list[Tensor] = []
        self.total: Tensor | None = None
        self.version: int | None = None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[OwnLosses]:
        """Let the model call this for the time of a ``with`` block."""
        if self.call is None:
            yield self
            return
        held = self.model.__dict__.get(_OWN)
        self.model.loss_function = self  # type: ignore[assignment]
        try:
            yield self
        finally:
            if held is not None:
                self.model.loss_function = held
            else:
                self.model.__dict__.pop(_OWN, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the sum of the losses of all members."""
        assert self.call is not None
        positional = [parts_of(value, self.members, self.rows) for value in args]
        named = {key: parts_of(value, self.members, self.rows) for key, value in kwargs.items()}
        self.found = [
            self.call(*[one[number] for one in positional], **{key: one[number] for key, one in named.items()})
            for number in range(self.members)
        ]
        self.total = torch.stack(self.found).sum()
        self.version = None if self.total.is_inference() else self.total._version
        return self.total

    def _untouched(self, loss: Tensor) -> bool:
        """Tell whether the model returned the sum as it was, and added nothing to it, in place or not."""
        if loss is not self.total:
            return False
        if self.version is not None:
            return loss._version == self.version
        return torch.allclose(torch.stack(self.found).sum(), loss, rtol=0.0, atol=0.0, equal_nan=True)

    def losses(self, outputs: Any, batch: Any) -> list[Tensor]:
        """Return the loss of each member, after the forward on ``batch``, whose labels are those of one member.

        Raises:
            ConfigError: the model computes its loss in another way, of which the parts of the members are not known.
        """
        loss = field_of(outputs, "loss")
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"{type(self.model).__name__} returned {type(outputs).__name__} without a loss; put 'labels' into the batch, or give "
                "PopulationModule(loss=...)"
            )
        if self._untouched(loss):
            return self.found
        found = None if self.found else self._usual(outputs, batch)
        near = 1e-4 if loss.dtype == torch.float32 else 1e-2
        if found is None or not torch.allclose(
            torch.stack(found).mean().detach().float(), loss.detach().float(), rtol=near, atol=near, equal_nan=True
        ):
            raise ConfigError(
                f"{type(self.model).__name__} computes a loss of all rows ({float(loss.detach()):.6g}) whose parts for each member are not known; give "
                "PopulationModule(loss=...), called as loss(outputs, labels) for each member"
            )
        return found

    def _usual(self, outputs: Any, batch: Any) -> list[Tensor] | None:
        """Return the mean cross-entropy of each member, as models compute it that do not call ``loss_function``; None where it cannot be."""
        labels, logits = batch.get("labels") if isinstance(batch, Mapping) else batch, field_of(outputs, "logits")
        if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or labels.is_floating_point():
            return None
        if logits.dim() != labels.dim() + 1 or len(logits) != self.members * self.rows:
            return None
        shift = labels.dim() == 2 and predicts_the_next_token(self.model)
        found = []
        for part in torch.split(logits, self.rows):
            wanted = labels[:, 1:] if shift else labels
            part = part[:, :-1] if shift else part
            found.append(F.cross_entropy(part.float().flatten(0, -2), wanted.flatten()))
        return found


def names_of_rows(names: Sequence[str], rows: int) -> list[str]:
    """Return the member of each row of a repeated batch."""
    return [name for name in names for _ in range(rows)]

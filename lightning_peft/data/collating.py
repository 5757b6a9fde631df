"""Batches from examples: padding on the right, labels, and who may attend to whom in packed rows.

Two examples packed into a row, with ``document_mask="dense"`` (``positions`` has the model find the same by itself)::

    input_ids      a a a b b        may attend   a │ x
    position_ids   0 1 2 0 1                     a │ x x
                                                 a │ x x x
                                                 b │       x
                                                 b │       x x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.adapter_training import ADAPTER_COLUMN
from lightning_peft.batch_parts import IGNORED
from lightning_peft.data.examples import Example

DocumentMask = Literal["positions", "dense"]


@dataclass(frozen=True)
class WithAdapters:
    """Keep the column of adapter names beside what another collator makes."""

    collate: Callable[[list[Example]], dict[str, Any]]

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return the batch, with the name of the adapter of each row."""
        names = [example[ADAPTER_COLUMN] for example in examples]
        rest: list[Example] = [
            {key: value for key, value in example.items() if key != ADAPTER_COLUMN} for example in examples
        ]
        return {**self.collate(rest), ADAPTER_COLUMN: names}


def padded(values: Sequence[Tensor], filler: int) -> Tensor:
    """Return sequences (n,) of several lengths as one tensor (batch, longest), filled up on the right."""
    return pad_sequence(list(values), batch_first=True, padding_value=filler)


@dataclass(frozen=True)
class SequenceCollator:
    """Batches of token ids with their attention mask, and of labels of any kind.

    Args:
        pad: id of the padding token.
        padding: what other fields that are sequences are filled up with; their names are the columns.
        unused: fields that are no columns.
    """

    pad: int
    padding: tuple[tuple[str, int], ...] = (("labels", IGNORED),)
    unused: tuple[str, ...] = ()

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return ``input_ids`` and ``attention_mask`` (batch, longest), and the other columns."""
        ids = [example["input_ids"] for example in examples]
        batch: dict[str, Any] = {
            "input_ids": padded(ids, self.pad),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        }
        fillers = dict(self.padding)
        for name in examples[0]:
            if name in self.unused:
                continue
            values = [example[name] for example in examples]
            if name in fillers and isinstance(values[0], Tensor):
                batch[name] = padded(values, fillers[name])
            elif name != "input_ids":
                batch[name] = torch.tensor(values)
        return batch


@dataclass(frozen=True)
class FullRowCollator:
    """Batches of rows of one length, every token of which is predicted."""

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return ``input_ids`` and ``labels`` (batch, length)."""
        ids = torch.stack([example["input_ids"] for example in examples])  # (batch, length)
        return {"input_ids": ids, "labels": ids.clone()}


@dataclass(frozen=True)
class PackedCollator:
    """Batches of packed rows, in which no example attends to another.

    Args:
        pad: id of the padding token.
        document_mask: ``positions`` gives the positions alone, which begin anew with each example; the models of transformers
            that mask by them do so under every attention. ``dense`` gives the mask too, for ``eager`` and ``sdpa``.
    """

    pad: int
    document_mask: DocumentMask = "positions"

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return ``input_ids``, ``labels`` and ``position_ids`` (batch, longest), and the mask (batch, 1, longest, longest)."""
        positions = [example["position_ids"] for example in examples]
        longest = max(map(len, positions))
        # What fills a row is an example of its own, of which nothing is predicted.
        positions = [torch.cat([row, torch.arange(longest - len(row))]) for row in positions]
        batch: dict[str, Any] = {
            "input_ids": padded([example["input_ids"] for example in examples], self.pad),
            "labels": padded([example["labels"] for example in examples], IGNORED),
            "position_ids": torch.stack(positions),
            # With a cache, models of transformers take positions that begin anew for those of one long row.
            "use_cache": False,
        }
        if self.document_mask == "dense":
            batch["attention_mask"] = block_diagonal_mask(batch["position_ids"])
        return batch


def block_diagonal_mask(position_ids: Tensor) -> Tensor:
    """Return what is added to attention scores so that each token sees itself and those before it in its example.

    Args:
        position_ids: positions (batch, seq), which are 0 where an example begins.

    Returns:
        0 where a query may attend to a key, and the least float elsewhere, (batch, 1, queries, keys).

    Example:
        >>> (block_diagonal_mask(torch.tensor([[0, 1, 0]]))[0, 0] == 0).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    number = (position_ids == 0).cumsum(-1)  # (batch, seq)
    same = number[:, :, None] == number[:, None, :]  # (batch, queries, keys)
    mask = torch.zeros(same.shape, dtype=torch.get_default_dtype())
    return mask.masked_fill_(~same.tril(), torch.finfo(mask.dtype).min)[:, None]

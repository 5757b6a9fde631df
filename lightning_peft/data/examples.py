"""Examples in memory: token ids of all of them in one array, so that processes that load batches share them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

Example: TypeAlias = Mapping[str, Any]
"""What a data module makes of a row: lists of integers, which become tensors, and any other values."""


class Examples(Dataset[dict[str, Any]]):
    """Examples of the same fields.

    A field that is a list of integers in the first example is one in all, and comes back as a tensor (n,) of int64.

    Example:
        >>> examples = Examples([{"input_ids": [5, 6], "label": "a"}, {"input_ids": [7], "label": "b"}])
        >>> examples[1], examples.lengths.tolist()
        ({'input_ids': tensor([7]), 'label': 'b'}, [2, 1])
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        self.size = 0
        flat: dict[str, array[int]] = {}
        ends: dict[str, array[int]] = {}
        self.others: dict[str, list[Any]] = {}
        for example in examples:
            for name, value in example.items():
                if self.size == 0:
                    if isinstance(value, list) and value and isinstance(value[0], int):
                        flat[name], ends[name] = array("i"), array("q", [0])
                    else:
                        self.others[name] = []
                if name in flat:
                    flat[name].extend(value)
                    ends[name].append(len(flat[name]))
                else:
                    self.others[name].append(value)
            self.size += 1
        self.flat = {name: torch.frombuffer(ids, dtype=torch.int32).clone() for name, ids in flat.items() if ids}
        self.ends = {name: torch.frombuffer(end, dtype=torch.int64).clone() for name, end in ends.items()}

    def __len__(self) -> int:
        return self.size

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"there are {self.size} examples, and no number {index}")
        example: dict[str, Any] = {}
        for name, ids in self.flat.items():
            start, end = self.ends[name][index : index + 2].tolist()
            example[name] = ids[start:end].long()
        for name, values in self.others.items():
            example[name] = values[index]
        return example

    @property
    def fields(self) -> set[str]:
        """The names of the fields."""
        return {*self.ends, *self.others}

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each example, (examples,)."""
        if "input_ids" in self.ends:
            return self.ends["input_ids"].diff()
        return torch.tensor([_length(value) for value in self.others.get("input_ids", [1] * self.size)])


def _length(value: Any) -> int:
    return max(map(len, value)) if isinstance(value, list) and value and isinstance(value[0], list) else 1


class NamedExamples(Dataset[dict[str, Any]]):
    """Examples of several sets, one after the other, each with a field that says which set it is of."""

    def __init__(self, field: str, parts: Sequence[tuple[str | None, Examples]]) -> None:
        self.field, self.parts = field, parts
        self.places = [(number, index) for number, (_, part) in enumerate(parts) for index in range(len(part))]

    def __len__(self) -> int:
        return len(self.places)

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        number, inside = self.places[index]
        name, part = self.parts[number]
        return {**part[inside], self.field: name}

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each example, (examples,)."""
        return torch.cat([part.lengths for _, part in self.parts])

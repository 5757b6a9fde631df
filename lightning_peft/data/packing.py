"""Examples of several lengths in rows of one length: no token is lost, none is repeated, and no example is cut.

Best-fit decreasing: the longest example first, each into the fullest row that it fits in.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence

from lightning_peft.batch_parts import IGNORED
from lightning_peft.data.examples import Example
from lightning_peft.errors import ConfigError

WINDOW = 1024
"""Examples that are packed together."""


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return which examples go into which row.

    Args:
        lengths: tokens of each example.
        capacity: tokens that a row holds.

    Returns:
        For each row the numbers of its examples in their order; rows are ordered by their first example.

    Raises:
        ConfigError: an example does not fit into a row.

    Example:
        >>> pack_lengths([5, 3, 4, 2], 7)
        [[0, 3], [1, 2]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # tokens that fit in yet, and the row; sorted
    for number in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        length = lengths[number]
        if length > capacity:
            raise ConfigError(f"an example of {length} tokens does not fit into a row of {capacity}; cut it first")
        place = bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([number])
            insort(free, (capacity - length, len(rows) - 1))
        else:
            space, row = free.pop(place)
            rows[row].append(number)
            insort(free, (space - length, row))
    return sorted(map(sorted, rows))


def packed(examples: Iterable[Example], capacity: int) -> Iterator[Example]:
    """Yield examples packed into rows: ``input_ids``, ``labels`` and ``position_ids``.

    Args:
        examples: ``input_ids`` and ``labels`` each, lists of one length.
        capacity: tokens that a row holds.
    """
    examples = iter(examples)
    while window := list(itertools.islice(examples, WINDOW)):
        for row in pack_lengths([len(example["input_ids"]) for example in window], capacity):
            yield joined([window[number] for number in row])


def joined(examples: Sequence[Example]) -> Example:
    """Return examples as one row. The first token of each is not predicted, as it follows nothing.

    Example:
        >>> joined([{"input_ids": [1, 5], "labels": [1, 5]}, {"input_ids": [1, 7], "labels": [-100, 7]}])
        {'input_ids': [1, 5, 1, 7], 'labels': [-100, 5, -100, 7], 'position_ids': [0, 1, 0, 1]}
    """
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORED, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row

"""Whether fresh adapters need values of their own, or get those of a file at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_from_file: ContextVar[bool] = ContextVar("from_file", default=False)


@contextlib.contextmanager
def values_from_file() -> Iterator[None]:
    """Say that every tensor of a file of the adapters that are made in this block is overwritten before anybody reads it."""
    token = _from_file.set(True)
    try:
        yield
    finally:
        _from_file.reset(token)


def comes_from_file() -> bool:
    """Tell whether values that a file holds need not be drawn."""
    return _from_file.get()

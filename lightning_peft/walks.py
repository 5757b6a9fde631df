"""What a walk through a model found, kept for the time of a verb that asks for it again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

_Places = Iterator[tuple[str, nn.Module]]
_found: dict[int, list[tuple[str, nn.Module]] | None] = {}
"""By the id of a model in a block of :func:`walked_once`: what the last walk found, or None where it may have changed since."""


@contextlib.contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Walk through ``model`` once for all that asks in this block, where whoever changes its modules calls :func:`forget_walks`."""
    outermost = id(model) not in _found
    _found.setdefault(id(model))
    try:
        yield
    finally:
        if outermost:
            del _found[id(model)]


def forget_walks() -> None:
    """Have models be walked through again, as modules have come or gone."""
    for key in [*_found]:
        _found[key] = None


def walked(model: nn.Module, walk: Callable[[nn.Module], _Places]) -> _Places:
    """Yield what ``walk`` yields for ``model``, or yielded before in this block."""
    if id(model) not in _found:
        return walk(model)
    places = _found[id(model)]
    if places is None:
        places = _found[id(model)] = list(walk(model))
    return iter(places)

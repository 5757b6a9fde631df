"""Weights of a base that stay in their file until they are needed, so that no process holds all of them.

::

    module   weight: on the meta device      noted on the module: weight ── Unread ── rows of a tensor in a file

    injection    a module has its weights for as long as an adapter is made for it, read if the adapter looks at them
    sharding     each process reads the rows that it keeps
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_MARK = "_lightning_peft_unread"
"""Attribute of a module: parameter name to what is to be read."""


class Source(Protocol):
    """A tensor in a file."""

    def read(self) -> Tensor:
        """Return it whole."""
        ...

    def rows(self, first: int, stop: int) -> Tensor:
        """Return a part of its first dimension."""
        ...

    def elements(self, places: Sequence[int]) -> Tensor:
        """Return elements of the flattened tensor."""
        ...


@dataclass(frozen=True)
class Unread:
    """What a parameter on the meta device stands for."""

    source: Source
    """The tensor in a file."""
    dtype: torch.dtype
    """The dtype that it is loaded in."""

    def read(self) -> Tensor:
        """Return the whole value."""
        return self.source.read().to(self.dtype)

    def rows(self, first: int, stop: int) -> Tensor:
        """Return a part of the first dimension."""
        return self.source.rows(first, stop).to(self.dtype)

    def elements(self, places: Sequence[int]) -> Tensor:
        """Return elements of the flattened value."""
        return self.source.elements(places).to(self.dtype)


def mark_unread(module: nn.Module, name: str, value: Unread) -> None:
    """Note on ``module`` where the value of its parameter ``name`` is."""
    vars(module).setdefault(_MARK, {})[name] = value


def unread(module: nn.Module) -> dict[str, Unread]:
    """Return what is still to be read of the parameters of ``module`` itself, by name."""
    noted: dict[str, Unread] = vars(module).get(_MARK, {})
    return {name: value for name, value in noted.items() if is_waiting(module._parameters.get(name))}


def is_waiting(parameter: Tensor | None) -> bool:
    """Tell whether a parameter has no values yet."""
    return parameter is not None and parameter.is_meta


class ReadOnFirstUse(Tensor):
    """A parameter on the CPU whose values are read by the first function that looks at more than its shape, dtype and device.

    Most adapters start from random numbers and never do.
    """

    _value: Unread | None

    @classmethod
    def of(cls, value: Unread, like: Tensor) -> ReadOnFirstUse:
        """Return the parameter that ``like``, on the meta device, stands for."""
        empty = torch.empty(like.shape, dtype=value.dtype, device="cpu")  # memory that nobody touches yet
        made: Any = empty.as_subclass(cls)
        made._is_param = True  # what makes it an nn.Parameter
        made._value = value
        made.requires_grad_(like.requires_grad)
        result: ReadOnFirstUse = made
        return result

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Read before anything is computed."""
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _SEEN_WITHOUT:
                for one in tree_leaves((args, kwargs)):
                    if isinstance(one, cls) and one._value is not None:
                        value, one._value = one._value, None
                        with torch.no_grad():
                            one.copy_(value.read())
            return func(*args, **(kwargs or {}))


_SEEN_WITHOUT: frozenset[Any] = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_meta", "requires_grad", "layout")
    ]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.requires_grad_]
)
"""What is known of a tensor without its values."""


@contextlib.contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Have the weights in ``module`` that are unread there, for the time of a ``with`` block."""
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    values: dict[int, Any] = {}
    try:
        for inner in module.modules():
            for name, value in unread(inner).items():
                parameter = inner._parameters[name]
                assert parameter is not None
                if id(parameter) not in values:  # tied weights stay tied
                    values[id(parameter)] = ReadOnFirstUse.of(value, parameter)
                before.append((inner, name, parameter))
                inner._parameters[name] = values[id(parameter)]
        yield
    finally:
        for inner, name, parameter in before:
            inner._parameters[name] = parameter

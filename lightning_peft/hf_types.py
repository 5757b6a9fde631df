"""Which method reads HF PEFT's files of a type, where methods that inherit from each other share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_peft.errors import PluginConflictError
from lightning_peft.interfaces import Method


def ancestors(methods: Iterable[type[Method]], peft_type: str | None) -> list[type[Method]]:
    """Return the methods of a ``peft_type`` that inherit from no other method of that type."""
    typed = [method for method in methods if peft_type is not None and method.peft_type == peft_type]
    return [method for method in typed if not any(other in typed for other in method.__mro__[1:])]


def claimants(methods: Iterable[type[Method]], peft_type: str) -> list[type[Method]]:
    """Return the methods of a ``peft_type`` that are asked whether they read a configuration."""
    # Only what a class defines itself counts: a method that inherits from DoRA is not asked with DoRA's answer.
    return [method for method in methods if method.peft_type == peft_type and "reads_hf_config" in vars(method)]


def reader(methods: Iterable[type[Method]], peft_type: str, claimed: Sequence[type[Method]]) -> type[Method] | None:
    """Return the method that reads a folder of HF PEFT, or None where nobody knows the type.

    That is the most derived of the methods that ``claimed`` it, and the ancestor where none did.

    Raises:
        PluginConflictError: two methods claimed it, and none inherits from the other.
    """
    methods = list(methods)
    found = [method for method in methods if method in claimed or method in ancestors(methods, peft_type)]
    last = [method for method in found if not any(other is not method and issubclass(other, method) for other in found)]
    if len(last) > 1:
        names = " and ".join(repr(method.name) for method in last)
        raise PluginConflictError(
            f"{names} would both read this configuration of HF PEFT's type {peft_type!r}; let one inherit from the other, or narrow its "
            "reads_hf_config"
        )
    return last[0] if last else None

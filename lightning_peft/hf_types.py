"""Which method reads HF PEFT's files of a type, where methods that inherit from each other share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_peft.errors import PluginConflictError
from lightning_peft.interfaces import Method


def ancestors(methods: Iterable[type[Method]], peft_type: str | None) -> list[type[Method]]:
    """Return the methods of a ``peft_type`` that inherit from no other method of that type."""
    typed = [method for method in methods if peft_type is not None and method.peft_type == peft_type]
    return [method for method in typed if not any(other in typed for other in method.__mro__[1:])]


def reader(methods: Iterable[type[Method]], peft_type: str, config: Mapping[str, Any]) -> type[Method] | None:
    """Return the method that reads a configuration of HF PEFT, or None where nobody knows the type.

    That is the ancestor, unless methods below it define ``reads_hf_config`` themselves and say yes: then the most derived of them.

    Raises:
        PluginConflictError: two methods read it, and none inherits from the other.
    """
    methods = list(methods)
    found = ancestors(methods, peft_type)
    # Only what a class defines itself counts: QDoRA(DoRA) is not asked with DoRA's answer.
    typed = [method for method in methods if method.peft_type == peft_type and "reads_hf_config" in vars(method)]
    found += [method for method in typed if method not in found and method.reads_hf_config(config)]
    last = [method for method in found if not any(other is not method and issubclass(other, method) for other in found)]
    if len(last) > 1:
        names = " and ".join(repr(method.name) for method in last)
        raise PluginConflictError(
            f"{names} would both read this configuration of HF PEFT's type {peft_type!r}; let one inherit from the other, or narrow its "
            "reads_hf_config"
        )
    return last[0] if last else None

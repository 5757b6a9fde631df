"""HF PEFT's configurations: which method reads those of a type, and the refusal of keys that it does not have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lightning_peft.errors import AdapterConfigError, PluginConflictError
from lightning_peft.interfaces import Method

_GENERAL = frozenset(
    ["peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"]
)
"""Keys that every configuration has, and that are no hyperparameters."""


def refuse_other_keys(name: str, config: Mapping[str, Any], understood: Collection[str]) -> None:
    """Refuse a configuration of HF PEFT that sets something the method ``name`` does not have.

    Args:
        name: the method, for the message.
        config: the configuration; what is None, false or empty counts as not set.
        understood: keys of the method, beside those that every configuration has.

    Raises:
        AdapterConfigError: another key is set.
    """
    for key, value in config.items():
        if key not in _GENERAL and key not in understood and value not in (None, False, "", [], {}):
            raise AdapterConfigError(
                f"this {name} does not have HF PEFT's {key!r}, which the adapter sets to {value!r}"
            )


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

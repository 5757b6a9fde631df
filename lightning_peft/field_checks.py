"""Checks of fields that methods and quantizers share."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from lightning_peft.errors import ConfigError


def check_switches(settings: Any) -> None:
    """Refuse anything but true or false in the fields of a dataclass that are true or false by default.

    A word such as ``'no'`` would count as true.

    Raises:
        ConfigError: a field is neither.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{type(settings).__name__} {field.name} must be true or false, got {value!r}")


def is_whole(value: Any, least: int) -> bool:
    """Tell whether ``value`` is a whole number of at least ``least``; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Tell whether ``value`` is a number, finite or not; true, false and words such as ``'1e-3'`` are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_in(size: int | str, field: str) -> int:
    """Return a size such as ``"5GB"`` as a number of bytes.

    Raises:
        ConfigError: it is none; the message calls it ``field``.

    Example:
        >>> bytes_in("1.5KB", "size"), bytes_in("2 KiB", "size"), bytes_in(7, "size")
        (1500, 2048, 7)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|TB|B)?\s*", str(size).upper())
    number = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else 0
    if isinstance(size, bool) or number < 1:
        raise ConfigError(f"{field} must be a positive number of bytes, or such as '5GB' or '500MB', got {size!r}")
    return number

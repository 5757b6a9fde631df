"""Checks of fields that methods and quantizers share."""

from __future__ import annotations

import dataclasses
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

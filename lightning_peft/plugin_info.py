"""What the registry remembers of a plugin: where it came from, what it gave, or why it is broken."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from importlib import metadata

from lightning_peft.errors import PluginError


@dataclass
class PluginInfo:
    """One plugin: where it came from, what it gave, or why it is broken."""

    source: str
    """Module path of a built-in, or ``distribution version (entry point)``."""
    builtin: bool = False
    provides: dict[str, list[str]] = field(default_factory=dict)
    """Kind (``method``, ``quantizer``, ...) to names."""
    complete: bool = False
    """Whether ``provides`` is all the plugin has: every hook was called and gave what it should."""
    error: BaseException | None = None
    """Why the plugin is broken, or None."""
    hints: tuple[str, ...] = ()
    """Names the plugin may have provided: of its distribution and entry point."""

    @property
    def cause(self) -> str:
        """Why the plugin is broken, in one line without its source."""
        return cause_of(self.error).removeprefix(f"{self.source}: ")


def cause_of(error: BaseException | None) -> str:
    """Return what ``error`` says, in one text, with its type where that is not of this library."""
    try:
        text = str(error)
    except Exception:  # the error's own __str__ is broken
        text = "(its message cannot be shown)"
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"


def distribution_of(point: metadata.EntryPoint) -> tuple[str, str]:
    """Return name and version of the distribution of an entry point."""
    with contextlib.suppress(Exception):  # METADATA may be missing or damaged
        if point.dist is not None and point.dist.name:
            return str(point.dist.name), str(point.dist.version)
    return "a distribution without METADATA", "?"


def normal_name(name: str) -> str:
    """Return the name of a distribution or an entry point as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", name.strip().lower())

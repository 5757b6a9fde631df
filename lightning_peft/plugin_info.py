"""What the registry remembers of a plugin: where it came from, what it gave, or why it is broken."""

from __future__ import annotations

from dataclasses import dataclass, field

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

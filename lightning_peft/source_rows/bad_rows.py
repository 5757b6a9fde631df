"""What became of rows that are malformed, empty or too long: refused at once, or counted and told with file and line."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, Literal

from lightning_peft.errors import BadRowError, ConfigError, LightningPEFTWarning

OnBadRows = Literal["raise", "report"]

_KEPT = 1000
"""Places that are remembered of each kind; beyond it rows are only counted."""
_SHOWN = 5

WHAT_HAPPENS = {
    "malformed": "left out",
    "empty": "left out",
    "duplicate": "left out",
    "truncated": "cut",
}
"""Kinds of bad rows, and what happens to a row of each where it is reported."""


class BadRows:
    """The bad rows of one set.

    Args:
        mode: ``raise`` refuses the first one, ``report`` counts all.
        hint: the error says how to count such rows instead.

    Example:
        >>> rows = BadRows("report")
        >>> rows.note(BadRowError("empty", "'a.jsonl' line 3", "has no text"))
        >>> print(rows)
        1 empty row left out: 'a.jsonl' line 3 has no text
    """

    def __init__(self, mode: OnBadRows = "raise", *, hint: bool = True) -> None:
        if mode not in ("raise", "report"):
            raise ConfigError(f"on_bad_rows must be 'raise' or 'report', got {mode!r}")
        self.mode, self.hint = mode, hint
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        """Of each kind, the file, line and reason of the rows, the first thousand."""

    def note(self, error: BadRowError) -> None:
        """Raise ``error``, or count the row.

        Raises:
            BadRowError: rows are refused.
        """
        if self.mode == "raise":
            instead = "; on_bad_rows='report' counts such rows instead" if self.hint else ""
            raise BadRowError(error.kind, error.where, error.reason + instead)
        self.add(error.kind, f"{error.where} {error.reason}")

    def add(self, kind: str, what: str) -> None:
        """Count a row that is no error, such as a duplicate."""
        self.counts[kind] += 1
        kept = self.places.setdefault(kind, [])
        if len(kept) < _KEPT:
            kept.append(what)

    def take(self) -> list[tuple[str, int, list[str]]]:
        """Return all that was counted, as plain values, and forget it."""
        found = [(kind, count, self.places.get(kind, [])) for kind, count in self.counts.items()]
        self.counts, self.places = Counter(), {}
        return found

    def merge(self, found: list[tuple[str, int, list[str]]]) -> None:
        """Add what :meth:`take` returned elsewhere."""
        for kind, count, places in found:
            self.counts[kind] += count
            kept = self.places.setdefault(kind, [])
            kept.extend(places[: _KEPT - len(kept)])

    def __str__(self) -> str:
        lines = []
        for kind, count in self.counts.items():
            shown = self.places[kind][:_SHOWN]
            more = f"; and {count - len(shown)} more" if count > len(shown) else ""
            lines.append(f"{count} {kind} row{'s' * (count > 1)} {WHAT_HAPPENS[kind]}: {'; '.join(shown)}{more}")
        return "\n".join(lines)

    def warn(self, of: str) -> None:
        """Tell with one warning what was counted of the set ``of``, if anything was."""
        if self.counts:
            warnings.warn(f"of the rows of {of}, {self}", LightningPEFTWarning, stacklevel=3)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and places as plain values."""
        return {kind: {"count": count, "rows": list(self.places[kind])} for kind, count in self.counts.items()}

"""Examples in local files: the rows of a ``.jsonl`` file, or a ``.txt`` file as one row with the field ``text``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.errors import ConfigError, did_you_mean

_PIECES = re.compile(r"\{\{|\}\}|\{(\w+)\}|[{}]")


@dataclass(frozen=True)
class Row:
    """One example.

    Example:
        >>> row = Row("'questions.jsonl' line 1", {"question": "Who?", "answer": 3})
        >>> row["answer"], row.filled("Question: {question} {{1}}")
        (3, 'Question: Who? {1}')
    """

    where: str
    """File and line, for messages."""
    fields: dict[str, Any]
    """What it holds."""

    def __getitem__(self, name: str) -> Any:
        if name not in self.fields:
            raise ConfigError(
                f"the field {name!r} was asked for, which {self.where} does not have{did_you_mean(name, self.fields) or '.'} The row has: "
                f"{', '.join(self.fields) or 'no fields'}"
            )
        return self.fields[name]

    def filled(self, template: str) -> str:
        """Return ``template`` with the fields of the row: ``{field}`` stands for a value, ``{{`` and ``}}`` for braces."""

        def piece(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            value = self[match[1]]
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

        return _PIECES.sub(piece, template)


def read_rows(path: str, limit: int | None = None) -> list[Row]:
    """Return the first ``limit`` rows of a file, all if None; blank lines are left out.

    Raises:
        ConfigError: no such file, another kind of file, a line that is no JSON object, or no row at all.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no file {path!r}; relative paths start at {str(Path.cwd())!r}")
    if file.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{path!r} is neither .txt nor .jsonl; convert it, or rename it if it is one of them")
    rows: list[Row] = []
    try:
        for row in _rows(file, path):
            if limit is not None and len(rows) == limit:
                break
            rows.append(row)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path!r} is not UTF-8 text: {error}") from error
    if not rows:
        raise ConfigError(f"{path!r} has no rows, so there is nothing to measure")
    return rows


def _rows(file: Path, path: str) -> Iterator[Row]:
    if file.suffix == ".txt":
        yield Row(repr(path), {"text": file.read_text(encoding="utf-8")})
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path!r} line {number} is not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ConfigError(
                    f"{path!r} line {number} is a JSON {type(fields).__name__}, not an object with fields"
                )
            yield Row(f"{path!r} line {number}", fields)

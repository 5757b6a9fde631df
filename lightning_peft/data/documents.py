"""Documents in local files: a ``.txt`` file is one, each row of a ``.jsonl`` file is one.

A template says how a row becomes text: ``{field}`` stands for the value of that field, ``{{`` and ``}}`` for braces.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_peft.errors import ConfigError, did_you_mean


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Return the pieces of a template: literal text, and the field that follows it.

    Raises:
        ConfigError: unbalanced braces, a placeholder without a name or with a format.

    Example:
        >>> parse_template("{mr} => {ref}.")
        [('', 'mr'), (' => ', 'ref'), ('.', None)]
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r} cannot be read: {error}; write {{{{ and }}}} for braces") from error
    for _, field, spec, conversion in pieces:
        if field == "" or spec or conversion:
            raise ConfigError(
                f"template {template!r} has the placeholder {_placeholder(field, spec, conversion)!r}; "
                "a placeholder is the plain name of a field, such as {text}"
            )
    if not any(field for _, field, _, _ in pieces):
        raise ConfigError(f"template {template!r} names no field; write for instance {{text}}")
    return [(literal, field) for literal, field, _, _ in pieces]


def read_documents(path: str, template: str = "{text}") -> Iterator[str]:
    """Yield the documents of a ``.txt`` or ``.jsonl`` file; blank lines of a ``.jsonl`` are skipped.

    Args:
        path: the file, UTF-8.
        template: how a row of a ``.jsonl`` becomes text.

    Raises:
        ConfigError: no such file, another kind of file, a malformed row, a field that a row does not have.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"there is no text file {path!r}; relative paths start at the working directory, which is {str(Path.cwd())!r}"
        )
    if file.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{path!r} is neither .txt nor .jsonl; convert it, or rename it if it is one of them")
    pieces = parse_template(template)
    try:
        if file.suffix == ".txt":
            yield file.read_text(encoding="utf-8")
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _render(pieces, template, _row(line, path, number), path, number)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path!r} is not UTF-8 text: {error}") from error


def hold_out(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    r"""Split off the end: the last rows, or the end of a single document from a line break on.

    Example:
        >>> hold_out(["a", "b", "c", "d"], 0.25)
        (['a', 'b', 'c'], ['d'])
        >>> hold_out(["one\ntwo\nthree\n"], 0.5)
        (['one\ntwo\n'], ['three\n'])
    """
    if len(documents) == 1:
        text = documents[0]
        cut = text.find("\n", max(0, int(len(text) * (1 - fraction)) - 1)) + 1 or len(text)
        return [text[:cut]], [text[cut:]]
    kept = len(documents) - max(1, round(len(documents) * fraction))
    return documents[:kept], documents[kept:]


def _row(line: str, path: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path!r} line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{path!r} line {number} is a JSON {type(row).__name__}, not an object with fields")
    return row


def _render(pieces: list[tuple[str, str | None]], template: str, row: dict[str, Any], path: str, number: int) -> str:
    text = []
    for literal, field in pieces:
        text.append(literal)
        if field is None:
            continue
        if field not in row:
            raise ConfigError(
                f"template {template!r} names the field {field!r}, which {path!r} line {number} does not have"
                f"{did_you_mean(field, row)} The row has: {', '.join(row) or 'no fields'}"
            )
        text.append(row[field] if isinstance(row[field], str) else json.dumps(row[field], ensure_ascii=False))
    return "".join(text)


def _placeholder(field: str | None, spec: str | None, conversion: str | None) -> str:
    return "{" + (field or "") + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"

"""Rows as text: a ``.txt`` file is one document, each row of any other file is one.

A template says how a row becomes text: ``{field}`` stands for the value of that field, ``{{`` and ``}}`` for braces.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Sequence
from typing import TypeAlias

from lightning_peft.errors import BadRowError, ConfigError, did_you_mean
from lightning_peft.source_rows.reading import Row, suffix_of

Pieces: TypeAlias = Sequence[tuple[str, str | None]]
"""Literal text, and the field that follows it."""


def parse_template(template: str) -> Pieces:
    """Return the pieces of a template: literal text, and the field that follows it.

    Raises:
        ConfigError: unbalanced braces, a placeholder without a name or with a format, or no placeholder.

    Example:
        >>> list(parse_template("{mr} => {ref}."))
        [('', 'mr'), (' => ', 'ref'), ('.', None)]
    """
    pieces = _parsed(template)
    if not any(field for _, field in pieces):
        raise ConfigError(f"template {template!r} names no field; write for instance {{text}}")
    return pieces


def filled(template: str, row: Row) -> str:
    """Return a template with the values of a row; it need not name a field.

    Raises:
        ConfigError: the template cannot be read.
        BadRowError: the row lacks a field.

    Example:
        >>> filled("Question: {question} {{1}}", Row({"question": "Who?", "answer": 3}, "questions.jsonl", 1))
        'Question: Who? {1}'
    """
    return render(_parsed(template), template, row)


@functools.lru_cache(maxsize=256)
def _parsed(template: str) -> Pieces:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r} cannot be read: {error}; write {{{{ and }}}} for braces") from error
    for _, field, spec, conversion in pieces:
        if field == "" or spec or conversion:
            raise ConfigError(
                f"template {template!r} has the placeholder {_placeholder(field, spec, conversion)!r}; "
                "a placeholder is the plain name of a field, such as {text}; write {{ and }} for braces"
            )
    return tuple((literal, field) for literal, field, _, _ in pieces)


def is_whole_text(row: Row) -> bool:
    """Tell whether a row is a whole ``.txt``, which no template applies to."""
    return suffix_of(row.source) == ".txt"


def render(pieces: Pieces, template: str, row: Row) -> str:
    """Return the text of a row by the pieces of a template; numbers, lists and objects are written as JSON.

    Raises:
        BadRowError: the row lacks a field, or has nothing there (null).
    """
    text = []
    for literal, field in pieces:
        text.append(literal)
        if field is None:
            continue
        if field not in row.values:
            raise BadRowError(
                "malformed",
                row.where,
                f"does not have the field {field!r} that the template {template!r} names"
                f"{did_you_mean(field, row.values) or '.'} The row has: {', '.join(row.values) or 'no fields'}",
            )
        value = row.values[field]
        if value is None:
            raise BadRowError(
                "empty", row.where, f"has nothing (null) as {field!r}, which the template {template!r} names"
            )
        plain = isinstance(value, (bool, int, float, list, dict))  # a .parquet has others, such as dates
        text.append(json.dumps(value, ensure_ascii=False, default=str) if plain else str(value))
    return "".join(text)


def _placeholder(field: str | None, spec: str | None, conversion: str | None) -> str:
    return "{" + (field or "") + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"

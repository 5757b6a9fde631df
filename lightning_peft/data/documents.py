"""Documents in files: a ``.txt`` file is one, each row of any other file is one.

A template says how a row becomes text: ``{field}`` stands for the value of that field, ``{{`` and ``}}`` for braces.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator

from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.sources import Row, read_rows
from lightning_peft.errors import BadRowError, ConfigError, did_you_mean


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
    """Yield the documents of a file; blank lines are skipped, and a bad row is refused.

    Args:
        path: a ``.txt``, which is one document, or a ``.jsonl``, ``.csv`` or ``.parquet``, each row of which is one.
        template: how a row becomes text.

    Raises:
        ConfigError: no such file, another kind of file, a malformed row, a field that a row does not have.
    """
    pieces = parse_template(template)
    for row in read_rows(path, BadRows("raise"), whole_text=True):
        yield row.values["text"] if is_whole_text(row) else render(pieces, template, row)


def is_whole_text(row: Row) -> bool:
    """Tell whether a row is a whole ``.txt``, which no template applies to."""
    return row.source.endswith(".txt")


def render(pieces: list[tuple[str, str | None]], template: str, row: Row) -> str:
    """Return the text of a row by the pieces of a template; a value that is no text is written as JSON.

    Raises:
        BadRowError: the row lacks a field.
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
        text.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(text)


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


def _placeholder(field: str | None, spec: str | None, conversion: str | None) -> str:
    return "{" + (field or "") + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"

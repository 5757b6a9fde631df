"""Rows of local files and of data sets of the hub, each with the place it comes from.

====================  ===========================================  ==================================
``train``             a row is                                     read with
====================  ===========================================  ==================================
``a.jsonl``           an object, one a line                        Python's json, line by line
``a.csv``             a record below the header                    Python's csv
``a.parquet``         a row                                        pyarrow, batch by batch
``a.txt``             a line, or the whole file                    Python
``owner/name:split``  a row of that split                          ``datasets.load_dataset``
a folder              a row of its split                           ``datasets.load_dataset``
====================  ===========================================  ==================================

Files are read here and not by ``datasets``, which gives up on a whole file where one line is malformed. What stands in front of a
file to say that it is UTF-8, the byte order mark, is no part of its first row.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.errors import BadRowError, ConfigError, did_you_mean
from lightning_peft.source_rows.bad_rows import BadRows

FORMATS = (".jsonl", ".csv", ".parquet", ".txt")
_ROWS_AT_ONCE = 256
_LONGEST_VALUE = 2**31 - 1
"""Characters in a value of a CSV file; Python's csv refuses more than 131,072 unless told otherwise, and documents have more."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data, and where it stands."""

    values: Mapping[str, Any]
    """Fields by name."""
    source: str
    """The file, or the data set."""
    line: int
    """Its first line in the file, or its number, from 1."""

    @property
    def where(self) -> str:
        """The file and the line, for messages."""
        return f"{self.source!r} line {self.line}"

    def field(self, name: str) -> Any:
        """Return a field.

        Raises:
            BadRowError: the row does not have it.
        """
        if name not in self.values:
            raise BadRowError(
                "malformed",
                self.where,
                f"has no field {name!r}{did_you_mean(name, self.values) or '.'} It has: {', '.join(self.values) or 'no fields'}",
            )
        return self.values[name]

    def text(self, name: str) -> str:
        """Return a field that is text, not empty.

        Raises:
            BadRowError: the row does not have it, or it is no text, or there is none in it.
        """
        value = self.field(name)
        if not isinstance(value, str):
            raise BadRowError("malformed", self.where, f"has a {type(value).__name__} as {name!r}, not text")
        if not value.strip():
            raise BadRowError("empty", self.where, f"has no text as {name!r}")
        return value


def read_rows(
    source: str,
    bad_rows: BadRows,
    *,
    split: str = "train",
    whole_text: bool = False,
    streaming: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a file, of a folder or of a data set of the hub; blank lines are no rows.

    Args:
        source: the path of a file or folder, or the id of a data set, with ``:split`` behind it for another split.
        bad_rows: told of rows that cannot be read.
        split: the split of a folder or data set that does not name one.
        whole_text: a ``.txt`` is one row, not one a line.
        streaming: read a data set while it is used instead of fetching it first.
        options: further arguments of ``datasets.load_dataset``.

    Raises:
        ConfigError: there is no such file or data set, or it is of another kind.
        BadRowError: a row cannot be read, and such rows are refused.
    """
    file, suffix = Path(source), suffix_of(source)
    if suffix in FORMATS:
        if not file.is_file():
            raise ConfigError(
                f"there is no text file {source!r}; relative paths start at the working directory, which is {str(Path.cwd())!r}"
            )
        if suffix == ".txt":
            return _whole_text(source) if whole_text else _lines(source, bad_rows)
        return {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[suffix](source, bad_rows)
    if file.is_file() or (suffix and not file.is_dir() and source.count("/") != 1):
        raise ConfigError(f"{source!r} is none of {', '.join(FORMATS)}; convert it, or rename it if it is one of them")
    return _data_set(source, split, streaming, dict(options or {}))


def first_rows(path: str, limit: int | None = None) -> list[Row]:
    """Return the first ``limit`` rows of a local file, all if None, to measure on; a ``.txt`` is one row with the field ``text``.

    Raises:
        ConfigError: there is no such file, it is of another kind, or has no rows.
        BadRowError: a row cannot be read.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path!r}; relative paths start at {str(Path.cwd())!r}")
    rows = list(itertools.islice(read_rows(path, BadRows("raise", hint=False), whole_text=True), limit))
    if not rows:
        raise ConfigError(f"{path!r} has no rows, so there is nothing to measure")
    return rows


def suffix_of(source: str) -> str:
    """Return what the name of a file ends in, in small letters: ``.jsonl``; empty where it ends in nothing.

    Example:
        >>> suffix_of("data/Train.CSV"), suffix_of("owner/name:train")
        ('.csv', '')
    """
    return Path(source).suffix.lower()


def _whole_text(source: str) -> Iterator[Row]:
    try:
        yield Row({"text": Path(source).read_text(encoding="utf-8-sig")}, source, 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source!r} is not UTF-8 text: {error}") from error


def _numbered_lines(source: str, bad_rows: BadRows) -> Iterator[tuple[int, str]]:
    with Path(source).open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                line = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode("utf-8")
            except UnicodeDecodeError as error:
                bad_rows.note(_not_text(f"{source!r} line {number}", error.reason))
                continue
            if line.strip():
                yield number, line


def _not_text(where: str, reason: str) -> BadRowError:
    return BadRowError("malformed", where, f"is not UTF-8 text: {reason}")


def _lines(source: str, bad_rows: BadRows) -> Iterator[Row]:
    for number, line in _numbered_lines(source, bad_rows):
        yield Row({"text": line.rstrip("\r\n")}, source, number)


def _jsonl(source: str, bad_rows: BadRows) -> Iterator[Row]:
    for number, line in _numbered_lines(source, bad_rows):
        where = f"{source!r} line {number}"
        try:
            values = json.loads(line)
            if "\\u" in line:  # escapes may spell what is no character: half of a pair
                json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            bad_rows.note(_not_text(where, error.reason))
            continue
        except (ValueError, RecursionError) as error:
            bad_rows.note(BadRowError("malformed", where, f"is not JSON: {error}"))
            continue
        if isinstance(values, dict):
            yield Row(values, source, number)
        else:
            found = f"is a JSON {type(values).__name__}, not an object with fields"
            bad_rows.note(BadRowError("malformed", where, found))


def _csv(source: str, bad_rows: BadRows) -> Iterator[Row]:
    header: list[str] | None = None
    for line, record in _csv_records(source, bad_rows):
        where = f"{source!r} line {line}"
        try:
            "".join(record).encode()
        except UnicodeEncodeError:
            bad_rows.note(_not_text(where, "invalid byte"))
            continue
        if header is None:
            header = record
            if len(set(header)) < len(header):
                raise ConfigError(f"{source!r} has two columns of one name in its first line, the header: {header}")
        elif len(record) != len(header):
            found = f"has {len(record)} values for the {len(header)} columns {', '.join(header)}"
            bad_rows.note(BadRowError("malformed", where, found))
        else:
            yield Row(dict(zip(header, record, strict=True)), source, line)


def _csv_records(source: str, bad_rows: BadRows) -> Iterator[tuple[int, list[str]]]:
    """Yield the records, each with the line that it begins in; what is not UTF-8 comes as it does from Python's surrogateescape."""
    with Path(source).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        records = csv.reader(lines, strict=True)
        while True:
            line, limit = records.line_num + 1, csv.field_size_limit(_LONGEST_VALUE)
            try:
                record = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                open_quote = "; a quote that opens here is not closed" if "end of data" in str(error) else ""
                found = f"is not CSV: {error}{open_quote}"
                bad_rows.note(BadRowError("malformed", f"{source!r} line {line}", found))
                continue
            finally:
                csv.field_size_limit(limit)
            if record:
                yield line, record


def _parquet(source: str, bad_rows: BadRows) -> Iterator[Row]:
    del bad_rows  # a row of a typed file cannot be malformed by itself
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"{source!r} is read with pyarrow, which is not installed: pip install 'lightning-peft[data]'"
        ) from error
    number = 0
    try:
        for batch in parquet.ParquetFile(source).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(values, source, number)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{source!r} is not a parquet file: {error}") from error


def _data_set(source: str, split: str, streaming: bool, options: dict[str, Any]) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source!r} is no file, and data sets of the hub are read with datasets, which is not installed: "
            "pip install 'lightning-peft[data]'"
        ) from error
    name, _, named = (source, "", "") if Path(source).is_dir() else source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=named or split, streaming=streaming, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{source!r} is neither a file nor a data set that datasets.load_dataset can read with split={named or split!r}; "
            f"it says: {error}"
        ) from error
    label = f"{name}:{named or split}"
    for number, values in enumerate(_unshared(rows) if streaming else rows, start=1):
        yield Row(values, label, number)


def _unshared(rows: Any) -> Iterator[dict[str, Any]]:
    """Yield all rows of a streamed data set.

    Iterating over it would share its files out among the workers of a loader, which share out rows here.
    """
    for batch in rows.iter(batch_size=_ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))

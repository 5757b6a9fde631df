"""Reading documents: every mistake in a file is told with the file and the line."""

from __future__ import annotations

import datetime
import json

import pytest

from lightning_peft.data.text import hold_out
from lightning_peft.errors import ConfigError
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import read_rows
from lightning_peft.source_rows.templates import filled, is_whole_text, parse_template


def read_documents(path, template="{text}"):
    rows = read_rows(path, BadRows("raise"), whole_text=True)
    return [row.values["text"] if is_whole_text(row) else filled(template, row) for row in rows]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def test_a_text_file_is_one_document(write):
    assert list(read_documents(write("a.txt", "one\n\ntwo\n"))) == ["one\n\ntwo\n"]


def test_a_row_becomes_text_by_the_template(write):
    path = write("a.jsonl", '{"mr": "name : Zizzi", "ref": "Zizzi \\u00e9"}\n\n{"mr": 3, "ref": ["a"]}\n')
    assert list(read_documents(path, "{{{mr}}} => {ref}.")) == ["{name : Zizzi} => Zizzi é.", '{3} => ["a"].']


def test_a_line_separator_of_unicode_does_not_end_a_row(write):
    path = write("a.jsonl", json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert list(read_documents(path)) == ["a\u2028b"]


def test_a_field_name_may_hold_spaces(write):
    path = write("a.jsonl", '{"big question": "why"}')
    assert list(read_documents(path, "{big question}")) == ["why"]


@pytest.mark.parametrize(
    ("name", "content", "template", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "{text}", r"a.jsonl' line 2 is not JSON: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "{text}", r"a.jsonl' line 2 is a JSON list, not an object"),
        (
            "a.jsonl",
            '{"mr": "a", "ref": "b"}',
            "{mr} {reff}",
            r"a.jsonl' line 1 does not have the field 'reff' that .*; did you mean 'ref'",
        ),
        ("a.jsonl", '{"mr": "a", "ref": "b"}', "{text}", r"does not have the field 'text'.* The row has: mr, ref"),
        ("a.jsonl", "{}", "{text}", r"The row has: no fields"),
        ("a.jsonl", '{"text": null}', "{text}", r"a.jsonl' line 1 has nothing \(null\) as 'text', which the template"),
        ("a.doc", "a,b", "{text}", r"a.doc' is none of .jsonl, .csv, .parquet, .txt; convert it"),
        ("a.txt", b"\xff\xfe\xfa", "{text}", r"a.txt' is not UTF-8 text"),
        ("a.jsonl", b'{"text": "\xff"}', "{text}", r"a.jsonl' line 1 is not UTF-8 text"),
    ],
)
def test_a_bad_file_is_named(write, name, content, template, message):
    with pytest.raises(ConfigError, match=message):
        list(read_documents(write(name, content), template))


def test_a_missing_file_is_told_with_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"no text file 'x.txt'; relative paths start .* '{tmp_path}'"):
        list(read_documents("x.txt"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text", r"cannot be read: expected '}'.*; write \{\{ and \}\} for braces"),
        ("{}", r"has the placeholder '\{\}'; a placeholder is the plain name"),
        ("{text!r}", r"has the placeholder '\{text!r\}'"),
        ("{text:>9}", r"has the placeholder '\{text:>9\}'"),
        ("text", r"'text' names no field; write for instance \{text\}"),
    ],
)
def test_a_bad_template_is_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        parse_template(template)


def test_holding_out_loses_and_repeats_nothing():
    text = "".join(f"line {i}\n" for i in range(100))
    (kept,), (held_out,) = hold_out([text], 0.1)
    assert kept + held_out == text
    assert kept.endswith("\n")
    assert len(held_out) == pytest.approx(0.1 * len(text), abs=8)
    kept, held_out = hold_out(["a", "b", "c"], 0.01)
    assert (kept, held_out) == (["a", "b"], ["c"])


def test_a_document_of_one_line_is_cut_between_words():
    words = "one two three four five six seven eight nine ten"
    (kept,), (held_out,) = hold_out([words], 0.2)
    assert (kept, held_out) == ("one two three four five six seven eight ", "nine ten")
    assert hold_out(["title\n" + words], 0.2) == (["title\n" + kept], [held_out])
    assert hold_out(["abc"], 0.5) == (["abc"], [""])  # nowhere to cut


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_the_last_line_is_held_out_where_less_was_asked_for(end):
    text = "first line\nsecond line\nthird line" + end
    assert hold_out([text], 0.01) == (["first line\nsecond line\n"], ["third line" + end])


def test_values_of_a_typed_file_are_written(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"day": [datetime.date(2020, 1, 2)], "n": [3]}), tmp_path / "a.parquet"
    )
    assert read_documents(str(tmp_path / "a.parquet"), "{day} {n}") == ["2020-01-02 3"]

"""Rows of every kind of file; what is wrong with one is told with its file and line, or counted."""

from __future__ import annotations

import csv
import pickle
import sys

import pytest

from lightning_peft.errors import BadRowError, ConfigError
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import Row, first_rows, read_rows

ROWS = [{"text": "a b", "n": "1"}, {"text": "c, d", "n": "2"}]


def values(source, bad_rows=None, **options):
    return [dict(row.values) for row in read_rows(str(source), BadRows() if bad_rows is None else bad_rows, **options)]


def test_all_kinds_of_files_give_the_same_rows(tmp_path, jsonl):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('text,n\r\na b,1\r\n"c, d",2\r\n')
    assert values(jsonl("a.jsonl", ROWS)) == values(tmp_path / "a.csv") == values(tmp_path / "a.parquet") == ROWS
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert values(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two"}]
    assert values(tmp_path / "a.txt", whole_text=True) == [{"text": "one\n\ntwo"}]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_read_as_a_data_set_of_the_hub_is(tmp_path, monkeypatch, jsonl, streaming):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    jsonl("set/train.jsonl", ROWS)
    jsonl("set/test.jsonl", ROWS[:1])
    options = {"streaming": streaming, "options": {"cache_dir": str(tmp_path / "cache")}}
    rows = list(read_rows(str(tmp_path / "set"), BadRows(), **options))
    assert [dict(row.values) for row in rows] == ROWS
    assert rows[1].where == f"'{tmp_path / 'set'}:train' line 2"
    assert values(f"{tmp_path / 'set'}:test", **options) == ROWS[:1]
    with pytest.raises(ConfigError, match="load_dataset can read with split='valid'"):
        values(f"{tmp_path / 'set'}:valid", **options)


def test_malformed_rows_are_counted_with_file_and_line(tmp_path, jsonl):
    bad = BadRows("report")
    path = jsonl("a.jsonl", [ROWS[0], "{broken", "[1]", "", ROWS[1]])
    assert values(path, bad) == ROWS
    assert dict(bad.counts) == {"malformed": 2}
    assert bad.to_dict()["malformed"]["rows"][1] == f"'{path}' line 3 is a JSON list, not an object with fields"
    assert str(bad).startswith(f"2 malformed rows left out: '{path}' line 2 is not JSON")
    records = tmp_path / "a.csv"
    records.write_text('text,n\na,1\n"two\nlines",2\nb\nc,3,4\nd,5\n')
    bad = BadRows("report")
    assert values(records, bad) == [{"text": t, "n": n} for t, n in [("a", "1"), ("two\nlines", "2"), ("d", "5")]]
    assert [place.partition("line ")[2] for place in bad.places["malformed"]] == [
        "5 has 1 values for the 2 columns text, n",
        "6 has 3 values for the 2 columns text, n",
    ]
    mixed = tmp_path / "b.txt"
    mixed.write_bytes(b"good\n\xff\nalso\n")
    bad = BadRows("report")
    assert values(mixed, bad) == [{"text": "good"}, {"text": "also"}]
    assert "line 2 is not UTF-8 text" in str(bad)


def test_a_malformed_row_is_refused_where_that_is_asked_for(jsonl):
    with pytest.raises(BadRowError, match=r"a.jsonl' line 2 is not JSON.*; on_bad_rows='report' counts such rows"):
        values(jsonl("a.jsonl", [ROWS[0], "{broken"]))
    with pytest.raises(ConfigError, match="on_bad_rows must be 'raise' or 'report', got 'ignore'"):
        BadRows("ignore")


def test_a_field_that_is_missing_or_empty_or_no_text_is_told():
    row = Row({"text": "a", "empty": " ", "number": 3}, "a.jsonl", 7)
    assert row.text("text") == "a"
    for name, message in {
        "txt": "'a.jsonl' line 7 has no field 'txt'; did you mean 'text'",
        "empty": "has no text as 'empty'",
        "number": "has a int as 'number', not text",
    }.items():
        with pytest.raises(BadRowError, match=message):
            row.text(name)


def test_what_is_no_file_of_rows_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    (tmp_path / "b.csv").write_text("a,a\n1,2\n")
    for source, message in {
        str(tmp_path / "a.parquet"): "is not a parquet file",
        str(tmp_path / "b.csv"): "has two columns of one name",
        "nowhere.csv": "there is no text file 'nowhere.csv'",
        "a.doc": "'a.doc' is none of .jsonl, .csv, .parquet, .txt",
    }.items():
        with pytest.raises(ConfigError, match=message):
            values(source)


def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_text("no")
    for source in (str(tmp_path), str(tmp_path / "a.parquet")):
        with pytest.raises(ConfigError, match=r"not installed: pip install 'lightning-peft\[data\]'"):
            values(source)


# -- what files of the world hold --------------------------------------------------------------------------------------


def test_the_mark_of_utf8_in_front_of_a_file_is_no_part_of_its_first_row(tmp_path):
    mark = b"\xef\xbb\xbf"
    for name, content in {"a.jsonl": b'{"text": "a"}\r\n', "a.csv": b"text\r\na\r\n", "a.TXT": b"a\r\n"}.items():
        (tmp_path / name).write_bytes(mark + content)
        assert values(tmp_path / name) == [{"text": "a"}]
    assert values(tmp_path / "a.TXT", whole_text=True) == [{"text": "a\n"}]


def test_half_a_character_and_a_number_without_end_are_malformed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n{"n": ' + "1" * 5000 + "}\n")
    bad = BadRows("report")
    assert values(path, bad) == [{"text": "\U0001f600"}]
    first, second = bad.places["malformed"]
    assert "line 1 is not UTF-8 text: surrogates not allowed" in first
    assert "line 3 is not JSON" in second


def test_a_csv_record_is_told_by_the_line_it_begins_in(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\n"two\nlines",1\n\n"one\xff",2\nb,3\n"open,4\nc,5\n')
    bad = BadRows("report")
    rows = list(read_rows(str(path), bad))
    assert [(dict(row.values), row.line) for row in rows] == [
        ({"text": "two\nlines", "n": "1"}, 2),
        ({"text": "b", "n": "3"}, 6),
    ]
    first, second = bad.places["malformed"]
    assert "line 5 is not UTF-8 text" in first
    assert "line 7 is not CSV: unexpected end of data; a quote that opens here is not closed" in second


def test_a_value_of_a_csv_file_may_be_a_long_document(tmp_path):
    limit = csv.field_size_limit()
    text = "line\n" * 40_000
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\nb\n')
    assert values(tmp_path / "a.csv") == [{"text": text}, {"text": "b"}]
    assert csv.field_size_limit() == limit


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_folder_may_have_a_colon_in_its_name(tmp_path, jsonl):
    pytest.importorskip("datasets")
    (tmp_path / "run:1").mkdir()
    jsonl("run:1/train.jsonl", ROWS)
    options = {"cache_dir": str(tmp_path / "cache")}
    assert values(tmp_path / "run:1", streaming=True, options=options) == ROWS


def test_rows_to_measure_on_are_all_there_or_refused(tmp_path, jsonl):
    path = jsonl("a.jsonl", [*ROWS, "{broken"])
    assert [dict(row.values) for row in first_rows(path, 2)] == ROWS
    with pytest.raises(BadRowError, match="line 3 is not JSON") as error:
        first_rows(path)
    assert "on_bad_rows" not in str(error.value)
    assert pickle.loads(pickle.dumps(error.value)).where == error.value.where
    with pytest.raises(ConfigError, match="there is no file 'nowhere.jsonl'; relative paths start at"):
        first_rows("nowhere.jsonl")
    with pytest.raises(ConfigError, match="has no rows, so there is nothing to measure"):
        first_rows(jsonl("b.jsonl", ["", " "]))

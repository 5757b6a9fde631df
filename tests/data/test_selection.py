"""Near-duplicates go, and a small set differs more within itself than a random one."""

from __future__ import annotations

import itertools
import json
import random
import sys

import pytest

from lightning_peft import InstructionDataModule
from lightning_peft.data.selection import duplicates, minhashes, most_different
from lightning_peft.errors import ConfigError

pytest.importorskip("datasketch")


def stories_of(data_dir):
    path = data_dir / "lm" / "tinystories_valid.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def similarity(texts):
    """Return the mean similarity of Jaccard of word triples, exactly and by itself."""
    sets = []
    for text in texts:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        sets.append(set(zip(words, words[1:], words[2:], strict=False)))
    pairs = list(itertools.combinations(sets, 2))
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


def test_copies_of_real_stories_are_found_and_nothing_else(data_dir):
    texts = stories_of(data_dir)[:60]
    copies = [texts[7].upper(), texts[9].replace(",", " ,"), texts[7] + " The end."]
    assert duplicates(minhashes([*texts, *copies]), 0.8) == {60: 7, 61: 9, 62: 7}
    assert duplicates(minhashes(["", "a", "", "a b"]), 0.9) == {2: 0}


def test_chosen_stories_differ_more_than_random_ones(data_dir):
    texts = stories_of(data_dir)[:120]
    chosen = most_different(minhashes(texts), 12, seed=0)
    assert len(set(chosen)) == 12
    assert chosen == most_different(minhashes(texts), 12, seed=0)
    draws = [similarity(random.Random(seed).sample(texts, 12)) for seed in range(10)]
    assert similarity([texts[number] for number in chosen]) < min(draws)


def test_a_data_module_trains_on_the_selection(byte_tokenizer, jsonl):
    answers = ["one two three four", "five six seven eight", "one two three four", "one two three five", "nine ten"]
    path = jsonl("a.jsonl", [{"prompt": "p", "completion": answer} for answer in answers])

    def kept(**options):
        data = InstructionDataModule(byte_tokenizer, path, shuffle=False, **options)
        data.setup("fit")
        return data, [data.shown(one)[-1][0].removesuffix("</s>") for one in data._datasets["train", True]]

    with pytest.warns(UserWarning, match=r"1 duplicate row left out: .* line 3 is nearly line 1"):
        data, rows = kept(max_similarity=0.9)
    assert rows == [answers[0], answers[1], *answers[3:]]
    assert data.bad_rows["train"].counts["duplicate"] == 1
    with pytest.warns(UserWarning, match="duplicate"):
        _, rows = kept(max_similarity=0.9, diverse_rows=3)
    assert len(rows) == 3
    assert len(kept(diverse_rows=99)[1]) == 5


def test_the_library_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'lightning-peft\[data\]'"):
        minhashes(["a"])


def test_scripts_without_spaces_are_compared_by_their_characters():
    texts = [
        "我今天去公园散步看到很多花",
        "我今天去公园散步看到很多花。",
        "股票市场星期一大幅下跌了",
        "我今天去公园散步看到很多鸟",
    ]
    assert duplicates(minhashes(texts), 0.95) == {1: 0}
    assert 2 in most_different(minhashes(texts), 2)

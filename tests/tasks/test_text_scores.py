"""Scores of text, against the libraries that define them."""

import pytest
import torch
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from lightning_peft.errors import ConfigError
from lightning_peft.tasks import text_scores
from lightning_peft.tasks.text_scores import SCORES, TextScores

PROMPTS = ["name: Aromi", "name: Fitzbillies", "name: The Punter"]
MADE = [
    "Aromi is a coffee shop near the river.",
    "Fitzbillies, a cheap pub, serves fast food in the city centre.",
    "The Punter is not family-friendly.",
]
WANTED = [
    ["Aromi is a coffee shop that stands near the river.", "Near the river is a coffee shop, Aromi."],
    ["Fitzbillies is a cheap pub in the city centre; it serves fast food."],
    ["The Punter is not family-friendly."],
]
TOKENS = Tokenizer13a()


def split(text):
    return TOKENS(text).split()


def scored(names, prompts=PROMPTS, made=MADE, wanted=WANTED):
    scores = TextScores(names)
    scores.update(prompts, made, wanted)
    return {name: value.item() for name, value in scores.compute().items()}


def padded(wanted):
    """References as sacreBLEU takes them: a list for each place, of all examples."""
    most = max(map(len, wanted))
    return [[row[place] if place < len(row) else None for row in wanted] for place in range(most)]


def test_bleu_and_chrf_are_those_of_sacrebleu():
    found = scored(["bleu", "chrf"])
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(MADE, padded(WANTED)).score, abs=1e-3)
    assert found["chrf"] == pytest.approx(CHRF(word_order=2).corpus_score(MADE, padded(WANTED)).score, abs=1e-3)


def test_ter_is_that_of_sacrebleu_for_one_reference():
    one = [[row[0]] for row in WANTED]
    lower = [text.lower() for text in MADE], [[row[0].lower()] for row in one]
    found = scored(["ter"], made=lower[0], wanted=lower[1])
    assert found["ter"] == pytest.approx(
        TER(asian_support=False).corpus_score(lower[0], padded(lower[1])).score, abs=1e-2
    )


def test_rouge_is_that_of_rouge_score_for_the_best_reference():
    found = scored(["rouge1", "rouge2", "rougeL"])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name, value in found.items():
        best = [
            max(scorer.score(text, made)[name].fmeasure for text in wanted)
            for made, wanted in zip(MADE, WANTED, strict=True)
        ]
        assert value == pytest.approx(sum(best) / len(best), abs=1e-6)


def test_nist_is_that_of_nltk_on_13a_tokens():
    expected = corpus_nist([[split(text) for text in row] for row in WANTED], [split(text) for text in MADE], n=5)
    assert scored(["nist"])["nist"] == pytest.approx(expected)


def test_nist_of_short_predictions_is_a_number():
    assert scored(["nist"], ["a"], ["yes"], [["yes"]])["nist"] >= 0
    assert scored(["nist"], ["a"], [""], [["yes"]])["nist"] == 0


class NoSynonyms:
    def synsets(self, word, *_):
        return []


def test_meteor_is_that_of_nltk(monkeypatch):
    """Without the files of WordNet: of its three stages, the exact words and the stems."""
    before = meteor_score.__defaults__
    assert any("Corpus" in type(one).__name__ for one in before)  # WordNet, which is read when it is first asked
    without = tuple(NoSynonyms() if "Corpus" in type(one).__name__ else one for one in before)
    monkeypatch.setattr(meteor_score, "__defaults__", without)
    each = [
        meteor_score([split(text) for text in wanted], split(made)) for made, wanted in zip(MADE, WANTED, strict=True)
    ]
    assert scored(["meteor"])["meteor"] == pytest.approx(sum(each) / 3)


def test_meteor_without_wordnet_says_what_to_do(monkeypatch):
    def missing(*_args, **_options):
        raise LookupError("Resource wordnet not found.")

    monkeypatch.setattr("nltk.translate.meteor_score.meteor_score", missing)
    with pytest.raises(ConfigError, match="nltk.downloader wordnet"):
        scored(["meteor"])


def test_exact_match_forgives_space_around_and_takes_any_reference():
    found = scored(["exact_match"], ["a", "b", "c"], [" 4", "six", "x"], [["4"], ["5", "six"], ["y"]])
    assert found["exact_match"] == pytest.approx(2 / 3)


def test_rows_of_one_prompt_are_one_example_with_several_references():
    """As of E2E, where each reference is a row of its own."""
    prompts = [prompt for prompt, row in zip(PROMPTS, WANTED, strict=True) for _ in row]
    made = [text for text, row in zip(MADE, WANTED, strict=True) for _ in row]
    wanted = [[text] for row in WANTED for text in row]
    names = [name for name in SCORES if name != "meteor"]
    assert scored(names, prompts, made, wanted) == scored(names)


def test_batches_and_other_alphabets_change_nothing():
    scores = TextScores(["bleu", "exact_match"])
    for row in range(3):
        scores.update(PROMPTS[row : row + 1], MADE[row : row + 1], WANTED[row : row + 1])
    assert {name: value.item() for name, value in scores.compute().items()} == scored(["bleu", "exact_match"])
    assert scored(["exact_match"], ["été"], ["naïve 猫"], [["naïve 猫"]])["exact_match"] == 1


def test_a_row_needs_a_reference():
    for wrong in ([[]], ["text"]):
        with pytest.raises(ConfigError, match="one or more references"):
            TextScores(["exact_match"]).update(["a"], ["b"], wrong)


def test_a_library_that_lacks_is_named(monkeypatch):
    monkeypatch.setattr(text_scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lightning-peft\[metrics\]"):
        TextScores(["rougeL"])
    assert TextScores(["exact_match"]).names == ["exact_match"]


def test_what_processes_hand_over_is_scored_as_in_one():
    """As torchmetrics joins lists of states: one tensor each."""
    whole, halves = TextScores(["bleu"]), [TextScores(["bleu"]), TextScores(["bleu"])]
    whole.update(PROMPTS, MADE, WANTED)
    halves[0].update(PROMPTS[:1], MADE[:1], WANTED[:1])
    halves[1].update(PROMPTS[1:], MADE[1:], WANTED[1:])
    joined = TextScores(["bleu"])
    joined.update(["x"], ["y"], [["z"]])
    for state in ("texts", "lengths", "parts"):
        setattr(joined, state, torch.cat([torch.cat(getattr(half, state)) for half in halves]))
    joined._update_count = 1
    assert joined.compute() == whole.compute()

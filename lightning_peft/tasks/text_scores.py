"""Scores of generated text against references, over a whole set and all processes.

Rows that have the same prompt are one example with several references, as the meaning representations of E2E have: of such
rows the first prediction counts. Scores are those of these libraries::

    bleu           sacreBLEU (Post, 2018), 13a tokens, 0 to 100          torchmetrics
    rouge1 ...     ROUGE F1 (Lin, 2004), best of the references, 0 to 1  torchmetrics
    chrf, ter      chrF (Popović, 2015), TER (Snover et al., 2006)       torchmetrics
    nist           NIST-5 (Doddington, 2002), 13a tokens                 nltk
    meteor         METEOR (Banerjee and Lavie, 2005), 13a tokens         nltk, with its WordNet
    exact_match    share of predictions equal to a reference, but for the space around them
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import CHRFScore, ROUGEScore, SacreBLEUScore, TranslationEditRate
from typing_extensions import override

from lightning_peft.errors import ConfigError

SCORES = ("bleu", "rouge1", "rouge2", "rougeL", "chrf", "ter", "nist", "meteor", "exact_match")
"""Names of scores."""
_LIBRARIES = {
    "rouge1": ["nltk"],
    "rouge2": ["nltk"],
    "rougeL": ["nltk"],
    "nist": ["nltk", "sacrebleu"],
    "meteor": ["nltk", "sacrebleu"],
}
_Example = tuple[str, list[str]]


def check_libraries(names: Sequence[str]) -> None:
    """Refuse scores whose library is not installed.

    Raises:
        ConfigError: one is lacking.
    """
    for name in names:
        for library in _LIBRARIES.get(name, ()):
            if importlib.util.find_spec(library) is None:
                raise ConfigError(
                    f"the score {name!r} is computed with the library {library}, which is not installed: pip install 'lightning-peft[metrics]'"
                )


class TextScores(Metric):
    """Scores of a set of predictions: see the module's text.

    Args:
        names: which ones.

    Example:
        >>> scores = TextScores(["exact_match"])
        >>> scores.update(["2+2=", "2+3="], ["4", " 6"], [["4"], ["5", "five"]])
        >>> scores.compute()
        {'exact_match': tensor(0.5000)}
    """

    full_state_update = False
    texts: list[Tensor]
    lengths: list[Tensor]
    parts: list[Tensor]

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        check_libraries(names)
        self.names = list(names)
        # Text as bytes, as processes exchange tensors; of each row: prompt, prediction, and then its references.
        self.add_state("texts", [], dist_reduce_fx="cat")
        self.add_state("lengths", [], dist_reduce_fx="cat")
        self.add_state("parts", [], dist_reduce_fx="cat")

    @override
    def update(self, prompts: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Take rows in, each with its prompt, its prediction and one or more references."""
        for prompt, prediction, wanted in zip(prompts, predictions, references, strict=True):
            if isinstance(wanted, str) or not wanted:
                raise ConfigError(f"a row needs a list of one or more references, got {wanted!r}")
            row = [text.encode() for text in (prompt, prediction, *wanted)]
            whole = (
                torch.frombuffer(bytearray(b"".join(row)), dtype=torch.uint8)
                if any(row)
                else torch.empty(0, dtype=torch.uint8)
            )
            self.texts.append(whole.to(self.device))
            self.lengths.append(torch.tensor([len(text) for text in row], device=self.device))
            self.parts.append(torch.tensor([len(row)], device=self.device))

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return each score by name."""
        examples = list(self._examples().values())
        made = {name: _SCORERS[name] for name in self.names if not name.startswith("rouge")}
        values = {name: float(scorer(examples)) for name, scorer in made.items()}
        rouge = [name for name in self.names if name.startswith("rouge")]
        if rouge:
            values |= _rouge(examples, rouge)
        return {name: torch.tensor(values[name], device=self.device) for name in self.names}

    def _examples(self) -> dict[str, _Example]:
        """Return prediction and references by prompt."""
        whole = _joined(self.texts).cpu().numpy().tobytes()
        lengths, examples, place, index = _joined(self.lengths).tolist(), dict[str, _Example](), 0, 0
        for count in _joined(self.parts).tolist():
            row = []
            for length in lengths[index : index + count]:
                row.append(whole[place : place + length].decode())
                place += length
            index += count
            kept = examples.setdefault(row[0], (row[1], []))[1]
            kept.extend(text for text in row[2:] if text not in kept)
        return examples


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    return torch.cat(state) if isinstance(state, list) else state  # processes hand over one tensor


def _predictions(examples: Sequence[_Example]) -> list[str]:
    return [prediction for prediction, _ in examples]


def _references(examples: Sequence[_Example]) -> list[list[str]]:
    return [references for _, references in examples]


def _by(metric: Callable[[], Any], scale: float = 1.0) -> Callable[[Sequence[_Example]], float]:
    def score(examples: Sequence[_Example]) -> float:
        return scale * float(metric()(_predictions(examples), _references(examples)))

    return score


def _rouge(examples: Sequence[_Example], names: Sequence[str]) -> dict[str, float]:
    found = ROUGEScore(rouge_keys=tuple(names), accumulate="best")(_predictions(examples), _references(examples))
    return {name: float(found[f"{name}_fmeasure"]) for name in names}


def _exact_match(examples: Sequence[_Example]) -> float:
    right = [prediction.strip() in [text.strip() for text in wanted] for prediction, wanted in examples]
    return float(sum(right) / len(right))


def _tokens(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return str(Tokenizer13a()(text)).split()


def _nist(examples: Sequence[_Example]) -> float:
    from nltk.translate.nist_score import corpus_nist

    references = [[_tokens(text) for text in wanted] for wanted in _references(examples)]
    predictions = [_tokens(text) for text in _predictions(examples)]
    # nltk divides by the number of n-grams; where there are no long ones, shorter ones are what there is.
    longest = min(5, max((len(tokens) for tokens in predictions), default=0))
    return float(corpus_nist(references, predictions, n=longest)) if longest else 0.0


def _meteor(examples: Sequence[_Example]) -> float:
    from nltk.translate.meteor_score import meteor_score

    try:
        scores = [
            meteor_score([_tokens(text) for text in wanted], _tokens(prediction)) for prediction, wanted in examples
        ]
    except LookupError as error:
        raise ConfigError(
            "METEOR counts synonyms of WordNet, which nltk does not find: python -m nltk.downloader wordnet, or leave 'meteor' out"
        ) from error
    return float(sum(scores) / len(scores))


_SCORERS: dict[str, Callable[[Sequence[_Example]], float]] = {
    "bleu": _by(SacreBLEUScore, 100.0),
    "chrf": _by(CHRFScore, 100.0),
    "ter": _by(TranslationEditRate, 100.0),
    "nist": _nist,
    "meteor": _meteor,
    "exact_match": _exact_match,
}

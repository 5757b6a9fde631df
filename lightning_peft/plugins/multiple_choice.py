"""Multiple choice: is the right answer the likeliest one?

Each choice is scored by its log-likelihood after the prompt, as in Brown et al., "Language Models are Few-Shot Learners", 2020
(arXiv:2005.14165), section 2.4, and in lm-evaluation-harness::

    acc       argmax_c  log p(c | prompt)
    acc_norm  argmax_c  log p(c | prompt) / characters of c
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn
from typing_extensions import override

from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.live_models import load_tokenizer, longest_input, measuring
from lightning_peft.evaluation.log_likelihood import encode_pair, score
from lightning_peft.field_checks import is_whole
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import EvalTask
from lightning_peft.source_rows.reading import Row, first_rows
from lightning_peft.source_rows.templates import filled


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(EvalTask):
    """Accuracy at multiple choice by log-likelihood, of a causal language model. The defaults read questions such as ARC's.

    Figures: ``acc``, ``acc_norm``, ``log_likelihood`` (of the right choice, mean, in nats), ``examples``.
    """

    name: ClassVar[str] = "multiple_choice"

    path: str
    """A ``.jsonl`` or ``.parquet`` file, one question a row."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    prompt: str = "Question: {question}\nAnswer:"
    """What stands before a choice; ``{field}`` is a field of the row."""
    choices: str = "choices"
    """Field with the list of choices."""
    label: str = "label"
    """Field with the right choice: its number from 0 on, or its text."""
    delimiter: str = " "
    """What stands between prompt and choice."""
    metric: Literal["acc", "acc_norm"] = "acc_norm"
    """The figure that models are compared by: choices by their likelihood, or by that a character."""
    max_examples: int | None = None
    """Read only so many questions; all if None."""
    batch_size: int = 16
    """Choices in a batch."""
    max_length: int | None = None
    """Tokens that the model takes; what it says itself if None."""

    def __post_init__(self) -> None:
        if self.metric not in ("acc", "acc_norm"):
            raise ConfigError(f"MultipleChoice metric must be acc or acc_norm, got {self.metric!r}")
        for label in ("batch_size", "max_examples", "max_length"):
            value = getattr(self, label)
            if not is_whole(value, 1) and (value is not None or label == "batch_size"):
                raise ConfigError(f"MultipleChoice {label} must be at least 1, got {value!r}")

    @override
    def compared_by(self) -> tuple[str, bool]:
        return self.metric, True

    @override
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        tokenizer = load_tokenizer(self.tokenizer)
        rows = first_rows(self.path, self.max_examples)
        pairs, questions = [], []
        for row in rows:
            choices, right = self._choices(row)
            context = filled(self.prompt, row)
            pairs += [encode_pair(tokenizer, context, self.delimiter + choice) for choice in choices]
            questions.append((choices, right))
        with measuring(model):
            longest = self.max_length or longest_input(model, tokenizer)
            scored = iter(score(model, pairs, batch_size=self.batch_size, max_length=longest))
        plain, normed, likelihood = 0, 0, 0.0
        for choices, right in questions:
            totals = [next(scored).total for _ in choices]
            by_character = [total / max(1, len(choice)) for total, choice in zip(totals, choices, strict=True)]
            plain += totals.index(max(totals)) == right
            normed += by_character.index(max(by_character)) == right
            likelihood += totals[right]
        count = len(rows)
        return {
            "acc": plain / count,
            "acc_norm": normed / count,
            "log_likelihood": likelihood / count,
            "examples": float(count),
        }

    def _choices(self, row: Row) -> tuple[list[str], int]:
        choices, label = row.field(self.choices), row.field(self.label)
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
            raise ConfigError(f"{row.where}: {self.choices!r} must be a list of two texts or more, got {choices!r}")
        right = _position(label, choices)
        if right is None:
            raise ConfigError(
                f"{row.where}: {self.label!r} must be one of the {len(choices)} choices or its number from 0 on, got {label!r}"
            )
        return choices, right


def _position(label: Any, choices: list[str]) -> int | None:
    if is_whole(label, 0) and label < len(choices):
        return int(label)
    return choices.index(label) if label in choices else None


@hookimpl
def register_eval_tasks() -> list[type[EvalTask]]:
    """Register multiple choice."""
    return [MultipleChoice]

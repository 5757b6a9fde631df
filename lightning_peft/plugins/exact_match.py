"""Exact match: does a model write the right answer?

The first match of a regular expression in what it writes is compared with the answer, as for GSM8K (Cobbe et al., 2021,
arXiv:2110.14168) and SVAMP (Patel et al., 2021, arXiv:2103.07191).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn
from typing_extensions import override

from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.generating import continuations
from lightning_peft.evaluation.live_models import load_tokenizer, measuring
from lightning_peft.field_checks import is_whole
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import EvalTask
from lightning_peft.source_rows.reading import first_rows
from lightning_peft.source_rows.templates import filled


@dataclass(frozen=True, kw_only=True)
class ExactMatch(EvalTask):
    """Share of prompts that a causal language model answers exactly, taking the likeliest token each time. The defaults read SVAMP.

    Figures: ``exact_match``, ``answered`` (what is written has an answer in it), ``examples``.
    """

    name: ClassVar[str] = "exact_match"

    path: str
    """A ``.jsonl``, ``.csv`` or ``.parquet`` file, one question a row."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    prompt: str = "Question: {Body} {Question}\nAnswer:"
    """What the model continues; ``{field}`` is a field of the row."""
    answer: str = "Answer"
    """Field with the right answer, a text or a number."""
    extract: str = r"-?\d[\d,]*(?:\.\d+)?"
    """Regular expression of an answer in what is written; of its first match the first group, if it has one."""
    compare: Literal["number", "text"] = "number"
    """Whether answers are compared as numbers, or as texts without spaces at their ends."""
    stop: list[str] | tuple[str, ...] = ("\n",)
    """Texts that end what is written."""
    max_new_tokens: int = 64
    """Most tokens that are written."""
    max_examples: int | None = None
    """Read only so many questions; all if None."""
    batch_size: int = 16
    """Questions in a batch."""

    def __post_init__(self) -> None:
        for label in ("batch_size", "max_new_tokens", "max_examples"):
            value = getattr(self, label)
            if not is_whole(value, 1) and (value is not None or label != "max_examples"):
                raise ConfigError(f"ExactMatch {label} must be at least 1, got {value!r}")
        if self.compare not in ("number", "text"):
            raise ConfigError(f"ExactMatch compare must be number or text, got {self.compare!r}")
        try:
            re.compile(self.extract)
        except re.error as error:
            raise ConfigError(f"ExactMatch extract={self.extract!r} is no regular expression: {error}") from error

    @override
    def compared_by(self) -> tuple[str, bool]:
        return "exact_match", True

    @override
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        tokenizer = load_tokenizer(self.tokenizer)
        rows = first_rows(self.path, self.max_examples)
        prompts, wanted = (
            [filled(self.prompt, row) for row in rows],
            [self._value(row.field(self.answer)) for row in rows],
        )
        for row, value in zip(rows, wanted, strict=True):
            if value is None:
                raise ConfigError(
                    f"{row.where}: {self.answer!r} must be a {self.compare}, got {row.field(self.answer)!r}"
                )
        with measuring(model):
            written = continuations(
                model,
                tokenizer,
                prompts,
                max_new_tokens=self.max_new_tokens,
                stop=self.stop,
                batch_size=self.batch_size,
            )
        found = [self.found_in(text) for text in written]
        right = sum(one is not None and one == value for one, value in zip(found, wanted, strict=True))
        return {
            "exact_match": right / len(rows),
            "answered": sum(one is not None for one in found) / len(rows),
            "examples": float(len(rows)),
        }

    def found_in(self, text: str) -> float | str | None:
        """Return the answer in what a model wrote, or None where there is none.

        Example:
            >>> ExactMatch(path="x.jsonl", tokenizer="x").found_in("That makes 1,051.0 dollars, or 3.")
            1051.0
        """
        match = re.search(self.extract, text)
        found = None if match is None else match[1] if match.re.groups else match[0]
        return None if found is None else self._value(found)

    def _value(self, answer: Any) -> float | str | None:
        if self.compare == "text":
            return str(answer).strip()
        try:
            return float(str(answer).replace(",", ""))
        except ValueError:
            return None


@hookimpl
def register_eval_tasks() -> list[type[EvalTask]]:
    """Register exact match."""
    return [ExactMatch]

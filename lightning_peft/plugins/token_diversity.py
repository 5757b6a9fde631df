"""Token diversity: how many different texts a model writes.

Biderman et al., "LoRA Learns Less and Forgets Less", 2024 (arXiv:2405.09673), section 4.4, count the different texts among 50 samples
of one prompt; Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016 (arXiv:1510.03055), the
different n-grams among all::

    unique      different samples of a prompt / samples, mean over prompts
    distinct_n  different n-grams of the samples of a prompt / n-grams, mean over prompts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.generating import continuations
from lightning_peft.evaluation.live_models import load_tokenizer, measuring
from lightning_peft.field_checks import is_number, is_whole
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import EvalTask
from lightning_peft.source_rows.reading import first_rows
from lightning_peft.source_rows.templates import filled


@dataclass(frozen=True, kw_only=True)
class TokenDiversity(EvalTask):
    """Diversity of what a causal language model writes after the same prompt, over several samples.

    The samples are drawn from the same seed each time, and the random numbers of a run go on as if none had been drawn. Figures:
    ``unique`` (share of different texts), ``unique_texts`` (their number), ``distinct_1``, ``distinct_2``, ``distinct_3``.
    """

    name: ClassVar[str] = "token_diversity"

    tokenizer: str
    """Folder or hub id of the tokenizer."""
    prompts: list[str] | tuple[str, ...] = ()
    """The prompts; or give a ``path``."""
    path: str | None = None
    """A ``.jsonl``, ``.csv`` or ``.parquet`` file, one prompt a row."""
    template: str = "{prompt}"
    """How a row becomes a prompt."""
    max_examples: int | None = None
    """Read only so many prompts; all if None."""
    samples: int = 50
    """Samples of each prompt, as in the paper."""
    temperature: float = 1.0
    """Of sampling; must be positive."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of so much probability."""
    max_new_tokens: int = 32
    """Most tokens of a sample."""
    stop: list[str] | tuple[str, ...] = ()
    """Texts that end a sample."""
    batch_size: int = 50
    """Samples in a batch."""
    seed: int = 0
    """Where sampling starts."""

    def __post_init__(self) -> None:
        if bool(self.prompts) == (self.path is not None):
            raise ConfigError(
                f"TokenDiversity needs either prompts or a path, got prompts={self.prompts!r} and path={self.path!r}"
            )
        for label, least in (("samples", 2), ("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
            if not is_whole(getattr(self, label), least):
                raise ConfigError(f"TokenDiversity {label} must be at least {least}, got {getattr(self, label)!r}")
        if not is_number(self.temperature) or not self.temperature > 0:
            raise ConfigError(f"TokenDiversity temperature must be positive, got {self.temperature!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"TokenDiversity top_p must lie in (0, 1], got {self.top_p!r}")

    @override
    def compared_by(self) -> tuple[str, bool]:
        return "unique", True

    @override
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        tokenizer = load_tokenizer(self.tokenizer)
        prompts = list(self.prompts)
        if self.path is not None:
            prompts = [filled(self.template, row) for row in first_rows(self.path, self.max_examples)]
        with measuring(model, self.seed):
            written = continuations(
                model,
                tokenizer,
                [prompt for prompt in prompts for _ in range(self.samples)],
                max_new_tokens=self.max_new_tokens,
                stop=self.stop,
                batch_size=self.batch_size,
                temperature=self.temperature,
                top_p=self.top_p,
            )
        groups = [written[start : start + self.samples] for start in range(0, len(written), self.samples)]
        unique = sum(len(set(texts)) for texts in groups) / len(groups)
        found = {"unique": unique / self.samples, "unique_texts": unique}
        tokens = [[tokenizer.encode(text, add_special_tokens=False) for text in texts] for texts in groups]
        for n in (1, 2, 3):
            found[f"distinct_{n}"] = sum(distinct(texts, n) for texts in tokens) / len(tokens)
        return found


def distinct(texts: list[list[Any]], n: int) -> float:
    """Return the share of different n-grams among those of all texts; 0 where there are none.

    Example:
        >>> distinct([[1, 2, 1, 2], [1, 2]], 2)
        0.5
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


@hookimpl
def register_eval_tasks() -> list[type[EvalTask]]:
    """Register token diversity."""
    return [TokenDiversity]

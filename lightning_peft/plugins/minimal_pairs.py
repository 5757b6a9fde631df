"""Minimal pairs: which of two sentences does a model find likelier?

Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", 2020 (arXiv:1912.00582)::

    acc = share of pairs with  log p(good) > log p(bad)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.live_models import load_tokenizer, longest_input, measuring
from lightning_peft.evaluation.log_likelihood import encode_pair, score
from lightning_peft.field_checks import is_whole
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import EvalTask
from lightning_peft.source_rows.reading import first_rows
from lightning_peft.source_rows.templates import filled


@dataclass(frozen=True, kw_only=True)
class MinimalPairs(EvalTask):
    """Share of pairs of sentences of which a causal language model finds the good one likelier. The defaults read BLiMP.

    Figures: ``acc``, ``acc/<group>`` for each group of pairs, ``margin`` (log p(good) - log p(bad), mean, in nats), ``examples``.
    """

    name: ClassVar[str] = "minimal_pairs"

    path: str
    """A ``.jsonl``, ``.csv`` or ``.parquet`` file, one pair a row."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    good: str = "{good}"
    """The sentence that should be likelier; ``{field}`` is a field of the row."""
    bad: str = "{bad}"
    """The other one."""
    group: str | None = "uid"
    """Field with the group that a pair belongs to; None for no figures of groups."""
    examples_per_group: int | None = None
    """Use only so many pairs of each group; all if None."""
    max_examples: int | None = None
    """Read only so many pairs; all if None."""
    batch_size: int = 32
    """Sentences in a batch."""
    max_length: int | None = None
    """Tokens that the model takes; what it says itself if None."""

    def __post_init__(self) -> None:
        for label in ("batch_size", "examples_per_group", "max_examples", "max_length"):
            value = getattr(self, label)
            if not is_whole(value, 1) and (value is not None or label == "batch_size"):
                raise ConfigError(f"MinimalPairs {label} must be at least 1, got {value!r}")
        if self.examples_per_group is not None and self.group is None:
            raise ConfigError(f"MinimalPairs examples_per_group={self.examples_per_group} needs a group, got None")

    @override
    def compared_by(self) -> tuple[str, bool]:
        return "acc", True

    @override
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        tokenizer = load_tokenizer(self.tokenizer)
        groups: list[str] = []
        pairs = []
        for row in first_rows(self.path, self.max_examples):
            group = str(row.field(self.group)) if self.group else ""
            if self.examples_per_group is not None and groups.count(group) >= self.examples_per_group:
                continue
            groups.append(group)
            pairs += [encode_pair(tokenizer, "", filled(template, row)) for template in (self.good, self.bad)]
        with measuring(model):
            longest = self.max_length or longest_input(model, tokenizer)
            totals = [one.total for one in score(model, pairs, batch_size=self.batch_size, max_length=longest)]
        margins = [good - bad for good, bad in zip(totals[::2], totals[1::2], strict=True)]
        found = {"acc": _share(margins), "margin": sum(margins) / len(margins), "examples": float(len(margins))}
        if self.group:
            for group in dict.fromkeys(groups):
                own = [margin for margin, its in zip(margins, groups, strict=True) if its == group]
                found[f"acc/{group}"] = _share(own)
        return found


def _share(margins: list[float]) -> float:
    return sum(margin > 0 for margin in margins) / len(margins)


@hookimpl
def register_eval_tasks() -> list[type[EvalTask]]:
    """Register minimal pairs."""
    return [MinimalPairs]

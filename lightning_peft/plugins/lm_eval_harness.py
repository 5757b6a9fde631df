"""Any task of lm-evaluation-harness, on the model as it stands; the extra ``eval`` installs it.

Biderman et al., "LoRA Learns Less and Forgets Less", 2024 (arXiv:2405.09673) measure forgetting by three of them: ``hellaswag``,
``winogrande`` and ``arc_challenge``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.harness import SEED, directions_of, figures_of, run_harness
from lightning_peft.field_checks import check_switches, is_whole
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import EvalTask


@dataclass(frozen=True, kw_only=True)
class LMEvalHarness(EvalTask):
    """A task of lm-evaluation-harness by its name, with a causal language model of transformers.

    Figures are those of the harness: ``acc``, ``acc_norm``, ``exact_match,strict-match``, ...; those of the tasks in a group as
    ``<task>/acc``.
    """

    name: ClassVar[str] = "lm_eval"

    task: str
    """Name of the task or group, such as ``arc_challenge``."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    include_path: str | None = None
    """Folder of task files (YAML) of your own, which may read local data; looked into first."""
    metric: str = "acc"
    """The figure that models are compared by."""
    higher_is_better: bool = True
    """Whether more of it is better; refused where the harness says otherwise."""
    num_fewshot: int | None = None
    """Examples in the prompt; what the task says if None."""
    limit: int | None = None
    """Use only so many examples of each task; all if None."""
    batch_size: int = 8
    """Requests in a batch."""
    max_length: int | None = None
    """Tokens that the model takes; what it says itself if None."""
    chat_template: bool = False
    """Put prompts into the chat template of the tokenizer."""
    seed: int = SEED
    """For the choice of few-shot examples, and for sampling."""

    def __post_init__(self) -> None:
        check_switches(self)
        for label, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("max_length", 1), ("seed", 0)):
            value = getattr(self, label)
            if not is_whole(value, least) and (value is not None or label in ("batch_size", "seed")):
                raise ConfigError(f"LMEvalHarness {label} must be at least {least}, got {value!r}")

    @override
    def compared_by(self) -> tuple[str, bool]:
        return self.metric, self.higher_is_better

    @override
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        results = run_harness(
            model,
            self.task,
            self.tokenizer,
            include_path=self.include_path,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            batch_size=self.batch_size,
            max_length=self.max_length,
            chat_template=self.chat_template,
            seed=self.seed,
        )
        said = directions_of(results, self.task).get(self.metric.partition(",")[0], self.higher_is_better)
        if said != self.higher_is_better:
            raise ConfigError(
                f"LMEvalHarness higher_is_better={self.higher_is_better} for {self.metric!r}, of which {self.task!r} says {said}"
            )
        return figures_of(results, self.task)


@hookimpl
def register_eval_tasks() -> list[type[EvalTask]]:
    """Register the harness."""
    return [LMEvalHarness]

"""Language models: perplexity, and text that is generated from prompts and scored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_peft.batch_parts import IGNORED
from lightning_peft.errors import ConfigError, did_you_mean
from lightning_peft.tasks.task import Task, check_names
from lightning_peft.tasks.text_scores import SCORES, TextScores, check_libraries

REFERENCES = "references"
"""Column of a batch with the texts that are right for each row: a list of lists."""
_SCORED = "text"
_LENGTH = 64
"""Tokens that are generated where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class _TextTask(Task):
    columns: ClassVar[tuple[str, ...]] = (REFERENCES,)
    predicts_tokens: ClassVar[bool] = True
    fills_before: ClassVar[bool] = True
    """Whether what is generated follows the prompt, so that short prompts are filled up before it."""

    metrics: Sequence[str] = ()
    """Scores of generated text: ``bleu``, ``rouge1``, ``rouge2``, ``rougeL``, ``chrf``, ``ter``, ``nist``, ``meteor``, ``exact_match``.
    Perplexity and the share of tokens that are predicted right are always measured."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, for generated text."""
    generation: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": _LENGTH, "do_sample": False})
    """How text is generated: settings of transformers' ``GenerationConfig``, such as ``num_beams``. Up to 64 new tokens where neither
    ``max_new_tokens`` nor ``max_length`` is among them."""
    generate_in: Sequence[str] = ("val", "test")
    """Where text is generated: ``val``, ``test`` or both. Generation costs a forward a token."""

    def __post_init__(self) -> None:
        label = type(self).__name__
        check_names(self, "metrics", self.metrics, SCORES)
        check_names(self, "generate_in", self.generate_in, ("val", "test"))
        check_libraries(self.metrics)
        if self.metrics and not self.tokenizer:
            raise ConfigError(
                f"{label} metrics={list(self.metrics)} are of text, which needs a tokenizer; give tokenizer='...'"
            )
        from transformers import GenerationConfig

        known = list(GenerationConfig().to_dict())
        for name in self.generation:
            if name not in known:
                raise ConfigError(f"{label} generation has no setting {name!r}{did_you_mean(name, known)}")

    @override
    def make_metrics(self, stage: str) -> dict[str, Metric]:
        return {_SCORED: TextScores(self.metrics)} if self.metrics and stage in self.generate_in else {}

    @override
    def update(self, metrics: Mapping[str, Metric], model: nn.Module, outputs: Any, batch: Any) -> None:
        if _SCORED not in metrics:
            return
        if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
            raise ConfigError(
                f"{type(self).__name__} generates text for batches with 'input_ids' and 'labels', and found a {type(batch).__name__} without"
            )
        tokenizer = _tokenizer(str(self.tokenizer))
        prompts, answers = self.prompts(batch)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        references = batch.get(REFERENCES) or [[text] for text in texts]
        asked = [tokenizer.decode(ids) for ids in prompts]
        metrics[_SCORED].update(asked, self._generated(model, tokenizer, prompts), references)

    @abstractmethod
    def prompts(self, batch: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tokens of the prompt and of the answer of each row, each (seq,)."""

    def _generated(self, model: Any, tokenizer: Any, prompts: Sequence[Tensor]) -> list[str]:
        pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
        longest = max(len(ids) for ids in prompts)
        ids = torch.full((len(prompts), longest), pad, device=prompts[0].device)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(
            prompts
        ):  # what is generated follows the last token, so short ones are filled up before
            where = slice(longest - len(one), None) if self.fills_before else slice(0, len(one))
            ids[row, where], mask[row, where] = one, 1
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Sharded layers are gathered in every forward, which all processes must do as often.
        options = {"synced_gpus": True} if several and torch.distributed.get_world_size() > 1 else {}
        # What transformers takes for the length otherwise counts the prompt too, and may leave no room behind it.
        length = {} if {"max_length", "max_new_tokens"} & self.generation.keys() else {"max_new_tokens": _LENGTH}
        with torch.no_grad():
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                pad_token_id=pad,
                **{"do_sample": False, **length, **self.generation},
                **options,
            )
        answers = made[:, longest:] if self.fills_before else made
        return [str(text) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


@dataclass(frozen=True, kw_only=True)
class CausalLMTask(_TextTask):
    """A causal language model: ``perplexity``, ``token_accuracy``, and scores of what it generates.

    A batch has ``input_ids`` and ``labels`` (batch, seq). Labels of -100 are not predicted; where text is generated, the last stretch of
    tokens that are is the answer, and all before it the prompt.

    Example:
        >>> CausalLMTask(metrics=["bleu"], tokenizer="my-folder", generation={"num_beams": 10, "max_new_tokens": 64}).generate_in
        ('val', 'test')
    """

    @override
    def prompts(self, batch: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        prompts, answers = [], []
        mask = batch.get("attention_mask")
        for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            here = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.dim() != 2 else mask[row].bool()
            ids, wanted = ids[here], labels[here] != IGNORED
            places = wanted.nonzero().flatten()
            end = int(places[-1]) + 1 if len(places) else 0
            before = (~wanted[:end]).nonzero().flatten()
            start = int(before[-1]) + 1 if len(before) else 0
            if not start:
                raise ConfigError(
                    f"CausalLMTask metrics={list(self.metrics)} are of answers to prompts, but row {row} of a batch "
                    f"{'has no prompt: the labels of its first tokens are not -100' if end else 'has no answer: all its labels are -100'}; "
                    "give data of prompts and answers, or leave metrics out"
                )
            prompts.append(ids[:start])
            answers.append(ids[start:end])
        return prompts, answers


@dataclass(frozen=True, kw_only=True)
class Seq2SeqTask(_TextTask):
    """A text-to-text model: ``perplexity``, ``token_accuracy``, and scores of what it generates for ``input_ids``.

    A batch has ``input_ids``, ``attention_mask`` and ``labels`` (batch, seq), the answer, filled up with -100.
    """

    fills_before: ClassVar[bool] = False

    @override
    def prompts(self, batch: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        mask = batch.get("attention_mask")
        rows = enumerate(batch["input_ids"])
        prompts = [ids if mask is None else ids[mask[row].bool()] for row, ids in rows]
        return prompts, [labels[labels != IGNORED] for labels in batch["labels"]]


@lru_cache(maxsize=4)
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer could be loaded from {path!r}: {error}") from error

"""Questions with answers to choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.data.collating import padded
from lightning_peft.data.examples import Example
from lightning_peft.data.tokenized import TokenizedDataModule
from lightning_peft.errors import BadRowError
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import Row


class MultipleChoiceDataModule(TokenizedDataModule):
    """A question and some answers, one of which is right, for the ``ForMultipleChoice`` models of transformers.

    Batches are ``{"input_ids", "attention_mask"}``, each (batch, choices, longest), and ``labels`` (batch,); where the
    tokenizer tells question and answer apart and the model takes that, as BERT does, also ``token_type_ids``. All rows have as many choices.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        train: file, folder or hub id to train on, or several by the names of adapters.
        val: file to evaluate on, or several by name.
        question_field: the field of the question.
        choices_field: the field of the answers: a list, or several fields of one answer each.
        label_field: the field with the right one: its number from 0, or its text. Where choices have labels of their own, as
            ARC's have on the hub (``{"text": [...], "label": ["A", ...]}``), one of those.
        num_choices: how many answers a row has; those of the first row if None.
        max_length: tokens of a question with an answer; longer ones are cut, or refused: see ``on_bad_rows``.
        options: arguments of :class:`RowsDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        *,
        question_field: str = "question",
        choices_field: str | list[str] = "choices",
        label_field: str = "label",
        num_choices: int | None = None,
        max_length: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, train, val, **options)
        self.check_whole(1, max_length=max_length)
        if num_choices is not None:
            self.check_whole(2, num_choices=num_choices)
        self.question_field, self.choices_field, self.label_field = question_field, choices_field, label_field
        self.num_choices, self.max_length = num_choices, max_length

    @override
    def prepare(self) -> None:
        super().prepare()
        self.check_room(self.max_length, pair=True)
        if self.num_choices is None:
            name, source = next(iter(self._train.items()))
            for row in self.read(name, source, BadRows("report")):
                try:
                    self.num_choices = len(self._choices(row))
                except BadRowError:
                    continue
                return

    @override
    def example(self, row: Row, bad_rows: BadRows) -> Example:
        """Return the tokens of the question with each answer, and the number of the right one.

        Raises:
            BadRowError: a field is missing, or there are fewer or more answers than in other rows, or none of that number.
        """
        question, choices = row.text(self.question_field), self._choices(row)
        if self.num_choices is not None and len(choices) != self.num_choices:
            raise BadRowError(
                "malformed", row.where, f"has {len(choices)} choices, and num_choices is {self.num_choices}"
            )
        label = self._right(choices, row)
        tokens = [self.encoded(question, choice, verbose=False) for choice in choices]
        longest = max((one["input_ids"] for one in tokens), key=len)
        if len(longest) > self.max_length:
            # The answer is what the choices differ in, so the question is cut.
            only = {"truncation": "only_first", "max_length": self.max_length}
            try:
                tokens = [self.encoded(question, choice, **only) for choice in choices]
            except Exception as error:  # the library of tokenizers has no error of its own
                raise BadRowError("empty", row.where, f"has an answer of more than {self.max_length} tokens") from error
            if any(len(one["input_ids"]) > self.max_length for one in tokens):
                raise BadRowError("empty", row.where, f"has an answer of more than {self.max_length} tokens")
            self.cut(longest, self.max_length, row, bad_rows)
        return {**{name: [one[name] for one in tokens] for name in tokens[0]}, "labels": label}

    def _right(self, choices: list[str], row: Row) -> int:
        """Return the number of the right choice."""
        label, given = row.field(self.label_field), row.values.get(str(self.choices_field))
        names = given.get("label") if isinstance(given, dict) else None
        own = names if isinstance(names, list) and len(names) == len(choices) else []  # "1" may be the first of them
        found = [number for number, name in enumerate(own) if str(name) == str(label)]
        if not found:
            found = [number for number, choice in enumerate(choices) if choice == label]
            number = int(label) if isinstance(label, str) and label.isdecimal() else label
            if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(choices):
                found.append(number)
        if len(set(found)) != 1:
            what = "which is the text of one and the number of another" if found else "which is none of them"
            raise BadRowError(
                "malformed", row.where, f"has {label!r} as the right one of {len(choices)} choices, {what}"
            )
        return found[0]

    @override
    def text_of(self, row: Row) -> str:
        """Return the question with its choices: questions such as "Which is true?" differ in these."""
        try:
            return " ".join([str(row.values.get(self.question_field)), *self._choices(row)])
        except BadRowError:
            return super().text_of(row)

    def _choices(self, row: Row) -> list[str]:
        if isinstance(self.choices_field, list):
            return [row.text(name) for name in self.choices_field]
        choices = row.field(self.choices_field)
        if isinstance(choices, dict):  # ARC and OpenBookQA as the hub has them: {"text": [...], "label": [...]}
            choices = choices.get("text")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
            raise BadRowError("malformed", row.where, f"has no list of texts as {self.choices_field!r}: {choices!r}")
        if not all(one.strip() for one in choices):
            raise BadRowError("empty", row.where, "has a choice without text")
        return choices

    @override
    def collator(self) -> Callable[[list[Example]], dict[str, Any]]:
        return ChoiceCollator(self.pad_id, dict(self.fillers)["token_type_ids"], self.unused)

    @override
    def shown(self, example: Example) -> list[tuple[str, bool]]:
        """Return the question with each answer on a line; the right one is what is predicted."""
        right = int(example["labels"])
        lines = [
            (self.loaded_tokenizer.decode(ids), number == right) for number, ids in enumerate(example["input_ids"])
        ]
        return [(f"{text}\n", chosen) for text, chosen in lines]


@dataclass(frozen=True)
class ChoiceCollator:
    """Batches of several token sequences a row."""

    pad: int
    pad_type: int = 0
    unused: tuple[str, ...] = ()

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids`` (batch, choices, longest), and ``labels`` (batch,)."""

        def rows(name: str) -> list[Tensor]:
            return [torch.tensor(ids) for example in examples for ids in example[name]]

        columns = {"input_ids": padded(rows("input_ids"), self.pad)}
        columns["attention_mask"] = padded([torch.ones_like(row) for row in rows("input_ids")], 0)
        if "token_type_ids" in examples[0].keys() - set(self.unused):
            columns["token_type_ids"] = padded(rows("token_type_ids"), self.pad_type)
        shape = (len(examples), len(examples[0]["input_ids"]), -1)
        labels = torch.tensor([int(example["labels"]) for example in examples])
        return {**{name: column.view(shape) for name, column in columns.items()}, "labels": labels}

"""Texts with a label, and texts with a label for every word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from typing_extensions import override

from lightning_peft.batch_parts import IGNORED
from lightning_peft.data.chat import check_fast
from lightning_peft.data.collating import SequenceCollator
from lightning_peft.data.examples import Example
from lightning_peft.data.tokenized import TokenizedDataModule
from lightning_peft.errors import BadRowError, ConfigError, did_you_mean
from lightning_peft.field_checks import is_number
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import Row


class LabelledDataModule(TokenizedDataModule):
    """A data module whose rows have labels by name or by number.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        train: file, folder or hub id to train on, or several by the names of adapters.
        val: file to evaluate on, or several by name.
        label_field: the field of the label.
        labels: names of the labels, in the order of their numbers; found in the training rows if None: words in alphabetical
            order, numbers as they are. A number in a row is the label of that name where names are numbers, its place among them
            elsewhere; it may be written as a text, as it is in a ``.csv``, or be true or false.
        max_length: tokens of a row; longer ones are cut at the end, or refused: see ``on_bad_rows``.
        options: arguments of :class:`RowsDataModule`.
    """

    label_names: list[str]
    """Names of the labels, in the order of their numbers; empty before ``setup`` where they are not given."""

    def __init__(
        self,
        tokenizer: str,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        *,
        label_field: str = "label",
        labels: list[str] | None = None,
        max_length: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, train, val, **options)
        self.check_whole(1, max_length=max_length)
        if labels is not None and (not labels or len(set(labels)) < len(labels)):
            raise ConfigError(f"{type(self).__name__} labels must be different names, got {labels!r}")
        if labels is None and self.streaming:
            raise ConfigError("streaming=True never reads all rows, in which labels are found; give labels=")
        self.label_field, self.max_length, self.label_names = label_field, max_length, list(map(str, labels or ()))

    @property
    def num_labels(self) -> int:
        """How many labels there are; known after ``setup``."""
        return len(self.label_names)

    @override
    def prepare(self) -> None:
        super().prepare()
        if not self.label_names:
            self.label_names = self._found()

    def _found(self) -> list[str]:
        values: set[Any] = set()
        for name, source in self._train.items():
            for row in self.read(name, source, BadRows("report")):
                values.update(self.labels_in(row.values.get(self.label_field)))
        return named_labels(values, self.label_field, ", ".join(self._train.values()))

    def labels_in(self, value: Any) -> Iterable[Any]:
        """Return the labels in a label field; values that are none are left out."""
        return [value] if isinstance(value, str) or number_of(value) is not None else []

    def label_id(self, value: Any, row: Row) -> int:
        """Return the number of a label.

        Raises:
            BadRowError: it is none.
        """
        number = number_of(value)
        name = value if isinstance(value, str) else None if number is None else str(number)
        if name in self.label_names:
            return self.label_names.index(name)
        words = all(number_of(one) is None for one in self.label_names)
        if words and number is not None and 0 <= number < len(self.label_names):
            return number
        near = did_you_mean(value, self.label_names) if isinstance(value, str) else ""
        names = ", ".join(self.label_names[:10]) + (", ..." if len(self.label_names) > 10 else "")
        raise BadRowError(
            "malformed", row.where, f"has the unknown label {value!r}{near or '.'} The labels are: {names}"
        )


def number_of(value: Any) -> int | None:
    """Return a whole number that is written as one, as a text, or as true or false; None for anything else.

    Example:
        >>> [number_of(value) for value in (3, "12", 2.0, True, "-1", "007", "x", 0.5, None)]
        [3, 12, 2, 1, -1, None, None, None, None]
    """
    if isinstance(value, (int, float)):
        return int(value) if value == value // 1 else None
    if not isinstance(value, str) or not value.removeprefix("-").isdecimal():
        return None
    return int(value) if str(int(value)) == value else None


def named_labels(values: Iterable[Any], field: str, source: str) -> list[str]:
    """Return the names of the labels that are in a field.

    Raises:
        ConfigError: there are none, or words and numbers.

    Example:
        >>> named_labels({"b", "a"}, "label", "a.jsonl"), named_labels({0, "2"}, "label", "a.jsonl")
        (['a', 'b'], ['0', '1', '2'])
    """
    values = set(values)
    numbers = [number for value in values if (number := number_of(value)) is not None]
    if values and len(numbers) == len(values) and min(numbers) >= 0:
        return [str(number) for number in range(max(numbers) + 1)]
    if values and not numbers:
        return sorted(values)
    raise ConfigError(
        f"the field {field!r} of {source} holds {'no labels' if not values else 'words as well as numbers, or negative ones'}; "
        "name the field with label_field=, or the labels with labels="
    )


class ClassificationDataModule(LabelledDataModule):
    """Texts, or pairs of texts, with a label or a number.

    Batches are ``{"input_ids", "attention_mask"}``, each (batch, longest), and ``labels`` (batch,); where the tokenizer tells the texts of a
    pair apart and the model takes that, as BERT does, also ``token_type_ids`` (batch, longest).

    Args:
        tokenizer: folder or hub id of the tokenizer.
        train: file, folder or hub id to train on, or several by the names of adapters.
        val: file to evaluate on, or several by name.
        text_field: the field of the text.
        pair_field: the field of a second text, as in GLUE's tasks over pairs; none if None.
        regression: labels are numbers to predict and not classes, as in STS-B.
        options: arguments of :class:`LabelledDataModule` and :class:`RowsDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        *,
        text_field: str = "text",
        pair_field: str | None = None,
        regression: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, train, val, **options)
        self.text_field, self.pair_field, self.regression = text_field, pair_field, regression
        if regression and self.label_names:
            raise ConfigError(f"regression=True predicts numbers, which have no names; leave out {self.label_names!r}")

    @override
    def prepare(self) -> None:
        super().prepare()
        self.check_room(self.max_length, pair=self.pair_field is not None)

    @property
    @override
    def pad_id(self) -> int:
        """The id that the model takes for padding, where it says one: decoders classify by the last token before it."""
        known = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        return int(known) if isinstance(known, int) and known >= 0 else super().pad_id

    @override
    def text_of(self, row: Row) -> str:
        return " ".join(str(row.values.get(name, "")) for name in (self.text_field, self.pair_field) if name)

    @override
    def _found(self) -> list[str]:
        return [] if self.regression else super()._found()

    @override
    def example(self, row: Row, bad_rows: BadRows) -> Example:
        """Return the tokens and the label of a row.

        Raises:
            BadRowError: a field is missing or empty, or the label unknown.
        """
        texts = [row.text(self.text_field), *([row.text(self.pair_field)] if self.pair_field else [])]
        label = self._number(row) if self.regression else self.label_id(row.field(self.label_field), row)
        tokens = self.encoded(*texts, verbose=False)
        if self.cut(tokens["input_ids"], self.max_length, row, bad_rows) < len(tokens["input_ids"]):
            tokens = self.encoded(*texts, truncation=True, max_length=self.max_length)
        return {**tokens, "labels": label}

    def _number(self, row: Row) -> float:
        value = row.field(self.label_field)
        try:
            if (is_number(value) or isinstance(value, str)) and math.isfinite(float(value)):
                return float(value)
        except ValueError:
            pass
        raise BadRowError("malformed", row.where, f"has {value!r} as label, not a number")

    @override
    def collator(self) -> Callable[[list[Example]], dict[str, Any]]:
        return SequenceCollator(self.pad_id, self.fillers, self.unused)

    @override
    def shown(self, example: Example) -> list[tuple[str, bool]]:
        """Return the text, and the label as what is predicted."""
        label = example["labels"]
        ids = [int(one) for one in example["input_ids"]]
        return [*self.pieces(ids, [False] * len(ids)), (" → ", False), (_name(label, self.label_names), True)]


class TokenClassificationDataModule(LabelledDataModule):
    """Sentences in words, with a label for every word.

    Batches are ``{"input_ids", "attention_mask", "labels"}``, each (batch, longest). A word that becomes several tokens gives its label
    to the first of them, or to all.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        train: file, folder or hub id to train on, or several by the names of adapters.
        val: file to evaluate on, or several by name.
        words_field: the field of the words, a list.
        label_field: the field of their labels, a list.
        label_tokens: which tokens of a word have its label; the others are not predicted.
        options: arguments of :class:`LabelledDataModule` and :class:`RowsDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        *,
        words_field: str = "tokens",
        label_field: str = "ner_tags",
        label_tokens: Literal["first", "all"] = "first",
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, train, val, label_field=label_field, **options)
        if label_tokens not in ("first", "all"):
            raise ConfigError(f"TokenClassificationDataModule label_tokens must be first or all, got {label_tokens!r}")
        self.words_field, self.label_tokens, self._glues = words_field, label_tokens, False

    @override
    def prepare(self) -> None:
        super().prepare()
        check_fast(self.loaded_tokenizer)
        tokenizer = self.loaded_tokenizer
        words, text = tokenizer(["a", "b"], is_split_into_words=True), tokenizer("a b")
        # Those of GPT-2, RoBERTa and their like read words as one long word if nothing stands between them.
        self._glues = words["input_ids"] != text["input_ids"]

    @override
    def text_of(self, row: Row) -> str:
        words = row.values.get(self.words_field)
        return " ".join(map(str, words)) if isinstance(words, list) else ""

    @override
    def labels_in(self, value: Any) -> Iterable[Any]:
        return (
            [one for item in value for one in super(TokenClassificationDataModule, self).labels_in(item)]
            if isinstance(value, list)
            else []
        )

    @override
    def example(self, row: Row, bad_rows: BadRows) -> Example:
        """Return the tokens and their labels.

        Raises:
            BadRowError: words and labels are not lists of one length, or a label is unknown.
        """
        words, names = row.field(self.words_field), row.field(self.label_field)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise BadRowError("malformed", row.where, f"has no list of words as {self.words_field!r}")
        if not words:
            raise BadRowError("empty", row.where, "has no words")
        if not isinstance(names, list) or len(names) != len(words):
            found = f"{len(names)} labels" if isinstance(names, list) else f"a {type(names).__name__}"
            raise BadRowError("malformed", row.where, f"has {len(words)} words and {found} as {self.label_field!r}")
        numbers = [self.label_id(name, row) for name in names]
        if self._glues:
            words = [words[0], *(f" {word}" for word in words[1:])]
        encoded = self.loaded_tokenizer(words, is_split_into_words=True, verbose=False)
        ids, of = list(encoded["input_ids"]), encoded.word_ids()
        labels = [
            numbers[word] if word is not None and (self.label_tokens == "all" or word != before) else IGNORED
            for word, before in zip(of, [None, *of], strict=False)
        ]
        if all(label == IGNORED for label in labels[: self.max_length]):
            raise BadRowError("empty", row.where, f"has no token with a label among its first {self.max_length}")
        kept = self.cut(ids, self.max_length, row, bad_rows)
        return {"input_ids": ids[:kept], "labels": labels[:kept]}

    @override
    def collator(self) -> Callable[[list[Example]], dict[str, Any]]:
        return SequenceCollator(self.pad_id, self.fillers, self.unused)

    @override
    def shown(self, example: Example) -> list[tuple[str, bool]]:
        """Return the text; a token with a label is followed by it."""
        pieces = []
        for one, label in zip(example["input_ids"], example["labels"], strict=True):
            text = self.loaded_tokenizer.decode([int(one)])
            known = int(label) != IGNORED
            pieces.append((f"{text}/{_name(label, self.label_names)} " if known else f"{text} ", known))
        return pieces


def _name(label: Any, names: list[str]) -> str:
    return names[int(label)] if names else f"{float(label):g}"

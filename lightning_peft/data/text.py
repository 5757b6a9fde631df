"""Text for causal language models, packed into full rows.

::

    document 1     document 2                 separator "bos"
    <s> a b c d    <s> e f g h i j    ...
    └── row 0 ──┘└── row 1 ──┘└── row 2       rows of block_size tokens; what does not fill a row at the end is left out
    0 1 2 3 4 0    1 2 0 1 2 3                positions with document_mask: they begin anew with each document and each row
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

from typing_extensions import override

from lightning_peft.batch_parts import IGNORED
from lightning_peft.data.collating import DocumentMask, FullRowCollator, PackedCollator
from lightning_peft.data.examples import Example
from lightning_peft.data.rows_module import TRAIN, Split
from lightning_peft.data.tokenized import TokenizedDataModule
from lightning_peft.errors import BadRowError, ConfigError, did_you_mean
from lightning_peft.field_checks import is_number
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import Row, suffix_of
from lightning_peft.source_rows.templates import is_whole_text, parse_template, render

_DOCUMENTS_AT_ONCE = 512
_REPLAY = "replay"


class TextDataModule(TokenizedDataModule):
    """Train and evaluate a causal language model on running text: continued pretraining.

    Batches are ``{"input_ids": (batch, block_size), "labels": the same}``; the model shifts the labels itself, as the
    models of transformers do. The training loader resumes exactly, also in the middle of an epoch. Where ``train`` names
    adapters, a batch has the column ``adapter`` too, with the name for each row: see ``by_rows`` of ``PEFTModule``.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        train: file to train on: a ``.txt``, which is one document, or any other, each row of which is one. Several files,
            ``{name: file}``, train an adapter each, that of the name; validation sets of that name are read by it, others
            by the base alone.
        val: file to evaluate on, or several by name, ``{name: file}``. A file without a name gets that of its stem.
        template: how a row becomes text: ``{field}`` stands for the value of the field. Where files
            differ, ``{name: template}`` for ``train``, or its names, and the names of ``val``; ``"{text}"`` where none is given.
        separator: token between documents. ``bos`` puts the tokenizer's bos token before each one (Llama; GPT-2, whose
            bos and eos are the same), ``eos`` its eos token after each, ``none`` nothing. Take the one that the model was
            pretrained with.
        block_size: tokens in a row.
        batch_size: rows in a batch of training.
        val_batch_size: rows in a batch of evaluation; ``batch_size`` if None.
        val_fraction: hold out so much of ``train``, at its end unless ``split`` says otherwise. It becomes the first
            validation set, named as the stem of the file; of several files, each its own, named as the file is.
        max_train_tokens: train only on so many tokens of each file; on all if None.
        max_val_tokens: evaluate only on so many tokens of each validation set; on all if None.
        document_mask: whether documents in a row see each other: ``none`` lets them, ``positions`` and ``dense`` do not, as with
            :class:`InstructionDataModule`.
        replay: file of text that the model was pretrained on, mixed into training in rows of its own; its name in
            ``template`` is ``replay``.
        replay_share: the share of them among the rows of training.
        options: arguments of :class:`RowsDataModule`.

    Raises:
        ConfigError: an argument is out of range, or a file is not what it should be.
    """

    default_split: ClassVar[Split] = "end"
    whole_text: ClassVar[bool] = True
    left_over: dict[str, int]
    """Tokens at the end of each set that fill no row, by its name."""

    def __init__(
        self,
        tokenizer: str,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        template: str | dict[str, str] = "{text}",
        separator: Literal["bos", "eos", "none"] = "bos",
        block_size: int = 256,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        val_fraction: float = 0.0,
        max_train_tokens: int | None = None,
        max_val_tokens: int | None = None,
        document_mask: DocumentMask | Literal["none"] = "none",
        replay: str | None = None,
        replay_share: float = 0.1,
        **options: Any,
    ) -> None:
        sizes = {"batch_size": batch_size, "val_batch_size": val_batch_size, "val_fraction": val_fraction}
        self.check_whole(2, block_size=block_size)
        super().__init__(tokenizer, train, val, **sizes, **options)
        limits = {"max_train_tokens": max_train_tokens, "max_val_tokens": max_val_tokens}
        self.check_whole(block_size, **{name: value for name, value in limits.items() if value is not None})
        if separator not in ("bos", "eos", "none"):
            raise ConfigError(f"TextDataModule separator must be one of bos, eos, none, got {separator!r}")
        if document_mask not in ("none", "positions", "dense"):
            raise ConfigError(
                f"TextDataModule document_mask must be one of none, positions, dense, got {document_mask!r}"
            )
        self.separator, self.block_size, self.document_mask = separator, block_size, document_mask
        self.max_train_tokens, self.max_val_tokens = max_train_tokens, max_val_tokens
        self.replay, self.replay_share, self.left_over = replay, replay_share, {}
        self._check_text()
        self.templates = self._templates(template)

    # -- rows ------------------------------------------------------------------------------------------------------

    @override
    def prepare(self) -> None:
        super().prepare()
        self._around()

    @override
    def read(self, name: str, source: str, bad_rows: BadRows, *, split: str = TRAIN) -> Iterator[Row]:
        """Yield the documents of a file, as rows with the field ``text``."""
        template = self.templates.get(name, "{text}")
        pieces = parse_template(template)
        for row in super().read(name, source, bad_rows, split=split):
            try:
                text = row.values["text"] if is_whole_text(row) else render(pieces, template, row)
                if not text.strip():
                    raise BadRowError("empty", row.where, "has no text")
            except BadRowError as error:
                bad_rows.note(error)
            else:
                yield Row({"text": text}, row.source, row.line)

    @override
    def split_rows(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        if len(rows) != 1:
            return super().split_rows(rows)
        (kept,), (held_out,) = hold_out([rows[0].values["text"]], self.val_fraction)
        return [Row({"text": kept}, rows[0].source, 1)], [Row({"text": held_out}, rows[0].source, 1)]

    @override
    def examples(self, rows: Iterable[Row], name: str, trained: bool, bad_rows: BadRows) -> Iterator[Example]:
        limit = self.max_train_tokens if trained else self.max_val_tokens
        packed = self._packed(rows, name, trained, limit, bad_rows)
        return self._with_replay(packed, bad_rows) if trained and self.replay is not None else packed

    @override
    def example(self, row: Row, bad_rows: BadRows) -> Example:
        """Return the tokens of one document."""
        before, after = self._around()
        ids = self.loaded_tokenizer(row.values["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": before + ids + after}

    @override
    def collator(self) -> Callable[[list[Example]], dict[str, Any]]:
        if self.document_mask == "none":
            return FullRowCollator()
        return PackedCollator(self.pad_id, self.document_mask)

    @override
    def shown(self, example: Example) -> list[tuple[str, bool]]:
        # What the first token would be predicted from is not there.
        return super().shown({"labels": [IGNORED, *example["input_ids"][1:]], **example})

    @override
    def source_of(self, name: str, trained: bool) -> str:
        """Return the file that a set comes from, or that of ``replay``."""
        return self.replay if name == _REPLAY and self.replay is not None else super().source_of(name, trained)

    # -- packing ---------------------------------------------------------------------------------------------------

    def _packed(
        self, rows: Iterable[Row], name: str, trained: bool, limit: int | None, bad_rows: BadRows
    ) -> Iterator[Example]:
        """Yield full rows of the tokens of all documents, the first ``limit`` of them."""
        before, after = self._around()
        ids, starts, total, made = array("i"), array("b"), 0, 0
        documents = iter(rows)
        at_once = 1 if self.streaming and trained else _DOCUMENTS_AT_ONCE
        while chunk := [row.values["text"] for row in itertools.islice(documents, at_once)]:
            for document in self._tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
                whole = before + document + after
                whole = whole if limit is None else whole[: limit - total]
                total += len(whole)
                ids.extend(whole)
                starts.extend([1] + [0] * (len(whole) - 1) if whole else [])
            done = len(ids) // self.block_size * self.block_size
            for start in range(0, done, self.block_size):
                made += 1
                yield self._row(ids[start : start + self.block_size], starts[start : start + self.block_size])
            del ids[:done], starts[:done]
            if total == limit:
                break
        self.left_over[self.label_of(name, trained)] = len(ids)
        if not made and not self.streaming:
            raise ConfigError(
                f"{self.source_of(name, trained)!r} gives {total} tokens for {name!r}, fewer than one row of block_size={self.block_size}; "
                + (f"of its rows, {bad_rows}" if bad_rows.counts else "lower block_size or give more text")
            )

    def _row(self, ids: array[int], starts: array[int]) -> Example:
        if self.document_mask == "none":
            return {"input_ids": ids.tolist()}
        positions, labels = array("i"), array("i")
        for one, begins in zip(ids, starts, strict=True):
            first = not positions or bool(begins)
            positions.append(0 if first else positions[-1] + 1)
            labels.append(IGNORED if first else one)
        return {"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": positions.tolist()}

    def _with_replay(self, examples: Iterator[Example], bad_rows: BadRows) -> Iterator[Example]:
        """Yield examples with rows of ``replay`` between them, of which ``replay_share`` are; they begin anew where they end."""
        share, replayed = self.replay_share, 0
        worker, workers = self.share
        replay = self._replay_rows(bad_rows if worker == 0 else BadRows("report"))
        replay = itertools.islice(replay, worker, None, workers)
        for given, example in enumerate(examples, start=1):
            yield example
            while replayed + 1 <= share * (given + replayed + 1):
                yield next(replay)
                replayed += 1

    def _replay_rows(self, bad_rows: BadRows) -> Iterator[Example]:
        while True:
            # Bad rows are told of in the first round only.
            rows, any_made = self.read(_REPLAY, str(self.replay), bad_rows), False
            for example in self._packed(rows, _REPLAY, True, None, bad_rows):
                any_made = True
                yield example
            if not any_made:
                raise ConfigError(
                    f"{self.replay!r} gives {self.left_over[_REPLAY]} tokens to replay, fewer than one row of block_size={self.block_size}; "
                    "lower block_size or give more text"
                )
            bad_rows = BadRows("report")

    def _around(self) -> tuple[list[int], list[int]]:
        """Return the tokens before and after a document."""
        if self.separator == "none":
            return [], []
        tokenizer = self.loaded_tokenizer
        token = tokenizer.bos_token_id if self.separator == "bos" else tokenizer.eos_token_id
        if token is None:
            other = "eos" if self.separator == "bos" else "bos"
            raise ConfigError(
                f"separator={self.separator!r}, but the tokenizer {self.tokenizer!r} has no {self.separator} token; "
                f"use separator={other!r} or 'none'"
            )
        return ([token], []) if self.separator == "bos" else ([], [token])

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_text(self) -> None:
        if self.replay is not None:
            if not is_number(self.replay_share) or not 0 < self.replay_share < 1:
                raise ConfigError(f"TextDataModule replay_share must lie in (0, 1), got {self.replay_share!r}")
            if self._by_adapter:
                raise ConfigError(
                    "replay is mixed into one file, and train names several; leave replay out, or name it in train"
                )
        if self.group_by_length:
            raise ConfigError("TextDataModule fills every row, so there are no lengths; leave group_by_length out")
        if self.streaming:
            if self.max_train_tokens is not None:
                raise ConfigError("streaming=True has no count of tokens; give max_train_rows for max_train_tokens")
            for source in (*self._train.values(), self.replay or ""):
                if suffix_of(source) == ".txt":
                    raise ConfigError(
                        f"{source!r} is one document, which is read at once; leave streaming out, or make it a .jsonl"
                    )

    def _templates(self, template: str | Mapping[str, str]) -> dict[str, str]:
        names = list(dict.fromkeys([*self._train, *self.val, *([_REPLAY] if self.replay else [])]))
        if isinstance(template, str):
            template = dict.fromkeys(names, template)
        for name, value in template.items():
            if name not in names:
                raise ConfigError(
                    f"template is given for {name!r}{did_you_mean(name, names) or ', which is not a set.'} "
                    f"The sets are: {', '.join(names)}"
                )
            parse_template(value)
        return {name: template.get(name, "{text}") for name in names}


def hold_out(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    r"""Split off the end: the last rows, or the end of a single document from a line break on.

    Example:
        >>> hold_out(["a", "b", "c", "d"], 0.25)
        (['a', 'b', 'c'], ['d'])
        >>> hold_out(["one\ntwo\nthree\n"], 0.5)
        (['one\ntwo\n'], ['three\n'])
    """
    if len(documents) == 1:
        cut = _cut_near(documents[0], int(len(documents[0]) * (1 - fraction)))
        return [documents[0][:cut]], [documents[0][cut:]]
    kept = len(documents) - max(1, round(len(documents) * fraction))
    return documents[:kept], documents[kept:]


def _cut_near(text: str, place: int) -> int:
    """Return where a line begins near ``place``, or a word where no line does; both parts have text if any such cut is there."""
    last = len(text.rstrip())  # behind it there is nothing to hold out
    for between in ("\n", " "):
        after = text.find(between, max(0, place - 1), last) + 1
        before = text.rfind(between, 0, min(place, last)) + 1
        if after or 2 * before > place:
            return after or before
    return len(text)

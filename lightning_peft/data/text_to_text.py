"""A text and the text that it becomes, for models with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typing_extensions import override

from lightning_peft.data.collating import SequenceCollator
from lightning_peft.data.examples import Example
from lightning_peft.data.tokenized import TokenizedDataModule
from lightning_peft.errors import BadRowError
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import Row
from lightning_peft.source_rows.templates import parse_template, render


class Seq2SeqDataModule(TokenizedDataModule):
    """A source text for the encoder and a target text for the decoder, as with T5 (arXiv 1910.10683) and BART.

    Batches are ``{"input_ids", "attention_mask"}``, each (batch, longest source), and ``labels`` (batch, longest target); the models of
    transformers make the input of the decoder of the labels.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        train: file, folder or hub id to train on, or several by the names of adapters.
        val: file to evaluate on, or several by name.
        source: template of the source, such as ``"summarize: {document}"``.
        target: template of the target.
        max_source_length: tokens of a source; longer ones are cut at the end, or refused: see ``on_bad_rows``.
        max_target_length: tokens of a target, as above.
        options: arguments of :class:`RowsDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        *,
        source: str = "{source}",
        target: str = "{target}",
        max_source_length: int = 512,
        max_target_length: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, train, val, **options)
        self.check_whole(2, max_source_length=max_source_length, max_target_length=max_target_length)
        self.source, self.target = source, target
        self._pieces = {template: parse_template(template) for template in (source, target)}
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    @override
    def example(self, row: Row, bad_rows: BadRows) -> Example:
        """Return the tokens of source and target.

        Raises:
            BadRowError: a field is missing, or one of both is empty.
        """
        source = self._ids(self.source, "source", self.max_source_length, row, bad_rows)
        target = self._ids(self.target, "target", self.max_target_length, row, bad_rows)
        return {"input_ids": source, "labels": target}

    def _ids(self, template: str, what: str, longest: int, row: Row, bad_rows: BadRows) -> list[int]:
        text = render(self._pieces[template], template, row)
        if not text.strip():
            raise BadRowError("empty", row.where, f"has an empty {what}")
        tokenizer = self.loaded_tokenizer
        words = {"text_target" if what == "target" else "text": text}
        ids: list[int] = list(tokenizer(**words, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:  # T5's tokenizer adds it itself
            ids.append(end)
        if len(ids) <= longest:
            return ids
        found = f"has a {what} of {len(ids)} tokens, {len(ids) - longest} more than max_{what}_length={longest}"
        bad_rows.note(BadRowError("truncated", row.where, found))
        return ids[:longest] if end is None else [*ids[: longest - 1], end]

    @override
    def collator(self) -> Callable[[list[Example]], dict[str, Any]]:
        return SequenceCollator(self.pad_id)

    @override
    def shown(self, example: Example) -> list[tuple[str, bool]]:
        """Return source and target; the target is what is predicted."""
        source, target = ([int(one) for one in example[name]] for name in ("input_ids", "labels"))
        return [
            *self.pieces(source, [False] * len(source)),
            (" → ", False),
            *self.pieces(target, [True] * len(target)),
        ]

"""Instructions and answers for causal language models: the answers are learned, what they answer is read.

::

    tokens    <s> What is 2 + 2 ?   4 </s>    <s> And a cat ?   An animal . </s>
    labels     -  -    -  - - - -   4 </s>     -  -   - -   -   An animal . </s>
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from typing_extensions import override

from lightning_peft.batch_parts import IGNORED
from lightning_peft.data.chat import check_fast, checked_messages, conversation_labels, token_labels, tools_of
from lightning_peft.data.collating import DocumentMask, PackedCollator, SequenceCollator
from lightning_peft.data.examples import Example
from lightning_peft.data.packing import packed
from lightning_peft.data.tokenized import TokenizedDataModule
from lightning_peft.errors import BadRowError, ConfigError
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import Row
from lightning_peft.source_rows.templates import parse_template, render

ALPACA_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""
"""The prompt of Stanford Alpaca for rows with an input, and a line break before the answer, as Alpaca-LoRA has it."""
ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
"""The prompt of Stanford Alpaca for rows without one."""

Format = Literal["auto", "alpaca", "messages", "prompt_completion"]
_COLUMNS = {
    "messages": {"messages"},
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
}


class InstructionDataModule(TokenizedDataModule):
    """Train a causal language model to answer: the loss is on the tokens of the answers alone.

    Batches are ``{"input_ids", "attention_mask", "labels"}``, each (batch, longest); with ``packing`` they have ``position_ids``
    in place of the mask.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        train: file, folder or hub id to train on, or several by the names of adapters.
        val: file to evaluate on, or several by name.
        format: what is in a row: ``alpaca`` has ``instruction``, ``output`` and perhaps ``input``; ``messages`` is a
            conversation of ``role`` and ``content``, written by the chat template of the tokenizer, with the ``tools`` of the row if
            it has any; ``prompt_completion`` has
            ``prompt`` and ``completion``. ``auto`` goes by the fields of each row.
        prompt: template of the prompt for rows of any other fields, such as ``"{mr} =>"``; needs ``completion``.
        completion: template of the answer, such as ``" {ref}"``.
        chat_template: file with the chat template, or the template itself, for a tokenizer without one.
        max_length: tokens of an example; longer ones are cut at the end, or refused: see ``on_bad_rows``.
        add_bos: begin rows that no chat template writes with the bos token, where the tokenizer has one and the prompt does not.
        add_eos: end such rows with the eos token, where there is one and the answer does not, which is learned as part of it.
        packing: put several examples into one row of ``max_length`` tokens.
        document_mask: how examples in a packed row are kept apart. ``positions``: by ``position_ids`` that begin anew, from which
            the models of transformers make their masks. ``dense``: by a mask (batch, 1, longest, longest) as well, for models that do
            not, under ``eager`` or ``sdpa`` attention.
        options: arguments of :class:`RowsDataModule`.

    Raises:
        ConfigError: an argument is out of range, or a file is not what it should be.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        *,
        format: Format = "auto",
        prompt: str | None = None,
        completion: str | None = None,
        chat_template: str | None = None,
        max_length: int = 512,
        add_bos: bool = True,
        add_eos: bool = True,
        packing: bool = False,
        document_mask: DocumentMask = "positions",
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, train, val, **options)
        self.check_whole(2, max_length=max_length)
        if format not in ("auto", *_COLUMNS):
            raise ConfigError(
                f"InstructionDataModule format must be one of auto, {', '.join(_COLUMNS)}, got {format!r}"
            )
        if document_mask not in ("positions", "dense"):
            raise ConfigError(f"InstructionDataModule document_mask must be positions or dense, got {document_mask!r}")
        if (prompt is None) != (completion is None) or (prompt is not None and format != "auto"):
            raise ConfigError(
                f"prompt and completion are given together, without a format, got prompt={prompt!r}, completion={completion!r}, format={format!r}"
            )
        if packing and self.group_by_length:
            raise ConfigError("packing fills every row, so there are no lengths; leave group_by_length out")
        self.format, self.chat_template, self.max_length = format, chat_template, max_length
        self.templates = None if prompt is None else (prompt, str(completion))
        self._pieces = [parse_template(template) for template in self.templates or ()]
        self.add_bos, self.add_eos, self.packing, self.document_mask = add_bos, add_eos, packing, document_mask

    @override
    def prepare(self) -> None:
        super().prepare()
        check_fast(self.loaded_tokenizer)
        if self.chat_template is not None:
            self.loaded_tokenizer.chat_template = _template_text(self.chat_template)

    @override
    def examples(self, rows: Iterable[Row], name: str, trained: bool, bad_rows: BadRows) -> Iterator[Example]:
        examples = super().examples(rows, name, trained, bad_rows)
        return packed(examples, self.max_length) if self.packing else examples

    @override
    def collator(self) -> Callable[[list[Example]], dict[str, Any]]:
        return PackedCollator(self.pad_id, self.document_mask) if self.packing else SequenceCollator(self.pad_id)

    @override
    def example(self, row: Row, bad_rows: BadRows) -> Example:
        """Return the tokens of a row and their labels, lists of one length.

        Raises:
            BadRowError: the row is malformed, or has no answer, or none within ``max_length``.
        """
        kind = "template" if self.templates else self.format if self.format != "auto" else _format_of(row)
        if kind == "messages":
            messages = checked_messages(row.field("messages"), row.where)
            ids, labels = conversation_labels(self.loaded_tokenizer, messages, row.where, tools_of(row))
        else:
            ids, labels = self._answered(*self._prompt_and_answer(kind, row), row)
        # What the first token would be predicted from is not there.
        if all(label == IGNORED for label in labels[1 : self.max_length]):
            found = f"has no token of an answer among its first {min(len(ids), self.max_length)}"
            raise BadRowError("empty", row.where, found + (f" of {len(ids)}" if len(ids) > self.max_length else ""))
        kept = self.cut(ids, self.max_length, row, bad_rows)
        return {"input_ids": ids[:kept], "labels": labels[:kept]}

    def _prompt_and_answer(self, kind: str, row: Row) -> tuple[str, str]:
        if self.templates:
            prompt, answer = (render(*both, row) for both in zip(self._pieces, self.templates, strict=True))
        elif kind == "alpaca":
            given = row.values.get("input")
            if given is not None and not isinstance(given, str):
                raise BadRowError("malformed", row.where, f"has a {type(given).__name__} as 'input', not text")
            row.text("instruction")
            template = ALPACA_INPUT if given and given.strip() else ALPACA
            prompt, answer = render(parse_template(template), template, row), row.text("output")
        else:
            prompt, answer = row.text("prompt"), row.text("completion")
        if not answer.strip():
            raise BadRowError("empty", row.where, "has an empty answer")
        return prompt, answer

    def _answered(self, prompt: str, answer: str, row: Row) -> tuple[list[int], list[int]]:
        tokenizer = self.loaded_tokenizer
        text = prompt + answer
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, labels = list(encoded["input_ids"]), token_labels(encoded, [(len(prompt), len(text))])
        if all(label == IGNORED for label in labels):
            raise BadRowError("empty", row.where, "has an answer without tokens")
        if self.add_bos and ids[0] != tokenizer.bos_token_id is not None:
            ids, labels = [tokenizer.bos_token_id, *ids], [IGNORED, *labels]
        if self.add_eos and ids[-1] != tokenizer.eos_token_id is not None:
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        return ids, labels

    @override
    def text_of(self, row: Row) -> str:
        messages = row.values.get("messages")
        if isinstance(messages, list):
            return " ".join(str(message.get("content")) for message in messages if isinstance(message, dict))
        return super().text_of(row)

    @override
    def shown(self, example: Example) -> list[tuple[str, bool]]:
        """Return the text of an example; examples of a packed row begin on lines of their own."""
        starts = [number for number, position in enumerate(example.get("position_ids", [0])) if int(position) == 0]
        pieces: list[tuple[str, bool]] = []
        for start, end in itertools.pairwise([*starts, len(example["input_ids"])]):
            part = {name: example[name][start:end] for name in ("input_ids", "labels")}
            pieces += [*([("\n", False)] if start else []), *super().shown(part)]
        return pieces


def _format_of(row: Row) -> str:
    for kind, columns in _COLUMNS.items():
        if columns <= row.values.keys():
            return kind
    raise BadRowError(
        "malformed",
        row.where,
        f"has the fields {', '.join(row.values) or 'none'}: neither messages, nor instruction and output, nor prompt and completion; "
        "give prompt= and completion= for other fields",
    )


def _template_text(given: str) -> str:
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"chat_template={given!r} is neither a template nor a file: {error}") from error

"""What data modules with a tokenizer share: the tokenizer, the greatest length, and rows shown as text."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override

from lightning_peft.batch_parts import IGNORED
from lightning_peft.data.examples import Example
from lightning_peft.data.rows_module import RowsDataModule
from lightning_peft.errors import BadRowError, ConfigError
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import Row


class TokenizedDataModule(RowsDataModule):
    """A data module that makes token ids of text.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        train: file, folder or hub id to train on, or several by the names of adapters.
        val: file to evaluate on, or several by name.
        options: arguments of :class:`RowsDataModule`.
    """

    def __init__(
        self, tokenizer: str, train: str | dict[str, str], val: str | dict[str, str] | None = None, **options: Any
    ) -> None:
        super().__init__(train, val, **options)
        self.tokenizer = tokenizer
        self._tokenizer: Any = None

    @override
    def prepare_data(self) -> None:
        """Fetch the tokenizer, in one process only."""
        self._load_tokenizer()

    @override
    def prepare(self) -> None:
        self._tokenizer = self._tokenizer or self._load_tokenizer()

    @property
    def loaded_tokenizer(self) -> Any:
        """The tokenizer itself; loaded when it is first asked for."""
        self._tokenizer = self._tokenizer or self._load_tokenizer()
        return self._tokenizer

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no tokenizer can be loaded from {self.tokenizer!r}; give the folder of one, or a hub id and a network. "
                f"transformers says: {error}"
            ) from error

    @property
    def pad_id(self) -> int:
        """The id that rows are filled up with; nothing attends to it and nothing is predicted there."""
        tokenizer = self.loaded_tokenizer
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def check_room(self, max_length: int, *, pair: bool = False) -> None:
        """Refuse a ``max_length`` that the special tokens of a row fill.

        Raises:
            ConfigError: there is no room for a token of a text, or of each of a pair.
        """
        special = self.loaded_tokenizer.num_special_tokens_to_add(pair=pair)
        if max_length < special + 1 + pair:
            raise ConfigError(
                f"{type(self).__name__} max_length={max_length} has no room for text beside the {special} special tokens of a row; "
                f"take at least {special + 1 + pair}"
            )

    def encoded(self, *texts: str, **options: Any) -> dict[str, Any]:
        """Return ``input_ids`` of a text or a pair, and ``token_type_ids`` where the tokenizer gives them: which of both a token is of."""
        found = self.loaded_tokenizer(*texts, **options)
        return {name: found[name] for name in ("input_ids", "token_type_ids") if name in found}

    @property
    def model(self) -> Any:
        """The model that is trained, where a trainer has one; None otherwise."""
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        return getattr(model, "_orig_mod", model)  # of torch.compile

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns that the model does not take, although its tokenizer gives them."""
        model = self.model
        if model is None or "token_type_ids" in inspect.signature(model.forward).parameters:
            return ()
        return ("token_type_ids",)

    @property
    def fillers(self) -> tuple[tuple[str, int], ...]:
        """What sequences of a batch are filled up with, by column."""
        return (
            ("labels", IGNORED),
            ("token_type_ids", int(getattr(self.loaded_tokenizer, "pad_token_type_id", 0) or 0)),
        )

    def cut(self, ids: list[int], longest: int, row: Row, bad_rows: BadRows) -> int:
        """Return how many of ``ids`` are kept, and note the row where some are not."""
        if len(ids) > longest:
            found = f"has {len(ids)} tokens, {len(ids) - longest} more than max_length={longest}"
            bad_rows.note(BadRowError("truncated", row.where, found))
        return min(len(ids), longest)

    @override
    def shown(self, example: Example) -> list[tuple[str, bool]]:
        """Return the text of an example, in pieces that are predicted and such that are not."""
        ids = [int(one) for one in example["input_ids"]]
        return self.pieces(ids, [int(label) != IGNORED for label in example["labels"]])

    def pieces(self, ids: Sequence[int], predicted: Iterable[bool]) -> list[tuple[str, bool]]:
        """Return the text of token ids, cut where it changes whether they are predicted."""
        tokenizer = self.loaded_tokenizer
        pieces: list[tuple[str, bool]] = []
        before, start = "", 0
        marks = list(predicted)
        for end in range(1, len(ids) + 1):
            if end == len(ids) or marks[end] != marks[start]:
                # The text of all tokens so far, less what was shown: a token alone may lose the space before it.
                text = tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)
                pieces.append((text[len(before) :], marks[start]))
                before, start = text, end
        return pieces

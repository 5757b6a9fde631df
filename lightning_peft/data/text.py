"""Local text for causal language models, packed into full rows.

::

    document 1     document 2                 separator "bos"
    <s> a b c d    <s> e f g h i j    ...
    └── row 0 ──┘└── row 1 ──┘└── row 2       rows of block_size tokens; what does not fill a row at the end is left out
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.adapter_training import ADAPTER_COLUMN
from lightning_peft.data.documents import hold_out, parse_template, read_documents
from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler
from lightning_peft.data_position import place_of
from lightning_peft.errors import ConfigError, did_you_mean

_DOCUMENTS_AT_ONCE = 512


class TextDataModule(LightningDataModule):
    """Train and evaluate a causal language model on local ``.txt`` and ``.jsonl`` files.

    Batches are ``{"input_ids": (batch, block_size), "labels": the same}``; the model shifts the labels itself, as the
    models of transformers do. The training loader resumes exactly, also in the middle of an epoch. Where ``train`` names
    adapters, a batch has the column ``adapter`` too, with the name for each row: see ``by_rows`` of ``PEFTModule``.

    Args:
        tokenizer: folder or hub id of the tokenizer.
        train: file to train on: a ``.txt``, which is one document, or a ``.jsonl``, each row of which is one. Several files,
            ``{name: file}``, train an adapter each, that of the name; validation sets of that name are read by it, others
            by the base alone.
        val: file to evaluate on, or several by name, ``{name: file}``. A file without a name gets that of its stem.
        template: how a row of a ``.jsonl`` becomes text: ``{field}`` stands for the value of the field. Where files
            differ, ``{name: template}`` for ``train``, or its names, and the names of ``val``; ``"{text}"`` where none is given.
        separator: token between documents. ``bos`` puts the tokenizer's bos token before each one (Llama; GPT-2, whose
            bos and eos are the same), ``eos`` its eos token after each, ``none`` nothing. Take the one that the model was
            pretrained with.
        block_size: tokens in a row.
        batch_size: rows in a batch of training.
        val_batch_size: rows in a batch of evaluation; ``batch_size`` if None.
        val_fraction: hold out so much of the end of ``train``. It becomes the first validation set, named as the stem of the file;
            of several files, each its own, named as the file is.
        max_train_tokens: train only on so many tokens of each file; on all if None.
        max_val_tokens: evaluate only on so many tokens of each validation set; on all if None.
        seed: with the epoch, decides the order of the rows.
        shuffle: shuffle the training rows each epoch.
        num_workers: processes that load batches; 0 for none, which is fastest for text in memory.

    Raises:
        ConfigError: an argument is out of range, or a file is not what it should be.
    """

    val_names: list[str]
    """Names of the validation sets, in the order of the data loaders. ``test`` measures the same sets."""
    test_names: list[str]
    """The same as ``val_names``."""

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
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        _check_range("block_size", block_size, 2)
        _check_range("batch_size", batch_size, 1)
        _check_range("seed", seed, 0)
        _check_range("num_workers", num_workers, 0)
        for name, value, least in (
            ("val_batch_size", val_batch_size, 1),
            ("max_train_tokens", max_train_tokens, block_size),
            ("max_val_tokens", max_val_tokens, block_size),
        ):
            if value is not None:
                _check_range(name, value, least)
        if not isinstance(val_fraction, (int, float)) or not 0.0 <= val_fraction < 1.0:
            raise ConfigError(f"TextDataModule val_fraction must lie in [0, 1), got {val_fraction!r}")
        if separator not in ("bos", "eos", "none"):
            raise ConfigError(f"TextDataModule separator must be one of bos, eos, none, got {separator!r}")
        self.tokenizer, self.train, self.separator = tokenizer, train, separator
        self._by_adapter = not isinstance(train, str)
        self._train = {_TRAIN: train} if isinstance(train, str) else dict(train)
        if not self._train:
            raise ConfigError("TextDataModule train must be a file, or several by the names of adapters, got none")
        self.val = {Path(val).stem: val} if isinstance(val, str) else dict(val or {})
        self.block_size, self.batch_size, self.val_batch_size = block_size, batch_size, val_batch_size or batch_size
        self.val_fraction, self.max_train_tokens, self.max_val_tokens = val_fraction, max_train_tokens, max_val_tokens
        self.seed, self.shuffle, self.num_workers = seed, shuffle, num_workers
        self.val_names = self.test_names = self._names()
        self.templates = self._templates(template)
        self._rows: dict[tuple[str, bool], Tensor] = {}  # of a set by its name, and whether it is trained on

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    @override
    def prepare_data(self) -> None:
        """Fetch the tokenizer, in one process only."""
        self._load_tokenizer()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise and pack what ``stage`` needs."""
        tokenizer = None
        wanted = [(name, True) for name in self._train if stage in (None, "fit")]
        for name, trained in wanted + [(name, False) for name in self.val_names]:
            if (name, trained) not in self._rows:
                tokenizer = tokenizer or self._load_tokenizer()
                limit = self.max_train_tokens if trained else self.max_val_tokens
                self._rows[name, trained] = self._pack(name, trained, tokenizer, limit)

    @override
    def train_dataloader(self) -> ResumableDataLoader:
        rows, trainer = self._named([(name, self._rows[name, True]) for name in self._train]), self.trainer
        (rank, processes, _), batches = place_of(trainer), trainer.limit_train_batches if trainer else None
        if isinstance(batches, float):
            batches = int(batches * -(-(len(rows) // processes) // self.batch_size))
        sampler = ResumableSampler(
            rows,
            seed=self.seed,
            shuffle=self.shuffle,
            num_replicas=processes,
            rank=rank,
            limit=None if batches is None else batches * self.batch_size,
        )
        return ResumableDataLoader(rows, sampler=sampler, batch_size=self.batch_size, **self._loading())  # type: ignore[arg-type]

    @override
    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [
            DataLoader(
                self._named([(name if name in self._train else None, self._rows[name, False])]),  # type: ignore[arg-type]
                batch_size=self.val_batch_size,
                **self._loading(),
            )
            for name in self.val_names
        ]

    @override
    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self.val_dataloader()

    def _named(self, parts: Sequence[tuple[str | None, Tensor]]) -> Tensor | _RowsOfAdapters:
        """Return the rows of all parts, each with the name of its part where batches name adapters."""
        return _RowsOfAdapters(parts) if self._by_adapter else parts[0][1]

    # -- reading ---------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        held_out = [self._stem(name) for name in self._train] if self.val_fraction else []
        for name in held_out:
            if name in self.val:
                raise ConfigError(
                    f"val has a set named {name!r}, which is also the name of what val_fraction holds out; rename the one in val"
                )
        names = [*held_out, *self.val]
        for name in names:
            if not name or "/" in name or (name == _TRAIN and name in self.val):
                raise ConfigError(f"{name!r} cannot be the name of a validation set; choose another name in val")
        return names

    def _stem(self, name: str) -> str:
        """Return the name of what is held out of a file of ``train``."""
        return name if self._by_adapter else Path(self._train[name]).stem

    def _templates(self, template: str | Mapping[str, str]) -> dict[str, str]:
        names = list(dict.fromkeys([*self._train, *self.val]))
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

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no tokenizer can be loaded from {self.tokenizer!r}; give the folder of one, or a hub id and a network. "
                f"transformers says: {error}"
            ) from error

    def _documents(self, name: str, trained: bool) -> Iterable[str]:
        if not trained and name in self.val:
            return read_documents(self.val[name], self.templates[name])
        of = name if trained else next(file for file in self._train if self._stem(file) == name)
        documents = read_documents(self._train[of], self.templates[of])
        if not self.val_fraction:
            return documents
        return hold_out(list(documents), self.val_fraction)[0 if trained else 1]

    def _pack(self, name: str, trained: bool, tokenizer: Any, limit: int | None) -> Tensor:
        """Return the rows (rows, block_size) of a set, int32."""
        separator = self._separator(tokenizer)
        before, after = (separator, []) if self.separator == "bos" else ([], separator)
        ids = array("i")
        documents = iter(self._documents(name, trained))
        while chunk := list(itertools.islice(documents, _DOCUMENTS_AT_ONCE)):
            for document in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
                ids.extend(before + document + after)
            if limit is not None and len(ids) >= limit:
                del ids[limit:]
                break
        rows = len(ids) // self.block_size
        if not rows:
            path = self.val[name] if not trained and name in self.val else self.train
            raise ConfigError(
                f"{path!r} gives {len(ids)} tokens for {name!r}, fewer than one row of block_size={self.block_size}; "
                "lower block_size or give more text"
            )
        return torch.frombuffer(ids, dtype=torch.int32)[: rows * self.block_size].clone().view(rows, self.block_size)

    def _separator(self, tokenizer: Any) -> list[int]:
        if self.separator == "none":
            return []
        token = tokenizer.bos_token_id if self.separator == "bos" else tokenizer.eos_token_id
        if token is None:
            other = "eos" if self.separator == "bos" else "bos"
            raise ConfigError(
                f"separator={self.separator!r}, but the tokenizer {self.tokenizer!r} has no {self.separator} token; "
                f"use separator={other!r} or 'none'"
            )
        return [token]

    def _loading(self) -> dict[str, Any]:
        # A generator of its own: a new epoch of data must not advance the random numbers of the training.
        return {
            "collate_fn": _collate,
            "num_workers": self.num_workers,
            "generator": torch.Generator().manual_seed(self.seed),
        }


_TRAIN = "train"


class _RowsOfAdapters:
    """Rows of several parts, each row with the name of its part."""

    def __init__(self, parts: Sequence[tuple[str | None, Tensor]]) -> None:
        self.rows = torch.cat([rows for _, rows in parts])
        self.names = [name for name, rows in parts for _ in range(len(rows))]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, str | None]:
        return self.rows[index], self.names[index]


def _collate(rows: list[Any]) -> dict[str, Any]:
    named = not isinstance(rows[0], Tensor)
    ids = torch.stack([row[0] for row in rows] if named else rows).long()  # (batch, block)
    column = {ADAPTER_COLUMN: [row[1] for row in rows]} if named else {}
    return {"input_ids": ids, "labels": ids.clone(), **column}


def _check_range(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"TextDataModule {name} must be an integer of at least {least}, got {value!r}")

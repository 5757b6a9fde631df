"""What all data modules share: files, splits, selection, bad rows, and loaders that resume exactly.

::

    file ──> rows ──> split ──> selection ──> examples ──> loader ──> batches
             │        seeded    train only    │            position saved
             └── malformed ───────────────────┴── empty, truncated: counted with file and line, or refused
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.adapter_training import ADAPTER_COLUMN
from lightning_peft.data.collating import WithAdapters
from lightning_peft.data.examples import Example, Examples, NamedExamples
from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler
from lightning_peft.data.selection import select_rows
from lightning_peft.data.streaming import StreamingDataLoader
from lightning_peft.data_position import place_of
from lightning_peft.errors import BadRowError, ConfigError, did_you_mean
from lightning_peft.field_checks import is_number, is_whole
from lightning_peft.source_rows.bad_rows import BadRows, OnBadRows
from lightning_peft.source_rows.reading import FORMATS, Row, read_rows, suffix_of

TRAIN = "train"
Split = Literal["random", "end"]
_GROUPED_BATCHES = 50


class RowsDataModule(LightningDataModule):
    """The part of a data module that does not know what is in a row.

    A subclass says with :meth:`example` what becomes of a row and with :meth:`collator` how a batch is made of examples.

    Args:
        train: file, folder or hub id to train on: see :mod:`lightning_peft.source_rows.reading`. Several, ``{name: file}``, train an
            adapter each, that of the name; validation sets of that name are read by it, others by the base alone.
        val: file to evaluate on, or several by name, ``{name: file}``. A file without a name gets that of its stem.
        batch_size: rows in a batch of training.
        val_batch_size: rows in a batch of evaluation; ``batch_size`` if None.
        val_fraction: hold out so much of ``train``. It becomes the first validation set, named as the stem of the file;
            of several files, each its own, named as the file is.
        split: which rows are held out: ``random`` ones, by ``seed``, or those at the ``end``. None is what suits the module:
            the end for running text, random rows elsewhere.
        max_train_rows: train only on the first so many rows of each file; on all if None.
        max_val_rows: evaluate only on the first so many rows of each validation set; on all if None.
        max_similarity: leave out training rows that are as similar as this to an earlier one, by MinHash over the words;
            none if None.
        diverse_rows: train on so many rows, as different from each other as possible; on all if None.
        group_by_length: put rows of like length into a batch, for less padding.
        streaming: read the training rows while training, instead of all at the start.
        shuffle_buffer: rows that are shuffled at a time while streaming.
        on_bad_rows: what happens to a malformed, empty or truncated row: ``raise`` refuses it with file and line, ``report``
            leaves it out or cuts it, counts it in ``bad_rows`` and warns once a set.
        load_options: further arguments of ``datasets.load_dataset``, such as ``name`` and ``revision``.
        seed: decides which rows are held out, and with the epoch the order of the rows.
        shuffle: shuffle the training rows each epoch.
        num_workers: processes that load batches; 0 for none, which is fastest for what is in memory.

    Raises:
        ConfigError: an argument is out of range, or a file is not what it should be.
    """

    val_names: list[str]
    """Names of the validation sets, in the order of the data loaders. ``test`` measures the same sets."""
    test_names: list[str]
    """The same as ``val_names``."""
    bad_rows: dict[str, BadRows]
    """What was left out or cut, by the name of the set; the training rows are under ``train``, or the name of their adapter. What is held
    out of a file under the same name is called ``name (held out)``."""
    default_split: ClassVar[Split] = "random"
    whole_text: ClassVar[bool] = False
    """A ``.txt`` is one row."""

    def __init__(
        self,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        *,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        val_fraction: float = 0.0,
        split: Literal["random", "end"] | None = None,
        max_train_rows: int | None = None,
        max_val_rows: int | None = None,
        max_similarity: float | None = None,
        diverse_rows: int | None = None,
        group_by_length: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1024,
        on_bad_rows: OnBadRows = "raise",
        load_options: dict[str, Any] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train = train
        self._by_adapter = not isinstance(train, str)
        self._train = {TRAIN: train} if isinstance(train, str) else dict(train)
        self.val = {_stem(val): val} if isinstance(val, str) else dict(val or {})
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.val_fraction, self.split = val_fraction, split or self.default_split
        self.max_train_rows, self.max_val_rows = max_train_rows, max_val_rows
        self.max_similarity, self.diverse_rows = max_similarity, diverse_rows
        self.group_by_length, self.streaming, self.shuffle_buffer = group_by_length, streaming, shuffle_buffer
        self.on_bad_rows, self.load_options = on_bad_rows, load_options
        self.seed, self.shuffle, self.num_workers = seed, shuffle, num_workers
        self.bad_rows = {}
        self.share = (0, 1)  # of several processes that read a stream, which this is
        self._datasets: dict[tuple[str, bool], Examples] = {}  # of a set by its name, and whether it is trained on
        self._read: dict[str, tuple[list[Row], list[Row]]] = {}
        self._check(val_batch_size)
        self.val_names = self.test_names = self._names()

    # -- what a subclass says --------------------------------------------------------------------------------------

    @abstractmethod
    def example(self, row: Row, bad_rows: BadRows) -> Example:
        """Return what is trained on for one row.

        Raises:
            BadRowError: nothing can be made of it.
        """

    @abstractmethod
    def collator(self) -> Callable[[list[Example]], dict[str, Any]]:
        """Return what makes a batch of examples; it is sent to the processes that load batches."""

    @abstractmethod
    def shown(self, example: Example) -> list[tuple[str, bool]]:
        """Return an example for people: pieces of text, and whether each is what the model learns to predict."""

    def text_of(self, row: Row) -> str:
        """Return the text by which rows are compared with each other: all texts, and texts in lists."""
        values = (value if isinstance(value, list) else [value] for value in row.values.values())
        return " ".join(one for value in values for one in value if isinstance(one, str))

    def prepare(self) -> None:
        """Load what :meth:`example` needs, such as a tokenizer; called before it in every process."""

    def examples(self, rows: Iterable[Row], name: str, trained: bool, bad_rows: BadRows) -> Iterator[Example]:
        """Yield the examples of a set."""
        del name, trained
        for row in rows:
            try:
                example = self.example(row, bad_rows)
            except BadRowError as error:
                bad_rows.note(error)
            else:
                yield example

    def read(self, name: str, source: str, bad_rows: BadRows, *, split: str = TRAIN) -> Iterator[Row]:
        """Yield the rows of a file of the set ``name``."""
        options = {"whole_text": self.whole_text, "streaming": self.streaming, "options": self.load_options}
        return read_rows(source, bad_rows, split=split, **options)  # type: ignore[arg-type]

    def split_rows(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """Return the rows to train on and those that are held out, both in the order of the file."""
        count = max(1, round(len(rows) * self.val_fraction))
        order = torch.arange(len(rows))
        if self.split == "random":
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        held_out = set(order[len(rows) - count :].tolist())
        return (
            [row for number, row in enumerate(rows) if number not in held_out],
            [row for number, row in enumerate(rows) if number in held_out],
        )

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read and prepare what ``stage`` needs.

        Raises:
            ConfigError: a set has no rows, or there is none to evaluate on.
        """
        if stage not in (None, "fit") and not self.val_names:
            raise ConfigError(f"there is nothing to evaluate on; give {type(self).__name__} val= or val_fraction=")
        wanted = [(name, True) for name in self._train if stage in (None, "fit") and not self.streaming]
        self.prepare()
        for name, trained in wanted + [(name, False) for name in self.val_names]:
            if (name, trained) not in self._datasets:
                self._datasets[name, trained] = self._made(name, trained)
        self._read.clear()

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        (rank, processes, _), batches = place_of(trainer), trainer.limit_train_batches if trainer else None
        if self.streaming:
            return self._stream(processes, batches)
        rows = self._named([(name, self._datasets[name, True]) for name in self._train])
        if len(rows) < processes:
            raise ConfigError(
                f"{processes} processes train on {len(rows)} rows, so that one has none; use fewer devices"
            )
        if isinstance(batches, float):
            batches = int(batches * -(-(len(rows) // processes) // self.batch_size))
        sampler = ResumableSampler(
            rows,
            seed=self.seed,
            shuffle=self.shuffle,
            num_replicas=processes,
            rank=rank,
            limit=None if batches is None else batches * self.batch_size,
            lengths=rows.lengths if self.group_by_length else None,  # type: ignore[arg-type]
            group_size=_GROUPED_BATCHES * self.batch_size * processes,
        )
        return ResumableDataLoader(rows, sampler=sampler, batch_size=self.batch_size, **self._loading())

    @override
    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [
            DataLoader(
                self._named([(name if name in self._train else None, self._datasets[name, False])]),
                batch_size=self.val_batch_size,
                **self._loading(),
            )
            for name in self.val_names
        ]

    @override
    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return self.val_dataloader()

    def _stream(self, processes: int, batches: int | float | None) -> StreamingDataLoader:
        if processes > 1:
            raise ConfigError(
                f"streaming=True reads in one process, and {processes} train; leave streaming out, or train with devices=1"
            )
        limit = batches if isinstance(batches, int) and not isinstance(batches, bool) else None
        return StreamingDataLoader(self, batch_size=self.batch_size, limit=limit, **self._loading())

    def _named(self, parts: list[tuple[Any, Examples]]) -> Examples | NamedExamples:
        """Return the examples of all parts, each with the name of its part where batches name adapters."""
        return NamedExamples(ADAPTER_COLUMN, parts) if self._by_adapter else parts[0][1]

    def _loading(self) -> dict[str, Any]:
        # A generator of its own: a new epoch of data must not advance the random numbers of the training.
        collate = self.collator()
        return {
            "collate_fn": WithAdapters(collate) if self._by_adapter else collate,
            "num_workers": self.num_workers,
            "generator": torch.Generator().manual_seed(self.seed),
        }

    # -- reading ---------------------------------------------------------------------------------------------------

    def stream(self, bad_rows: BadRows) -> Iterator[Row]:
        """Yield the training rows in the order of their files, without reading ahead."""
        name, source = next(iter(self._train.items()))
        return itertools.islice(self.read(name, source, bad_rows), self.max_train_rows)

    def rows_of(self, name: str, trained: bool, bad_rows: BadRows) -> Iterable[Row]:
        """Return the rows of a set, after split and selection."""
        if not trained and name in self.val:
            return itertools.islice(self.read(name, self.val[name], bad_rows, split="validation"), self.max_val_rows)
        of = name if trained else next(file for file in self._train if self._held_out_name(file) == name)
        if not self.val_fraction:
            rows: Iterable[Row] = self.read(of, self._train[of], bad_rows)
        else:
            if of not in self._read:
                self._read[of] = self.split_rows(list(self.read(of, self._train[of], bad_rows)))
            rows = self._read[of][0 if trained else 1]
        rows = itertools.islice(rows, self.max_train_rows if trained else self.max_val_rows)
        if trained and (self.max_similarity is not None or self.diverse_rows is not None):
            return select_rows(list(rows), self.text_of, bad_rows, self.max_similarity, self.diverse_rows, self.seed)
        return rows

    def _made(self, name: str, trained: bool) -> Examples:
        bad_rows = self.bad_rows[self.label_of(name, trained)] = BadRows(self.on_bad_rows)
        examples = Examples(self.examples(self.rows_of(name, trained, bad_rows), name, trained, bad_rows))
        bad_rows.warn(repr(self.source_of(name, trained)))
        if not len(examples):
            self.refuse_no_rows(name, trained, bad_rows)
        return examples

    def refuse_no_rows(self, name: str, trained: bool, bad_rows: BadRows) -> None:
        """Raise a ConfigError that tells why a set has no rows."""
        held_out = trained and self.val_fraction and any(self._read.get(name, ((), ())))
        why = f"val_fraction={self.val_fraction:g} holds them all out" if held_out else "it has none"
        why = f"of its rows, {bad_rows}" if bad_rows.counts else why
        raise ConfigError(f"{self.source_of(name, trained)!r} gives no rows for {name!r}; {why}")

    def label_of(self, name: str, trained: bool) -> str:
        """Return the name of a set that none other has: what is held out of a file may be named as what is trained on."""
        return name if trained or name not in self._train else f"{name} (held out)"

    def source_of(self, name: str, trained: bool) -> str:
        """Return the file that a set comes from."""
        if not trained and name in self.val:
            return self.val[name]
        return self._train[name if name in self._train else next(iter(self._train))]

    def first(self, name: str, count: int) -> list[Example]:
        """Return the first examples of a set, which is read if it was not; ``train`` or an adapter names what is trained on.

        Raises:
            ConfigError: there is no such set.
        """
        sets = {self.label_of(one, False): (one, False) for one in self.val_names}
        sets = {**{one: (one, True) for one in self._train}, **sets}
        if name not in sets:
            raise ConfigError(
                f"there is no set {name!r}{did_you_mean(name, sets) or '.'} The sets are: {', '.join(sets)}"
            )
        self.prepare()
        name, trained = sets[name]
        if trained and self.streaming:
            bad_rows = self.bad_rows[name] = BadRows(self.on_bad_rows)
            return list(itertools.islice(self.examples(self.stream(bad_rows), name, True, bad_rows), count))
        if (name, trained) not in self._datasets:
            self._datasets[name, trained] = self._made(name, trained)
        examples = self._datasets[name, trained]
        return [examples[number] for number in range(min(count, len(examples)))]

    def summary(self) -> str:
        """Return how many rows each set has, how it was split, and what was left out: a line or more for each set."""
        lines = []
        for (name, trained), examples in self._datasets.items():
            tokens = f", {int(examples.lengths.sum())} tokens" if "input_ids" in examples.fields else ""
            use = "to train on" if trained else "to evaluate on"
            if self.val_fraction and (trained or name not in self.val):
                how = f"drawn with seed {self.seed}" if self.split == "random" else "at the end"
                use += f" ({self.val_fraction:g} of the file is held out, {how})"
            lines.append(
                f"{self.label_of(name, trained)}: {len(examples)} rows{tokens} of {self.source_of(name, trained)} {use}"
            )
        return "\n".join([*lines, *(f"{name}: {bad}" for name, bad in self.bad_rows.items() if bad.counts)])

    # -- checks ----------------------------------------------------------------------------------------------------

    def _held_out_name(self, name: str) -> str:
        return name if self._by_adapter else _stem(self._train[name])

    def _names(self) -> list[str]:
        held_out = [self._held_out_name(name) for name in self._train] if self.val_fraction else []
        for name in held_out:
            if name in self.val:
                raise ConfigError(
                    f"val has a set named {name!r}, which is also the name of what val_fraction holds out; rename the one in val"
                )
        names = [*held_out, *self.val]
        for name in names:
            if not name or "/" in name or (name == TRAIN and name in self.val):
                raise ConfigError(f"{name!r} cannot be the name of a validation set; choose another name in val")
        return names

    def check_whole(self, least: int, **values: Any) -> None:
        """Refuse values that are no whole numbers of at least ``least``."""
        for name, value in values.items():
            if not is_whole(value, least):
                raise ConfigError(f"{type(self).__name__} {name} must be an integer of at least {least}, got {value!r}")

    def _check(self, val_batch_size: int | None) -> None:
        own = type(self).__name__
        self.check_whole(1, batch_size=self.batch_size, shuffle_buffer=self.shuffle_buffer)
        self.check_whole(0, seed=self.seed, num_workers=self.num_workers)
        optional = {name: getattr(self, name) for name in ("max_train_rows", "max_val_rows", "diverse_rows")}
        optional["val_batch_size"] = val_batch_size
        self.check_whole(1, **{name: value for name, value in optional.items() if value is not None})
        if not is_number(self.val_fraction) or not 0.0 <= self.val_fraction < 1.0:
            raise ConfigError(f"{own} val_fraction must lie in [0, 1), got {self.val_fraction!r}")
        if self.split not in ("random", "end"):
            raise ConfigError(f"{own} split must be 'random' or 'end', got {self.split!r}")
        if self.max_similarity is not None and not (is_number(self.max_similarity) and 0 < self.max_similarity <= 1):
            raise ConfigError(f"{own} max_similarity must lie in (0, 1], got {self.max_similarity!r}")
        BadRows(self.on_bad_rows)
        if not self._train:
            raise ConfigError(f"{own} train must be a file, or several by the names of adapters, got none")
        if self.streaming:
            for name in ("val_fraction", "max_similarity", "diverse_rows", "group_by_length"):
                if getattr(self, name):
                    raise ConfigError(
                        f"streaming=True never holds all rows, which {name}={getattr(self, name)!r} needs; leave one of them out"
                    )
            if self._by_adapter:
                raise ConfigError(
                    f"streaming=True reads one file, and train names {len(self._train)}; leave streaming out"
                )


def _stem(source: str) -> str:
    return Path(source if suffix_of(source) in FORMATS else source.partition(":")[0]).stem

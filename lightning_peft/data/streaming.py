"""Training rows that are read while training, and go on where a checkpoint was saved.

Of n workers, worker w reads every row and keeps those whose number is w modulo n. Batches are handed out in turn, and a worker
that has none left says so in its turns until all have none; so the turns alone say where each worker stands::

    turn       0    1    2    3    4    5    6    7
    worker     0    1    0    1    0    1    0    1
    batch      b    b    b    b    -    b    -    -      the end: as many turns without a batch as there are workers

A resumed epoch is read from its start, and the batches that were handed out are made again and thrown away.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info
from typing_extensions import override

from lightning_peft.data.examples import Example
from lightning_peft.data.resumable import EpochPosition
from lightning_peft.errors import ConfigError
from lightning_peft.source_rows.bad_rows import BadRows

if TYPE_CHECKING:
    from lightning_peft.data.rows_module import RowsDataModule
    from lightning_peft.source_rows.reading import Row

_NOTHING: tuple[None, list[Any]] = (None, [])
"""A turn without a batch."""


class StreamPosition(EpochPosition, Sampler[None]):
    """The epoch of a stream and the turns of it that were handed out; what Lightning tells of epochs comes here."""

    batches: int
    """Batches of this epoch that were handed out."""
    finished: bool
    """The end of the epoch was seen."""
    loaded: bool
    """A state was loaded, and at most one batch was handed out since: Lightning fetches one before it tells the epoch."""

    def __init__(self) -> None:
        self.epoch, self.position, self.told, self.resuming = 0, 0, 0, False
        self.batches, self.finished, self.loaded = 0, False, False

    @override
    def set_epoch(self, epoch: int) -> None:
        if self.loaded:
            self.told = epoch
        else:
            super().set_epoch(epoch)

    @override
    def advance(self, epochs: int = 1) -> None:
        super().advance(epochs)
        self.batches, self.finished = 0, False

    @override
    def __iter__(self) -> Iterator[None]:
        return itertools.repeat(None)


class StreamedBatches(IterableDataset[Any]):
    """The batches of a worker's turns, without end: after the last one come turns without a batch."""

    def __init__(
        self, module: RowsDataModule, batch_size: int, position: StreamPosition, collate: Callable[..., Any]
    ) -> None:
        self.module, self.batch_size, self.position, self.collate = copy.copy(module), batch_size, position, collate
        self.module.trainer = None

    @override
    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        here, workers = (info.id, info.num_workers) if info else (0, 1)
        start = self.position.position
        worker = (start + here) % workers  # whose turns these are
        bad_rows = BadRows(self.module.on_bad_rows)
        # All workers read all rows; one tells of those that cannot be read.
        rows = self.module.stream(bad_rows if worker == 0 else BadRows("report"))
        rows = itertools.islice(rows, worker, None, workers)
        self.module.share = (worker, workers)
        if self.module.shuffle:
            seed = (self.module.seed * 1_000_003 + self.position.epoch) * 1_009 + worker
            rows = shuffled(rows, self.module.shuffle_buffer, random.Random(seed))
        examples = self.module.examples(rows, "train", True, bad_rows)
        for number in itertools.count():
            try:
                batch = _tensors(itertools.islice(examples, self.batch_size))
            except ConfigError as error:  # a worker that raises it is told of by torch, with another error
                yield error, bad_rows.take()
                return
            if not batch:
                break
            found = bad_rows.take()  # also of batches that are thrown away, so that it is told once
            if worker + number * workers >= start:
                yield self.collate(batch), found
        yield None, bad_rows.take()
        while True:
            yield _NOTHING


def _tensors(examples: Iterable[Example]) -> list[Example]:
    return [
        {
            name: torch.tensor(value) if isinstance(value, list) and value and isinstance(value[0], int) else value
            for name, value in example.items()
        }
        for example in examples
    ]


def shuffled(rows: Iterable[Row], size: int, generator: random.Random) -> Iterator[Row]:
    """Yield rows in another order: always a random one of those in a buffer.

    Args:
        rows: the rows.
        size: rows in the buffer.
        generator: draws them.

    Example:
        >>> sorted(shuffled(range(5), 2, random.Random(0)))
        [0, 1, 2, 3, 4]
    """
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = generator.randrange(size)
        yield buffer[place]
        buffer[place] = row
    generator.shuffle(buffer)
    yield from buffer


class StreamingDataLoader(DataLoader[Any]):
    """A loader of a streamed set that goes on where its state says.

    Args:
        module: the data module that reads the rows.
        batch_size: examples in a batch.
        collate_fn: makes a batch of examples.
        limit: batches of an epoch that are trained on, as under ``Trainer(limit_train_batches=...)``; all if None.
        num_workers: processes that read.
        generator: for the seeds of the workers.
    """

    starts_at_once = True
    """A resumed run may set the random state of its checkpoint before the first batch."""
    carries_on = True
    """At the end of an epoch too, its state says where it goes on."""

    def __init__(
        self,
        module: RowsDataModule,
        *,
        batch_size: int,
        collate_fn: Callable[..., Any],
        limit: int | None = None,
        num_workers: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        position = StreamPosition()
        batches = StreamedBatches(module, batch_size, position, collate_fn)
        super().__init__(batches, batch_size=None, num_workers=num_workers, generator=generator)
        self.__dict__["sampler"] = position  # where Lightning tells the epoch
        self.module, self.limit, self.rows_in_a_batch = module, limit, batch_size

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        place: Any = self.sampler
        over = self.limit is not None and place.batches >= self.limit
        if place.resuming and place.finished and not over:
            place.resuming = False  # of the epoch that goes on, nothing is left
            return
        if over or (place.position and not place.resuming):
            place.advance()
        kept = torch.get_rng_state() if place.resuming and place.position else None
        place.resuming = False
        turns = super().__iter__()
        if kept is not None:
            torch.set_rng_state(kept)
        if place.epoch == 0:  # another loader, or a preview, may have counted them before
            self.module.bad_rows["train"] = BadRows(self.module.on_bad_rows)
        idle, handed_out, report = 0, 0, self.module.bad_rows.setdefault("train", BadRows(self.module.on_bad_rows))
        try:
            for batch, found in turns:
                place.position += 1
                if place.epoch == 0:  # the next ones find the same
                    report.merge(found)
                if isinstance(batch, ConfigError):
                    raise batch
                if batch is None:
                    idle += 1
                    if idle == max(1, self.num_workers):
                        break
                    continue
                idle, place.batches, handed_out = 0, place.batches + 1, handed_out + 1
                place.loaded = place.loaded and handed_out == 1
                yield batch
        finally:
            del turns  # its workers end here, and not when the trace of an error is forgotten
        place.finished = True
        if place.epoch == 0:
            report.warn(repr(self.module.source_of("train", True)))
        if not place.batches:
            self.module.refuse_no_rows("train", True, report)

    def state_dict(self) -> dict[str, int]:
        """Return the position, and what it is a position in."""
        place: Any = self.sampler
        own = {"epoch": place.epoch, "position": place.position, "batches": place.batches}
        return {**own, "finished": int(place.finished), **self._order()}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Start the next iteration at a position that :meth:`state_dict` returned.

        Raises:
            ConfigError: it is a position in another order: another seed, batch size or number of workers.
        """
        place: Any = self.sampler
        for name, here in self._order().items():
            if state_dict.get(name) != here:
                raise ConfigError(
                    f"the checkpoint was saved in the middle of data with {name}={state_dict.get(name)!r}, here it is {here!r}; "
                    "resume with the data settings of the first run, or start a new run from its adapter folder"
                )
        place.epoch, place.position, place.batches = (state_dict[name] for name in ("epoch", "position", "batches"))
        place.finished, place.resuming, place.loaded = bool(state_dict["finished"]), True, True

    def _order(self) -> dict[str, int]:
        module = self.module
        return {
            "seed": module.seed,
            "shuffle": int(module.shuffle) and module.shuffle_buffer,
            "batch_size": self.rows_in_a_batch,
            "workers": self.num_workers,
        }

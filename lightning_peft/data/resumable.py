"""A data loader whose position is saved and restored.

The order of an epoch is a function of (seed, epoch) alone, so a position in it is two numbers::

    epoch 0   7 2 5 | 0 9 4 | 1 8 3 | 6        |: batches of 3
    epoch 1   3 9 0 | 6 1 7 | ...
                    ^ {"epoch": 1, "position": 3}

Lightning saves and loads the state of every training loader that has ``state_dict`` and ``load_state_dict``; the
position counts the batches that were handed out, not those that worker processes have fetched ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_peft.errors import ConfigError


class EpochPosition:
    """An epoch, and a position in it."""

    epoch: int
    position: int
    """Samples of this epoch that this process has handed out."""
    told: int
    """The epoch last told to :meth:`set_epoch`."""
    resuming: bool
    """A state was loaded, and nothing was handed out since."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``, or stay at the position if that was told before.

        A loaded state knows better: Lightning may count on while it resumes, although an epoch goes on (after a stop by
        ``max_steps``) or begins (twice told a new number).
        """
        if not self.resuming and epoch != self.told:
            self.advance(epoch - self.told)
        self.told = epoch

    def advance(self, epochs: int = 1) -> None:
        """Go to the start of a later epoch."""
        self.epoch, self.position = self.epoch + epochs, 0


class ResumableSampler(EpochPosition, DistributedSampler[int]):
    """The order in which one process reads a dataset, from a position on.

    It is a ``DistributedSampler``, so Lightning leaves it in place when several processes train. Each process gets
    the same number of samples; up to ``num_replicas - 1`` are left out of an epoch, others in each.

    Args:
        dataset: what is read; only its length is used.
        seed: with the epoch, decides the order.
        shuffle: shuffle each epoch; otherwise the order is that of the dataset.
        num_replicas: number of processes.
        rank: which of them this is.
        limit: samples of an epoch that this process reads before the next one begins, as under
            ``Trainer(limit_train_batches=...)``; all if None. It only tells a resumed run whether an epoch was finished.
        lengths: length of each sample; samples of like length then come together, ``group_size`` at a time.
        group_size: samples that are ordered by length at once, such as some batches of them; groups are drawn at random.

    Example:
        >>> sampler = ResumableSampler(range(5), shuffle=False)
        >>> sampler.position = 3
        >>> list(sampler), len(sampler)
        ([3, 4], 5)
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        limit: int | None = None,
        lengths: Sequence[int] | None = None,
        group_size: int = 0,
    ) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=True,
        )
        self.limit = len(self) if limit is None else min(limit, len(self))
        self.position, self.told, self.resuming = 0, 0, False
        self.lengths, self.group_size = None if lengths is None else torch.as_tensor(lengths), group_size

    @override
    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(size, generator=generator)
        else:
            order = torch.arange(size)
        if self.lengths is not None:
            groups = torch.split(order, max(1, self.group_size))
            order = torch.cat([group[self.lengths[group].argsort(descending=True, stable=True)] for group in groups])
        return iter(order[self.rank : self.total_size : self.num_replicas][self.position :].tolist())


class ResumableDataLoader(DataLoader[Any]):
    """A ``DataLoader`` that goes on where its state says.

    The first iteration after :meth:`load_state_dict` starts at the saved position; every other one starts an epoch.
    Workers are started with the first batch, when the trainer has told the sampler its epoch; where a state was loaded, that draws
    nothing from the global generator, which is that of the checkpoint already. Without a
    :class:`ResumableSampler` (``Trainer(overfit_batches=...)`` replaces it) this is a plain ``DataLoader``.

    Example:
        >>> sampler = ResumableSampler(range(6), seed=1)
        >>> loader = ResumableDataLoader(range(6), batch_size=2, sampler=sampler)
        >>> batches = iter(loader)
        >>> _ = next(batches)
        >>> state, rest = loader.state_dict(), [batch.tolist() for batch in batches]
        >>> again = ResumableDataLoader(range(6), batch_size=2, sampler=ResumableSampler(range(6), seed=1))
        >>> again.load_state_dict(state)
        >>> [batch.tolist() for batch in again] == rest
        True
    """

    starts_at_once = True
    """A resumed run may set the random state of its checkpoint before the first batch."""

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):
            yield from super().__iter__()
            return
        if sampler.position >= sampler.limit or (sampler.position and not sampler.resuming):
            sampler.advance()
        # As a run goes on within an epoch, what starting draws was drawn before the checkpoint.
        kept = torch.get_rng_state() if sampler.resuming and sampler.position else None
        sampler.resuming = False
        batches = super().__iter__()
        if kept is not None:
            torch.set_rng_state(kept)
        for batch in batches:
            sampler.position = min(sampler.position + (self.batch_size or 1), len(sampler))
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, and what it is a position in."""
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):
            return {}
        return {"epoch": sampler.epoch, "position": sampler.position, **self._order(sampler)}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Start the next iteration at a position that :meth:`state_dict` returned.

        Raises:
            ConfigError: it is a position in another order: other data, seed, batch size or number of processes.
        """
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler) or not state_dict:
            return
        here_all = self._order(sampler)
        for name in [*here_all, *(state_dict.keys() - here_all.keys() - {"epoch", "position"})]:
            here, there = here_all.get(name), state_dict.get(name)
            if there != here:
                raise ConfigError(
                    f"the checkpoint was saved in the middle of data with {name}={there!r}, here it is {here!r}; resume "
                    "with the data settings of the first run, or start a new run from its adapter folder"
                )
        sampler.epoch, sampler.position = state_dict["epoch"], state_dict["position"]
        sampler.resuming = True

    def _order(self, sampler: ResumableSampler) -> dict[str, int]:
        return {
            "rows": len(sampler.dataset),  # type: ignore[arg-type]
            "seed": sampler.seed,
            "shuffle": int(sampler.shuffle),
            "batch_size": self.batch_size or 1,
            "processes": sampler.num_replicas,
            **({} if sampler.lengths is None else {"group_size": sampler.group_size}),
        }

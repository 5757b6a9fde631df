"""The position in the training data of loaders that do not keep it themselves.

A ``DataLoader`` without a state is brought back by doing again what it did: its iterators are made from the random numbers they
were made from, and give their batches again, which are thrown away::

    first run   epoch starts: note the random state, iter(loader) | batch 0 | batch 1 | saved
    resumed     go back to that state,               iter(loader) | batch 0 | batch 1 | random state of the checkpoint | batch 2 ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_peft.random_state import random_state, set_random_state

_SAMPLE = 64
"""Elements of a tensor that are kept to recognise a batch."""
_LARGE = 2**22
"""Bytes of a batch that is not kept in memory for its sample."""


def place_of(trainer: Trainer | None) -> tuple[int, int, int]:
    """Return which of how many parts of the data this process trains on, and how many processes side by side train on one part.

    The last is one, but where processes share a model (tensor parallelism).
    """
    if trainer is None:
        return 0, 1, 1
    dealt = trainer.distributed_sampler_kwargs
    if dealt is None:
        return trainer.global_rank, trainer.world_size, 1
    return int(dealt["rank"]), int(dealt["num_replicas"]), max(1, trainer.world_size // int(dealt["num_replicas"]))


def training_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders that the training batches come from; none before Lightning has set them up."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def keeps_its_position(loader: Any) -> bool:
    """Tell whether Lightning saves and restores the position of ``loader`` with its state."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def starts_at_once(loader: Any) -> bool:
    """Tell whether ``iter(loader)`` draws all its random numbers for starting itself, and not with the first batch."""
    return getattr(loader, "starts_at_once", False) or _of_torchdata(loader)


def keeps_its_workers(loader: Any) -> bool:
    """Tell whether the worker processes of ``loader``, and their random numbers, outlive an epoch."""
    return bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "num_workers", 0) > 0


def carries_on(loader: Any) -> bool:
    """Tell whether the state of ``loader`` at the end of an epoch is what its next epoch follows from."""
    return getattr(loader, "carries_on", False) or _of_torchdata(loader)


def _of_torchdata(loader: Any) -> bool:
    return any(kind.__module__.startswith("torchdata.") for kind in type(loader).__mro__)


def end_epoch(trainer: Trainer) -> bool:
    """Bring loaders whose next epoch follows from the last, such as those of torchdata, to the end of the epoch of a checkpoint.

    Lightning loads no states there. Returns whether there are such loaders: their next epoch starts with another ``iter``.
    """
    states = trainer.fit_loop._combined_loader_states_to_load
    loaders = training_loaders(trainer)
    if not all(map(starts_at_once, loaders)) or not any(map(carries_on, loaders)):
        return False
    if states:  # with max_steps it has loaded them
        for loader, state in zip(loaders, states, strict=True):
            if carries_on(loader):
                loader.load_state_dict(state)
        start_iterators(trainer)
    return True


def start_iterators(trainer: Trainer) -> None:
    """Let all training loaders start their iterators."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    iter(fetcher)


def generator_states(trainer: Trainer) -> dict[str, Tensor]:
    """Return the states of the generators that the training loaders and their samplers have, by place."""
    return {place: generator.get_state() for place, generator in _generators(trainer)}


def set_generator_states(trainer: Trainer, states: Mapping[str, Tensor]) -> None:
    """Go back to what :func:`generator_states` returned."""
    for place, generator in _generators(trainer):
        if place in states:
            generator.set_state(states[place].cpu())


def _generators(trainer: Trainer) -> Iterator[tuple[str, torch.Generator]]:
    seen: set[int] = set()
    for number, loader in enumerate(training_loaders(trainer) or _given_loaders(trainer)):
        if keeps_its_position(loader):
            continue
        for path in ("", "sampler", "batch_sampler", "batch_sampler.sampler"):
            owner = loader
            for part in path.split(".") if path else ():
                owner = getattr(owner, part, None)
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and id(generator) not in seen:
                seen.add(id(generator))
                yield f"{number}.{path}", generator


def _given_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders that were handed to ``fit`` themselves."""
    source = trainer.fit_loop._data_source
    return [] if source.is_module() else tree_leaves(source.instance)


def start_again(trainer: Trainer, state: Mapping[str, Any], generators: Mapping[str, Tensor]) -> None:
    """Make the iterators of the training loaders anew, from a random state and states of generators."""
    set_random_state(state)
    set_generator_states(trainer, generators)
    epoch: Any = trainer.fit_loop.epoch_progress.current
    for loader in training_loaders(trainer):
        _set_sampler_epoch(loader, epoch.processed)
    start_iterators(trainer)


def batches_done(trainer: Trainer) -> int:
    """Return how many batches of its epoch a run that resumes has trained on."""
    loop = trainer.fit_loop.epoch_loop
    return int(loop.batch_progress.current.completed) + bool(loop.restarted_on_train_batch_end)


def skip_batches(trainer: Trainer, count: int) -> tuple[Any, bool]:
    """Throw ``count`` batches away.

    Returns:
        The last of them, or None, and whether getting it drew random numbers, so that it may be another one than before.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    batch, before = None, None
    for number in range(count):
        if number == count - 1:
            before = random_state()
        try:
            batch, _, _ = next(fetcher)
        except StopIteration:
            return None, False
    fetcher.fetched -= count  # Lightning adds them itself
    return batch, before is not None and not _same_state(before, random_state())


class Sample:
    """The first elements of the tensors of a batch, by which it is recognised.

    They are copied when they are asked for, as each step has a batch and few a checkpoint. Until then the batch stays in memory, so of a large
    one they are copied at once.

    Args:
        batch: the batch.
        at_once: whether to copy them now, because steps write into their batches.
    """

    def __init__(self, batch: Any, *, at_once: bool) -> None:
        self._tensors = _leading(batch)
        large = sum(tensor.nbytes for tensor in self._tensors) > _LARGE
        self._copied = at_once or large or any(tensor.is_inference() for tensor in self._tensors)
        if self._copied:
            self._tensors = [_first(tensor) for tensor in self._tensors]
        self._versions = [] if self._copied else [tensor._version for tensor in self._tensors]

    def changed(self) -> bool:
        """Tell whether somebody wrote into the batch, so that what it was is not known any more."""
        return any(
            tensor._version != version
            for tensor, version in zip(self._tensors, self._versions, strict=not self._copied)
        )

    def taken(self) -> list[Tensor] | None:
        """Return the elements; None where they are not known."""
        if self._copied:
            return self._tensors
        return None if self.changed() else [_first(tensor) for tensor in self._tensors]


def sample_of(batch: Any) -> list[Tensor]:
    """Return the first elements of the tensors of a batch, by which it is recognised."""
    return [_first(tensor) for tensor in _leading(batch)]


def _leading(batch: Any) -> list[Tensor]:
    leaves = list(batch.values()) if type(batch) is dict else batch if type(batch) in (list, tuple) else [batch]
    if not all(type(leaf) is Tensor for leaf in leaves):
        leaves = tree_leaves(_plain_mapping(batch))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_sparse]
    return tensors[:8]


def _first(tensor: Tensor) -> Tensor:
    """Return a copy of the first elements of ``tensor``."""
    flat = tensor.detach().reshape(-1)
    return flat.narrow(0, 0, min(_SAMPLE, flat.shape[0])).clone()


def _plain_mapping(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def as_trained(module: LightningModule, batch: Any) -> Any:
    """Return a batch as ``training_step`` gets it: converted, and on the device of the module."""
    trainer = module.trainer
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def same_samples(one: list[Tensor], other: list[Tensor]) -> bool:
    """Compare what :func:`sample_of` returned of two batches."""
    pairs = [(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=False)]
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs
    )


def fetched_ahead(trainer: Trainer) -> list[Any]:
    """Return the batches that Lightning has fetched and not trained on: of loaders without a length it fetches one ahead."""
    return list(getattr(trainer.fit_loop._data_fetcher, "batches", ()))


def put_ahead(trainer: Trainer, batches: list[Any]) -> None:
    """Let training go on with ``batches`` before what the loader gives."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    fetcher.batches[:0] = batches
    fetcher.done = False


def _same_state(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (
        torch.equal(one["torch"], other["torch"])
        and one["python"] == other["python"]
        and one["numpy"][2:] == other["numpy"][2:]
        and torch.equal(one["numpy"][1], other["numpy"][1])
    )

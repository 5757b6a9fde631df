"""Initial values from data: a few training batches run through the model before training begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.injection import record
from lightning_peft.random_state import random_state, set_random_state
from lightning_peft.saved_modules import own_adapters

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def initialize_from_data(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor] | None = None, *, name: str = "default"
) -> None:
    """Give the adapter ``name`` the initial values that its method takes from data.

    Methods that declare ``data_driven`` need this once, after :func:`~lightning_peft.inject`, with the model on its device and
    before an optimizer is made: shapes may change. :class:`~lightning_peft.PEFTModule` calls it when a fit starts; in a
    LightningModule of your own, call it in ``configure_model``. Random states are left as they were, and so are the modes of
    modules.

    Args:
        model: the adapted model.
        batches: training batches on the device of the model; the method takes as many as it needs.
        loss: runs the model on a batch and returns the loss; if None, batches are mappings and the model returns its loss.
        name: the adapter.

    Raises:
        AdapterNotFoundError: there is no adapter of that name.
    """
    method = record(model, name).method
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            method.initialize(model, own_adapters(model, name), batches, loss or (lambda batch: model(**batch).loss))
    finally:
        for module, mode in modes.items():
            module.training = mode
        model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def training_batches(trainer: Trainer) -> Iterator[Iterable[Any]]:
    """Have the training batches of a fit that has not begun; its loaders and the random states are left as they were.

    Raises:
        ConfigError: the fit has no training data that can be read beforehand.
    """
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        raise ConfigError("a method that takes initial values from data was given, but there is no train_dataloader")
    before = random_state()
    loader = source.dataloader()
    position = loader.state_dict() if hasattr(loader, "state_dict") else None
    try:
        yield loader
    finally:
        if position is not None:
            loader.load_state_dict(position)
        set_random_state(before)

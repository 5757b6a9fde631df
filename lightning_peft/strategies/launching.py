"""Processes that start from the one that runs, by ``fork`` or ``spawn``: for notebooks and tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from typing_extensions import override

from lightning_peft.sharded_tensors import gathered


class ForkedLauncher(_MultiProcessingLauncher):
    """Lightning's, but what the module's ``state_dict`` holds comes back whole, and threads of a forked process may compute at once."""

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        # The first thread of a forked process that computes makes torch's pool of threads anew. Two that do at once, as transformers'
        # loading has them, meet a pool that is half made: "Invalid thread pool!".
        torch.set_num_threads(torch.get_num_threads())
        super()._wrapping_function(*args, **kwargs)

    @override
    def _collect_rank_zero_results(self, trainer: Trainer, results: Any) -> Any:
        with _whole_state(trainer.lightning_module):
            return super()._collect_rank_zero_results(trainer, results)


@contextlib.contextmanager
def _whole_state(module: LightningModule) -> Iterator[None]:
    whole = gathered(dict(module.state_dict()), keep=True)
    module.__dict__["state_dict"] = lambda *args, **kwargs: whole
    try:
        yield
    finally:
        del module.__dict__["state_dict"]

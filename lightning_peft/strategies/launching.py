"""Processes that start from the one that runs, by ``fork`` or ``spawn``: for notebooks and tests."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_peft.errors import LightningPEFTWarning
from lightning_peft.sharded_tensors import gathered
from lightning_peft.strategies.ending import end_with_parent, ending_what_starts


class ForkedLauncher(_MultiProcessingLauncher):
    """Lightning's, with three things added.

    What was trained comes back whole, into a model that is made for it. Threads of a forked process may compute at once. No process is left
    behind where the one that started them is interrupted or killed.
    """

    @override
    def launch(self, *args: Any, **kwargs: Any) -> Any:
        with ending_what_starts():
            return super().launch(*args, **kwargs)

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        # The first thread of a forked process that computes makes torch's pool of threads anew. Two that do at once, as transformers'
        # loading has them, meet a pool that is half made: "Invalid thread pool!".
        torch.set_num_threads(torch.get_num_threads())
        end_with_parent()
        super()._wrapping_function(*args, **kwargs)

    @override
    def get_extra_results(self, trainer: Trainer) -> dict[str, Any]:
        """Return what goes to the main process beside the weights: metrics, and how far the fit came, in a file.

        What is returned goes through a pipe of 64 kB that is read when the processes have ended; the state of a data loader may be larger.
        """
        path = Path(tempfile.mkdtemp()) / "fit_loop.ckpt"
        TorchCheckpointIO().save_checkpoint(trainer.fit_loop.state_dict(), path)
        return {**super().get_extra_results(trainer), "fit_loop": path}

    @override
    def update_main_process_results(self, trainer: Trainer, extra: dict[str, Any]) -> None:
        """Take that over."""
        path: Path = extra["fit_loop"]
        trainer.fit_loop.load_state_dict(TorchCheckpointIO().load_checkpoint(path, weights_only=False))
        shutil.rmtree(path.parent)
        super().update_main_process_results(trainer, extra)

    @override
    def _recover_results_in_main_process(self, worker_output: Any, trainer: Trainer) -> None:
        if worker_output.weights_path is not None:
            trained = self._strategy.checkpoint_io.load_checkpoint(worker_output.weights_path)
            _make_model(trainer, set(trained))
        super()._recover_results_in_main_process(worker_output, trainer)

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


def _make_model(trainer: Trainer, trained: set[str]) -> None:
    """Have the process that started the others make its model too, or the trained weights would go nowhere, without a word."""
    module, strategy, error = trainer.lightning_module, trainer.strategy, None
    before, function, reads = module._trainer, trainer.state.fn, getattr(strategy, "reads_weights", None)
    if trained <= module.state_dict().keys():
        return
    try:
        module._trainer, trainer.state.fn = trainer, TrainerFn.VALIDATING  # no initial values are taken from data
        if reads is not None:
            strategy.reads_weights = False  # type: ignore[attr-defined]  # nothing would read them later
        module.configure_model()
    except Exception as raised:
        error = raised
    finally:
        module._trainer, trainer.state.fn = before, function
        if reads is not None:
            strategy.reads_weights = reads  # type: ignore[attr-defined]
    missing = sorted(trained - module.state_dict().keys())
    if missing:
        warnings.warn(
            f"{type(module).__name__}.configure_model does not make the model in the process that started the others ({error or missing[0]}), so what "
            "they trained is not brought back into it; load it from a checkpoint",
            LightningPEFTWarning,
            stacklevel=2,
        )

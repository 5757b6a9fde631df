"""What the strategies do alike, whatever each process holds of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor
from typing_extensions import override

from lightning_peft.half_precision import keeping_adapters
from lightning_peft.moe.balance import balanced_over
from lightning_peft.strategies.buffers import moving_buffers, share
from lightning_peft.strategies.clipping import clip_gradients_by_norm
from lightning_peft.strategies.ending import end_others
from lightning_peft.strategies.launching import ForkedLauncher


class AdaptedStrategy(ParallelStrategy):
    """Stands before a strategy of Lightning: adapters are not rounded, experts are balanced over all processes, and none is left behind."""

    shares_buffers = True
    """Whether buffers that training may change are those of the first process before each step."""
    _within_window = False

    @override
    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            self._launcher = ForkedLauncher(self, start_method=self._launcher._start_method)

    @override
    def setup_environment(self) -> None:
        self.precision_plugin = keeping_adapters(self.precision_plugin)  # before configure_model, which it may act on
        super().setup_environment()

    @override
    def setup_precision_plugin(self) -> None:
        """Have the Trainer's clipping by norm be that of every layout."""
        super().setup_precision_plugin()
        plugin = self.precision_plugin
        vars(plugin)["clip_grad_by_norm"] = lambda optimizer, clip_val: clip_gradients_by_norm(
            plugin.main_params(optimizer), clip_val
        )

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if not isinstance(exception, KeyboardInterrupt):  # Lightning ends the others then
            end_others(self.launcher)

    @contextlib.contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Let gradients and buffers stay with their process, as in all but the last batch of a window."""
        self._within_window = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._within_window = False

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        if self.shares_buffers and not self._within_window and self.world_size > 1 and module is not None:
            share(moving_buffers(module))
        with balanced_over(self.world_size):
            return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with balanced_over(self.world_size):  # for what gradient checkpointing runs again
            return super().backward(closure_loss, *args, **kwargs)

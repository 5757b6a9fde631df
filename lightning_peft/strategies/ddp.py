"""DDP for adapted models: the strategy ``peft_ddp``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_peft.errors import ConfigError
from lightning_peft.sharded_folders import read_folder
from lightning_peft.strategies.adapted import AdaptedStrategy
from lightning_peft.strategies.agreement import check_agreement, share_values

_SENDS_BUFFERS = next(  # the older name, which torch 2.13 deprecates
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class PEFTDDPStrategy(AdaptedStrategy, DDPStrategy):
    """DDP that holds a whole adapted model in each process and averages the gradients of what is trained.

    The processes compare what they are about to train before the first step, ``bf16-true`` does not round adapters, and checkpoints
    of sharded runs are read. Inactive adapters do not require gradients and experts without tokens get zeros, so no search for unused
    parameters is needed.

    Args:
        kwargs: those of Lightning's ``DDPStrategy`` and of ``DistributedDataParallel``. With ``broadcast_buffers`` DDP sends all buffers
            or none; without it, the strategy sends those that training may change.

    Raises:
        ConfigError: ``find_unused_parameters=True`` was asked for.
    """

    strategy_name = "peft_ddp"

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("find_unused_parameters"):
            raise ConfigError(
                "find_unused_parameters=True was asked for, but adapters need it only where a batch chooses them by rows; then take Lightning's "
                "'ddp_find_unused_parameters_true'"
            )
        asked = [kwargs.get(name) for name in ("broadcast_buffers", "forward_sync_buffers")]
        self.shares_buffers = all(one is None for one in asked)  # a configuration file fills in what is left out
        if self.shares_buffers:
            kwargs[_SENDS_BUFFERS] = False
        super().__init__(**kwargs)

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        check_agreement(self, self.lightning_module)
        share_values(self, self.lightning_module)
        super().setup(trainer)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the checkpoint in a file, or whole what a sharded run left in a folder."""
        path = Path(checkpoint_path)
        return read_folder(path) if path.is_dir() else super().load_checkpoint(checkpoint_path, weights_only)

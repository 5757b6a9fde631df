"""A ModelCheckpoint whose every checkpoint is also an adapter to share."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from lightning_peft.errors import AdapterNotFoundError
from lightning_peft.mixin import PEFTMixin
from lightning_peft.state import save_adapter
from lightning_peft.surgery import adapted_roots, records


class AdapterCheckpoint(ModelCheckpoint):
    """Saves ``.ckpt`` files with adapters, optimizer and loops only, each with an adapter folder beside it.

    ``epoch=0-step=100.ckpt`` resumes the run; ``epoch=0-step=100.adapter/`` is what ``load_adapter`` and HF PEFT read. Where
    a model holds several adapters, the folder has one sub-folder for each but ``default``. The arguments are those of
    ``lightning.pytorch.callbacks.ModelCheckpoint``, and ``monitor``, ``save_top_k`` and ``save_last`` work as there. The module
    must be a :class:`~lightning_peft.PEFTModule` or have :class:`~lightning_peft.PEFTMixin`, which keeps the base out.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that would save its whole base."""
        if not isinstance(pl_module, PEFTMixin):
            raise AdapterNotFoundError(
                f"AdapterCheckpoint needs a PEFTModule, or a LightningModule with PEFTMixin before it in its bases; {type(pl_module).__name__} "
                "has neither and would write the whole base model into every checkpoint"
            )
        super().setup(trainer, pl_module, stage)

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            folder = adapter_folder(filepath)
            shutil.rmtree(folder, ignore_errors=True)
            for root in adapted_roots(trainer.lightning_module):
                for name in records(root):
                    save_adapter(root, folder if name == "default" else folder / name, name=name)

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            shutil.rmtree(adapter_folder(filepath), ignore_errors=True)


def adapter_folder(checkpoint: str | Path) -> Path:
    """Return the adapter folder beside a checkpoint file.

    Example:
        >>> str(adapter_folder("runs/last.ckpt"))
        'runs/last.adapter'
    """
    return Path(checkpoint).with_suffix(".adapter")

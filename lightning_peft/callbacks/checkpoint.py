"""A ModelCheckpoint whose every checkpoint is also an adapter to share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from typing_extensions import override

from lightning_peft.callbacks.durable_io import DurableCheckpointIO
from lightning_peft.checkpoint_manifest import roots_by_path
from lightning_peft.composition import save_adapters
from lightning_peft.errors import AdapterNotFoundError, ConfigError
from lightning_peft.fingerprint import remembered
from lightning_peft.gathered_gradients import tensors_are_whole
from lightning_peft.mixin import PEFTMixin
from lightning_peft.model_card import CARD, CardFacts
from lightning_peft.sharded_tensors import whole_adapters


class AdapterCheckpoint(ModelCheckpoint):
    """Saves ``.ckpt`` files with adapters, optimizer and loops only, each with an adapter folder beside it.

    ``epoch=0-step=100.ckpt`` resumes the run; ``epoch=0-step=100.adapter/`` is what ``load_adapter`` and HF PEFT read. Where
    a model holds several adapters, the folder has one sub-folder for each but ``default``, for ``load_adapters``; where several models in the module
    are adapted, one for each model. The arguments are those of
    ``lightning.pytorch.callbacks.ModelCheckpoint``, and ``monitor``, ``save_top_k`` and ``save_last`` work as there. Each folder has a page,
    ``README.md``, with the data and what was measured. The module
    must be a :class:`~lightning_peft.PEFTModule` or have :class:`~lightning_peft.PEFTMixin`, which keeps the base out.

    Local files are written by :class:`~lightning_peft.callbacks.durable_io.DurableCheckpointIO`, unless the Trainer has a
    ``CheckpointIO`` of its own: a run that is killed while it saves leaves the checkpoints before whole.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would save the whole base."""
        if not isinstance(pl_module, PEFTMixin):
            raise AdapterNotFoundError(
                f"AdapterCheckpoint needs a PEFTModule, or a LightningModule with PEFTMixin before it in its bases; {type(pl_module).__name__} "
                "has neither and would write the whole base model into every checkpoint"
            )
        averaging = [
            callback for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, WeightAveraging)
        ]
        if averaging and stage == "fit":
            raise ConfigError(
                f"{type(averaging[0]).__name__} puts the whole averaged model, its base included, into every checkpoint, and no run resumes from one; leave "
                "it or AdapterCheckpoint out"
            )
        if tensors_are_whole(trainer) and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        super().setup(trainer, pl_module, stage)

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        module = trainer.lightning_module
        assert isinstance(module, PEFTMixin)
        if tensors_are_whole(trainer):
            if trainer.is_global_zero:
                _save_adapters(module, adapter_folder(filepath), _facts(trainer))
            return
        known = remembered(roots_by_path(module).values(), full=module.base_fingerprint == "complete")
        with known, whole_adapters(module, keep=trainer.is_global_zero):
            if trainer.is_global_zero:
                _save_adapters(module, adapter_folder(filepath), _facts(trainer))

    @staticmethod
    @override
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
        folder, link = adapter_folder(filepath), adapter_folder(linkpath)
        if trainer.is_global_zero and folder.absolute() != link.absolute():
            _delete(link)
            try:
                link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)
            except OSError:  # where links need permissions, as on Windows
                shutil.copytree(folder, link)

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            _delete(adapter_folder(filepath))


def _save_adapters(module: PEFTMixin, folder: Path, facts: CardFacts) -> None:
    """Write every adapter of ``module`` to ``folder``, which is replaced only once all are written."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    _delete(temporary)
    roots = roots_by_path(module)
    try:
        for page in folder.rglob(CARD) if folder.is_dir() else ():  # one that somebody edited is kept
            kept = temporary / page.relative_to(folder)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(page, kept)
        for path, root in roots.items():
            inner = temporary / path if len(roots) > 1 else temporary
            save_adapters(root, inner, facts=facts, fingerprint=module.base_fingerprint)
        _delete(folder)
        if temporary.exists():
            os.replace(temporary, folder)
    except BaseException:
        _delete(temporary)
        raise


def _facts(trainer: Trainer) -> CardFacts:
    """Return what the page of an adapter says of the run."""
    data = getattr(trainer, "datamodule", None)
    name = None if data is None else str(getattr(data, "name", None) or type(data).__name__)
    metrics = {key: float(value) for key, value in sorted(trainer.callback_metrics.items()) if value.numel() == 1}
    return CardFacts(data=name, metrics=metrics, step=trainer.global_step)


def _delete(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def adapter_folder(checkpoint: str | Path) -> Path:
    """Return the adapter folder beside a checkpoint file.

    Example:
        >>> str(adapter_folder("runs/last.ckpt"))
        'runs/last.adapter'
    """
    path = Path(checkpoint)
    return path.with_name(path.name.removesuffix(ModelCheckpoint.FILE_EXTENSION) + ".adapter")

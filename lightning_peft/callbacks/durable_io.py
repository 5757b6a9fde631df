"""Checkpoint files that are whole or not there.

Lightning writes through a temporary file too, but in ``$TMPDIR``: where that is another file system, its last step is a copy,
which a kill cuts short; and it waits for no disk. Here the temporary file stands beside its target::

    .last.ckpt.x1y2.tmp   written, synced      -> renamed to last.ckpt, folder synced
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from lightning_peft.adapter_files import write_file
from lightning_peft.errors import AdapterFileError
from lightning_peft.sharded_folders import is_sharded_folder, read_folder


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's way to write and read checkpoints, but local files are replaced atomically and reach the disk.

    A kill at any moment leaves the former file or the new one under the name, and beside it at most a temporary one whose name
    no search for checkpoints finds. Paths of other file systems are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            OSError: the folder cannot be written; Lightning's own lets a lack of permission pass.
        """
        files, place = fsspec.core.url_to_fs(str(path))
        if not isinstance(files, LocalFileSystem) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        target = Path(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, buffer.getbuffer())

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read the checkpoint at ``path``: a file, or whole the folder that a sharded run left.

        Raises:
            AdapterFileError: it is a folder, or a damaged file.
            FileNotFoundError: there is none.
        """
        files, place = fsspec.core.url_to_fs(str(path))
        if is_sharded_folder(place):
            return read_folder(place)
        if files.isdir(place):
            raise AdapterFileError(
                f"{str(path)!r} is a folder, and a run resumes from a .ckpt file; an adapter folder has one of its name beside it, and to start "
                "anew from it: PEFTModule(base, adapter=...)"
            )
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except Exception as error:
            if isinstance(error, OSError) and (error.filename is not None or not files.exists(place)):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise AdapterFileError(
                f"{str(path)!r} cannot be read as a checkpoint; it may be cut short or damaged: {reason}"
            ) from error

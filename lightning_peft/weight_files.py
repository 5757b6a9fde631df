"""Files of tensors: safetensors, and what ``torch.save`` wrote, which is read without running any code in it.

The second is a pickle. torch reads it with ``weights_only=True``: an interpreter that knows tensors, containers and numbers
and refuses everything else.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lightning_peft.errors import AdapterFileError


def read_tensors(path: Path, *, inside: Sequence[str] = (), values: bool = True) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU.

    Args:
        path: a file of safetensors (by its suffix) or of ``torch.save``.
        inside: keys under one of which the mapping of tensors may stand, where the file is no such mapping itself.
        values: whether the values are needed; without them the tensors are on the meta device.

    Raises:
        AdapterFileError: it cannot be read, or holds something else than named tensors.
    """
    if path.suffix == ".safetensors":
        return parse_safetensors(path.read_bytes(), path)
    found = read_saved(path, values=values)
    if isinstance(found, Mapping):
        found = next((found[key] for key in inside if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not found:
        raise AdapterFileError(f"{str(path)!r} must hold tensors by name, found {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterFileError(f"{str(path)!r} must hold tensors by name, found {key!r}: {type(value).__name__}")
    return dict(found)


def read_saved(path: Path, *, values: bool = True) -> Any:
    """Return what ``torch.save`` wrote, such as a ``.ckpt``, on the CPU; without ``values`` its tensors are on the meta device.

    Raises:
        AdapterFileError: it cannot be read, or holds more than plain values and tensors.
    """
    try:
        return torch.load(path, map_location="cpu" if values else "meta", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle leads to
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it is not there, or may not be read
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise AdapterFileError(
            f"{str(path)!r} cannot be read as a file of tensors (weights_only=True, so no code in it is run): {reason}"
        ) from error


def survives_saving(value: Any) -> bool:
    """Tell whether ``value`` comes out of ``torch.save`` and a load with ``weights_only=True``, as plain values and tensors do."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True


def parse_safetensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors in ``content``, that of the file ``path``.

    Raises:
        AdapterFileError: it is no safetensors file.
    """
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise AdapterFileError(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def tensor_names(path: Path, *, inside: Sequence[str] = ()) -> list[str]:
    """Return the names of the tensors in a file; none where it cannot be read as one."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return list(file.keys())
        return list(read_tensors(path, inside=inside, values=False))
    except (AdapterFileError, OSError, safetensors.SafetensorError):
        return []

"""Files of tensors: safetensors, and what ``torch.save`` wrote, which is read without running any code in it.

The second is a pickle. torch reads it with ``weights_only=True``: an interpreter that knows tensors, containers and numbers
and refuses everything else.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
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


_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""What a safetensors file calls a dtype, in the order in which it holds them, the last first."""


def safetensors_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield what ``safetensors.torch.save`` returns, bit for bit, part by part: of the values no more than one tensor is copied at a time.

    Tensors may share memory, and be of any layout.
    """
    if sys.byteorder != "little" or not all(tensor.dtype in _DTYPES for tensor in tensors.values()):
        whole = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        yield safetensors.torch.save(whole, metadata=dict(metadata))
        return
    places = {dtype: place for place, dtype in enumerate(_DTYPES)}
    order = sorted(tensors, key=lambda name: (-places[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape, dtype = list(tensors[name].shape), _DTYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def tensor_names(path: Path, *, inside: Sequence[str] = ()) -> list[str]:
    """Return the names of the tensors in a file; none where it cannot be read as one."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return list(file.keys())
        return list(read_tensors(path, inside=inside, values=False))
    except (AdapterFileError, OSError, safetensors.SafetensorError):
        return []

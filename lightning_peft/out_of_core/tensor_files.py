"""Safetensors files, one tensor in memory at a time.

::

    8 bytes: length of the header | header, JSON: name -> dtype, shape, offsets | data of all tensors

A file that is mapped into memory counts as memory of the process as far as it was read. So files are read here with plain reads, and
what does not change goes from file to file in small pieces.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from lightning_peft.errors import AdapterFileError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in a header. Tensors of other dtypes are copied, not read."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 2**24
"""Bytes that are copied at once."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    """Its name."""
    dtype: str
    """Its dtype, as the header calls it."""
    shape: tuple[int, ...]
    """Its shape."""
    file: Path
    """The file that holds it."""
    start: int
    """Where its data start in the file."""
    size: int
    """Bytes of its data."""

    @property
    def is_floating_point(self) -> bool:
        """Whether it can be read as floating-point numbers."""
        return self.dtype in ("F64", "F32", "F16", "BF16")

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own."""
        return self.rows(0, self.shape[0]) if self.shape else self._piece((), 0, self.size)

    def rows(self, first: int, stop: int) -> Tensor:
        """Return the elements of the first dimension from ``first`` up to ``stop``, in memory of their own, reading nothing else."""
        width = self.size // max(1, self.shape[0])
        return self._piece((stop - first, *self.shape[1:]), first * width, (stop - first) * width)

    def _piece(self, shape: Sequence[int], offset: int, size: int) -> Tensor:
        if self.dtype not in DTYPES:
            raise AdapterFileError(
                f"{str(self.file)!r}: {self.name!r} has the dtype {self.dtype}, which cannot be read here"
            )
        tensor = torch.empty(tuple(shape), dtype=DTYPES[self.dtype])
        if size:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start + offset)
                _read_into(file, tensor.view(-1).view(torch.uint8).numpy().data, self.file)
        return tensor

    def elements(self, places: Sequence[int]) -> Tensor:
        """Return the elements at ``places`` of the flattened tensor, reading nothing else."""
        width = DTYPES[self.dtype].itemsize
        found = bytearray()
        with self.file.open("rb", buffering=0) as file:
            for place in places:
                found += os.pread(file.fileno(), width, self.start + place * width)
        return torch.frombuffer(found, dtype=DTYPES[self.dtype]) if found else torch.empty(0, dtype=DTYPES[self.dtype])


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors of a safetensors file by name, in the order of their data, and its metadata.

    Raises:
        AdapterFileError: the file is no valid safetensors file.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt"):  # checks lengths, offsets and shapes
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{str(path)!r} is not a readable safetensors file: {error}") from error
    metadata = header.pop("__metadata__", {})
    entries = {}
    for name, held in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = held["data_offsets"]
        entries[name] = Entry(name, held["dtype"], tuple(held["shape"]), path, 8 + length + start, stop - start)
    return entries, metadata


@dataclass(frozen=True)
class Planned:
    """A tensor that is going to be written."""

    entry: Entry
    """The tensor as it is in the base."""
    dtype: str
    """Its dtype afterwards."""

    @property
    def size(self) -> int:
        """Bytes of its data afterwards."""
        if self.dtype == self.entry.dtype:
            return self.entry.size
        return math.prod(self.entry.shape) * DTYPES[self.dtype].itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Return how a header calls ``dtype``."""
    return _NAMES[dtype]


def write_tensors(
    path: Path, planned: Iterable[Planned], merged: Callable[[str], Tensor | None], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file tensor by tensor.

    Args:
        path: the file, which does not exist.
        planned: what to write, in order.
        merged: called with the name of a tensor when its turn has come; returns its new values, or None where the data of the base
            are copied (and cast, if another dtype is planned).
        metadata: metadata of the file.
    """
    planned = list(planned)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for one in planned:
        header[one.entry.name] = {
            "dtype": one.dtype,
            "shape": list(one.entry.shape),
            "data_offsets": [offset, offset + one.size],
        }
        offset += one.size
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("xb", buffering=0) as file:
        _write(file, memoryview(len(content).to_bytes(8, "little") + content))
        for one in planned:
            value = merged(one.entry.name)
            if value is None and one.dtype == one.entry.dtype:
                _copy(one.entry, file)
                continue
            value = one.entry.read() if value is None else value
            value = value.to(DTYPES[one.dtype]).contiguous()
            if value.numel():
                _write(file, value.view(-1).view(torch.uint8).numpy().data)
            del value
        os.fsync(file.fileno())


def _read_into(file: Any, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise AdapterFileError(f"{str(path)!r} ends before its header says it does")
        done += count


def _write(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done : done + 2**30])


def _copy(entry: Entry, target: BinaryIO | Any) -> None:
    buffer = memoryview(bytearray(min(_PIECE, entry.size)))
    with entry.file.open("rb", buffering=0) as source:
        source.seek(entry.start)
        left = entry.size
        while left:
            piece = buffer[: min(left, len(buffer))]
            _read_into(source, piece, entry.file)
            _write(target, piece)
            left -= len(piece)

"""The files of an adapter folder: written atomically, read strictly.

A folder holds three files. ``adapter_model.safetensors`` and ``adapter_config.json`` are HF PEFT's, wherever HF PEFT knows
the method. ``lightning_peft.json`` is ours: the method with all its fields, its places, the fingerprint of the base
and a hash of the other two files. It is written last, so a folder torn by a crash is refused, not misread.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.errors import AdapterConfigError, AdapterFileError, UnknownNameError
from lightning_peft.interfaces import Method, Slice
from lightning_peft.registry import get_registry
from lightning_peft.weight_files import parse_safetensors, read_tensors

WEIGHTS, HF_CONFIG, OWN_CONFIG = "adapter_model.safetensors", "adapter_config.json", "lightning_peft.json"
INDEX = "lightning_peft_adapters.json"
"""Says which adapters a folder and its sub-folders hold, which are active and how they are scaled."""
PICKLED_WEIGHTS = "adapter_model.bin"
"""What HF PEFT writes under ``safe_serialization=False``, and wrote before it had safetensors."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds, read and checked, but in no model yet."""

    path: Path
    """The folder."""
    method: Method
    """The method, rebuilt from its fields."""
    tensors: Mapping[str, Tensor]
    """The tensors by their names in the file."""
    own: Mapping[str, Any] | None
    """The content of ``lightning_peft.json``; None for a folder written by HF PEFT."""
    hf: Mapping[str, Any] | None
    """The content of ``adapter_config.json``; None for a method that HF PEFT does not know."""
    weights: Path
    """The file of the tensors, for messages."""
    slices: Mapping[str, tuple[Slice, ...]] = field(default_factory=dict)
    """Path of a fused projection to its adapted slices, where a file of other software has such; ours says so itself."""

    @property
    def saved_names(self) -> list[str]:
        """What ``adapter_config.json`` names as ``modules_to_save``."""
        return list((self.hf or {}).get("modules_to_save") or ())

    @property
    def base_name_or_path(self) -> str | None:
        """The base model the adapter was trained on, as it was called then."""
        own = (self.own or {}).get("base") or {}
        name = own.get("name_or_path") or (self.hf or {}).get("base_model_name_or_path")
        return str(name) if name else None


def read_adapter(path: str | Path) -> AdapterFolder:
    """Read an adapter folder, ours or HF PEFT's. No code in a file is run and no class named in one is imported.

    Raises:
        AdapterFileError: a file is missing or cannot be read, or was changed since the folder was written.
        AdapterConfigError: the configuration names an unknown method, field or value.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterFileError(
            f"{str(folder)!r} is not a folder; an adapter folder holds {HF_CONFIG} or {OWN_CONFIG}, and {WEIGHTS}"
        )
    own = read_json(folder / OWN_CONFIG) if (folder / OWN_CONFIG).exists() else None
    hf = read_json(folder / HF_CONFIG) if (folder / HF_CONFIG).exists() else None
    if own is None and hf is None:
        if inner := inner_adapters(folder):
            raise AdapterFileError(
                f"{str(folder)!r} holds several adapters in the folders {inner[:10]}; load them together with load_adapters, or one of them, such as "
                f"{str(folder / inner[0])!r}"
            )
        raise AdapterFileError(
            f"{str(folder)!r} has neither {OWN_CONFIG} nor {HF_CONFIG}: it holds {sorted(p.name for p in folder.iterdir())[:10]}"
        )
    file = weights_file(folder)
    if file is None or (own is not None and file.name != WEIGHTS):
        raise AdapterFileError(f"{str(folder)!r} has no {WEIGHTS}")
    if file.name == WEIGHTS:
        content = file.read_bytes()
        if own is not None:
            _verify(folder, own, content)
        stored = parse_safetensors(content, file)
    else:
        stored = read_tensors(file)
    method = _own_method(folder, own) if own is not None else _hf_method(folder, hf or {})
    return AdapterFolder(path=folder, method=method, tensors=stored, own=own, hf=hf, weights=file)


def weights_file(folder: Path) -> Path | None:
    """Return the file in an adapter folder that holds the tensors; None where there is none."""
    return next((folder / name for name in (WEIGHTS, PICKLED_WEIGHTS) if (folder / name).is_file()), None)


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder is that of one adapter."""
    return any((folder / file).is_file() for file in (OWN_CONFIG, HF_CONFIG))


def inner_adapters(folder: Path) -> list[str]:
    """Return the names of the adapter folders inside a folder."""
    return sorted(child.name for child in folder.iterdir() if is_adapter(child))


def _verify(folder: Path, own: Mapping[str, Any], weights: bytes) -> None:
    if own.get("format_version") != FORMAT_VERSION:
        raise AdapterConfigError(
            f"{str(folder / OWN_CONFIG)!r} has format_version {own.get('format_version')!r}; this version reads {FORMAT_VERSION}"
        )
    files = own.get("files")
    if not isinstance(files, dict) or WEIGHTS not in files or not isinstance(own.get("base"), dict):
        raise AdapterConfigError(
            f"{str(folder / OWN_CONFIG)!r} needs 'files' with the hash of {WEIGHTS} and 'base', found {files!r}"
        )
    for file, expected in files.items():
        if file not in (WEIGHTS, HF_CONFIG):
            raise AdapterConfigError(f"{str(folder / OWN_CONFIG)!r} vouches for an unknown file {file!r}")
        content = weights if file == WEIGHTS else (folder / file).read_bytes() if (folder / file).is_file() else b""
        if hashlib.sha256(content).hexdigest() != expected:
            raise AdapterFileError(
                f"{str(folder / file)!r} is not the file that {OWN_CONFIG} was written for: the folder was changed, or a write was cut "
                f"off. Restore it, or delete {OWN_CONFIG} to read it as a plain HF PEFT folder"
            )


def _own_method(folder: Path, own: Mapping[str, Any]) -> Method:
    described = own.get("method")
    if (
        not isinstance(described, dict)
        or not isinstance(described.get("name"), str)
        or not isinstance(described.get("fields"), dict)
    ):
        raise AdapterConfigError(
            f"{str(folder / OWN_CONFIG)!r} needs 'method' with 'name' and 'fields', found {described!r}"
        )
    try:
        method: Method = get_registry().method(described["name"]).from_config(described["fields"])
    except UnknownNameError as error:
        raise AdapterConfigError(f"{str(folder / OWN_CONFIG)!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise AdapterConfigError(
            f"{str(folder / OWN_CONFIG)!r}: the fields of {described['name']!r} are wrong: {error}"
        ) from error
    return method


def _hf_method(folder: Path, hf: Mapping[str, Any]) -> Method:
    try:
        peft_type = hf.get("peft_type")
        if not isinstance(peft_type, str):
            raise AdapterConfigError(f"'peft_type' must be a string such as 'LORA', found {peft_type!r}")
        saved = hf.get("modules_to_save")
        if saved is not None and not (
            isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)
        ):
            raise AdapterConfigError(f"'modules_to_save' must be a list of names of modules, found {saved!r}")
        method = get_registry().method_for_peft_type(peft_type, hf)
        # The host honours modules_to_save, for every method.
        return method.from_hf_config({key: value for key, value in hf.items() if key != "modules_to_save"})
    except (AdapterConfigError, UnknownNameError) as error:
        raise AdapterConfigError(f"{str(folder / HF_CONFIG)!r}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; duplicate keys, NaN and anything but an object are errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"the key {key!r} stands twice")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{str(path)!r} must hold a JSON object, found {type(value).__name__}")
    return value


def to_json_bytes(value: Any) -> bytes:
    """Return ``value`` as JSON, sorted and indented."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_file(path: Path, content: bytes | memoryview | Iterable[bytes | memoryview], *, last: bool = True) -> str:
    """Replace ``path`` by ``content``: temporary file in the same folder, fsync, rename.

    Args:
        path: the file.
        content: all of it, or its parts.
        last: whether the names in the folder must be on the disk when this returns; :func:`settle_folder` does it for several files.

    Returns:
        The SHA-256 of the content in hexadecimal.
    """
    digest = hashlib.sha256()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in (content,) if isinstance(content, (bytes, memoryview)) else content:
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if last:
        settle_folder(path.parent)
    return digest.hexdigest()


def settle_folder(path: Path) -> None:
    """Have the names of the files in ``path`` on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

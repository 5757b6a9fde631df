"""Adapters of other software: which registered format reads a file or folder, and what it holds, as an adapter folder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_peft.adapter_files import OWN_CONFIG, AdapterFolder, read_adapter
from lightning_peft.adapter_formats import AdapterFormat, ForeignAdapter
from lightning_peft.errors import AdapterFileError, ConfigError, LightningPEFTError, PluginError
from lightning_peft.registry import get_registry


def read_any(path: str | Path, model: nn.Module, format: AdapterFormat | str | None = None) -> AdapterFolder:
    """Read an adapter for ``model``: a folder of ours, or what a registered format reads.

    Args:
        path: a file or folder.
        model: the base, which is left as it is.
        format: the format, by its name or with its fields; found from ``path`` if None.

    Raises:
        AdapterFileError: it cannot be read, or no format or more than one reads it.
        AdapterConfigError: something is missing that the format needs.
        AdapterMismatchError: it is not for this model.
        UnknownNameError: no format has that name.
    """
    source = Path(path)
    chosen = _given(format) or _found(source)
    return read_adapter(source) if chosen is None else _as_folder(source, chosen.read(source, model))


def _given(format: AdapterFormat | str | None) -> AdapterFormat | None:
    if format is None or isinstance(format, AdapterFormat):
        return format
    if not isinstance(format, str):
        raise ConfigError(f"format must be the name of an adapter format or one with its fields, got {format!r}")
    made: AdapterFormat = get_registry().get("adapter format", format)()
    return made


def _found(source: Path) -> AdapterFormat | None:
    """Return the one format that reads ``source``; None for a folder that is ours, or that nobody knows."""
    if (source / OWN_CONFIG).exists():
        return None
    claimed = [kind() for kind in get_registry().adapter_formats.values() if _claims(kind(), source)]
    if len(claimed) > 1:
        names = [one.name for one in claimed]
        raise AdapterFileError(f"{str(source)!r} is read by several formats, {names}; say which with format=")
    if not claimed and source.is_file():
        raise AdapterFileError(
            f"{str(source)!r} is a file that no registered format reads; the formats are {sorted(get_registry().adapter_formats)}, and "
            "format= names one"
        )
    return claimed[0] if claimed else None


def _claims(format: AdapterFormat, source: Path) -> bool:
    try:
        return bool(format.reads(source))
    except LightningPEFTError:
        return False
    except Exception as error:
        raise PluginError(f"{format.name}.reads({str(source)!r}) raised {type(error).__name__}: {error}") from error


def _as_folder(source: Path, found: ForeignAdapter) -> AdapterFolder:
    """Return ``found`` under the names of HF PEFT's file, so that it is placed and checked as such a folder is."""
    prefix = found.method.hf_prefix if found.method.peft_type and not found.hf_names else ""
    saved = {"modules_to_save": list(found.modules_to_save)} if found.modules_to_save else {}
    return AdapterFolder(
        path=source,
        method=found.method,
        tensors={prefix + name: tensor for name, tensor in found.tensors.items()},
        own=None,
        hf={**(found.hf_config or {}), **saved},
        weights=found.file,
        slices=found.slices,
    )

"""Folders of HF PEFT, and those that transformers writes from a model with adapters of HF PEFT in it.

Both hold ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``adapter_model.bin``). HF PEFT puts ``base_model.model.`` before
the path of every module; transformers' ``save_pretrained(save_peft_format=False)`` writes the path alone. HF PEFT itself reads the second kind
without an error and leaves the model as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.adapter_files import HF_CONFIG, read_adapter, weights_file
from lightning_peft.adapter_formats import AdapterFormat, ForeignAdapter
from lightning_peft.errors import AdapterFileError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import HF_PREFIX
from lightning_peft.weight_files import tensor_names


@dataclass(frozen=True, kw_only=True)
class PEFTFolder(AdapterFormat):
    """A folder written by HF PEFT's ``save_pretrained``, with weights in safetensors or, from older versions, pickled."""

    name: ClassVar[str] = "peft"

    @override
    def reads(self, path: Path) -> bool:
        return _has_both_files(path) and not _without_prefix(path)

    @override
    def read(self, path: Path, model: nn.Module) -> ForeignAdapter:
        folder = read_adapter(path)
        if folder.hf is None:
            raise AdapterFileError(f"{str(path)!r} has no {HF_CONFIG}, so it is no folder of HF PEFT")
        return ForeignAdapter(
            file=folder.weights, method=folder.method, tensors=folder.tensors, hf_config=folder.hf, hf_names=True
        )


@dataclass(frozen=True, kw_only=True)
class TransformersFolder(AdapterFormat):
    """A folder written by transformers' ``save_pretrained(save_peft_format=False)``: HF PEFT's, without the prefix of names."""

    name: ClassVar[str] = "transformers"

    @override
    def reads(self, path: Path) -> bool:
        return _has_both_files(path) and _without_prefix(path)

    @override
    def read(self, path: Path, model: nn.Module) -> ForeignAdapter:
        folder = read_adapter(path)
        return ForeignAdapter(
            file=folder.weights, method=folder.method, tensors=folder.tensors, hf_config=folder.hf or {}
        )


def _has_both_files(path: Path) -> bool:
    return (path / HF_CONFIG).is_file() and weights_file(path) is not None


def _without_prefix(path: Path) -> bool:
    """Tell whether the tensors are those of modules, and no path begins as HF PEFT's do."""
    file = weights_file(path)
    names = [] if file is None else tensor_names(file)
    if not names or any(name.startswith(HF_PREFIX.partition(".")[0] + ".") for name in names):
        return False
    return read_adapter(path).method.hf_prefix == HF_PREFIX  # other methods have tensors of no module, without a prefix


@hookimpl
def register_adapter_formats() -> list[type[AdapterFormat]]:
    """Register HF PEFT's folders and transformers'."""
    return [PEFTFolder, TransformersFolder]

"""Exporters: the formats in which a model leaves the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.errors import MergeError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Exporter
from lightning_peft.merging import adapters_merged
from lightning_peft.state import save_adapter
from lightning_peft.surgery import adapters_taken_out


@dataclass(frozen=True, kw_only=True)
class AdapterFolder(Exporter):
    """An adapter folder that HF PEFT, transformers and vLLM read, wherever they know the method."""

    name: ClassVar[str] = "adapter"

    adapter: str = "default"
    """The adapter to write."""

    @override
    def export(self, model: nn.Module, path: Path) -> None:
        save_adapter(model, path, name=self.adapter)


@dataclass(frozen=True, kw_only=True)
class MergedTransformers(Exporter):
    """A plain transformers folder: the active adapters merged into the weights, no trace of adapters left."""

    name: ClassVar[str] = "merged_transformers"

    max_shard_size: str = "5GB"
    """Size at which the weights are cut into several files."""

    @override
    def export(self, model: nn.Module, path: Path) -> None:
        if not callable(getattr(model, "save_pretrained", None)):
            raise MergeError(
                f"{type(model).__name__} is not a transformers model; merge with merge_adapters(model) and save its state_dict yourself"
            )
        with adapters_merged(model), adapters_taken_out(model):
            assert not adapter_layers(model)
            model.save_pretrained(path, max_shard_size=self.max_shard_size)  # type: ignore[operator]


@hookimpl
def register_exporters() -> list[type[Exporter]]:
    """Register the built-in exporters."""
    return [AdapterFolder, MergedTransformers]

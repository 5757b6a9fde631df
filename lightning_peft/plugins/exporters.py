"""Exporters: the formats in which a model leaves the library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn
from typing_extensions import override

from lightning_peft.adapter_files import HF_CONFIG, OWN_CONFIG
from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.errors import ConfigError, ExportError, MergeError
from lightning_peft.field_checks import bytes_in, check_switches
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Exporter
from lightning_peft.merging import adapters_merged, refuse_shards
from lightning_peft.quantized_layers import packed_layers
from lightning_peft.quantized_merging import pack_layers, unpack_layers
from lightning_peft.side_files import copy_tokenizer
from lightning_peft.state import base_name, save_adapter
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
    merges: ClassVar[bool] = True

    max_shard_size: str = "5GB"
    """Size at which the weights are cut into several files."""
    tokenizer: bool = True
    """Copy tokenizer, processor and chat template from where the base was loaded."""
    quantized: Literal["refuse", "dequantize"] = "refuse"
    """What to do with a quantised base: ``dequantize`` writes it in the precision of the rest of the model."""

    def __post_init__(self) -> None:
        check_switches(self)
        bytes_in(self.max_shard_size, "MergedTransformers max_shard_size")
        if self.quantized not in ("refuse", "dequantize"):
            raise ConfigError(f"MergedTransformers quantized must be refuse or dequantize, got {self.quantized!r}")

    @override
    def export(self, model: nn.Module, path: Path) -> None:
        refuse_shards(model, f"{type(self).__name__} cannot write {str(path)!r}")
        if not callable(getattr(model, "save_pretrained", None)):
            raise MergeError(
                f"{type(model).__name__} is not a transformers model; merge with merge_adapters(model) and save its state_dict yourself"
            )
        path = Path(path)
        _refuse_beside_adapter(path)
        with adapters_merged(model, self.quantized), adapters_taken_out(model):
            assert not adapter_layers(model)
            if self.quantized == "refuse" and packed_layers(model):
                raise MergeError(
                    f"{next(iter(packed_layers(model)))!r} is quantised and cannot be written into a plain folder; give the exporter "
                    "quantized='dequantize'"
                )
            unpacked = unpack_layers(model)
            try:
                with _not_of_quantizer(model):
                    model.save_pretrained(path, max_shard_size=bytes_in(self.max_shard_size, "max_shard_size"))  # type: ignore[operator]
            finally:
                pack_layers(model, unpacked)
        _delete_old_index(path)
        base = base_name(model)
        if self.tokenizer and base is not None:
            copy_tokenizer(base, path)


def _refuse_beside_adapter(path: Path) -> None:
    """Refuse a folder that holds an adapter: transformers would load it over weights that it is merged into."""
    found = [name for name in (HF_CONFIG, OWN_CONFIG) if (path / name).exists()]
    if found:
        raise ExportError(
            f"a merged model was to be written to {str(path)!r}, which holds an adapter ({', '.join(found)}): transformers would apply that to the "
            "merged weights once more; name another folder"
        )


def _delete_old_index(path: Path) -> None:
    """Delete the index of shards that an earlier export left and that are gone, where the weights now are one file."""
    index = path / "model.safetensors.index.json"
    if index.exists() and (path / "model.safetensors").exists():
        index.unlink()


@contextlib.contextmanager
def _not_of_quantizer(model: Any) -> Iterator[None]:
    """Let a model that transformers quantised be saved as one it did not."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    config = model.config
    settings = config.quantization_config
    try:
        model.hf_quantizer = None
        del config.quantization_config
        yield
    finally:
        model.hf_quantizer, config.quantization_config = quantizer, settings


@hookimpl
def register_exporters() -> list[type[Exporter]]:
    """Register the built-in exporters."""
    return [AdapterFolder, MergedTransformers]

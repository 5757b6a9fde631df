"""Merging when training has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_peft.activation import active_adapters
from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.errors import AdapterNotFoundError, ConfigError, MergeError
from lightning_peft.injection import adapted_roots, records
from lightning_peft.interfaces import Exporter, Method
from lightning_peft.merging import check_mergeable, merge_adapters, refuse_packed_shards, refuse_shards
from lightning_peft.quantized_layers import is_packed
from lightning_peft.registry import get_registry


class MergeAdapters(Callback):
    """Merges the active adapters when a fit has ended, in place or into a folder.

    It comes after the last checkpoint was saved, so checkpoints hold adapters. A fit that fails merges nothing. What cannot be
    merged or written is refused before the first step.

    Args:
        export_to: folder to write with an exporter; the model then stays unmerged. Merges in place if None.
        exporter: registry name of the exporter.
        options: fields of the exporter.
        names: adapters to merge in place; the active ones if None.
        quantized: what to do where the base is quantised, in place; an exporter has a field of its own for it.
        keep_originals: keep what an in-place merge replaces, so that ``unmerge_adapters`` restores it.
    """

    def __init__(
        self,
        export_to: str | None = None,
        exporter: str = "merged_transformers",
        options: dict[str, Any] | None = None,
        names: Sequence[str] | None = None,
        quantized: Literal["refuse", "requantize", "dequantize"] = "refuse",
        keep_originals: bool = True,
    ) -> None:
        self.export_to, self.exporter, self.options = export_to, exporter, options
        self.names = None if names is None else [names] if isinstance(names, str) else list(names)
        self.quantized, self.keep_originals = quantized, keep_originals
        if export_to is not None and names is not None:
            raise ConfigError(
                f"MergeAdapters names={names!r} was given with export_to, but an exporter writes the active adapters"
            )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that is not empty, an exporter that is not there, and a method that says it cannot merge."""
        if stage != "fit":
            return
        if self.export_to is not None:
            folder = Path(self.export_to)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(
                    f"MergeAdapters export_to={self.export_to!r} exists and is not an empty folder; name another one"
                )
            self._writer()
        for adaptation in getattr(pl_module, "adaptations", None) or ():
            method = getattr(adaptation, "method", adaptation)
            named = self.names is None or getattr(adaptation, "name", None) in self.names
            if named and isinstance(method, Method):
                self._refuse(method)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse adapters that cannot be merged, now that the model is there."""
        roots = self._roots(pl_module)
        for root in roots if self.export_to is not None else ():
            refuse_shards(root, f"MergeAdapters cannot write {self.export_to!r}")
        if self.names is None:
            for root in roots:
                self._check(root, active_adapters(root))
            return
        for name in self.names:
            holding = [root for root in roots if name in records(root)]
            if not holding:
                raise AdapterNotFoundError(
                    f"MergeAdapters was asked to merge {name!r}, and no model of {type(pl_module).__name__} has it"
                )
            for root in holding:
                self._check(root, [name])

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge, or write on the first process."""
        roots = self._roots(pl_module)
        if self.export_to is None:
            for root in roots:
                names = None if self.names is None else [name for name in self.names if name in records(root)]
                merge_adapters(root, names, quantized=self.quantized, keep_originals=self.keep_originals)
            return
        if trainer.is_global_zero:
            if len(roots) > 1:
                raise ConfigError(f"{type(pl_module).__name__} holds {len(roots)} adapted models; export them yourself")
            self._writer().export(roots[0], Path(self.export_to))
        trainer.strategy.barrier("lightning_peft.MergeAdapters")

    def _check(self, root: nn.Module, names: Sequence[str]) -> None:
        for name in names:
            held = records(root).get(name)
            if held is not None:
                self._refuse(held.method)
        if not self._leaves_to_exporter():
            quantized = self._quantized()
            check_mergeable(root, names, quantized)
            refuse_packed_shards(root, names)
            for path, layer in adapter_layers(root).items():
                here = [name for name in names if name in layer.adapters]
                if here and quantized == "refuse" and is_packed(layer.base_layer):
                    raise MergeError(
                        f"MergeAdapters would merge {here[0]!r} at {path!r}, which is quantised; give quantized='dequantize' or 'requantize'"
                    )

    def _refuse(self, method: Method) -> None:
        if (
            self._leaves_to_exporter()
            or method.mergeable
            or (method.merges_quantized and self._quantized() != "refuse")
        ):
            return
        raise MergeError(f"MergeAdapters cannot merge {method.name!r}, {method.merge_refusal}")

    def _leaves_to_exporter(self) -> bool:
        """Whether the exporter decides what can be written, as those of mixtures of experts do."""
        return self.export_to is not None and not self._writer().merges

    def _quantized(self) -> Literal["refuse", "requantize", "dequantize"]:
        found: Literal["refuse", "requantize", "dequantize"]
        found = self.quantized if self.export_to is None else getattr(self._writer(), "quantized", "refuse")
        return found

    def _writer(self) -> Exporter:
        options: Mapping[str, Any] = self.options or {}
        writer: Exporter = get_registry().get("exporter", self.exporter).from_config(options)
        return writer

    @staticmethod
    def _roots(pl_module: LightningModule) -> list[nn.Module]:
        roots = adapted_roots(pl_module)
        if not roots:
            raise AdapterNotFoundError(
                f"MergeAdapters found no adapter in {type(pl_module).__name__}; inject one in configure_model"
            )
        return roots

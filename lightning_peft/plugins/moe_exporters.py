"""Exporters of mixtures of experts: folders that transformers, and what reads its formats, loads as a model of its own.

::

    model with mixtures ── checked against the format ── config.json, weights ── loaded again, logits compared ── folder

Nothing is written before the format is known to hold the model, and nothing stays that computes something else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_files import HF_CONFIG, WEIGHTS, to_json_bytes, write_file
from lightning_peft.errors import ConfigError, ExportError, LightningPEFTWarning
from lightning_peft.field_checks import bytes_in
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Exporter
from lightning_peft.merging import refuse_shards
from lightning_peft.moe import export_check
from lightning_peft.moe.mixtures import Mixture, as_top_k, routed_by
from lightning_peft.moe.routing import Router
from lightning_peft.moe.transformers_formats import MixtureShape, choose, empty_experts_allowed, target_config
from lightning_peft.state import load_adapter
from lightning_peft.whole_mixtures import acting_mixtures, others_merged, shape_of, target_model

REPORT = "export.json"
"""File beside the weights that says what was compared, and how far apart it was."""


@dataclass(frozen=True, kw_only=True)
class TransformersMoE(Exporter):
    """A model of transformers with experts in its layers: Mixtral, Qwen2Moe or Qwen3Moe.

    Other active adapters are merged into what is written, mixtures of low-rank experts as whole weights.
    """

    name: ClassVar[str] = "transformers_moe"
    atomic: ClassVar[bool] = True

    format: Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe"] = "auto"
    """The format to write; auto takes the most widely read one that can hold the model."""
    as_top_k: bool = False
    """Write a model of Expert Choice, which no format has, as the Top-K model nearest to it: another function, and warned of."""
    tolerance: float | None = None
    """Difference from the live model's logits at which the folder is thrown away, as a share of the largest; by default 2e-6 in float32."""
    tokens: int = 64
    """Tokens in each of the two sequences on which the folder is compared with the live model."""
    max_shard_size: str = "5GB"
    """Size at which the weights are cut into several files."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.format not in ("auto", "mixtral", "qwen2_moe", "qwen3_moe"):
            raise ConfigError(f"{kind} format must be one of auto, mixtral, qwen2_moe, qwen3_moe, got {self.format!r}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(f"{kind} tolerance must be positive, got {self.tolerance!r}")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise ConfigError(f"{kind} tokens must be a positive integer, got {self.tokens!r}")
        bytes_in(self.max_shard_size, f"{kind} max_shard_size")

    @override
    def export(self, model: nn.Module, path: Path) -> None:
        refuse_shards(model, f"{type(self).__name__} cannot write {str(path)!r}")
        places = acting_mixtures(model)
        rules = {place: as_top_k(one.rule) if self.as_top_k else one.rule for place, one in places.items()}
        shape, format = self._planned(model, places, rules)
        config = target_config(model.config, format, shape)
        with _new_folder(path) as folder:
            with others_merged(model, places) as beside:
                self._save(target_model(model, config, places, beside), folder)
                wanted = self._logits(model, places, rules)
            share = export_check.check(
                self._reloaded_logits(model, folder), wanted, f"the {format} folder", self.tolerance
            )
            report = {"format": format, "difference": share, "of": "logits", "tokens": self.tokens}
            if rules != {place: one.rule for place, one in places.items()}:
                report["difference_from_expert_choice"] = self._warn(model, wanted)
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")

    def _planned(self, model: Any, places: dict[str, Mixture], rules: dict[str, Router]) -> tuple[MixtureShape, str]:
        shape = shape_of(places, rules)
        return shape, choose(type(model).__name__, self.format, model.config.num_hidden_layers, shape)

    def _save(self, target: Any, folder: Path) -> None:
        target.save_pretrained(folder, max_shard_size=bytes_in(self.max_shard_size, "max_shard_size"))

    def _logits(self, model: Any, places: dict[str, Mixture], rules: dict[str, Router]) -> Tensor:
        """Return the logits of the live model, routed by ``rules``."""
        with routed_by(places, rules, nn.functional.silu):
            return export_check.logits(model, export_check.probe(model.config, self.tokens))

    def _reloaded_logits(self, model: Any, folder: Path) -> Tensor:
        return export_check.logits(_reloaded(model, folder), export_check.probe(model.config, self.tokens))

    def _warn(self, model: Any, written: Tensor) -> float:
        """Say how far the Top-K model is from the live one, and return it."""
        live = export_check.logits(model, export_check.probe(model.config, self.tokens))
        share = float((written.double() - live.double()).abs().max() / live.double().abs().max())
        warnings.warn(
            f"experts choose tokens in this model, and tokens choose experts in what was written: another function, whose logits differ by up "
            f"to {share:.1e} of the largest on {self.tokens} random tokens; evaluate it before it is used",
            LightningPEFTWarning,
            stacklevel=4,
        )
        return share


@dataclass(frozen=True, kw_only=True)
class Mixtral(TransformersMoE):
    """A Mixtral folder: Llama and Mistral with experts in every layer, the weights of a token's experts summing to one."""

    name: ClassVar[str] = "mixtral"

    format: Literal["mixtral"] = "mixtral"
    """The format to write."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format != "mixtral":
            raise ConfigError(f"Mixtral format must be 'mixtral', got {self.format!r}; TransformersMoE writes others")


@dataclass(frozen=True, kw_only=True)
class MixtralPEFT(Mixtral):
    """An adapter folder of HF PEFT over a Mixtral whose experts are copies of the MLP, for mixtures of low-rank experts.

    The base goes to ``base`` in the same folder, and is for all adapters of one dense model the same. The adapter has the pairs of
    the experts (``target_parameters``) and the routers (``modules_to_save``). Other active adapters are merged into the base.
    """

    name: ClassVar[str] = "mixtral_peft"

    @override
    def export(self, model: nn.Module, path: Path) -> None:
        refuse_shards(model, f"{type(self).__name__} cannot write {str(path)!r}")
        places = acting_mixtures(model)
        rules = {place: one.rule for place, one in places.items()}
        shape, format = self._planned(model, places, rules)
        config = target_config(model.config, format, shape)
        tensors, settings = _peft_files(places, str(Path(path).absolute() / "base"))
        with _new_folder(path) as folder:
            with others_merged(model, places) as beside:
                self._save(target_model(model, config, places, beside, copies=True), folder / "base")
                wanted = self._logits(model, places, rules)
            write_file(folder / WEIGHTS, tensors)
            write_file(folder / HF_CONFIG, to_json_bytes(settings))
            base = _reloaded(model, folder / "base")
            load_adapter(base, folder)
            found = export_check.logits(base, export_check.probe(model.config, self.tokens))
            del base
            share = export_check.check(found, wanted, "the adapter over its base", self.tolerance)
            report = {"format": "peft", "difference": share, "of": "logits", "tokens": self.tokens}
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")


def _peft_files(places: dict[str, Mixture], base: str) -> tuple[bytes, dict[str, Any]]:
    """Return the weights file and the configuration of HF PEFT for mixtures of low-rank experts.

    Gate and up-projection are one parameter there, whose update has twice the rank: A is [A_gate; A_up], B has B_gate and B_up on its
    diagonal. As all parameters of a module have one rank, the pair of the down-projection is filled up with zeros.
    """
    import safetensors.torch

    tensors: dict[str, Tensor] = {}
    settings = set()
    for path, mixture in places.items():
        adapter: Any = mixture.adapter
        if not callable(getattr(adapter, "pair", None)):
            raise ExportError(
                f"the experts at {path!r} are whole weights, not pairs of low rank, so no HF PEFT adapter can hold them; write a "
                "'mixtral' folder"
            )
        rank = 2 * adapter.rank
        settings.add((rank, adapter.scaling * rank))
        (gate_A, gate_B), (up_A, up_B), (down_A, down_B) = (
            [tensor.detach().float().cpu() for tensor in adapter.pair(name)] for name in ("gate", "up", "down")
        )  # A (experts, rank / 2, in), B (experts, rank / 2, out)
        fused_A = torch.cat([gate_A, up_A], dim=1)
        fused_B = torch.cat(
            [torch.cat([gate_B, torch.zeros_like(up_B)], dim=2), torch.cat([torch.zeros_like(gate_B), up_B], dim=2)],
            dim=1,
        )
        down_A, down_B = (torch.cat([one, torch.zeros_like(one)], dim=1) for one in (down_A, down_B))
        experts = f"base_model.model.{path}.experts"
        for inside, A, B in ((f"{experts}.base_layer", fused_A, fused_B), (experts, down_A, down_B)):
            tensors[f"{inside}.lora_A.weight"] = A.flatten(0, 1).contiguous()  # (experts * rank, in)
            tensors[f"{inside}.lora_B.weight"] = B.permute(2, 1, 0).flatten(1).contiguous()  # (out, rank * experts)
        tensors[f"base_model.model.{path}.gate.weight"] = mixture.router.float().cpu().clone()
    if len(settings) > 1:
        raise ExportError(
            f"the experts differ in rank or scale from layer to layer ({sorted(settings)}); write a 'mixtral' folder"
        )
    rank, alpha = settings.pop()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "modules_to_save": ["gate"],
    }
    return safetensors.torch.save(tensors, metadata={"format": "pt"}), config


def _reloaded(model: Any, folder: Path) -> Any:
    """Load a folder as anybody would, in the precision and on the device of ``model``."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        attention = model.config._attn_implementation
        # The fast products of experts do not take float64.
        experts = {"experts_implementation": "eager"} if model.dtype == torch.float64 else {}
        with empty_experts_allowed():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=model.dtype, attn_implementation=attention, **experts
            )
        return loaded.to(model.device)
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write, which becomes ``path`` when all went well and is gone otherwise.

    Raises:
        ExportError: ``path`` holds something.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ExportError(f"{str(path)!r} is to be written, but it is not empty; name a new folder")
    partial = path.with_name(f".{path.name}.writing-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@hookimpl
def register_exporters() -> list[type[Exporter]]:
    """Register the exporters of mixtures of experts."""
    return [TransformersMoE, Mixtral, MixtralPEFT]

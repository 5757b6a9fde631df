"""LoRA files of LitGPT: ``lit_model.pth.lora`` with ``hyperparameters.yaml`` beside it.

LitGPT holds query, key and value in one matrix, with one pair A, B for those of the three that are adapted::

    transformer.h.0.attn.qkv.lora_A   (n * r, in)                         n of query, key, value, in this order
    transformer.h.0.attn.qkv.lora_B   (features of the n parts, r)        their rows, one part after the other

Which parts these are is in the hyperparameters (``lora_query``, ``lora_key``, ``lora_value``), as is alpha. The rows of a part are in the order
of the heads, as in transformers. Files from before the matrix was split that way call it ``attn.attn``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_formats import AdapterFormat, ForeignAdapter
from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import AdapterConfigError, AdapterFileError, AdapterMismatchError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.registry import get_registry
from lightning_peft.weight_files import read_tensors, tensor_names

WEIGHTS, HYPERPARAMETERS = "lit_model.pth.lora", "hyperparameters.yaml"
_INSIDE = ("model",)
_PLACES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
"""LitGPT's name of a layer in a Llama block to that of transformers."""
_PARTS = ("query", "key", "value")
_KEY = re.compile(r"transformer\.h\.(\d+)\.(.+)\.(lora_[AB])")


@dataclass(frozen=True, kw_only=True)
class LitGPTFile(AdapterFormat):
    """A LoRA file of LitGPT, or the folder it is in, for models laid out as Llama. What is ``None`` is read from ``hyperparameters.yaml``."""

    name: ClassVar[str] = "litgpt"

    alpha: float | None = None
    """``lora_alpha`` of the run."""
    query: bool | None = None
    """``lora_query`` of the run: whether queries were adapted."""
    key: bool | None = None
    """``lora_key`` of the run."""
    value: bool | None = None
    """``lora_value`` of the run."""

    @override
    def reads(self, path: Path) -> bool:
        file = _file(path)
        if not file.is_file() or (file == path and not file.name.endswith((".pth", ".lora"))):
            return False
        return any(_KEY.fullmatch(name) for name in tensor_names(file, inside=_INSIDE))

    @override
    def read(self, path: Path, model: nn.Module) -> ForeignAdapter:
        file = _file(path)
        stored = read_tensors(file, inside=_INSIDE)
        said = _hyperparameters(file.parent / HYPERPARAMETERS)
        alpha = self.alpha if self.alpha is not None else said.get("lora_alpha")
        if alpha is None:
            raise AdapterConfigError(
                f"{str(file)!r} does not hold alpha, and there is no {HYPERPARAMETERS} with lora_alpha beside it; give it: "
                "format=LitGPTFile(alpha=...)"
            )
        enabled = self._enabled(said)
        modules = {place: unwrapped(module) for place, module in base_modules(model)}
        tensors: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            match = _KEY.fullmatch(name)
            if name.startswith("lm_head.lora_"):
                tensors[f"{name}.weight"] = tensor
            elif match and match[2] in _PLACES:
                tensors[f"model.layers.{match[1]}.{_PLACES[match[2]]}.{match[3]}.weight"] = tensor
            elif match and match[2] in ("attn.qkv", "attn.attn"):
                if match[3] == "lora_B":
                    A = stored.get(name[:-1] + "A")
                    tensors |= _split(file, name.removesuffix(".lora_B"), A, tensor, modules, enabled)
                elif name[:-1] + "B" not in stored:
                    raise AdapterMismatchError(f"{str(file)!r} has {name!r} without its lora_B")
            else:
                raise AdapterMismatchError(
                    f"{str(file)!r} has {name!r}, which no layer of a Llama is called in LitGPT; read are attn.qkv, {', '.join(_PLACES)} and lm_head"
                )
        ranks = {int(tensor.shape[-1]) for name, tensor in tensors.items() if ".lora_B." in name and tensor.dim() == 2}
        if len(ranks) != 1:
            raise AdapterMismatchError(f"{str(file)!r} must have one rank at all places, found {sorted(ranks)}")
        rank = ranks.pop()
        if said.get("lora_r", rank) != rank:
            raise AdapterMismatchError(f"{str(file)!r} has rank {rank}, but {HYPERPARAMETERS} says {said['lora_r']!r}")
        config = {"r": rank, "lora_alpha": alpha, "lora_dropout": said.get("lora_dropout") or 0.0}
        method = get_registry().method_for_peft_type("LORA", config).from_hf_config(config)
        return ForeignAdapter(file=file, method=method, tensors=tensors)

    def _enabled(self, said: Mapping[str, Any]) -> list[bool | None]:
        """Return whether queries, keys and values are adapted; None where nobody says."""
        given = (self.query, self.key, self.value)
        return [own if own is not None else said.get(f"lora_{part}") for part, own in zip(_PARTS, given, strict=True)]


def _file(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def _hyperparameters(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{str(path)!r} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict):
        raise AdapterFileError(f"{str(path)!r} must hold a mapping, found {type(found).__name__}")
    return found


def _split(
    file: Path, name: str, down: Tensor | None, up: Tensor, modules: Mapping[str, nn.Module], enabled: list[bool | None]
) -> dict[str, Tensor]:
    """Return the pairs of query, key and value from the one pair of their fused layer ``name``."""
    layer = f"model.layers.{name.split('.')[2]}.self_attn"
    places = [f"{layer}.{part[0]}_proj" for part in _PARTS]
    if down is None or down.dim() != 2 or up.dim() != 2 or not up.shape[1] or down.shape[0] % up.shape[1]:
        found = (None if down is None else tuple(down.shape), tuple(up.shape))
        raise AdapterMismatchError(
            f"{str(file)!r}: {name!r} needs lora_A (n * r, in) and lora_B (out, r), found {found}"
        )
    if not all(isinstance(modules.get(place), nn.Module) for place in places):
        raise AdapterMismatchError(f"{str(file)!r} has {name!r}, but the model has no {places[0]!r}: wrong base?")
    rank = int(up.shape[1])
    parts = down.shape[0] // rank
    if parts == len(_PARTS) and None in enabled and not any(on is False for on in enabled):
        enabled = [True] * parts
    if None in enabled or sum(map(bool, enabled)) != parts:
        raise AdapterMismatchError(
            f"{str(file)!r}: {name!r} holds {parts} updates, but query, key, value = {enabled} does not say which these are; give them: "
            "format=LitGPTFile(query=True, key=False, value=True)"
        )
    widths = [int(modules[place].get_parameter("weight").shape[0]) for place in places]
    one_group = widths[1] == getattr(modules.get(layer), "head_dim", None)  # then nothing is interleaved
    if name.endswith("attn.attn") and parts == len(_PARTS) and not one_group:
        raise AdapterMismatchError(
            f"{str(file)!r} comes from a LitGPT that interleaved query, key and value by heads ({name!r}) but added an update of all three in "
            "another order, so that no rows belong to one of them; train again with a newer LitGPT, or merge it there"
        )
    chosen = [(place, width) for place, width, on in zip(places, widths, enabled, strict=True) if on]
    if sum(width for _, width in chosen) != up.shape[0]:
        raise AdapterMismatchError(
            f"{str(file)!r}: {name}.lora_B has {up.shape[0]} rows, the adapted ones of query, key and value have {[w for _, w in chosen]}: "
            "another base, or others of the three"
        )
    found_tensors: dict[str, Tensor] = {}
    downs, ups = torch.split(down, rank), torch.split(up, [width for _, width in chosen])
    for (place, _), rows, columns in zip(chosen, downs, ups, strict=True):
        found_tensors |= {f"{place}.lora_A.weight": rows, f"{place}.lora_B.weight": columns}
    return found_tensors


@hookimpl
def register_adapter_formats() -> list[type[AdapterFormat]]:
    """Register LitGPT's files."""
    return [LitGPTFile]

"""LoRA and DoRA files of torchtune: ``adapter_0.pt`` or ``adapter_model.pt``, with ``adapter_config.json`` beside it.

The names are torchtune's (``layers.0.attn.q_proj.lora_a.weight``). Its rotary embedding turns neighbouring features of a head, that of
transformers turns features half a head apart. So the output features of query and key are in another order::

    torchtune      0  h/2  1  h/2+1  2  ...        transformers      0  1  2  ...  h/2  h/2+1  ...

and the rows of B (and the magnitudes of DoRA) are put in transformers' order here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_files import HF_CONFIG, read_json, weights_file
from lightning_peft.adapter_formats import AdapterFormat, ForeignAdapter
from lightning_peft.arithmetic.rotary_order import pairs_to_halves
from lightning_peft.errors import AdapterConfigError, AdapterFileError, AdapterMismatchError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.registry import get_registry
from lightning_peft.weight_files import read_tensors, tensor_names

_LAYERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
"""torchtune's name of a layer in a block to that of transformers."""
_ENDS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_KEY = re.compile(r"(?:layers\.(\d+)\.(\w+\.\w+)|output)\.(lora_a\.weight|lora_b\.weight|magnitude)")
_MODELS = ("llama", "mistral")
"""``model_type`` of models whose query and key torchtune reorders in this way."""


@dataclass(frozen=True, kw_only=True)
class TorchtuneFile(AdapterFormat):
    """A LoRA or DoRA file of torchtune for Llama or Mistral, or the folder it is in. What is ``None`` is read from ``adapter_config.json``."""

    name: ClassVar[str] = "torchtune"

    alpha: float | None = None
    """``lora_alpha`` of the recipe."""

    @override
    def reads(self, path: Path) -> bool:
        if path.is_dir() and weights_file(path) is not None:
            return False  # torchtune has written it in HF PEFT's format as well
        return any(_is_ours(file) for file in _files(path))

    @override
    def read(self, path: Path, model: nn.Module) -> ForeignAdapter:
        files = [file for file in _files(path) if _is_ours(file)]
        if len(files) != 1:
            raise AdapterFileError(
                f"{str(path)!r} must be one file of torchtune or a folder with one, found {[file.name for file in files]}; name the file"
            )
        file = files[0]
        beside = file.parent / HF_CONFIG
        said = read_json(beside) if beside.is_file() else {}
        alpha = self.alpha if self.alpha is not None else said.get("lora_alpha")
        if alpha is None:
            raise AdapterConfigError(
                f"{str(file)!r} does not hold alpha, and there is no {HF_CONFIG} with lora_alpha beside it; give it: "
                "format=TorchtuneFile(alpha=...)"
            )
        stored = read_tensors(file)
        tensors = {_name(file, name): _in_order(file, name, tensor, model) for name, tensor in stored.items()}
        ranks = {int(tensor.shape[0]) for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
        if len(ranks) != 1:
            raise AdapterMismatchError(f"{str(file)!r} must have one rank at all places, found {sorted(ranks)}")
        rank = ranks.pop()
        if said.get("r", rank) != rank:
            raise AdapterMismatchError(f"{str(file)!r} has rank {rank}, but {HF_CONFIG} says {said['r']!r}")
        _check_targets(file, said.get("target_modules"), tensors)
        dora = any(name.endswith("lora_magnitude_vector") for name in tensors)
        config = {"r": rank, "lora_alpha": alpha, "use_dora": dora}
        method = get_registry().method_for_peft_type("LORA", config).from_hf_config(config)
        return ForeignAdapter(file=file, method=method, tensors=tensors)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("adapter_*.pt"))
    return [path] if path.is_file() and path.suffix == ".pt" else []


def _is_ours(file: Path) -> bool:
    return any(_KEY.fullmatch(name) for name in tensor_names(file))


def _name(file: Path, name: str) -> str:
    match = _KEY.fullmatch(name)
    if match is None or (match[1] and match[2] not in _LAYERS):
        raise AdapterMismatchError(
            f"{str(file)!r} has {name!r}, which is no adapted layer of a Llama in torchtune; read are {', '.join(_LAYERS)} and output"
        )
    place = f"model.layers.{match[1]}.{_LAYERS[match[2]]}" if match[1] else "lm_head"
    return f"{place}.{_ENDS[match[3]]}"


def _in_order(file: Path, name: str, tensor: Tensor, model: nn.Module) -> Tensor:
    """Return a tensor with its output features in transformers' order."""
    match = _KEY.fullmatch(name)
    assert match is not None
    if match[3] == "lora_a.weight" or match[2] not in ("attn.q_proj", "attn.k_proj"):
        return tensor
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _MODELS:
        raise AdapterMismatchError(
            f"{str(file)!r} adapts {match[2]}, whose features torchtune orders in its own way; that order is known for {', '.join(_MODELS)}, not for "
            f"model_type {kind!r}"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = tensor.shape[0]
    if not tensor.dim() or rows % size:
        raise AdapterMismatchError(
            f"{str(file)!r}: {name!r} has shape {tuple(tensor.shape)}, heads have {size} features"
        )
    return pairs_to_halves(tensor, size)


def _check_targets(file: Path, names: Any, tensors: Mapping[str, Tensor]) -> None:
    """Compare ``target_modules``, in torchtune's words or HF PEFT's, with the layers that have tensors."""
    if names is None:
        return
    short = {ours.rpartition(".")[2]: theirs.rpartition(".")[2] for ours, theirs in _LAYERS.items()} | {
        "output": "lm_head"
    }
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterConfigError(f"target_modules of {HF_CONFIG} must be a list of names, got {names!r}")
    wanted = {str(short.get(name, name)) for name in names}
    found = {re.sub(r"\.lora_.*$", "", name).rpartition(".")[2] for name in tensors}
    if wanted != found:
        raise AdapterMismatchError(
            f"{str(file)!r}: target_modules {sorted(wanted)} of {HF_CONFIG} and the layers with tensors {sorted(found)} do not agree"
        )


@hookimpl
def register_adapter_formats() -> list[type[AdapterFormat]]:
    """Register torchtune's files."""
    return [TorchtuneFile]

"""LoRA as a GGUF file, the format of llama.cpp: written by an exporter, read as an adapter format.

::

    general.type = adapter      general.architecture = llama, qwen2, ...      adapter.type = lora      adapter.lora.alpha

    blk.0.attn_v.weight.lora_a  (rank, in)               blk.0.attn_v.weight.lora_b  (out, rank)
    token_embd.weight.lora_a    (vocabulary, rank)       token_embd.weight.lora_b    (dim, rank)

llama.cpp scales each update by alpha / rank, with one alpha for the file and the rank of the tensor. Where a place has another scale,
what is missing goes into its B. Architectures whose rotary embedding turns neighbouring features, Llama's among them, hold query and
key with their rows in :mod:`another order <lightning_peft.arithmetic.rotary_order>`, and so does B.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_formats import AdapterFormat, ForeignAdapter
from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.arithmetic.rotary_order import halves_to_pairs, pairs_to_halves
from lightning_peft.errors import AdapterFileError, AdapterMismatchError, ConfigError, ExportError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Exporter
from lightning_peft.low_rank_pairs import Pair, updates_in
from lightning_peft.registry import get_registry

FILE = "adapter.gguf"
_EMBEDDING, _DOWN, _UP = "token_embd.weight", ".lora_a", ".lora_b"
_DTYPES = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16")}
"""Our name of a precision to GGUF's of a tensor and of a file."""


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp holds the models of one ``model_type``."""

    name: str
    pairs: bool = False
    """Whether the rows of query and key are put in the order of pairs."""


_ARCHITECTURES = {
    "gemma": _Architecture("gemma"),
    "gemma2": _Architecture("gemma2"),
    "gemma3_text": _Architecture("gemma3"),
    "gpt2": _Architecture("gpt2"),
    "granite": _Architecture("granite", pairs=True),
    "llama": _Architecture("llama", pairs=True),
    "mistral": _Architecture("llama", pairs=True),
    "mixtral": _Architecture("llama", pairs=True),
    "olmo": _Architecture("olmo", pairs=True),
    "olmo2": _Architecture("olmo2"),
    "phi": _Architecture("phi2"),
    "phi3": _Architecture("phi3"),
    "qwen2": _Architecture("qwen2"),
    "qwen2_moe": _Architecture("qwen2moe"),
    "qwen3": _Architecture("qwen3"),
    "qwen3_moe": _Architecture("qwen3moe"),
    "smollm3": _Architecture("smollm3", pairs=True),
    "starcoder2": _Architecture("starcoder2"),
}
"""``model_type`` of transformers to the architecture, for models whose linear layers llama.cpp holds as they are, or with reordered rows."""


@dataclass(frozen=True, kw_only=True)
class GGUFAdapter(Exporter):
    """A LoRA adapter as ``adapter.gguf``, for ``--lora`` of llama.cpp and what is built on it. What is written is what acts, scale included."""

    name: ClassVar[str] = "gguf_adapter"

    adapter: str = "default"
    """The adapter to write."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the tensors in the file."""

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"GGUFAdapter dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    @override
    def export(self, model: nn.Module, path: Path) -> None:
        """Write ``adapter.gguf`` into the folder ``path``.

        Raises:
            ConfigError: the library ``gguf`` is not installed.
            AdapterNotFoundError: the model has no adapter of that name.
            ExportError: the model or the adapter is one that the format cannot hold; nothing is written.
        """
        gguf = _library()
        try:
            architecture, places = _places(gguf, model)
            updates = updates_in(model, self.adapter)
        except AdapterMismatchError as error:
            raise ExportError(str(error)) from error
        except ConfigError as error:
            raise ExportError(
                f"a GGUF file holds low-rank updates of weights that are at hand, and nothing else: {error}"
            ) from error
        if updates.tied:
            raise ExportError(
                f"adapter {self.adapter!r} gives the weights of {sorted(updates.tied)} one update, and llama.cpp has no update for an embedding "
                "that is the head too; merge it: lightning-peft merge"
            )
        pairs = {
            _writable(model, places, path, here): next(iter(here.values())) for path, here in updates.pairs.items()
        }
        alpha = Counter(_alpha(pair) for pair in pairs.values()).most_common(1)[0][0]
        alpha = alpha or 1.0  # an alpha of zero would stand for "not scaled"
        tensors: dict[str, Tensor] = {}
        for place, pair in pairs.items():
            tensors |= _as_stored(place, pair, alpha, _heads(model, architecture, place))
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor.to(getattr(torch, self.dtype))).all():
                raise ExportError(f"{name!r} has values that are not finite in {self.dtype}; nothing was written")
        Path(path).mkdir(parents=True, exist_ok=True)
        _write(gguf, Path(path) / FILE, architecture.name, alpha, self.dtype, tensors)


@dataclass(frozen=True, kw_only=True)
class GGUFFile(AdapterFormat):
    """A LoRA adapter of llama.cpp in a ``.gguf`` file, or the folder with one ``adapter.gguf``."""

    name: ClassVar[str] = "gguf"

    @override
    def reads(self, path: Path) -> bool:
        file = _file(path)
        if file.suffix != ".gguf" or not file.is_file():
            return False
        with file.open("rb") as opened:
            return opened.read(4) == b"GGUF"

    @override
    def read(self, path: Path, model: nn.Module) -> ForeignAdapter:
        gguf, file = _library(), _file(path)
        said, stored = _content(gguf, file)
        if said["general.type"] != "adapter" or said["adapter.type"] != "lora":
            raise AdapterFileError(
                f"{str(file)!r} must have general.type 'adapter' and adapter.type 'lora', found {said['general.type']!r} and {said['adapter.type']!r}"
            )
        architecture, places = _places(gguf, model)
        if said["general.architecture"] != architecture.name:
            raise AdapterMismatchError(
                f"{str(file)!r} is for the architecture {said['general.architecture']!r}, the model is {architecture.name!r} in llama.cpp"
            )
        by_name = {name: place for place, name in places.items()}
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for name in stored:
            base = name.removesuffix(_DOWN).removesuffix(_UP)
            if base == name or base not in by_name:
                raise AdapterMismatchError(
                    f"{str(file)!r} has {name!r}, which is no part of an update of {architecture.name!r}"
                )
            if base + _DOWN not in stored or base + _UP not in stored:
                raise AdapterMismatchError(f"{str(file)!r} has {name!r} without the other half of the pair")
            if name.endswith(_UP):
                down, up = stored[base + _DOWN], stored[name]
                heads = _heads(model, architecture, base)
                tensors |= _as_ours(file, by_name[base], base, down, up, heads)
                ranks[by_name[base]] = int(up.shape[-1])
        if not ranks:
            raise AdapterMismatchError(f"{str(file)!r} holds no adapter tensor")
        alpha = said["adapter.lora.alpha"]
        if not isinstance(alpha, (int, float, type(None))):
            raise AdapterFileError(f"{str(file)!r}: adapter.lora.alpha must be a number, found {alpha!r}")
        config = _hf_config(ranks, float(alpha or 0.0))
        method = get_registry().method_for_peft_type("LORA", config).from_hf_config(config)
        return ForeignAdapter(file=file, method=method, tensors=tensors)


# -- what both ways share ----------------------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "GGUF files are read and written with the library gguf, which is not installed: pip install 'lightning-peft[gguf]'"
        ) from error
    return gguf


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _places(gguf: Any, model: Any) -> tuple[_Architecture, dict[str, str]]:
    """Return the architecture of ``model``, and its modules by path with the name of their weight in GGUF."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _ARCHITECTURES:
        raise AdapterMismatchError(
            f"the layout of a {type(model).__name__} (model_type {kind!r}) in llama.cpp is not known here; known are {', '.join(_ARCHITECTURES)}"
        )
    architecture = _ARCHITECTURES[kind]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found = {path: names.get_name(f"{path}.weight", try_suffixes=(".weight",)) for path, _ in base_modules(model)}
    return architecture, {path: name for path, name in found.items() if name is not None}


def _heads(model: Any, architecture: _Architecture, name: str) -> int:
    """Return the number of heads whose rows are reordered in the weight ``name``; 0 where none are."""
    if not architecture.pairs or not name.endswith((".attn_q.weight", ".attn_k.weight")):
        return 0
    config = model.config
    grouped = getattr(config, "num_key_value_heads", None) if name.endswith(".attn_k.weight") else None
    return int(grouped or config.num_attention_heads)


# -- writing -----------------------------------------------------------------------------------------------------------


def _writable(model: nn.Module, places: Mapping[str, str], path: str, here: Mapping[str, Pair]) -> str:
    """Return the name in GGUF of the weight that is updated at ``path``, if the file can hold that."""
    module = unwrapped(model.get_submodule(path))
    pair = next(iter(here.values()))
    if path not in places or len(here) != 1 or pair.up.dim() != 2 or pair.down.dim() != 2:
        raise ExportError(
            f"{path!r}, a {type(module).__name__}, has no matrix of its own in llama.cpp's layout of {type(model).__name__}, so a GGUF file cannot hold "
            "its update; leave it out, or merge: lightning-peft merge"
        )
    weight = module.get_parameter("weight")
    for other, candidate in base_modules(model):
        if other != path and unwrapped(candidate)._parameters.get("weight") is weight:
            raise ExportError(
                f"{path!r} shares its weight with {other!r}, which llama.cpp holds as one tensor that it cannot update at one of the two; merge: "
                "lightning-peft merge"
            )
    return places[path]


def _alpha(pair: Pair) -> float:
    """Return the alpha with which llama.cpp would scale ``pair`` rightly."""
    alpha = torch.tensor(round(pair.scaling * pair.rank, 9), dtype=torch.float32)  # as the file holds it
    return float(alpha)


def _as_stored(name: str, pair: Pair, alpha: float, heads: int) -> dict[str, Tensor]:
    """Return the two tensors of a pair as the file holds them, in float32."""
    up, down = pair.up.detach().cpu().double(), pair.down.detach().float().cpu()
    if _alpha(pair) != alpha:
        up = up * (pair.scaling * pair.rank / alpha)
    up = up.float()
    if heads:
        up = halves_to_pairs(up, up.shape[0] // heads)
    return {name + _DOWN: down.t() if name == _EMBEDDING else down, name + _UP: up}


def _write(gguf: Any, file: Path, architecture: str, alpha: float, dtype: str, tensors: Mapping[str, Tensor]) -> None:
    """Write the file under another name first, so that none is there that was cut off."""
    kind, whole = _DTYPES[dtype]
    number = getattr(gguf.GGMLQuantizationType, kind)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(int(gguf.LlamaFileType[whole]))
        for name, tensor in tensors.items():
            writer.add_tensor(name, gguf.quantize(tensor.contiguous().numpy(), number), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# -- reading -----------------------------------------------------------------------------------------------------------


def _content(gguf: Any, file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the file says of itself, and its tensors in float32."""
    keys = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    try:
        reader = gguf.GGUFReader(file)
        fields = {key: reader.get_field(key) for key in keys}
        said = {key: None if found is None else found.contents() for key, found in fields.items()}
        if said["general.type"] != "adapter":
            return said, {}
        tensors = {one.name: torch.tensor(gguf.dequantize(one.data, one.tensor_type)) for one in reader.tensors}
    except (ValueError, TypeError, IndexError, KeyError, OSError, NotImplementedError, OverflowError) as error:
        raise AdapterFileError(f"{str(file)!r} cannot be read as GGUF: {error}") from error
    return said, tensors


def _as_ours(file: Path, place: str, name: str, down: Tensor, up: Tensor, heads: int) -> dict[str, Tensor]:
    """Return the two tensors of a pair under our names."""
    if down.dim() != 2 or up.dim() != 2 or (heads and up.shape[0] % (2 * heads)):
        raise AdapterMismatchError(
            f"{str(file)!r}: {name!r} needs two matrices{f' for {heads} heads' if heads else ''}, found shapes {tuple(down.shape)}, {tuple(up.shape)}"
        )
    if name == _EMBEDDING:
        return {f"{place}.lora_embedding_A": down.t().contiguous(), f"{place}.lora_embedding_B": up}
    if heads:
        up = pairs_to_halves(up, up.shape[0] // heads)
    return {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}


def _hf_config(ranks: Mapping[str, int], alpha: float) -> dict[str, Any]:
    """Return HF PEFT's configuration of updates that are scaled by alpha / rank, or not at all where alpha is zero."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {re.escape(place): value for place, value in ranks.items() if value != rank}
    return {"r": rank, "lora_alpha": alpha or rank, "rank_pattern": other, "alpha_pattern": {} if alpha else other}


@hookimpl
def register_adapter_formats() -> list[type[AdapterFormat]]:
    """Register GGUF files of LoRA adapters."""
    return [GGUFFile]


@hookimpl
def register_exporters() -> list[type[Exporter]]:
    """Register the exporter of GGUF files of LoRA adapters."""
    return [GGUFAdapter]

"""Files of loralib, the library of the LoRA paper: what ``loralib.lora_state_dict`` returned, saved with ``torch.save``.

::

    <path>.lora_A  (r, in)       Linear            <path>.lora_A  (r * n, in)               MergedLinear, n of its parts adapted
    <path>.lora_B  (out, r)                        <path>.lora_B  (n * out / parts, r)

The file holds neither alpha nor, for a ``MergedLinear``, which parts are adapted: both are fields here. The scripts of the paper save
the classifier of a task in the same file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_formats import AdapterFormat, ForeignAdapter
from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Slice
from lightning_peft.registry import get_registry
from lightning_peft.saved_modules import inside
from lightning_peft.targets import is_conv1d_linear
from lightning_peft.weight_files import read_tensors, tensor_names

_INSIDE = ("model_state_dict",)
"""Where the paper's scripts for GPT-2 put the tensors."""
_ROLES = ("query", "key", "value")


@dataclass(frozen=True, kw_only=True)
class LoralibFile(AdapterFormat):
    """A file of loralib.

    Example:
        >>> LoralibFile(alpha=16, modules_to_save=["classifier"]).name
        'loralib'
    """

    name: ClassVar[str] = "loralib"

    alpha: float | None = None
    """``lora_alpha`` of the training script. The file does not hold it, so it must be given."""
    enable_lora: Sequence[bool] | None = None
    """Which parts of a fused projection were adapted, as the training script said it: ``[True, False, True]`` for query and value. Needed for
    a ``MergedLinear`` of which not all parts are."""
    modules_to_save: Sequence[str] = ()
    """Modules whose whole weights the file holds, such as ``classifier``. They are loaded only where named here."""

    def __post_init__(self) -> None:
        if self.alpha is not None and (
            isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha)
        ):
            raise ConfigError(f"LoralibFile alpha must be a finite number, got {self.alpha!r}")
        enabled = self.enable_lora
        if enabled is not None and not (
            isinstance(enabled, (list, tuple)) and all(isinstance(part, bool) for part in enabled) and any(enabled)
        ):
            raise ConfigError(f"LoralibFile enable_lora must be a list of booleans, one of them true, got {enabled!r}")
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"LoralibFile modules_to_save must be a list of names, got {self.modules_to_save!r}")

    @override
    def reads(self, path: Path) -> bool:
        if not path.is_file() or path.suffix not in (".bin", ".pt", ".pth"):
            return False
        return any(name.endswith(".lora_A") for name in tensor_names(path, inside=_INSIDE))

    @override
    def read(self, path: Path, model: nn.Module) -> ForeignAdapter:
        stored = read_tensors(path, inside=_INSIDE)
        if self.alpha is None:
            raise AdapterConfigError(
                f"{str(path)!r}: a file of loralib does not hold alpha, the scale of its updates; give the lora_alpha it was trained with: "
                "format=LoralibFile(alpha=...), or --options '{\"alpha\": ...}' on the command line"
            )
        ranks = {name.removesuffix(".lora_B"): int(B.shape[-1]) for name, B in stored.items() if _is(name, B, "lora_B")}
        if not ranks:
            raise AdapterMismatchError(
                f"{str(path)!r} has no tensor '<module>.lora_B' (out, rank): {sorted(stored)[:3]}"
            )
        bias = self._bias(path, stored, ranks)
        rank = next(iter(ranks.values()))
        # loralib scales by alpha / r at every place, whatever its rank.
        config: dict[str, Any] = {"r": rank, "lora_alpha": self.alpha, "bias": bias}
        config["rank_pattern"] = {place: here for place, here in ranks.items() if here != rank}
        modules = {place: unwrapped(module) for place, module in base_modules(model)}
        tensors: dict[str, Tensor] = {}
        slices: dict[str, tuple[Slice, ...]] = {}
        for name, tensor in stored.items():
            place, _, end = name.rpartition(".")
            if end in ("lora_A", "lora_B") and place in modules:
                own, slices[place] = self._at(path, place, modules[place], stored)
                tensors |= own
            elif end == "bias" and place in ranks:
                tensors[f"{place}.base_layer.bias"] = tensor
            else:
                tensors[name] = tensor
        method = get_registry().method_for_peft_type("LORA", config).from_hf_config(config)
        return ForeignAdapter(
            file=path,
            method=method,
            tensors=tensors,
            modules_to_save=tuple(self.modules_to_save),
            slices={place: parts for place, parts in slices.items() if parts},
        )

    def _bias(self, path: Path, stored: Mapping[str, Tensor], ranks: Mapping[str, int]) -> str:
        """Return which biases the file holds, in HF PEFT's words; refuse whole weights that nobody asked for."""
        rest = [name for name in stored if name.rpartition(".")[2] not in ("lora_A", "lora_B")]
        saved = [
            name for name in rest if any(inside(name, [end]) or f".{end}." in name for end in self.modules_to_save)
        ]
        others = [name for name in rest if name not in saved]
        whole = sorted(name for name in others if not name.endswith(".bias"))
        if whole:
            modules = sorted(
                {name.partition(".")[0] if name.count(".") < 3 else name.rpartition(".")[0] for name in whole}
            )
            raise AdapterMismatchError(
                f"{str(path)!r} also holds whole weights of the base, such as {whole[:3]} ({len(whole)}); if these modules were trained in full, "
                f"say so: format=LoralibFile(alpha=..., modules_to_save={modules[:5]})"
            )
        beside = any(name.rpartition(".")[0] not in ranks for name in others)
        return "all" if beside else "lora_only" if others else "none"

    def _at(
        self, path: Path, place: str, module: nn.Module, stored: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], tuple[Slice, ...]]:
        """Return the tensors of one place as HF PEFT's, and the slices where it is fused."""
        A, B = stored.get(f"{place}.lora_A"), stored.get(f"{place}.lora_B")
        if A is None or B is None or A.dim() != 2 or B.dim() != 2:
            found = {end: tuple(t.shape) for end, t in (("lora_A", A), ("lora_B", B)) if t is not None}
            raise AdapterMismatchError(
                f"{str(path)!r}: {place!r} needs lora_A and lora_B, both matrices, found {found}"
            )
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise AdapterMismatchError(
                f"{str(path)!r}: {place!r} is a convolution, whose update in loralib is B A folded into the kernel; no method here computes that"
            )
        if isinstance(module, nn.Embedding):
            return {f"{place}.lora_embedding_A": A, f"{place}.lora_embedding_B": B}, ()
        rank, rows = int(B.shape[1]), int(B.shape[0])
        parts = A.shape[0] // rank if rank else 0
        out = _out_features(module)
        whole = parts == 1 and (rows == out or rows > out or out % rows)
        if (
            whole or not parts or A.shape[0] != parts * rank
        ):  # if that is not as it should be, the comparison with the model tells
            return {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}, ()
        enabled = list(self.enable_lora or ([True] * parts if rows == out else ()))
        width = out // len(enabled) if enabled else 0
        if sum(enabled) != parts or width * parts != rows or width * len(enabled) != out:
            raise AdapterMismatchError(
                f"{str(path)!r}: {place!r} holds {parts} updates of rank {rank} for {rows} of {out} output features, so it is a MergedLinear, or of another base; "
                f"enable_lora={self.enable_lora!r} does not say which parts these are. Give it as in training, such as [True, False, True]"
            )
        chosen = [index for index, on in enumerate(enabled) if on]
        names = _ROLES if len(enabled) == len(_ROLES) else [f"part_{index}" for index in range(len(enabled))]
        dense = B.new_zeros(out, parts * rank)  # each part's own rows and columns, zero elsewhere
        for number, index in enumerate(chosen):
            block = B[number * width : (number + 1) * width]
            dense[index * width : (index + 1) * width, number * rank : (number + 1) * rank] = block
        slices = [Slice(names[i], groups=1, width=out, start=i * width, stop=(i + 1) * width) for i in chosen]
        return {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": dense}, tuple(slices)


def _is(name: str, tensor: Tensor, end: str) -> bool:
    return name.endswith(f".{end}") and tensor.dim() == 2 and tensor.shape[-1] > 0


def _out_features(module: nn.Module) -> int:
    weight = module.get_parameter("weight")
    return int(weight.shape[1] if is_conv1d_linear(module) else weight.shape[0])


@hookimpl
def register_adapter_formats() -> list[type[AdapterFormat]]:
    """Register loralib's files."""
    return [LoralibFile]

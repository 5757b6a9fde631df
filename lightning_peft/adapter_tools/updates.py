"""The low-rank updates of an adapter as pairs of matrices: read from a model or a folder, put into a model.

What a file of LoRA holds is the common language of all tools here: for every place a pair, A (rank, in, ...) and
B (out, rank, ...), and a scale. Slices of fused projections, initial pairs (PiSSA) and transposed layouts are all written so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_peft.adapter_files import WEIGHTS, AdapterFolder, read_adapter
from lightning_peft.adapter_layer import adapter_layers, adapters_named
from lightning_peft.arithmetic.low_rank import BiasAdapter, LowRankAdapter
from lightning_peft.arithmetic.low_rank_experts import LowRankExperts
from lightning_peft.composition import stored_scales
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError
from lightning_peft.injection import Injection, record
from lightning_peft.interfaces import Target
from lightning_peft.registry import get_registry
from lightning_peft.rollback import unchanged_on_error
from lightning_peft.saved_modules import SavedParameters
from lightning_peft.surgery import inject_at

Source = str | Path | tuple[nn.Module, str]
"""An adapter: its folder, or a model and the name it has there."""
_NAMES = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
"""The name of A in a file, for a linear layer and for an embedding, to that of B."""


@dataclass(frozen=True)
class Pair:
    """One update ``scaling * B A``, in the shapes of a file."""

    down: Tensor
    """A (rank, in, ...)."""
    up: Tensor
    """B (out, rank, ...)."""
    scaling: float = 1.0
    """Factor of the update."""
    transposed: bool = False
    """Whether the module holds its weight as (in, out): an embedding, a ``Conv1D``."""

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return B (out, rank) and A (rank, in), without the scale; a convolution's kernel counts as inputs."""
        return self.up.reshape(self.up.shape[0], -1), self.down.reshape(self.rank, -1)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Return (B, A) with the scale in B, so that the update is their product, in float64 where there is that."""
        wide = torch.float32 if self.up.device.type == "mps" else torch.float64
        up, down = (matrix.to(wide) for matrix in self.matrices())
        return up * self.scaling, down

    def like(self, up: Tensor, down: Tensor) -> Self:
        """Return a pair of scale one with the matrices B (out, rank) and A (rank, in), in the shapes and dtype of this one."""
        return replace(
            self,
            down=down.reshape(-1, *self.down.shape[1:]).to(self.down.dtype).contiguous(),
            up=up.reshape(*up.shape, *[1] * (self.up.dim() - 2)).to(self.up.dtype).contiguous(),
            scaling=1.0,
        )


@dataclass(frozen=True)
class Updates:
    """All low-rank updates of one adapter."""

    pairs: Mapping[str, Mapping[str, Pair]]
    """Module path to what stands before the names of a pair there in a file, with the name of A, to the pair."""
    origin: str
    """Where they come from, for messages."""
    tied: frozenset[str] = frozenset()
    """The places that share a weight and one update; only one place of each weight has a pair."""

    @property
    def labelled(self) -> dict[str, Pair]:
        """The pairs by the path of the weight they change: mostly that of a module."""
        return {_label(path, key): pair for path, here in self.pairs.items() for key, pair in here.items()}

    @property
    def largest_rank(self) -> int:
        """The largest rank of all pairs."""
        return max(pair.rank for here in self.pairs.values() for pair in here.values())


def _label(path: str, key: str) -> str:
    name = next(name for name in _NAMES if key.endswith(name))
    inner = key.removesuffix(name).replace("base_layer.", "").rstrip(".")
    return f"{path}.{inner}" if inner else path


def updates_of(source: Source) -> Updates:
    """Return the updates of an adapter.

    Args:
        source: an adapter folder, or ``(model, name)``.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        AdapterFileError: the folder cannot be read.
        ConfigError: the adapter is something else than low-rank updates.
    """
    if isinstance(source, tuple):
        return updates_in(*source)
    return updates_from(read_adapter(source))


# -- out of a model ----------------------------------------------------------------------------------------------------


def updates_in(model: nn.Module, name: str) -> Updates:
    """Return the updates of the adapter ``name`` in ``model``; places that follow another's tensors are left out.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        ConfigError: the adapter is something else than low-rank updates, or has values that are not finite.
    """
    injection, what = record(model, name), f"adapter {name!r}"
    if injection.method.exact_packed_base:
        raise ConfigError(
            f"{what} is a {injection.method.name!r} adapter, whose update is over packed weights of its own and no LoRA"
        )
    pairs: dict[str, dict[str, Pair]] = {}
    tied = set()
    for path, adapter in adapters_named(model, name).items():
        if isinstance(adapter, SavedParameters):
            raise ConfigError(f"{what} trains {path!r} in full (modules_to_save), which is no low-rank update")
        if isinstance(adapter, LowRankExperts):
            raise ConfigError(
                f"{what} adapts the fused experts at {path!r}; pairs of several experts are not taken apart"
            )
        if adapter.tied_parameters:
            tied.add(path)
        if adapter.tied_parameters and next(adapter.parameters(), None) is None:
            continue  # it acts with the tensors of another place
        held = bool(getattr(adapter, "transposed", False))
        found, rest = _paired(adapter.export_state(), getattr(adapter, "scaling", 1.0), held)
        if isinstance(adapter, BiasAdapter) or any(key.endswith("bias") for key in rest):
            raise ConfigError(f"{what} trains the bias of {path!r} too, which is no low-rank update; {_ADVICE}")
        if rest or not found or not isinstance(adapter, LowRankAdapter):
            raise ConfigError(
                f"{what} is a {injection.method.name!r} adapter, which at {path!r} is not one low-rank product but {sorted(rest) or 'nothing'}; "
                + _ADVICE
            )
        for pair in found.values():
            if not (torch.isfinite(pair.down).all() and torch.isfinite(pair.up).all()):
                raise ConfigError(f"{what} has values at {path!r} that are not finite: its training has diverged")
        pairs[path] = found
    return Updates(pairs=pairs, origin=what, tied=frozenset(tied))


_ADVICE = "convert it with to_lora(model, name, rank=...), or combine with method='task_arithmetic'"


def _paired(state: Mapping[str, Tensor], scaling: float, transposed: bool) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Return the pairs among the tensors of one place by the name of A there, and the tensors that are left."""
    rest, found = dict(state), {}
    for key in state:
        name = next((name for name in _NAMES if key == name or key.endswith(f".{name}")), None)
        partner = key.removesuffix(name) + _NAMES[name] if name else ""
        if partner in state:
            found[key] = Pair(rest.pop(key), rest.pop(partner), scaling, transposed or key == "lora_embedding_A")
    return found, rest


# -- out of a folder ---------------------------------------------------------------------------------------------------


def updates_from(folder: AdapterFolder) -> Updates:
    """Return the updates of a folder, which must be one of LoRA for HF PEFT, as strong as its factor beside it says."""
    hf, what = folder.hf or {}, repr(str(folder.path))
    plain = hf.get("peft_type") == "LORA" and not hf.get("use_dora") and not folder.method.exact_packed_base
    if not plain:
        raise ConfigError(
            f"{what} is a {folder.method.name!r} adapter, which no folder holds as low-rank products alone; load it over its base and "
            "convert it there: lightning-peft to-lora, or to_lora(model, name, rank=...)"
        )
    for key, meaning in {
        "modules_to_save": "modules trained in full",
        "target_parameters": "fused experts",
        "ensure_weight_tying": "one update for tied weights",
    }.items():
        if hf.get(key) or (folder.own or {}).get(key):
            raise ConfigError(f"{what} holds {meaning} ({key}), which cannot be read without the model; load it there")
    lora, scalings = low_rank_method().from_hf_config({k: v for k, v in hf.items() if k != "modules_to_save"}), {}
    places: dict[str, dict[str, Tensor]] = {}
    scale = stored_scales(folder.path).get("default", 1.0)
    for stored, tensor in folder.tensors.items():
        name = stored.removeprefix(folder.method.hf_prefix)
        found = re.match(r"(.+?)\.((?:base_layer\.\w+\.)?(?:lora_A\.weight|lora_B\.weight|lora_embedding_[AB]))$", name)
        if found is None:
            raise ConfigError(
                f"{str(folder.path / WEIGHTS)!r} holds {stored!r}, which is no low-rank product; load the adapter over its base, and use to_lora"
            )
        places.setdefault(found[1], {})[found[2]] = tensor
    pairs = {}
    for path in sorted(places, key=_natural):
        scalings[path] = _at(lora, path).scaling * scale
        pairs[path], rest = _paired(places[path], scalings[path], bool(hf.get("fan_in_fan_out")))
        _check_pairs(folder, path, pairs[path], rest)
    if not pairs:
        raise AdapterMismatchError(f"{str(folder.path / WEIGHTS)!r} holds no adapter tensor")
    return Updates(pairs=pairs, origin=what)


def _check_pairs(folder: AdapterFolder, path: str, pairs: Mapping[str, Pair], rest: Mapping[str, Tensor]) -> None:
    where = f"{str(folder.path / WEIGHTS)!r}: {path!r}"
    if rest:
        raise AdapterMismatchError(f"{where} has {sorted(rest)} without the other half of the pair")
    for pair in pairs.values():
        if pair.up.dim() < 2 or pair.up.shape[1] != pair.rank:
            raise AdapterMismatchError(
                f"{where} has A of shape {tuple(pair.down.shape)} and B of shape {tuple(pair.up.shape)}, whose ranks differ"
            )
        for tensor in (pair.down, pair.up):
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise AdapterMismatchError(f"{where} has values that are not finite floating-point numbers")


def _at(lora: Any, path: str) -> Any:
    """Return ``lora`` as it is at ``path``, by the rule of HF PEFT: the first pattern that matches the end of the path."""
    overrides: dict[str, Any] = {}
    for field, patterns in lora.patterns().items():
        for word, value in patterns.items():
            named = (
                re.fullmatch(word[3:], path) if word.startswith("re:") else path == word or path.endswith(f".{word}")
            )
            if named:
                overrides.setdefault(field, value)
    try:
        return lora.at(**overrides, rank_pattern={}, alpha_pattern={})
    except ConfigError as error:
        raise AdapterConfigError(str(error)) from error


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Order ``layers.2`` before ``layers.10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]


# -- into a model ------------------------------------------------------------------------------------------------------


def low_rank_method() -> Any:
    """Return the class of the method whose files are those that HF PEFT calls ``LORA``: what all tools here read and make."""
    return get_registry().method_for_peft_type("LORA")


def lora_for(pairs: Mapping[str, Mapping[str, Pair]], *, tied: bool = False, biases: bool = False) -> Any:
    """Return the LoRA, of scale one everywhere, that holds ``pairs``: the ranks of single places are in its patterns."""
    ranks = {path: max(pair.rank for pair in here.values()) for path, here in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"re:{re.escape(path)}": value for path, value in ranks.items() if value != rank}
    return low_rank_method()(
        rank=rank,
        alpha=float(rank),
        rank_pattern=other,
        alpha_pattern={word: float(value) for word, value in other.items()},
        tied="both" if tied else "one",
        bias="lora_only" if biases else "none",
    )


def put_in(
    model: nn.Module,
    name: str,
    pairs: Mapping[str, Mapping[str, Pair]],
    *,
    family: str,
    tied: bool = False,
    biases: Mapping[str, Tensor] | None = None,
    trainable: bool = False,
) -> Injection:
    """Put ``pairs`` of scale one into ``model`` as the LoRA adapter ``name``, and make it the active one.

    Args:
        model: the model.
        name: the name of the new adapter.
        pairs: the updates.
        family: name of the model family.
        tied: whether places that share a weight share the update.
        biases: module path to the bias (out,) it has under the adapter, where that differs from the base.
        trainable: whether the adapter is trained further.

    Raises:
        ConfigError: a value is not finite; the model is unchanged.
    """
    for path, here in pairs.items():
        for pair in here.values():
            if not (torch.isfinite(pair.up).all() and torch.isfinite(pair.down).all()):
                raise ConfigError(f"the update of {path!r} for {name!r} would be non-finite; the model is unchanged")
    method = lora_for(pairs, tied=tied, biases=bool(biases))
    targets = tuple(Target(path=path, rule=name) for path in adapted_in_order(model, pairs))
    injection = Injection(method=method, targets=targets, family=family)
    with unchanged_on_error(model), torch.random.fork_rng():
        inject_at(model, injection, name=name, trainable=trainable)
        for path, adapter in adapters_named(model, name).items():
            if path not in pairs:
                if not adapter.tied_parameters:
                    raise ConfigError(f"{path!r} would get an adapter for which there are no values")
                continue  # it shares the tensors of another place
            state = adapter.export_state()
            for key, pair in pairs[path].items():
                partner = next(key.removesuffix(a) + b for a, b in _NAMES.items() if key.endswith(a))
                state[key] = _padded(pair.down, state[key])
                state[partner] = _padded(pair.up, state[partner])
            for key in state:
                if key.endswith("bias") and biases and path in biases:
                    state[key] = biases[path]
            adapter.import_state(state)
    return injection


def adapted_in_order(model: nn.Module, paths: Mapping[str, Any]) -> list[str]:
    """Return ``paths`` in the order in which the model holds the modules where they are adapted already, the others last."""
    layers = [path for path in adapter_layers(model) if path in paths]
    return [*layers, *(path for path in paths if path not in layers)]


def _padded(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` with zeros up to the shape of ``like``: its own rank may be smaller than that of the place."""
    if tensor.shape == like.shape:
        return tensor
    result = torch.zeros_like(like)
    result[tuple(slice(size) for size in tensor.shape)] = tensor.to(like)
    return result

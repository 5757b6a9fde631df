"""The low-rank updates of an adapter as pairs of matrices: read from a model or a folder, put into a model.

The pairs themselves, and how they are read from a model, are in :mod:`lightning_peft.low_rank_pairs`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter_files import WEIGHTS, AdapterFolder, read_adapter
from lightning_peft.adapter_layer import adapter_layers, adapters_named
from lightning_peft.composition import stored_scales
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError
from lightning_peft.injection import Injection
from lightning_peft.interfaces import Target
from lightning_peft.low_rank_pairs import PAIR_NAMES, Pair, Updates, paired, updates_in
from lightning_peft.registry import get_registry
from lightning_peft.rollback import unchanged_on_error
from lightning_peft.surgery import inject_at

Source = str | Path | tuple[nn.Module, str]
"""An adapter: its folder, or a model and the name it has there."""


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
        pairs[path], rest = paired(places[path], scalings[path], bool(hf.get("fan_in_fan_out")))
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
                partner = next(key.removesuffix(a) + b for a, b in PAIR_NAMES.items() if key.endswith(a))
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

"""The tensors of a model folder, and which parameters of the model they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import base_parameters
from lightning_peft.errors import AdapterFileError, ConfigError, MergeError
from lightning_peft.fingerprint import Fingerprint, described, sampled_places
from lightning_peft.out_of_core.tensor_files import DTYPES, Entry, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model folder, of which only the headers are read."""

    folder: Path
    """The folder."""
    files: dict[str, list[str]]
    """File name to the names of its tensors, in order."""
    entries: dict[str, Entry]
    """The tensors by name."""
    metadata: dict[str, str]
    """Metadata of the files."""


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of the weights in a model folder.

    Raises:
        ConfigError: the folder holds no model with safetensors files.
        AdapterFileError: a file cannot be read, or is not what the index says.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{str(folder)!r} is not a model folder: it has no config.json")
    if (folder / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterFileError(f"{str(folder / INDEX)!r} cannot be read: {error!r}") from error
    elif (folder / SINGLE).is_file():
        weight_map, names = {}, [SINGLE]
    else:
        raise ConfigError(
            f"{str(folder)!r} has neither {INDEX} nor {SINGLE}: weights in other files cannot be merged tensor by tensor"
        )
    files: dict[str, list[str]] = {}
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for name in names:
        if Path(name).name != name:
            raise AdapterFileError(f"{str(folder / INDEX)!r} names {name!r}, which is not a file of the folder")
        found, about = read_header(folder / name)
        files[name] = list(found)
        entries |= found
        metadata |= about
    if sum(map(len, files.values())) != len(entries) or not weight_map.keys() <= entries.keys():
        lost = sorted(weight_map.keys() - entries.keys())
        raise AdapterFileError(
            f"the files of {str(folder)!r} are not what {INDEX} says: missing {lost[:3]}, or a tensor stands twice"
        )
    return Checkpoint(folder, files, entries, metadata)


def empty_model(checkpoint: Checkpoint, kind: Any = None) -> nn.Module:
    """Return the model of the folder's configuration on the meta device, in eval mode.

    Args:
        checkpoint: an open model folder.
        kind: class of transformers; that of the configuration if None.

    Raises:
        ConfigError: transformers does not know the model.
        MergeError: the weights are quantised.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(checkpoint.folder)!r} holds no model that transformers knows: {error}") from error
    if getattr(config, "quantization_config", None):
        raise MergeError(f"the weights of {str(checkpoint.folder)!r} are quantised; merge into a base in 16 or 32 bit")
    named = kind or getattr(transformers, next(iter(config.architectures or ()), ""), None)
    with torch.device("meta"):
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            model: nn.Module = named(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


@dataclass(frozen=True)
class Names:
    """Which tensors of a checkpoint the parameters of a model are."""

    keys: dict[int, list[str]]
    """By the id of a parameter, the names of the tensors that are it: none, one, or several where weights are tied."""
    converted: dict[str, str]
    """Parameters that transformers computes from several tensors, each with one of these."""


def parameter_names(model: nn.Module, checkpoint: Checkpoint) -> Names:
    """Return which tensors of ``checkpoint`` are which parameters of ``model``, by the rules transformers loads by."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    plain: Any = model
    rules = get_model_conversion_mapping(plain)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    known: dict[str, Tensor] = model.state_dict(keep_vars=True)
    prefix = plain.base_model_prefix
    keys: dict[int, list[str]] = {id(parameter): [] for parameter in model.parameters()}
    converted: dict[str, str] = {}
    for key in checkpoint.entries:
        name, several = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, several = rename_source_key(key, [], [], prefix, known)
        if several is not None:
            converted.setdefault(name, key)
        elif id(known.get(name)) in keys:
            keys[id(known[name])].append(key)
    return Names(keys, converted)


def take_dtypes(model: nn.Module, checkpoint: Checkpoint, names: Names, dtype: torch.dtype | None) -> None:
    """Give the parameters of ``model``, on the meta device, the precision of the checkpoint, or ``dtype``.

    Raises:
        AdapterFileError: a tensor has another shape than the configuration says.
    """
    for name, parameter in model.named_parameters():
        for key in names.keys[id(parameter)]:
            entry = checkpoint.entries[key]
            if entry.shape != tuple(parameter.shape):
                raise AdapterFileError(
                    f"{str(entry.file)!r}: {key!r} has shape {entry.shape}, but by the configuration {name!r} has {tuple(parameter.shape)}"
                )
            if entry.is_floating_point:
                parameter.data = parameter.data.to(dtype or DTYPES[entry.dtype])


def checkpoint_fingerprint(model: nn.Module, checkpoint: Checkpoint, names: Names) -> tuple[Fingerprint, set[str]]:
    """Return the fingerprint of a base from its files, and the parameters that no single tensor of them is."""
    found: dict[str, str] = {}
    left_out = set(names.converted)
    for name, parameter in base_parameters(model):
        keys = names.keys[id(parameter)]
        if not keys or not checkpoint.entries[keys[0]].is_floating_point:
            left_out.add(name)
            continue
        entry = checkpoint.entries[keys[0]]
        found[name] = described(entry.shape, entry.elements(sampled_places(parameter.numel()).tolist()))
    return Fingerprint(found), left_out

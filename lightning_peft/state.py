"""Adapters between a model and a folder: what is saved, and a strict way back."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import fingerprint as fp
from lightning_peft.adapter_files import (
    FORMAT_VERSION,
    HF_CONFIG,
    INDEX,
    OWN_CONFIG,
    WEIGHTS,
    AdapterFolder,
    settle_folder,
    to_json_bytes,
    write_file,
)
from lightning_peft.adapter_formats import AdapterFormat
from lightning_peft.adapter_layer import (
    adapters_named,
    base_modules,
    base_parameters,
    has_adapter,
)
from lightning_peft.adapter_placement import (
    check_packed,
    check_shared,
    check_tensors,
    name_in_layer,
    placed,
    placed_tensors,
    refuse_other_base,
    saved_roots,
    shapes_at,
    without_base_copies,
)
from lightning_peft.arithmetic.padded_ranks import as_in_files
from lightning_peft.errors import (
    AdapterConfigError,
    AdapterFileError,
    AdapterMismatchError,
    InjectionError,
    LightningPEFTError,
    LightningPEFTWarning,
)
from lightning_peft.finite import all_finite
from lightning_peft.foreign_files import read_any
from lightning_peft.initial_values import values_from_file
from lightning_peft.injection import Injection, record
from lightning_peft.interfaces import HF_PREFIX, Adapter
from lightning_peft.model_card import CardFacts, write_card
from lightning_peft.rollback import unchanged_on_error
from lightning_peft.saved_modules import (
    file_names,
    hf_saved_config,
    own_adapters,
)
from lightning_peft.scaling import adapter_scale
from lightning_peft.sharded_parameters import class_name, is_sharded
from lightning_peft.surgery import inject_at
from lightning_peft.walks import walked_once
from lightning_peft.weight_files import safetensors_parts

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of one adapter by ``<module path>.<tensor>``, named and shaped as in an adapter file.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
    """
    return _state_of(as_in_files(adapters_named(model, name)))


def _state_of(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    return {
        f"{path}.{key}": value for path, adapter in adapters.items() for key, value in adapter.export_state().items()
    }


# -- writing -----------------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    facts: CardFacts | None = None,
    fingerprint: str = "sampled",
) -> Path:
    """Write the adapter ``name`` to the folder ``path``, in HF PEFT's format where HF PEFT knows the method.

    Values, rank and scaling are those of training: a factor set by :func:`~lightning_peft.scaling.scale_adapters` is left out, with
    a warning, and so are the zeros of a padded rank. Each file is replaced atomically. Files of other names in the folder stay, and so
    does a ``README.md`` that was not written here or was edited since.

    Args:
        model: the adapted model.
        path: the folder.
        name: the adapter.
        facts: what ``README.md`` says beyond the files, such as the data and measurements.
        fingerprint: ``sampled`` stores a few elements of every weight of the base; ``complete`` a hash of all of them too, which reads
            every weight here and whenever the folder is loaded.

    Returns:
        The folder.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        AdapterFileError: the adapter has non-finite values, or no values yet (meta device); or the folder was written by
            :func:`~lightning_peft.save_adapters` for several or scaled ones.
        ConfigError: ``fingerprint`` is neither of the two.
        OSError: the folder cannot be written.
    """
    scale = adapter_scale(model, name)
    if scale != 1.0:
        warnings.warn(
            f"adapter {name!r} has the scale {scale:g}, which an adapter folder does not hold: the folder has the adapter unscaled",
            LightningPEFTWarning,
            stacklevel=2,
        )
    if (Path(path) / INDEX).exists():
        raise AdapterFileError(
            f"{str(path)!r} was written for several or scaled adapters, and its {INDEX} would go on saying so; save_adapters(model, path) "
            "writes all of them, or name another folder"
        )
    return write_adapter(model, path, name, facts, fingerprint)


def write_adapter(
    model: nn.Module, path: str | Path, name: str, facts: CardFacts | None = None, fingerprint: str = "sampled"
) -> Path:
    """Write what :func:`save_adapter` does, without a word about the scale."""
    fp.check_kind(fingerprint)
    with walked_once(model):
        return _write(model, Path(path), name, facts or CardFacts(), fingerprint)


def _write(model: nn.Module, folder: Path, name: str, facts: CardFacts, fingerprint: str) -> Path:
    injection = record(model, name)
    tensors = adapter_state_dict(model, name)
    trained = [key for key, parameter in base_parameters(model) if parameter.requires_grad]
    if trained:
        warnings.warn(
            f"{len(trained)} parameters of the base are trained, such as {trained[0]!r}; an adapter folder does not hold them, a .ckpt does",
            LightningPEFTWarning,
            stacklevel=4,
        )
    _refuse_no_values(tensors, name)
    folder.mkdir(parents=True, exist_ok=True)
    own = _state_of(as_in_files(own_adapters(model, name)))
    saved = {key: tensor for key, tensor in tensors.items() if key not in own}
    payload = injection.method.file_tensors(own) | file_names(injection.method, saved)
    files: dict[str, bytes | Iterator[bytes | memoryview]] = {WEIGHTS: safetensors_parts(payload, {"format": "pt"})}
    if injection.method.peft_type:
        files[HF_CONFIG] = to_json_bytes(_hf_config(model, injection, name))
    config = _own_config(model, injection, fingerprint)
    if HF_CONFIG not in files:  # that of an adapter of another method, which stood here
        (folder / HF_CONFIG).unlink(missing_ok=True)
    config["files"] = {file: write_file(folder / file, content, last=False) for file, content in files.items()}
    pretrained = type(model).__module__.partition(".")[0] == "transformers"
    numbers = sum(tensor.numel() for tensor in tensors.values())
    write_card(folder, injection, config, numbers, replace(facts, pretrained=pretrained))
    settle_folder(folder)  # before there is the file that vouches for the others
    write_file(folder / OWN_CONFIG, to_json_bytes(config))
    return folder


def _own_config(model: nn.Module, injection: Injection, fingerprint: str) -> dict[str, Any]:
    """Return the content of ``lightning_peft.json``, but for the hashes of the other two files."""
    return {
        "format_version": FORMAT_VERSION,
        "method": {"name": injection.method.name, "fields": injection.method.to_config()},
        "family": injection.family,
        "places": {
            target.path: {"rule": target.rule, "slices": [asdict(part) for part in target.slices]}
            for target in injection.targets
        },
        **({"modules_to_save": {target.path: target.rule for target in injection.saved}} if injection.saved else {}),
        "base": _base(model, injection, full=fingerprint == "complete"),
        "versions": {
            "python": platform.python_version(),
            **{lib: _version(lib) for lib in ("lightning-peft", "lightning", "torch", "transformers")},
        },
    }


def _refuse_no_values(tensors: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in tensors.items():
        if is_sharded(tensor):
            raise AdapterFileError(
                f"{key!r} of adapter {name!r} is sharded, and this process holds a part of it; save with AdapterCheckpoint, which gathers "
                "adapters, or in all processes inside whole_adapters() of lightning_peft.sharded_tensors"
            )
        if tensor.is_meta:
            raise AdapterFileError(
                f"{key!r} of adapter {name!r} is on the meta device and has no values to save; materialise it first"
            )
        if not all_finite(tensor):
            raise AdapterFileError(
                f"{key!r} of adapter {name!r} has non-finite values; it is not saved, so that a good file is not replaced"
            )


def _base(model: nn.Module, injection: Injection, *, full: bool) -> dict[str, Any]:
    described = fp.to_json(model, packed=injection.method.exact_packed_base, full=full)
    return {"name_or_path": base_name(model), "class": class_name(model), **described}


def base_name(model: nn.Module) -> str | None:
    """Return the folder or hub id that ``model`` was loaded from, as transformers remembers it."""
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    # A folder by its full path: from another working directory a relative one would pass for a hub id.
    return None if not name else str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _hf_config(model: nn.Module, injection: Injection, name: str) -> dict[str, Any]:
    task = next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None)
    if task is None and injection.method.hf_prefix != HF_PREFIX:
        task = "FEATURE_EXTRACTION"  # without a task HF PEFT ignores what it puts around a whole model
    config = {
        "peft_type": injection.method.peft_type,
        "task_type": task,
        "base_model_name_or_path": base_name(model),
        "revision": None,
        "inference_mode": True,
        "target_modules": injection.paths,
        **injection.method.to_hf_config(as_in_files(own_adapters(model, name))),
        **hf_saved_config(model, injection.saved),
    }
    for key in [key for key in config if key.endswith("_modules")]:
        if config[key] is None:
            del config[key]  # the format of the method has no such key
        else:
            config[key] = _shortest(model, config[key])
    return config


def _shortest(model: nn.Module, paths: list[str]) -> list[str]:
    """Return the last parts of ``paths`` where these name the same modules under HF PEFT's suffix rule, else the paths."""
    chosen, ends = set(paths), {path.rsplit(".", 1)[-1] for path in paths}
    named = {path for path, _ in base_modules(model) if path and path.rsplit(".", 1)[-1] in ends}
    return sorted(ends) if named == chosen else sorted(chosen)


# -- reading -----------------------------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    check_base: bool = True,
    format: AdapterFormat | str | None = None,
) -> Injection:
    """Put the adapter of a folder or file into ``model``, in place, and make it the active one.

    Strict: every tensor the adapter needs must be there with the right shape and finite values, and no other. If it is
    refused, the model is what it was.

    Args:
        model: the base model, with other adapters or without.
        path: a folder written by :func:`save_adapter`, or a folder or file of HF PEFT, transformers, loralib, LitGPT, torchtune or any
            other registered format.
        name: the name it gets in the model.
        trainable: whether it is trained further.
        check_base: whether to refuse a base other than the one it was trained on. Other software does not say.
        format: the format of other software, by its name or with fields that the file does not hold, such as ``LoralibFile(alpha=16)``;
            found from what is there if None.

    Raises:
        AdapterFileError: the folder cannot be read.
        AdapterConfigError: its configuration cannot be honoured.
        AdapterMismatchError: its tensors are not what the model needs.
        BaseMismatchError: it was trained on another base.
        InjectionError: the model has an adapter of that name.
    """
    with walked_once(model):
        if has_adapter(model, name):
            raise InjectionError(
                f"{type(model).__name__} already has an adapter {name!r}; load {str(path)!r} under another name="
            )
        folder = read_any(path, model, format)
        injection, tensors = asked_for(model, folder, check_base=check_base)
        with unchanged_on_error(model), torch.random.fork_rng():
            try:
                with values_from_file():
                    inject_at(model, injection, name=name, trainable=trainable)
            except LightningPEFTError as error:
                raise AdapterMismatchError(
                    f"{str(folder.path)!r} does not fit {type(model).__name__}: {error}"
                ) from error
            fill(model, folder, adapters_named(model, name), tensors, check_base=check_base)
        return injection


def fill(
    model: nn.Module,
    folder: AdapterFolder,
    adapters: Mapping[str, Adapter],
    tensors: dict[str, Tensor],
    *,
    check_base: bool,
) -> None:
    """Give fresh ``adapters``, by module path, the ``tensors`` of a folder, as strictly as :func:`load_adapter` says."""
    if any(tensor.is_meta for tensor in _state_of(adapters).values()):
        raise AdapterMismatchError(
            f"{str(folder.path)!r} cannot be loaded while {type(model).__name__} is on the meta device; load the weights of the base first"
        )
    if check_base and folder.own is not None and folder.method.exact_packed_base:
        check_packed(model, folder)
    tensors = without_base_copies(model, folder, tensors)
    for place, adapter in adapters.items():
        if type(adapter).fit_to is not Adapter.fit_to:
            adapter.fit_to(shapes_at(place, tensors))
    base_names = (key for path, _ in base_parameters(model) for key in (path, name_in_layer(path)))
    check_tensors(folder, _state_of(adapters), tensors, base_names)
    for place, adapter in adapters.items():
        try:
            adapter.import_state({key: tensors[f"{place}.{key}"] for key in adapter.export_state()})
        except AdapterConfigError as error:
            raise AdapterMismatchError(f"{str(folder.weights)!r}, at {place!r}: {error}") from error
    check_shared(folder, adapters, tensors)


def planned_adapter(model: nn.Module, path: str | Path, *, check_base: bool = True) -> Injection:
    """Return what :func:`load_adapter` would inject from a folder; the model is left alone. It raises the same errors."""
    return asked_for(model, read_any(path, model), check_base=check_base)[0]


def asked_for(model: nn.Module, folder: AdapterFolder, *, check_base: bool) -> tuple[Injection, dict[str, Tensor]]:
    """Return the injection that a folder asks for, and its tensors by ``<module path>.<tensor>``."""
    if check_base and folder.own is not None:
        refuse_other_base(model, folder)
    roots = saved_roots(model, folder)
    tensors, saved = placed_tensors(model, folder, roots)
    return replace(placed(model, folder, tensors, roots), saved=roots), tensors | saved


@cache
def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

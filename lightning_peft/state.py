"""Adapters between a model and a folder: what is saved, and a strict way back."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_peft import fingerprint as fp
from lightning_peft.activation import active_adapters, set_active_adapters
from lightning_peft.adapter_files import (
    FORMAT_VERSION,
    HF_CONFIG,
    OWN_CONFIG,
    WEIGHTS,
    AdapterFolder,
    read_adapter,
    to_json_bytes,
    write_file,
)
from lightning_peft.adapter_layer import (
    adapter_layers,
    adapter_names,
    adapters_named,
    base_modules,
    base_parameters,
    unwrapped,
)
from lightning_peft.errors import (
    AdapterConfigError,
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    InjectionError,
    LightningPEFTError,
    LightningPEFTWarning,
)
from lightning_peft.injection import Injection, record
from lightning_peft.interfaces import Slice, Target
from lightning_peft.registry import get_registry
from lightning_peft.surgery import delete_adapter, inject_at

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of one adapter by ``<module path>.<tensor>``, named and shaped as in an adapter file.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
    """
    return {
        f"{path}.{key}": value
        for path, adapter in adapters_named(model, name).items()
        for key, value in adapter.export_state().items()
    }


# -- writing -----------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, path: str | Path, *, name: str = "default") -> Path:
    """Write the adapter ``name`` to the folder ``path``, in HF PEFT's format where HF PEFT knows the method.

    Each file is replaced atomically. Files of other names in the folder stay.

    Returns:
        The folder.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        AdapterFileError: the adapter has non-finite values, or no values yet (meta device).
        OSError: the folder cannot be written.
    """
    injection = record(model, name)
    tensors = adapter_state_dict(model, name)
    trained = [key for key, parameter in base_parameters(model) if parameter.requires_grad]
    if trained:
        warnings.warn(
            f"{len(trained)} parameters of the base are trained, such as {trained[0]!r}; an adapter folder does not hold them, a .ckpt does",
            LightningPEFTWarning,
            stacklevel=2,
        )
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise AdapterFileError(
                f"{key!r} of adapter {name!r} is on the meta device and has no values to save; materialise it first"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(
                f"{key!r} of adapter {name!r} has non-finite values; it is not saved, so that a good file is not replaced"
            )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # Distinct contiguous copies: safetensors refuses tensors that share memory.
    payload = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in injection.method.file_tensors(tensors).items()
    }
    files = {WEIGHTS: safetensors.torch.save(payload, metadata={"format": "pt"})}
    if injection.method.peft_type:
        files[HF_CONFIG] = to_json_bytes(_hf_config(model, injection, name))
    own = {
        "format_version": FORMAT_VERSION,
        "method": {"name": injection.method.name, "fields": injection.method.to_config()},
        "family": injection.family,
        "places": {
            target.path: {"rule": target.rule, "slices": [asdict(part) for part in target.slices]}
            for target in injection.targets
        },
        "base": {"name_or_path": base_name(model), "class": type(model).__name__, **fp.to_json(model)},
        "files": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
        "versions": {
            "python": platform.python_version(),
            **{lib: _version(lib) for lib in ("lightning-peft", "lightning", "torch", "transformers")},
        },
    }
    for file, content in {**files, OWN_CONFIG: to_json_bytes(own)}.items():
        write_file(folder / file, content)
    return folder


def base_name(model: nn.Module) -> str | None:
    """Return the folder or hub id that ``model`` was loaded from, as transformers remembers it."""
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    # A folder by its full path: from another working directory a relative one would pass for a hub id.
    return None if not name else str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _hf_config(model: nn.Module, injection: Injection, name: str) -> dict[str, Any]:
    task = next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None)
    config = {
        "peft_type": injection.method.peft_type,
        "task_type": task,
        "base_model_name_or_path": base_name(model),
        "revision": None,
        "inference_mode": True,
        "target_modules": injection.paths,
        **injection.method.to_hf_config(adapters_named(model, name)),
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
    model: nn.Module, path: str | Path, *, name: str = "default", trainable: bool = False, check_base: bool = True
) -> Injection:
    """Put the adapter of a folder into ``model``, in place, and make it the active one.

    Strict: every tensor the adapter needs must be there with the right shape and finite values, and no other. If it is
    refused, the model is what it was.

    Args:
        model: the base model, with other adapters or without.
        path: a folder written by :func:`save_adapter` or by HF PEFT.
        name: the name it gets in the model.
        trainable: whether it is trained further.
        check_base: whether to refuse a base other than the one it was trained on. Folders of HF PEFT do not say.

    Raises:
        AdapterFileError: the folder cannot be read.
        AdapterConfigError: its configuration cannot be honoured.
        AdapterMismatchError: its tensors are not what the model needs.
        BaseMismatchError: it was trained on another base.
        InjectionError: the model has an adapter of that name.
    """
    folder = read_adapter(path)
    if name in adapter_names(model):
        raise InjectionError(
            f"{type(model).__name__} already has an adapter {name!r}; load {str(path)!r} under another name="
        )
    if check_base and folder.own is not None:
        _check_base(model, folder)
    tensors = _placed_tensors(model, folder)
    injection = _placed(model, folder, tensors)
    with _unchanged_on_error(model, name), torch.random.fork_rng():
        try:
            inject_at(model, injection, name=name, trainable=trainable)
        except LightningPEFTError as error:
            raise AdapterMismatchError(f"{str(folder.path)!r} does not fit {type(model).__name__}: {error}") from error
        if any(tensor.is_meta for tensor in adapter_state_dict(model, name).values()):
            raise AdapterMismatchError(
                f"{str(folder.path)!r} cannot be loaded while {type(model).__name__} is on the meta device; load the weights of the base first"
            )
        tensors = _without_base_copies(model, folder, tensors)
        for place, adapter in adapters_named(model, name).items():
            adapter.fit_to(_shapes_at(place, tensors))
        base_names = [key for path, _ in base_parameters(model) for key in (path, _in_layer(path))]
        _check_tensors(folder, adapter_state_dict(model, name), tensors, base_names)
        for place, adapter in adapters_named(model, name).items():
            try:
                adapter.import_state({key: tensors[f"{place}.{key}"] for key in adapter.export_state()})
            except AdapterConfigError as error:
                raise AdapterMismatchError(f"{str(folder.path / WEIGHTS)!r}, at {place!r}: {error}") from error
    return injection


@contextlib.contextmanager
def _unchanged_on_error(model: nn.Module, name: str) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = active_adapters(model)
    try:
        yield
    except BaseException:
        if name in adapter_names(model):
            delete_adapter(model, name)
            set_active_adapters(model, active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _check_base(model: nn.Module, folder: AdapterFolder) -> None:
    base = (folder.own or {}).get("base") or {}
    here = fp.fingerprint(model)
    if not base.get("tensors") or here is None:
        return
    stored = fp.Fingerprint(base["tensors"])
    different = stored.differences(here, fp.quantized_names(model) | frozenset(base.get("quantized") or ()))
    if different:
        raise BaseMismatchError(
            f"{str(folder.path)!r} was trained on the base {base.get('name_or_path') or base.get('class')!r} with fingerprint {stored.digest}, but "
            f"this {type(model).__name__} has fingerprint {here.digest}: {len(different)} of {len(stored.tensors)} parameters differ, first "
            f"{different[0]!r}. Load the right base, or pass check_base=False if you know what you do"
        )


def _placed_tensors(model: nn.Module, folder: AdapterFolder) -> dict[str, Tensor]:
    try:
        return folder.method.placed_tensors(model, folder.tensors)
    except AdapterMismatchError as error:
        raise AdapterMismatchError(f"{str(folder.path / WEIGHTS)!r}: {error}") from error


def _shapes_at(place: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    names = (name for name in tensors if name.startswith(f"{place}."))
    return {name[len(place) + 1 :]: tuple(tensors[name].shape) for name in names}


def _placed(model: nn.Module, folder: AdapterFolder, tensors: Mapping[str, Tensor]) -> Injection:
    """Return the injection a folder asks for."""
    if folder.own is not None:
        try:
            targets = tuple(
                Target(path=place, rule=held["rule"], slices=tuple(Slice(**part) for part in held["slices"]))
                for place, held in folder.own["places"].items()
            )
            method = folder.method.loaded_over(model)
            return Injection(method=method, targets=targets, family=str(folder.own["family"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise AdapterConfigError(
                f"{str(folder.path / OWN_CONFIG)!r}: 'places' or 'family' cannot be read: {error!r}"
            ) from error
    modules = {place: unwrapped(module) for place, module in base_modules(model) if place}
    places: dict[str, set[str]] = {}
    for key in tensors:
        parts = key.split(".")
        place = next((p for n in range(len(parts) - 1, 0, -1) if (p := ".".join(parts[:n])) in modules), None)
        if place is None:
            raise AdapterMismatchError(
                f"{str(folder.path / WEIGHTS)!r} has {key!r}, but {type(model).__name__} has no module for it: wrong base?"
            )
        places.setdefault(place, set()).add(key[len(place) + 1 :])
    # A place where the file holds only parameters of the base (a bias, or worse) is not a target.
    targets = tuple(
        Target(path=place, rule=HF_CONFIG)
        for place in modules
        if place in places and not places[place] <= set(dict(modules[place].named_parameters(recurse=False)))
    )
    _check_hf_targets(folder, modules, {target.path for target in targets})
    return Injection(method=folder.method, targets=targets, family=get_registry().resolve_family(model).name)


def _check_hf_targets(folder: AdapterFolder, modules: Mapping[str, nn.Module], places: set[str]) -> None:
    """Compare the places of the tensors with HF PEFT's own rule for ``target_modules``, where that is a list of names."""
    hf = folder.hf or {}
    names = hf.get("target_modules")
    if not places:
        raise AdapterMismatchError(
            f"{str(folder.path / WEIGHTS)!r} holds no adapter tensor: its keys are {sorted(folder.tensors)[:3]}"
        )
    if not isinstance(names, list) or hf.get("layers_to_transform") is not None or hf.get("exclude_modules"):
        return  # a regular expression from a file is never run; the tensors alone say where they belong
    wanted = {place for place in modules if any(place == name or place.endswith(f".{name}") for name in names)}
    missing = sorted(place for place in wanted - places if folder.method.supports(modules[place]))
    extra = sorted(places - wanted)
    if missing or extra:
        raise AdapterMismatchError(
            f"{str(folder.path)!r}: target_modules {names} of {HF_CONFIG} and the tensors of {WEIGHTS} do not agree. "
            f"Modules without tensors: {missing[:5]} ({len(missing)}); tensors for other modules: {extra[:5]} ({len(extra)})"
        )


def _without_base_copies(model: nn.Module, folder: AdapterFolder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the copies of adapted embeddings and heads that HF PEFT writes beside their adapters, after comparing them."""
    tensors = dict(tensors)
    for place, layer in adapter_layers(model).items():
        key = f"{place}.base_layer.weight"
        if key in tensors:
            stored, weight = tensors.pop(key), layer.base_layer.get_parameter("weight").detach()
            if stored.shape != weight.shape or not torch.equal(stored.to(weight), weight):
                raise BaseMismatchError(
                    f"{str(folder.path / WEIGHTS)!r} holds {key!r}, which would overwrite the base: it differs from the weight of this model"
                )
    return tensors


def _check_tensors(
    folder: AdapterFolder, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], names: Iterable[str]
) -> None:
    """Compare the tensors of a file with those expected; ``names`` are the parameters of the base."""
    where = str(folder.path / WEIGHTS)
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        base = " (some would overwrite the base)" if set(extra) & set(names) else ""
        raise AdapterMismatchError(
            f"{where!r} does not hold what {folder.method.name!r} needs here. Missing: {missing[:5]} ({len(missing)}); "
            f"not expected{base}: {extra[:5]} ({len(extra)})"
        )
    for key, tensor in expected.items():
        if found[key].shape != tensor.shape:
            raise AdapterMismatchError(
                f"{where!r}: {key!r} has shape {tuple(found[key].shape)}, this model needs {tuple(tensor.shape)}: another base, or another rank"
            )
        if not found[key].is_floating_point() or not torch.isfinite(found[key]).all():
            raise AdapterMismatchError(
                f"{where!r}: {key!r} ({found[key].dtype}) has values that are not finite floating-point numbers"
            )


def _in_layer(name: str) -> str:
    """Return the name HF PEFT gives a base parameter of an adapted module."""
    place, _, parameter = name.rpartition(".")
    return f"{place}.base_layer.{parameter}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

"""Where the tensors of an adapter folder belong in a model, and whether they are what the model needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import fingerprint as fp
from lightning_peft.adapter_files import (
    HF_CONFIG,
    OWN_CONFIG,
    AdapterFolder,
)
from lightning_peft.adapter_layer import (
    adapter_layers,
    base_modules,
    unwrapped,
)
from lightning_peft.errors import (
    AdapterConfigError,
    AdapterMismatchError,
    BaseMismatchError,
)
from lightning_peft.families import GENERIC
from lightning_peft.finite import all_finite
from lightning_peft.injection import Injection
from lightning_peft.interfaces import Adapter, Slice, Target
from lightning_peft.registry import get_registry
from lightning_peft.saved_modules import (
    inside,
    saved_by_hf_peft,
    split_file,
)


def check_shared(folder: AdapterFolder, adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file that has different values for tensors that several places of the adapter share."""
    for place, adapter in adapters.items():
        for key, value in adapter.export_state().items() if adapter.tied_parameters else ():
            if not torch.equal(value, tensors[f"{place}.{key}"].to(value)):
                raise AdapterMismatchError(
                    f"{str(folder.weights)!r} has values of {place}.{key} other than those of the module that shares this weight; "
                    "with tied weights they are one tensor"
                )


def refuse_other_base(model: nn.Module, folder: AdapterFolder) -> None:
    """Refuse a base other than the one that the adapter was trained on, where the folder says which that was."""
    here = fp.fingerprint(model)
    if here is not None:
        refuse_different(model, folder, here, fp.quantized_names(model))


def refuse_different(model: nn.Module, folder: AdapterFolder, here: fp.Fingerprint, left_out: Set[str]) -> None:
    """Refuse the base ``model`` of the fingerprint ``here``, which is not compared in the parameters ``left_out``."""
    base = (folder.own or {}).get("base") or {}
    if not base.get("tensors"):
        return
    stored = fp.Fingerprint(base["tensors"])
    different = stored.differences(here, frozenset(left_out) | frozenset(base.get("quantized") or ()))
    if different:
        raise BaseMismatchError(
            f"{str(folder.path)!r} was trained on the base {base.get('name_or_path') or base.get('class')!r} with fingerprint {stored.digest}, but "
            f"this {type(model).__name__} has fingerprint {here.digest}: {len(different)} of {len(stored.tensors)} parameters differ, first "
            f"{different[0]!r}. Load the right base, or pass check_base=False if you know what you do"
        )
    if isinstance(full := base.get("complete"), dict):
        different = fp.full_differences(full, model, frozenset(base.get("quantized") or ()))
        if different:
            raise BaseMismatchError(
                f"{str(folder.path)!r} was trained on a base whose weights have the full fingerprint {fp.digest_of(full)}, but this "
                f"{type(model).__name__} has {fp.digest_of(fp.full_digests(model))}: {len(different)} of {len(full)} parameters differ, first "
                f"{different[0]!r}; their samples agree, so a few elements were changed or rounded. Load the very base, in its precision, or pass "
                "check_base=False if you know what you do"
            )


def check_packed(model: nn.Module, folder: AdapterFolder) -> None:
    """Compare the packed weights of the base, now that the method has prepared it, with those the adapter was trained over."""
    stored = ((folder.own or {}).get("base") or {}).get("packed") or {}
    here = fp.packed_digests(model)
    different = sorted(path for path in stored.keys() | here.keys() if stored.get(path) != here.get(path))
    if different:
        raise BaseMismatchError(
            f"{str(folder.path)!r} was trained over packed weights that are not those of this {type(model).__name__}: {len(different)} of "
            f"{len(stored)} layers differ, first {different[0]!r}. Quantise the same weights with the same settings on the same kind of "
            "device, or pass check_base=False to load it all the same"
        )


def saved_roots(model: nn.Module, folder: AdapterFolder) -> tuple[Target, ...]:
    """Return the modules that are trained in full beside the method."""
    if folder.own is None:
        return saved_by_hf_peft(
            model, folder.method, folder.saved_names, (folder.hf or {}).get("task_type"), folder.tensors
        )
    saved = folder.own.get("modules_to_save", {})
    if not isinstance(saved, dict):
        raise AdapterConfigError(f"{str(folder.path / OWN_CONFIG)!r}: 'modules_to_save' cannot be read: {saved!r}")
    return tuple(Target(path=path, rule=str(rule)) for path, rule in saved.items())


def placed_tensors(
    model: nn.Module, folder: AdapterFolder, saved: Sequence[Target]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the method and those of the modules trained in full, by ``<module path>.<tensor>``."""
    own, copies = split_file(folder.method, [target.path for target in saved], folder.tensors)
    try:
        return folder.method.placed_tensors(model, own), copies
    except AdapterMismatchError as error:
        raise AdapterMismatchError(f"{str(folder.weights)!r}: {error}") from error


def shapes_at(place: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of one place by their names there."""
    names = (name for name in tensors if name.startswith(f"{place}."))
    return {name[len(place) + 1 :]: tuple(tensors[name].shape) for name in names}


def placed(
    model: nn.Module, folder: AdapterFolder, tensors: Mapping[str, Tensor], saved: Sequence[Target]
) -> Injection:
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
                f"{str(folder.weights)!r} has {key!r}, but {type(model).__name__} has no module for it: wrong base?"
            )
        places.setdefault(place, set()).add(key[len(place) + 1 :])
    # A place where the file holds only parameters of the base (a bias, or worse) is not a target.
    targets = tuple(
        Target(path=place, rule=HF_CONFIG, slices=folder.slices.get(place, ()))
        for place in modules
        if place in places and not places[place] <= set(dict(modules[place].named_parameters(recurse=False)))
    )
    injection = Injection(method=folder.method, targets=targets, family=get_registry().resolve_family(model).name)
    free = {place: module for place, module in modules.items() if not inside(place, [root.path for root in saved])}
    _check_hf_targets(folder, model, free, injection)
    return injection


def _check_hf_targets(
    folder: AdapterFolder, model: nn.Module, modules: Mapping[str, nn.Module], injection: Injection
) -> None:
    """Compare the places of the tensors with HF PEFT's own rule for ``target_modules``, where that is a list of names.

    ``target_parameters`` name modules by their parameters. A place that the method adds to those named is expected too.
    """
    hf, places, method = folder.hf or {}, set(injection.paths), injection.method
    parameters = hf.get("target_parameters") or []
    names = hf.get("target_modules") or ([] if parameters else hf.get("target_modules"))
    if not places:
        raise AdapterMismatchError(
            f"{str(folder.weights)!r} holds no adapter tensor: its keys are {sorted(folder.tensors)[:3]}"
        )
    if not isinstance(names, list) or not _plain_rule(hf):
        return  # a regular expression from a file is never run; the tensors alone say where they belong
    wanted = {place for place in modules if _chosen(place, names, hf)}
    wanted |= {
        place
        for place, module in modules.items()
        if any(_named(f"{place}.{name}", parameters) for name, _ in module.named_parameters(recurse=False))
    }
    missing = sorted(place for place in wanted - places if method.supports(modules[place]))
    extra = sorted(places - wanted)
    if extra:
        family = get_registry().model_families.get(injection.family, GENERIC)
        asked = [target for target in injection.targets if target.path in wanted]
        extra = sorted(set(extra) - {target.path for target in method.expand(model, asked, family)})
    if missing or extra:
        raise AdapterMismatchError(
            f"{str(folder.path)!r}: target_modules {[*names, *parameters]}{_beside(hf)} of {HF_CONFIG} and the tensors of {folder.weights.name} do not agree. "
            f"Modules without tensors: {missing[:5]} ({len(missing)}); tensors for other modules: {extra[:5]} ({len(extra)})"
        )


def without_base_copies(model: nn.Module, folder: AdapterFolder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the copies of adapted embeddings and heads that HF PEFT writes beside their adapters, after comparing them."""
    tensors = dict(tensors)
    for place, layer in adapter_layers(model).items():
        key = f"{place}.base_layer.weight"
        if key in tensors:
            stored, weight = tensors.pop(key), layer.base_layer.get_parameter("weight").detach()
            if stored.shape != weight.shape or not torch.equal(stored.to(weight), weight):
                raise BaseMismatchError(
                    f"{str(folder.weights)!r} holds {key!r}, which would overwrite the base: it differs from the weight of this model"
                )
    return tensors


def check_tensors(
    folder: AdapterFolder, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], names: Iterable[str]
) -> None:
    """Compare the tensors of a file with those expected; ``names`` are the parameters of the base."""
    where = str(folder.weights)
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
        # In the precision it is loaded in, where a value of a wider one may be too large.
        if not found[key].is_floating_point() or not all_finite(found[key].to(tensor.dtype)):
            raise AdapterMismatchError(
                f"{where!r}: {key!r} ({found[key].dtype}) has values that are not finite floating-point numbers in {tensor.dtype}"
            )


def _beside(hf: Mapping[str, Any]) -> str:
    rules = [f"{key} {hf[key]}" for key in ("exclude_modules", "layers_to_transform") if hf.get(key) not in (None, [])]
    return "".join(f", {rule}" for rule in rules)


def _plain_rule(hf: Mapping[str, Any]) -> bool:
    """Tell whether no regular expression of a file decides which of the named modules are adapted."""
    excluded, layers, around = (hf.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    around = [around] if isinstance(around, str) else around or []
    return (
        (not excluded or isinstance(excluded, list))
        and (layers is None or isinstance(layers, (int, list)))
        and all(isinstance(word, str) and re.fullmatch(r"[A-Za-z0-9_]+", word) for word in around)
    )


def _chosen(place: str, names: Sequence[str], hf: Mapping[str, Any]) -> bool:
    """Tell whether HF PEFT adapts a module under ``names``, by the rule for ``exclude_modules`` and ``layers_to_transform``.

    The number of a layer is the first one behind a name, or behind one of ``layers_pattern``. It does not count for a module that is named
    by its whole path.
    """
    if not _named(place, names) or _named(place, hf.get("exclude_modules") or []):
        return False
    layers = hf.get("layers_to_transform")
    if layers is None or layers == [] or place in names:
        return True
    around = hf.get("layers_pattern") or []
    words = [around] if isinstance(around, str) else around
    patterns = [rf"(?:.*?\.)?{word}\.(\d+)\." for word in words] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for pattern in patterns if (match := re.match(pattern, place))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def name_in_layer(name: str) -> str:
    """Return the name HF PEFT gives a base parameter of an adapted module."""
    place, _, parameter = name.rpartition(".")
    return f"{place}.base_layer.{parameter}"

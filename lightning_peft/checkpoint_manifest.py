"""What a ``.ckpt`` says about its adapters, and the comparison with a module before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.activation import active_adapters
from lightning_peft.adapter_layer import base_parameters
from lightning_peft.errors import CheckpointMismatchError
from lightning_peft.fingerprint import Fingerprint, fingerprint, quantized_names, to_json
from lightning_peft.injection import adapted_roots, records

MANIFEST = "lightning_peft"
"""Key of a ``.ckpt`` under which the names, shapes and settings of its adapters stand."""
VERSION = 1
_FIELDS = ("tensors", "adapters", "base")


def roots_by_path(module: nn.Module) -> dict[str, nn.Module]:
    """Return the adapted models inside ``module`` by their path there."""
    paths = {id(inner): path for path, inner in module.named_modules()}
    return {paths[id(root)]: root for root in adapted_roots(module)}


def make_manifest(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the adapters in ``module``, whose ``state`` is saved, in plain values."""
    return {
        "version": VERSION,
        "tensors": _shapes(state),
        "adapters": _adapters(module),
        "base": {path: to_json(root) for path, root in roots_by_path(module).items()},
    }


def check_manifest(checkpoint: Mapping[str, Any], module: nn.Module, state: Mapping[str, Any]) -> None:
    """Compare what a checkpoint holds with the adapters and the base of ``module``, whose state is ``state``.

    Raises:
        CheckpointMismatchError: they are not the same; the message has both sides.
    """
    manifest = checkpoint.get(MANIFEST)
    if not isinstance(manifest, dict):
        raise CheckpointMismatchError(
            f"the checkpoint has no {MANIFEST!r} entry, so it was not saved by a module with adapters; it holds {sorted(checkpoint)}"
        )
    if manifest.get("version") != VERSION:
        raise CheckpointMismatchError(
            f"the checkpoint has manifest version {manifest.get('version')!r}; this version reads {VERSION}"
        )
    for field in _FIELDS:
        if not isinstance(manifest.get(field), dict):
            raise CheckpointMismatchError(f"the {MANIFEST!r} entry of the checkpoint has no {field!r}: it is damaged")
    _compare_adapters(manifest["adapters"], _adapters(module))
    _compare_tensors(manifest["tensors"], _shapes(state), "the module")
    if "state_dict" in checkpoint:  # not in sharded checkpoints
        _compare_tensors(manifest["tensors"], _shapes(checkpoint["state_dict"]), "the checkpoint's own state_dict")
    for path, root in roots_by_path(module).items():
        _compare_base(manifest["base"].get(path) or {}, root)


def _shapes(state: Mapping[str, Any]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def _adapters(module: nn.Module) -> dict[str, dict[str, Any]]:
    roots = roots_by_path(module)
    active = {path: active_adapters(root) for path, root in roots.items()}
    return {
        f"{path}:{name}": {
            "method": injection.method.name,
            "fields": injection.method.to_config(),
            "places": injection.paths,
            "active": name in active[path],
            **({"position": active[path].index(name)} if name in active[path] and len(active[path]) > 1 else {}),
            **({"modules_to_save": [target.path for target in injection.saved]} if injection.saved else {}),
        }
        for path, root in roots.items()
        for name, injection in records(root).items()
    }


def _compare_adapters(stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if stored.keys() != here.keys():
        raise CheckpointMismatchError(
            f"the checkpoint holds the adapters {sorted(stored)}, the module holds {sorted(here)}"
        )
    for name, held in stored.items():
        for label in ("method", "fields", "places", "active", "position", "modules_to_save"):
            if held.get(label) != here[name].get(label):
                raise CheckpointMismatchError(
                    f"adapter {name!r}: {label} of the checkpoint and of the module differ: "
                    f"{_first_difference(held.get(label), here[name].get(label))}. Resume with the settings of the checkpoint, or start a new run "
                    "from its adapter folder"
                )


def _first_difference(stored: Any, here: Any) -> str:
    if isinstance(stored, dict) and isinstance(here, dict):
        key = next(key for key in sorted(stored.keys() | here.keys()) if stored.get(key) != here.get(key))
        return f"{key} was {stored.get(key)!r} and is {here.get(key)!r}"
    return f"was {stored!r} and is {here!r}"


def _compare_tensors(stored: Mapping[str, Any], here: Mapping[str, Any], whose: str) -> None:
    missing, extra = sorted(stored.keys() - here.keys()), sorted(here.keys() - stored.keys())
    shapes = [
        f"{key} {stored[key]} and {here[key]}"
        for key in sorted(stored.keys() & here.keys())
        if stored[key] != here[key]
    ]
    if missing or extra or shapes:
        raise CheckpointMismatchError(
            f"the tensors listed in the checkpoint and those of {whose} are not the same. Only listed: {missing[:5]} ({len(missing)}); "
            f"only in {whose}: {extra[:5]} ({len(extra)}); other shapes: {shapes[:5]} ({len(shapes)})"
        )


def _compare_base(stored: Mapping[str, Any], root: nn.Module) -> None:
    here = fingerprint(root)
    if here is None or not stored.get("tensors"):
        return
    before = Fingerprint(stored["tensors"])
    trained = {name for name, parameter in base_parameters(root) if parameter.requires_grad}
    packed = quantized_names(root) | frozenset(stored["quantized"])
    different = before.differences(here, packed | trained)
    if different:
        raise CheckpointMismatchError(
            f"the checkpoint was trained over a base with fingerprint {before.digest}, this base has {here.digest}: "
            f"{len(different)} parameters differ, first {different[0]!r}"
        )

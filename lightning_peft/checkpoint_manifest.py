"""What a ``.ckpt`` says about its adapters, and the comparison with a module before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.activation import active_adapters, set_active_adapters
from lightning_peft.adapter_layer import adapters_named, base_parameters
from lightning_peft.errors import CheckpointMismatchError
from lightning_peft.fingerprint import (
    Fingerprint,
    digest_of,
    fingerprint,
    full_differences,
    full_digests,
    quantized_names,
    to_json,
)
from lightning_peft.injection import adapted_roots, records
from lightning_peft.scaling import adapter_scale, scale_adapters

MANIFEST = "lightning_peft"
"""Key of a ``.ckpt`` under which the names, shapes and settings of its adapters stand."""
SCHEDULE = "schedule"
"""Entry of the manifest where the active adapters change in training: those that are active by the path of their model."""
SCALE = "scale"
"""Entry of an adapter in the manifest: the factor of its effect."""
VERSION = 1
_FIELDS = ("tensors", "adapters", "base")
_LABELS = ("method", "fields", "places", "active", "position", "modules_to_save")


def roots_by_path(module: nn.Module) -> dict[str, nn.Module]:
    """Return the adapted models inside ``module`` by their path there."""
    paths = {id(inner): path for path, inner in module.named_modules()}
    return {paths[id(root)]: root for root in adapted_roots(module)}


def make_manifest(module: nn.Module, state: Mapping[str, Any], *, full: bool = False) -> dict[str, Any]:
    """Describe the adapters in ``module``, whose ``state`` is saved, in plain values; with a ``complete`` fingerprint of the base."""
    return {
        "version": VERSION,
        "tensors": _shapes(state),
        "adapters": _adapters(module),
        "base": {path: to_json(root, full=full) for path, root in roots_by_path(module).items()},
        **({SCHEDULE: _active(module)} if is_scheduled(module) else {}),
    }


def is_scheduled(module: nn.Module) -> bool:
    """Tell whether a callback of the Trainer changes the active adapters of ``module`` in the course of a fit."""
    callbacks = getattr(getattr(module, "_trainer", None), "callbacks", ())
    return any(getattr(callback, "schedules_adapters", False) for callback in callbacks)


def take_schedule(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Activate what was active when a checkpoint of a scheduled run was saved, unless a fit goes on and the schedule does it.

    Raises:
        CheckpointMismatchError: a fit resumes without the schedule of the checkpoint, or with one where it had none.
    """
    manifest = checkpoint.get(MANIFEST)
    schedule = manifest.get(SCHEDULE) if isinstance(manifest, dict) else None
    trainer = getattr(module, "_trainer", None)
    if trainer is not None and trainer.state.fn == "fit":
        if (schedule is not None) != is_scheduled(module):
            with_or_without = ("with", "without") if schedule is not None else ("without", "with")
            raise CheckpointMismatchError(
                "the checkpoint was saved {} a PhaseSchedule, and this run is {} one; resume with the callbacks of the checkpoint, or start "
                "a new run from its adapter folder".format(*with_or_without)
            )
    elif isinstance(schedule, dict):
        for path, root in roots_by_path(module).items():
            set_active_adapters(root, [name for name in schedule.get(path, ()) if name in records(root)])


def _active(module: nn.Module) -> dict[str, list[str]]:
    return {path: active_adapters(root) for path, root in roots_by_path(module).items()}


def check_manifest(
    checkpoint: Mapping[str, Any], module: nn.Module, state: Mapping[str, Any], *, check_base: bool = True
) -> None:
    """Compare what a checkpoint holds with the adapters and, if ``check_base``, the base of ``module``, whose state is ``state``.

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
    by_schedule = SCHEDULE in manifest and is_scheduled(module)
    labels = [label for label in _LABELS if not (by_schedule and label in ("active", "position"))]
    _compare_adapters(manifest["adapters"], _adapters(module), labels)
    _compare_tensors(manifest["tensors"], _shapes(state), "the module")
    if "state_dict" in checkpoint:  # not in sharded checkpoints
        _compare_tensors(manifest["tensors"], _shapes(checkpoint["state_dict"]), "the checkpoint's own state_dict")
    for path, root in roots_by_path(module).items() if check_base else ():
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
            **({SCALE: adapter_scale(root, name)} if _scalable(root, name) else {}),
            **({"position": active[path].index(name)} if name in active[path] and len(active[path]) > 1 else {}),
            **({"modules_to_save": [target.path for target in injection.saved]} if injection.saved else {}),
        }
        for path, root in roots.items()
        for name, injection in records(root).items()
    }


def _scalable(root: nn.Module, name: str) -> bool:
    return all(adapter.scalable for adapter in adapters_named(root, name).values())


def take_scales(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Let the adapters of ``module`` act as strongly as they did when a checkpoint that fits it was saved; older ones do not say."""
    for path, root in roots_by_path(module).items():
        stored = {name: checkpoint[MANIFEST]["adapters"][f"{path}:{name}"].get(SCALE) for name in records(root)}
        scale_adapters(root, {name: scale for name, scale in stored.items() if scale is not None})


def _compare_adapters(stored: Mapping[str, Any], here: Mapping[str, Any], labels: Sequence[str]) -> None:
    if stored.keys() != here.keys():
        raise CheckpointMismatchError(
            f"the checkpoint holds the adapters {sorted(stored)}, the module holds {sorted(here)}"
        )
    for label in labels:
        for name, held in stored.items():
            if _unordered(held.get(label)) != _unordered(here[name].get(label)):
                raise CheckpointMismatchError(
                    f"adapter {name!r}: {label} of the checkpoint and of the module differ: "
                    f"{_first_difference(held.get(label), here[name].get(label))}. Resume with the settings of the checkpoint, or start a new run "
                    "from its adapter folder"
                )


def _unordered(value: Any) -> Any:
    """Return the paths of places sorted: the order they were listed in does not matter, as adapters and optimizers go by names."""
    return sorted(value) if isinstance(value, list) else value


def _first_difference(stored: Any, here: Any) -> str:
    if isinstance(stored, list) and isinstance(here, list) and max(len(stored), len(here)) > 5:
        gone, new = ([path for path in a if path not in b] for a, b in ((stored, here), (here, stored)))
        return f"only the checkpoint has {gone[:5]} ({len(gone)}), only the module {new[:5]} ({len(new)})"
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
            f"{len(different)} parameters differ, first {different[0]!r}. Load the right base, or set check_base=False on the module if you know "
            "what you do"
        )
    full = stored.get("complete")
    if isinstance(full, dict) and (different := full_differences(full, root, packed | trained)):
        raise CheckpointMismatchError(
            f"the checkpoint was trained over a base with the full fingerprint {digest_of(full)}, this base has {digest_of(full_digests(root))}: "
            f"{len(different)} parameters differ in elements that are not sampled, first {different[0]!r}"
        )

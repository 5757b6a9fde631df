"""Modules that are trained in full beside a method, in the same adapter: a classification head, an embedding.

Like everything that is trained in full they are copies, so that the base stays; the arithmetic is in
:mod:`lightning_peft.arithmetic.parameter_copies`. A method does not know of them: its own verbs see :func:`own_adapters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import adapters_named, base_modules, unwrapped
from lightning_peft.arithmetic.parameter_copies import ParameterCopies, parameter_places
from lightning_peft.errors import AdapterMismatchError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.targets import resolve_targets

HEADS = ("classifier", "score")
"""Names of heads that HF PEFT always trains in full in tasks of classification."""
_CLASSIFICATION = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}

_NEW = "_lightning_peft_new_modules"

_Value = TypeVar("_Value")


class SavedParameters(ParameterCopies):
    """Copies of all parameters of one module that is trained in full beside a method."""


def note_new(model: nn.Module, paths: Sequence[str]) -> None:
    """Note the ``paths`` of modules of ``model`` that its checkpoint had no weights for."""
    model.__dict__[_NEW] = list(paths)


def new_modules(model: nn.Module) -> list[str]:
    """Return the paths of the modules of ``model`` that its checkpoint had no weights for; they have random ones, and need training."""
    return list(model.__dict__.get(_NEW, ()))


def own_adapters(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Return the adapters called ``name`` that its method made, by module path.

    Raises:
        AdapterNotFoundError: there is none of that name.
    """
    found = adapters_named(model, name).items()
    return {path: adapter for path, adapter in found if not isinstance(adapter, SavedParameters)}


def resolve_saved(model: nn.Module, words: str | Sequence[str] | None, family: ModelFamily) -> tuple[Target, ...]:
    """Return the modules that ``words`` name, none of them inside another.

    Raises:
        TargetError: a word matches no module with parameters, or a part of one.
    """
    if not words:
        return ()
    asker = "modules_to_save"
    found = resolve_targets(
        model, words, family, supports=lambda module: next(module.parameters(), None) is not None, method=asker
    )
    for target in found:
        if target.slices:
            raise TargetError(
                f"{asker} {target.rule!r} is a slice of {target.path!r}, which cannot be trained in full alone; name the whole module"
            )
    return tuple(target for target in found if not inside(target.path, [t.path for t in found if t is not target]))


def inside(path: str, roots: Iterable[str]) -> bool:
    """Tell whether ``path`` is one of ``roots`` or below one.

    Example:
        >>> inside("classifier.dense", ["classifier"]), inside("classifier2", ["classifier"])
        (True, False)
    """
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def saved_places(model: nn.Module, saved: Sequence[Target], adapted: Iterable[str] = ()) -> dict[str, list[str]]:
    """Return path to parameter names of the modules at and below ``saved``.

    Raises:
        TargetError: one has no parameters that act in it, or the method adapts it as well (``adapted``).
    """
    places = parameter_places(model, [target.path for target in saved])
    for target in saved:
        if not any(inside(place, [target.path]) for place in places):
            raise TargetError(
                f"modules_to_save {target.rule or target.path!r} names {target.path!r}, which has no parameters of its own to train"
            )
    for path in adapted:
        if inside(path, [target.path for target in saved]):
            raise TargetError(
                f"{path!r} was asked for twice: modules_to_save trains it in full, and the method adapts it; leave it out of the targets "
                "or out of modules_to_save"
            )
    return places


# -- files -------------------------------------------------------------------------------------------------------------


def file_names(method: Method, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of saved modules by their names in the file of an adapter made by ``method``."""
    prefix = method.hf_prefix if method.peft_type else ""
    return {prefix + name: tensor for name, tensor in saved.items()}


def split_file(
    method: Method, roots: Sequence[str], stored: Mapping[str, _Value]
) -> tuple[dict[str, _Value], dict[str, _Value]]:
    """Return what a file holds for the method, and what it holds for the modules ``roots`` by ``<module path>.<tensor>``."""
    prefix = method.hf_prefix if method.peft_type else ""
    saved = {
        name.removeprefix(prefix): value
        for name, value in stored.items()
        if name.startswith(prefix) and inside(name.removeprefix(prefix), roots)
    }
    rest = {name: value for name, value in stored.items() if name.removeprefix(prefix) not in saved}
    return rest, _without_repeated(saved, roots)


def _without_repeated(saved: dict[str, _Value], roots: Sequence[str]) -> dict[str, _Value]:
    """Drop the biases that HF PEFT writes again under ``bias="all"``: of the trained module, where equal, and of that it stands for."""
    kept = dict(saved)
    for root in roots:
        for name, value in saved.items():
            again = name.removeprefix(f"{root}.modules_to_save.")
            trained = saved.get(f"{root}.{again}") if again != name else None
            same = isinstance(value, Tensor) and isinstance(trained, Tensor) and torch.equal(value, trained)
            if same or (name.startswith(f"{root}.original_module.") and name.endswith("bias")):
                del kept[name]
    return kept


def saved_by_hf_peft(
    model: nn.Module, method: Method, names: Sequence[str], task: object, stored: Iterable[str]
) -> tuple[Target, ...]:
    """Return the modules of ``model`` that ``modules_to_save`` and ``task_type`` of HF PEFT's configuration name.

    HF PEFT compares the ends of paths. In tasks of classification it adds the heads itself, present or not.

    Raises:
        AdapterMismatchError: a name is no module of the model.
    """
    modules = {path: unwrapped(module) for path, module in base_modules(model) if path}
    found: dict[str, str] = {}
    for name in names:
        hits = [path for path in modules if path.endswith(name)]
        if not hits and name not in HEADS:
            raise AdapterMismatchError(
                f"modules_to_save names {name!r}, but {type(model).__name__} has no such module: wrong base?"
            )
        found |= dict.fromkeys(hits, name)
    for name in HEADS if task in _CLASSIFICATION.values() else ():
        held = [path for path in modules if path.endswith(name)]
        found |= {path: name for path in held if any(key.startswith(f"{method.hf_prefix}{path}.") for key in stored)}
    outermost = [path for path in found if not inside(path, [other for other in found if other != path])]
    return tuple(Target(path=path, rule=found[path]) for path in modules if path in outermost)


def hf_saved_config(model: nn.Module, saved: Sequence[Target]) -> dict[str, object]:
    """Return the fields of HF PEFT's configuration that say which modules are trained in full; empty for none."""
    if not saved:
        return {}
    paths = [target.path for target in saved]
    modules = [path for path, _ in base_modules(model) if path]
    ends = sorted({path.rpartition(".")[2] for path in paths})
    short = {path for path in modules if path.endswith(tuple(ends))} == set(paths)
    config: dict[str, object] = {"modules_to_save": ends if short else paths}
    heads = {path for path in modules if path.endswith(HEADS)}
    task = next((task for end, task in _CLASSIFICATION.items() if type(model).__name__.endswith(end)), None)
    # Under such a task HF PEFT trains the heads in full, so it may only be named where that is so.
    return config | ({"task_type": task} if task and heads and heads <= set(paths) else {})

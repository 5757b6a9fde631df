"""Several methods in one model, all active at once.

Where they meet at one place they act around one another, the first of the list innermost::

    [LoRA, Bottleneck, BitFit]        y = bitfit(bottleneck(lora(base)))(x)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from lightning_peft.activation import active_adapters, set_active_adapters
from lightning_peft.adapter_files import INDEX, inner_adapters, is_adapter, to_json_bytes, write_file
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.base_preparation import prepare_base
from lightning_peft.errors import AdapterFileError, ConfigError, InjectionError
from lightning_peft.families import ModelFamily
from lightning_peft.injection import Injection, all_places, records
from lightning_peft.interfaces import Method
from lightning_peft.model_card import CardFacts
from lightning_peft.rollback import unchanged_on_error
from lightning_peft.rows import set_row_adapters
from lightning_peft.saved_modules import saved_places
from lightning_peft.scaling import adapter_scale, scale_adapters
from lightning_peft.state import load_adapter, planned_adapter, write_adapter
from lightning_peft.surgery import check_name, inject, plan, resolve_family
from lightning_peft.targets import Targets

_VERSION, _SCALED = 1, 2
"""Versions of that file: without and with factors of their effects."""


@dataclass(frozen=True)
class Adaptation:
    """One method of several, with what it adapts.

    Example:
        >>> from lightning_peft import LoRA
        >>> Adaptation(LoRA(rank=4), targets=["query", "value"]).targets
        ['query', 'value']
    """

    method: Method
    """The method."""
    targets: str | list[str] | Targets | None = None
    """What it adapts: roles, globs, ``re:`` expressions or :class:`Targets`; the method's default targets if None."""
    name: str | None = None
    """Name of its adapter; the method's registry name if None, and for a second one ``<name>_2``."""
    modules_to_save: str | list[str] | None = None
    """Modules to train in full beside the method, in the same adapter."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise ConfigError(f"Adaptation needs an instance of a Method such as LoRA(rank=8), got {self.method!r}")


def named(adaptations: Sequence[Adaptation | Method]) -> list[Adaptation]:
    """Return ``adaptations`` with a name each; a bare method becomes an :class:`Adaptation` of its default targets.

    Raises:
        ConfigError: there is none, something else is among them, or a name is given twice.

    Example:
        >>> from lightning_peft import BitFit, LoRA
        >>> [one.name for one in named([LoRA(), BitFit(), LoRA()])]
        ['lora', 'bitfit', 'lora_2']
    """
    if not adaptations:
        raise ConfigError(f"a list of methods needs at least one, got {adaptations!r}")
    whole = [Adaptation(one) if isinstance(one, Method) else one for one in adaptations]
    for one in whole:
        if not isinstance(one, Adaptation):
            raise ConfigError(f"a list of methods holds Adaptation(method, targets) or methods, got {one!r}")
    given = [one.name for one in whole if one.name is not None]
    for name in given:
        if given.count(name) > 1:
            raise ConfigError(f"the name {name!r} is given to {given.count(name)} adaptations; each needs its own")
    result: list[Adaptation] = []
    for one in whole:
        name, number = one.name or one.method.name, 1
        while one.name is None and name in {*given, *(other.name for other in result)}:
            number += 1
            name = f"{one.method.name}_{number}"
        result.append(replace(one, name=name))
    return result


def inject_all(
    model: nn.Module,
    adaptations: Sequence[Adaptation | Method],
    *,
    family: ModelFamily | str | None = None,
    trainable: bool = True,
    by_rows: bool = False,
    around: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Injection]:
    """Adapt ``model`` in place with several methods and make all of them active, the first one innermost.

    What can be seen beforehand is checked for all before the model changes; if one fails later, the others are taken out.

    Args:
        model: any module.
        adaptations: methods with their targets, or bare methods with their default targets.
        family: the model family, or its name, where it should not be found from the model.
        trainable: whether the adapters are trained.
        by_rows: they act on rows of their own instead, so methods may meet that act alone at a place; none is active.
        around: called with each name; the adapter of that name is made, with its initial values, inside the context it returns.

    Returns:
        What was injected where, by adapter name.

    Raises:
        ConfigError: a name is given twice.
        TargetError: a target matches nothing, or something that its method cannot adapt.
        InjectionError: a name is taken, two methods meet at a place where one of them acts alone, or a method prepares only layers
            that others need as they are.

    Example:
        >>> import torch
        >>> from lightning_peft import BitFit, LoRA, active_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> _ = inject_all(model, [Adaptation(LoRA(rank=1), targets="0"), BitFit()])
        >>> active_adapters(model)
        ['lora', 'bitfit']
    """
    chosen = {str(one.name): one for one in named(adaptations)}
    known = resolve_family(model, family)
    for name in chosen:
        check_name(model, name)
    plans = {name: plan(model, one.method, one.targets, one.modules_to_save, known) for name, one in chosen.items()}
    if not by_rows:
        _check_together(model, plans, known)
    with unchanged_on_error(model):
        # By all of them, before an adapter measures what it is made for.
        prepare_base(model, list(plans.values()), known)
        made, put = {}, partial(inject, model, family=known, trainable=trainable)
        for name, one in chosen.items():
            with around(name):
                made[name] = put(one.method, one.targets, modules_to_save=one.modules_to_save, name=name)
        set_active_adapters(model, [] if by_rows else list(chosen))
        set_row_adapters(model, list(chosen) if by_rows else [])
    return made


def _check_together(model: nn.Module, plans: dict[str, Injection], family: ModelFamily) -> None:
    """Refuse methods that meet at a place where one of them acts alone."""
    places: dict[str, list[tuple[str, str | None]]] = {}  # path -> adapter names, each with why it acts alone
    for name, injection in plans.items():
        method = injection.method
        alone = None if method.composable else f"{method.name!r} acts alone at a place"
        for target in all_places(model, injection, family):
            if target.only_listens:
                continue
            places.setdefault(target.path, []).append((name, alone))
        for path in saved_places(model, injection.saved):
            places.setdefault(path, []).append((name, f"modules_to_save of {name!r} trains the module in full"))
    for path, here in places.items():
        why = next((reason for _, reason in here if reason), None)
        if len(here) > 1 and why:
            raise InjectionError(
                f"the adapters {[name for name, _ in here]} all adapt {path!r}, but {why}; give them other targets"
            )


# -- on disk -----------------------------------------------------------------------------------------------------------


def save_adapters(
    model: nn.Module, path: str | Path, *, facts: CardFacts | None = None, fingerprint: str = "sampled"
) -> Path:
    """Write every adapter of ``model``: ``default`` into the folder itself, each other one into a sub-folder of its name.

    Unless ``default`` is the only one there and unscaled, a file beside them says which there are, which are active in what order, and
    how they are scaled.

    Args:
        model: the adapted model.
        path: the folder.
        facts: what the ``README.md`` of each adapter says beyond its files.
        fingerprint: of the base, ``sampled`` or ``complete``, as in :func:`~lightning_peft.save_adapter`.

    Returns:
        The folder.

    Raises:
        AdapterNotFoundError: the model has no adapter.
        AdapterFileError: an adapter has non-finite values, or no values yet (meta device).
    """
    folder = Path(path)
    names = list(records(model))
    if not names:
        adapters_named(model, "default")  # raises, saying that there is none
    for name in names:
        write_adapter(model, _folder_of(folder, name), name, facts, fingerprint)
    scales = {name: scale for name in names if (scale := adapter_scale(model, name)) != 1.0}
    if (
        names != ["default"] or scales or inner_adapters(folder)
    ):  # without the file those of an earlier save would count
        active = [name for name in active_adapters(model) if name in names]
        content = {"format_version": _SCALED if scales else _VERSION, "adapters": names, "active": active}
        content |= {"scales": scales} if scales else {}
        write_file(folder / INDEX, to_json_bytes(content))
    else:
        (folder / INDEX).unlink(missing_ok=True)
    return folder


def load_adapters(
    model: nn.Module, path: str | Path, *, trainable: bool = False, check_base: bool = True
) -> dict[str, Injection]:
    """Put all adapters of a folder into ``model``, in place, and make those active that were so when they were saved.

    If one is refused, the model is what it was. A folder without the file that says which adapters there are and which are
    active, such as one of HF PEFT, gives the adapter in the folder itself as ``default`` and those of its sub-folders by
    name, in the order of the alphabet, all active.

    Args:
        model: the base model, with other adapters or without.
        path: a folder written by :func:`save_adapters`, :class:`~lightning_peft.AdapterCheckpoint` or HF PEFT.
        trainable: whether they are trained further.
        check_base: whether to refuse a base other than the one they were trained on.

    Returns:
        What was injected where, by adapter name.

    Raises:
        AdapterFileError: there is no adapter, or one cannot be read or does not fit.
        InjectionError: the model has an adapter of one of the names.
    """
    folder = Path(path)
    names, active, scales = _index(folder)
    for name in names:
        check_name(model, name)
    with unchanged_on_error(model):
        if len(names) > 1:  # an adapter that goes in first must not keep the next one's base from being prepared
            plans = [planned_adapter(model, _folder_of(folder, name), check_base=check_base) for name in names]
            prepare_base(model, plans, resolve_family(model, None))
        loaded = {
            name: load_adapter(model, _folder_of(folder, name), name=name, trainable=trainable, check_base=check_base)
            for name in names
        }
        set_active_adapters(model, active)
        scale_adapters(model, scales)
    return loaded


def stored_scales(path: str | Path) -> dict[str, float]:
    """Return the factors that a folder holds beside its adapters, by name, of those that are scaled.

    Raises:
        AdapterFileError: the file beside them cannot be read, or has a factor that is not a finite number.
    """
    folder = Path(path)
    scales = _index(folder)[2] if holds_several(folder) else {}
    for name, factor in scales.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise AdapterFileError(
                f"{str(folder / INDEX)!r}: the scale of {name!r} must be a finite number, found {factor!r}"
            )
    return scales


def holds_several(path: str | Path) -> bool:
    """Tell whether a folder was written for several adapters."""
    return (Path(path) / INDEX).is_file()


def saved_adapters(path: str | Path, *, inactive: bool = False) -> dict[str, Path]:
    """Return the folders of the adapters of a folder that were active when they were saved, by name, the innermost first.

    With ``inactive`` also those of the others, in the order in which they were put in.
    """
    folder = Path(path)
    names, active, _ = _index(folder) if holds_several(folder) else (["default"], ["default"], {})
    return {name: _folder_of(folder, name) for name in (names if inactive else active)}


def first_adapter(path: str | Path) -> Path:
    """Return the folder of the first adapter of a folder, which is the folder itself where there is one adapter."""
    folder = Path(path)
    return _folder_of(folder, _index(folder)[0][0]) if holds_several(folder) else folder


def _folder_of(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name


def _index(folder: Path) -> tuple[list[str], list[str], dict[str, float]]:
    """Return the names of the adapters of a folder, those that are active, and the factors of those that are scaled."""
    if not holds_several(folder):
        inner = inner_adapters(folder) if folder.is_dir() else []
        found = [*(["default"] if is_adapter(folder) else []), *(name for name in inner if name != "default")]
        if not found:
            raise AdapterFileError(f"{str(folder)!r} holds no adapter, neither itself nor in a folder inside it")
        return found, found, {}
    file = folder / INDEX
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names, active, scales = list(content["adapters"]), list(content["active"]), dict(content.get("scales", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{str(file)!r} cannot be read: {error!r}") from error
    if content.get("format_version") not in (_VERSION, _SCALED):
        raise AdapterFileError(
            f"{str(file)!r} has format_version {content.get('format_version')!r}; this version reads {_VERSION} and {_SCALED}"
        )
    for name in (*names, *active):
        try:
            check_name(nn.Module(), name)  # it becomes part of a path
        except ConfigError as error:
            raise AdapterFileError(f"{str(file)!r}: {error}") from error
    if not names or len(set(names)) < len(names) or not {*active, *scales} <= set(names):
        raise AdapterFileError(
            f"{str(file)!r} must name each adapter once, the active and scaled ones among them: {names}, {active}, {scales}"
        )
    return names, active, scales

"""Model-wide verbs: put adapters in, choose which act, merge them, take them out.

All of them work on any ``nn.Module`` and through :class:`~lightning_peft.adapter_layer.AdapterLayer` alone; none knows
what a method does.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_peft.activation import set_active_adapters
from lightning_peft.adapter_layer import (
    AdapterLayer,
    adapter_layers,
    adapter_names,
    adapters_named,
    base_modules,
    base_parameters,
    has_adapter,
    parents_of,
    put_in_place,
    unwrapped,
)
from lightning_peft.base_preparation import prepare_base
from lightning_peft.errors import (
    AdapterNotFoundError,
    ConfigError,
    InjectionError,
    LightningPEFTWarning,
    MergeError,
    TargetError,
)
from lightning_peft.families import ModelFamily
from lightning_peft.injection import Injection, all_places, records
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.offloading import forget_offloaded
from lightning_peft.quantized_layers import make_trainable_over, packed_layers
from lightning_peft.registry import get_registry
from lightning_peft.rows import refuse_in_rows
from lightning_peft.saved_modules import SavedParameters, inside, resolve_saved, saved_places
from lightning_peft.targets import Targets, fused_parameters, is_fused_experts, matches, resolve_targets
from lightning_peft.torch_encoders import keep_torch_encoders_calling
from lightning_peft.unread_weights import weights_at_hand
from lightning_peft.walks import walked_once


def inject(
    model: nn.Module,
    method: Method,
    targets: str | Sequence[str] | Targets | None = None,
    *,
    modules_to_save: str | Sequence[str] | None = None,
    name: str = "default",
    family: ModelFamily | str | None = None,
    trainable: bool = True,
) -> Injection:
    """Adapt ``model`` in place: freeze it, put adapters at ``targets`` and make them the active ones.

    Args:
        model: any module. In a LightningModule of your own, call this in ``configure_model``.
        method: the adaptation method.
        targets: roles, globs or ``re:`` expressions; the method's default targets if None.
        modules_to_save: modules to train in full beside the method, such as a classification head, in the same adapter: roles,
            globs or ``re:`` expressions. The method's default targets leave them out.
        name: the adapter's name; a model may hold several.
        family: the model family, or its name, where it should not be found from the model.
        trainable: whether the adapters are trained.

    Returns:
        What was injected where.

    Raises:
        TargetError: a target matches nothing, or something that the method cannot adapt, or a module of ``modules_to_save``.
        InjectionError: the name is taken, or the model is in a block of :func:`~lightning_peft.rows.adapter_rows`.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> inject(model, LoRA(rank=1), ["0", "1"]).paths
        ['0', '1']
    """
    with walked_once(model):
        check_name(model, name)
        if not isinstance(method, Method):
            raise ConfigError(f"inject needs an instance of a Method such as LoRA(rank=8), got {method!r}")
        known = resolve_family(model, family)
        injection = plan(model, method, targets, modules_to_save, known)
        if "all_linear" in Targets.of(method.default_targets if targets is None else targets).include:
            _warn_of_fused_experts(model, method)
        return _put(model, injection, known, name, trainable)


def plan(
    model: nn.Module,
    method: Method,
    targets: str | Sequence[str] | Targets | None,
    modules_to_save: str | Sequence[str] | None,
    family: ModelFamily,
) -> Injection:
    """Return what :func:`inject` would put where; the model is left alone."""
    saved = resolve_saved(model, modules_to_save, family)
    chosen = resolve_targets(
        model,
        method.default_targets if targets is None else targets,
        family,
        supports=method.supports,
        method=type(method).__name__,
        refusal=method.target_refusal.format(model=type(model).__name__),
    )
    if targets is None:  # nobody asked for these by name
        chosen = [target for target in chosen if not inside(target.path, [root.path for root in saved])]
        if not chosen:
            raise TargetError(
                f"modules_to_save={modules_to_save!r} leaves nothing of {type(model).__name__} for {type(method).__name__} to adapt"
            )
    saved_places(model, saved, [target.path for target in chosen])
    _overrides(model, method, chosen, family)
    return Injection(method=method, targets=tuple(chosen), family=family.name, saved=saved)


def inject_at(model: nn.Module, injection: Injection, *, name: str, trainable: bool = True) -> Injection:
    """Put the adapters of an :class:`Injection` into ``model`` at exactly its places, as :func:`inject` would."""
    with walked_once(model):
        check_name(model, name)
        family = _family_that_fits(model, injection)
        return _put(model, injection, family, name, trainable)


def _family_that_fits(model: nn.Module, injection: Injection) -> ModelFamily:
    """Return the family of ``injection``, all of whose places must be in ``model``."""
    known = {path: unwrapped(module) for path, module in base_modules(model)}
    for target in (*injection.targets, *injection.saved):
        if target.path not in known:
            raise TargetError(
                f"the adapter has a place {target.path!r}, but {type(model).__name__} has no such module: it is for another model"
            )
    for target in injection.targets:
        if not injection.method.supports(known[target.path]):
            kind = type(known[target.path]).__name__
            raise TargetError(
                f"the adapter has a place {target.path!r}, a {kind} in this model, which {injection.method.name!r} cannot adapt"
            )
    held: ModelFamily | None = get_registry().model_families.get(injection.family)
    return held or get_registry().resolve_family(model)


def _put(model: nn.Module, injection: Injection, family: ModelFamily, name: str, trainable: bool) -> Injection:
    refuse_in_rows(model, None, f"adapter {name!r} cannot go in")
    merged = sorted({other for layer in adapter_layers(model).values() for other in layer.merged})
    if merged:
        raise MergeError(
            f"adapter {name!r} cannot go in while {merged[0]!r} is merged into the base; call unmerge_adapters(model) first, or "
            "unload_adapters(model) to make the merged weights the base"
        )
    _overrides(model, injection.method, injection.targets, family)
    prepare_base(model, [injection], family)
    if not records(model):
        make_trainable_over(packed_layers(model))
    modules = dict(base_modules(model))
    # Everything that can fail comes before the model changes.
    made = [(modules[path], adapter) for path, adapter in new_adapters(model, injection, family).items()]
    if not records(model):  # later, what its user unfroze stays so
        freeze(model)
    bare = any(not isinstance(module, AdapterLayer) for module, _ in made)
    parents = parents_of(model) if bare else {}
    before = adapter_layers(model).values()
    for module, adapter in made:
        layer = module if isinstance(module, AdapterLayer) else _wrap(module, parents[id(module)])
        if before and not any(other._enabled for other in before):  # in a block of adapters_disabled
            layer.enable(False)
        layer.add(name, adapter, trainable=trainable)
    keep_torch_encoders_calling(model)
    records(model)[name] = injection
    set_active_adapters(model, [name])
    return injection


def new_adapters(model: nn.Module, injection: Injection, family: ModelFamily) -> dict[str, Adapter]:
    """Return fresh adapters for the places of ``injection`` by module path; the model, prepared for them, does not hold them."""
    method = injection.method
    overrides = _overrides(model, method, injection.targets, family)
    modules = {path: unwrapped(module) for path, module in base_modules(model)}
    targets = all_places(model, injection, family)
    copies: dict[str, Adapter] = {}
    for path, names in saved_places(model, injection.saved, [target.path for target in targets]).items():
        with weights_at_hand(modules[path]):
            copies[path] = SavedParameters(modules[path], names)
            copies[path].reset_parameters(modules[path])
    fresh: dict[str, Adapter] = {}
    for target in targets:
        with weights_at_hand(modules[target.path]):
            adapter = method.at(**overrides.get(target.path, {})).adapter(modules[target.path], target)
            adapter.reset_parameters(modules[target.path])
        fresh[target.path] = adapter
    method.connect(model, fresh)
    return copies | fresh


def freeze(model: nn.Module) -> None:
    """Freeze every parameter of the base; those of adapters keep their state."""
    for _, parameter in base_parameters(model):
        if parameter.requires_grad:
            parameter.requires_grad_(False)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter ``name``; a place without adapters becomes the module it was.

    Raises:
        AdapterNotFoundError: there is none of that name.
        MergeError: it is merged into the base; unmerge it first.
        InjectionError: a block of :func:`~lightning_peft.rows.adapter_rows` uses it.
    """
    adapters_named(model, name)
    refuse_in_rows(model, name, f"adapter {name!r} cannot be deleted")
    layers = {path: layer for path, layer in adapter_layers(model).items() if name in layer.adapters}
    if any(name in layer.merged for layer in layers.values()):
        raise MergeError(f"adapter {name!r} is merged into the base; unmerge it before deleting it")
    parents = parents_of(model) if any(len(layer.adapters) == 1 for layer in layers.values()) else {}
    for layer in layers.values():
        layer.delete(name)
        if not layer.adapters:
            _take_out(layer, parents)
    keep_torch_encoders_calling(model)
    records(model).pop(name, None)
    forget_offloaded(model, name)


@contextlib.contextmanager
def adapters_taken_out(model: nn.Module) -> Iterator[nn.Module]:
    """Have the bare base, with what is merged into it, in the places of adapter layers for the time of a ``with`` block."""
    layers = list(adapter_layers(model).values())
    parents = parents_of(model)
    for layer in layers:
        _take_out(layer, parents)
    try:
        yield model
    finally:
        for layer in layers:
            put_in_place(layer, parents[id(layer)])


def _take_out(layer: AdapterLayer, parents: Mapping[int, Sequence[tuple[nn.Module, str]]]) -> None:
    """Put the base back where ``layer`` stands; what has the layer run in parts (tensor parallelism) has the base run so."""
    put_in_place(layer.base_layer, parents[id(layer)])
    if hand_over := vars(layer).get("hand_over"):
        hand_over(layer.base_layer)


def unload_adapters(model: nn.Module) -> nn.Module:
    """Take all adapter layers out and return the model: the base, with what was merged into it kept.

    Raises:
        AdapterNotFoundError: there are no adapters.
        InjectionError: a block of :func:`~lightning_peft.rows.adapter_rows` uses one.
    """
    refuse_in_rows(model, None, "adapters cannot be unloaded")
    layers = adapter_layers(model)
    if not layers:
        raise AdapterNotFoundError(
            f"{type(model).__name__} has no adapters to unload; call inject(model, method) first"
        )
    parents = parents_of(model)
    for layer in layers.values():
        _take_out(layer, parents)
    keep_torch_encoders_calling(model)
    records(model).clear()
    forget_offloaded(model)
    return model


def materialize_adapters(model: nn.Module) -> None:
    """Give adapters that were injected on the meta device real tensors, on the device of their base, and initial values.

    Raises:
        InjectionError: the base itself is still on the meta device.
    """
    for path, layer in adapter_layers(model).items():
        for adapter in layer.adapters.values():
            tensors = [*adapter.parameters(), *adapter.buffers()]
            if not any(tensor.is_meta for tensor in tensors):
                continue
            device = next(
                (tensor.device for tensor in [*layer.base_layer.parameters(), *layer.base_layer.buffers()]),
                torch.device("cpu"),
            )
            if device.type == "meta":
                raise InjectionError(
                    f"the base at {path!r} is on the meta device; load its weights before materialising its adapters"
                )
            adapter.to_empty(device=device)
            adapter.reset_parameters(layer.base_layer)  # type: ignore[operator]


def resolve_family(model: nn.Module, family: ModelFamily | str | None) -> ModelFamily:
    """Return the family that is named, or the one that ``model`` is of."""
    if isinstance(family, ModelFamily):
        return family
    registry = get_registry()
    named: ModelFamily = registry.resolve_family(model) if family is None else registry.get("model family", family)
    return named


def check_name(model: nn.Module, name: str) -> None:
    """Refuse ``name`` for a new adapter of ``model`` where it is no name, or taken."""
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name)
        or hasattr(nn.ModuleDict(), name)
    ):
        raise ConfigError(
            f"an adapter name is 1 to 64 letters, digits, '_' or '-', and no attribute of nn.ModuleDict such as 'keys', got {name!r}"
        )
    if has_adapter(model, name):
        held = ", ".join(map(repr, adapter_names(model)))
        raise InjectionError(
            f"{type(model).__name__} already has an adapter {name!r} (it holds: {held}); give another name=, or delete_adapter(model, {name!r})"
        )


# -- details -----------------------------------------------------------------------------------------------------------


def _overrides(
    model: nn.Module, method: Method, targets: Sequence[Target], family: ModelFamily
) -> dict[str, dict[str, Any]]:
    """Return path to the fields that differ there, from the method's patterns; every pattern must match a target."""
    overrides: dict[str, dict[str, Any]] = {target.path: {} for target in targets}
    for field, values in method.patterns().items():
        for word, value in values.items():
            hits = [path for path in matches(word, model, family) if path in overrides]
            if not hits:
                raise TargetError(
                    f"{field}_pattern {word!r} matches none of the {len(targets)} adapted places, such as {targets[0].path!r}"
                )
            for target in targets:
                if target.path in hits:
                    _refuse_part_of_slices(f"{field}_pattern {word!r}", word, target, family)
                    overrides[target.path].setdefault(field, value)
    return overrides


def _refuse_part_of_slices(what: str, word: str, target: Target, family: ModelFamily) -> None:
    """Refuse a pattern that means one slice of a fused projection where several are adapted with one method."""
    others = [part.role for part in target.slices if part.role != word]
    if family.fused_for(word) is not None and word not in family.roles and others:
        raise TargetError(
            f"{what} is one slice of {target.path!r}, where {', '.join(others)} would get its value too; adapt the slices as adapters of "
            "different names, or give the pattern for the whole module"
        )


def _wrap(module: nn.Module, places: list[tuple[nn.Module, str]]) -> AdapterLayer:
    layer = AdapterLayer(module)
    layer.training = module.training
    put_in_place(layer, places)
    return layer


def _warn_of_fused_experts(model: nn.Module, method: Method) -> None:
    """Name the experts that ``all_linear`` passes by because the method cannot adapt them, or nobody knows their layout."""
    fused = [
        f"{path}.{name}"
        for path, module in ((path, unwrapped(module)) for path, module in base_modules(model))
        for name in fused_parameters(module)
        if "expert" in f"{path}.{name}" and not (is_fused_experts(module) and method.supports(module))
    ]
    if fused:
        warnings.warn(
            f"'all_linear' adapts linear layers and experts of a known layout where the method can; {len(fused)} three-dimensional "
            f"parameters such as {fused[0]!r} are not adapted by {type(method).__name__} and stay frozen",
            LightningPEFTWarning,
            stacklevel=3,
        )

"""The structural rule: what is under ``base_layer`` is the base, everything else belongs to adapters.

Freezing, the trainable set, saved state, merging and disabling all derive from it, for every method at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.errors import AdapterNotFoundError, InjectionError, MergeError
from lightning_peft.finite import all_finite
from lightning_peft.interfaces import Adapter
from lightning_peft.layer_parts import MergeState, RowRunner
from lightning_peft.sharded_parameters import kept, merged_whole, put
from lightning_peft.walks import forget_walks, walked

_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module")
"""Child names under which ``torch.compile`` and activation checkpointing hide the module that was there."""


class AdapterLayer(nn.Module):
    """Stands at an adapted place: the module that was there, and the adapters around it.

    Attributes that the layer does not have itself (``weight``, ``in_features``, ``attention_type``, ...) are those of
    the module it wraps, so code that looks at the module still finds what it looks for.

    Args:
        base_layer: the module to adapt.
    """

    base_layer: nn.Module
    adapters: nn.ModuleDict
    _rows: RowRunner | None = None
    _in_rows: frozenset[str] = frozenset()
    _active: tuple[str, ...] = ()
    _trainable: frozenset[str] = frozenset()
    _training_now: frozenset[str] = frozenset()  # those of them that act
    _enabled = True
    # What merging replaced: adapter names, and parameter name -> its value before.
    _merged: tuple[str, ...] = ()
    _originals: Mapping[str, Tensor] = MappingProxyType({})
    # The module that merging replaced, where its weight cannot take an update. A tuple, as it is no part of the model.
    _replaced: tuple[nn.Module, ...] = ()
    _permanent: tuple[str, ...] = ()  # those of the merged adapters whose merge cannot be undone
    # The adapters that act in forward, outermost last. A tuple, so that modules in it are not registered twice.
    _stack: tuple[Adapter, ...] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self._modules.update(base_layer=base_layer, adapters=nn.ModuleDict())

    # -- forward ---------------------------------------------------------------------------------------------------

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base with the active adapters around it; shapes are those of the base."""
        if self._rows is not None:
            return self._rows.run(self, args, kwargs)
        stack, call = self._stack, cast("Callable[..., Any]", self._modules["base_layer"])
        if len(stack) == 1:
            return stack[0](call, *args, **kwargs)
        for adapter in stack:
            call = functools.partial(adapter, call)
        return call(*args, **kwargs)

    # -- adapters --------------------------------------------------------------------------------------------------

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters, innermost first."""
        return self._active

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are folded into the weights of the base at the moment."""
        return self._merged

    @property
    def permanent(self) -> tuple[str, ...]:
        """Names of the merged adapters that cannot be taken out again, as the weights they replaced were not kept."""
        return self._permanent

    @property
    def original_base(self) -> nn.Module:
        """The module of the base that stood here before a merge replaced it, or the one that is wrapped."""
        return self._replaced[0] if self._replaced else self.base_layer

    def add(self, name: str, adapter: Adapter, *, trainable: bool) -> None:
        """Add ``adapter`` under ``name``, inactive."""
        if name in self.adapters:
            raise InjectionError(f"this place already has an adapter {name!r}; choose another name or delete it first")
        if adapter.training != self.base_layer.training:
            adapter.train(self.base_layer.training)
        _require(adapter, False)
        self.adapters[name] = adapter
        self.set_trainable(name, trainable)

    def delete(self, name: str) -> None:
        """Remove the adapter ``name``."""
        if name in self._merged:
            raise MergeError(f"adapter {name!r} is merged into the base; unmerge it before deleting it")
        del self.adapters[name]
        self._active = tuple(other for other in self._active if other != name)
        self._trainable, self._training_now = self._trainable - {name}, self._training_now - {name}
        self._in_rows -= {name}
        self._refresh()

    def rename(self, old: str, new: str) -> None:
        """Call the adapter ``old`` ``new``; its place in every order stays."""
        for key in list(self.adapters):
            adapter = self.adapters.pop(key)
            self.adapters[new if key == old else key] = adapter
        self._active = tuple(new if name == old else name for name in self._active)
        self._merged = tuple(new if name == old else name for name in self._merged)
        for names in ("_in_rows", "_trainable", "_training_now"):
            setattr(self, names, frozenset(new if name == old else name for name in getattr(self, names)))

    def activate(self, names: Sequence[str]) -> None:
        """Make the adapters among ``names`` that live here the active ones, in that order."""
        self._active = tuple(name for name in names if name in self.adapters)
        self._refresh()

    def enable(self, enabled: bool) -> None:
        """Let the active adapters act, or not; which of them are active is remembered."""
        self._enabled = enabled
        self._refresh()

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Say whether the adapter ``name`` is trained while it is active."""
        self._trainable = self._trainable | {name} if trainable else self._trainable - {name}
        self._refresh()

    def route(self, rows: RowRunner | None) -> None:
        """Let ``rows`` decide which adapter acts on which row of the batch; None for the active ones on all."""
        self.__dict__["_rows"] = rows  # past nn.Module, as every block of rows comes by here

    def train_in_rows(self, names: Sequence[str]) -> None:
        """Let the adapters among ``names`` that live here require gradients also while they are not active."""
        self._in_rows = frozenset(name for name in names if name in self.adapters)
        self._refresh()

    def trains(self, name: str) -> bool:
        """Tell whether the adapter ``name`` takes part in training: as an active one, or on rows of its own."""
        return name in self._active or name in self._in_rows

    def _refresh(self) -> None:
        adapters = cast("Mapping[str, Adapter]", self.adapters._modules)
        acting = [adapters[name] for name in self._active if name not in self._merged]
        self._stack = tuple(acting) if self._enabled else ()
        # Only adapters that act require gradients: DDP then never meets a trained parameter without one. The others are left
        # alone, so that the cost of a switch does not grow with the number of adapters.
        acting_now = self._in_rows.union(self._active)
        trained = self._trainable & acting_now
        for name in self._training_now | acting_now:
            _require(adapters[name], name in trained)
        self._training_now = trained

    def _adapter(self, name: str) -> Adapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    # -- merging ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, names: Sequence[str], *, keep_originals: bool = True) -> None:
        """Fold the adapters ``names`` that live here into the base.

        Args:
            names: the adapters.
            keep_originals: keep the original tensors for :meth:`unmerge`.

        Raises:
            MergeError: one is merged already, cannot be merged, or would give non-finite weights. Nothing is changed then.
        """
        names = self.in_order(names)
        originals: dict[str, Tensor] = {}
        try:
            for name in names:
                for key, value in merged_whole(self._adapter(name), self.base_layer).items():
                    parameter = self.base_layer.get_parameter(key)
                    if value.shape != parameter.shape or not parameter.is_floating_point():
                        raise MergeError(
                            f"merging adapter {name!r} gives {key!r} the shape {tuple(value.shape)}, but the base holds {parameter.dtype} of "
                            f"shape {tuple(parameter.shape)}: packed weights of a quantised base cannot be merged into"
                        )
                    if not all_finite(value):
                        raise MergeError(
                            f"merging adapter {name!r} makes {key!r} non-finite; the weights are unchanged"
                        )
                    originals.setdefault(key, kept(parameter))
                    put(parameter, value)
        except BaseException:
            self._restore(originals)
            raise
        self.note_merged(names, originals, keep_originals=keep_originals)

    def in_order(self, names: Sequence[str]) -> list[str]:
        """Return those of ``names`` that live here, innermost first, as they act in forward; refuse what cannot be merged."""
        order = {name: place for place, name in enumerate(self._active)}
        names = sorted((name for name in names if name in self.adapters), key=lambda name: order.get(name, len(order)))
        for name in names:
            self._check_mergeable(name, names, order)
        return names

    def note_merged(self, names: Sequence[str], originals: Mapping[str, Tensor], *, keep_originals: bool) -> None:
        """Know that the adapters ``names`` are in the weights now, which were ``originals`` before."""
        self._originals = {**originals, **self._originals}
        self._merged += tuple(names)
        if names and not keep_originals:
            self._originals, self._replaced, self._permanent = {}, (), self._merged
        self._refresh()

    def replace_merged(self, module: nn.Module, names: Sequence[str], *, keep_originals: bool = True) -> None:
        """Wrap ``module``, which acts as the base with the adapters ``names`` folded in and all that was merged before.

        Args:
            module: what is wrapped from now on.
            names: the adapters, innermost first.
            keep_originals: keep the module that stood here for :meth:`unmerge`.
        """
        self._replaced, self._originals = (self.original_base,), {}
        self.base_layer = module
        self.note_merged(names, {}, keep_originals=keep_originals)

    def merge_state(self) -> MergeState:
        """Return what is merged here, for :meth:`restore_merge`. Nothing is copied, but what was replaced since stays in memory."""
        values = {key: kept(p) for key, p in self.base_layer.named_parameters() if p.is_floating_point()}
        return MergeState(self.base_layer, values, self._merged, dict(self._originals), self._replaced, self._permanent)

    def restore_merge(self, state: MergeState) -> None:
        """Have merged what was merged when ``state`` was taken, bit for bit."""
        self.base_layer = state.base_layer
        self._restore(state.values)
        self._merged, self._permanent = state.merged, state.permanent
        self._originals, self._replaced = dict(state.originals), state.replaced
        self._refresh()

    def _check_mergeable(self, name: str, names: Sequence[str], order: Mapping[str, int]) -> None:
        if name in self._merged:
            raise MergeError(f"adapter {name!r} is merged already; a second merge would apply it twice")
        for inner in self._active[: order.get(name, 0)]:
            # Adapters of one kind (sums, or products) come in any order; of different kinds they do not.
            if inner not in (*names, *self._merged) and type(self.adapters[inner]) is not type(self.adapters[name]):
                raise MergeError(
                    f"adapter {name!r} acts around {inner!r}, which is of another kind and not merged: merging only the outer one "
                    f"would change the result; merge {inner!r} too, or first"
                )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original tensors of the base back, bit for bit; what was merged without keeping them stays merged."""
        if self._replaced:
            now = next(self.base_layer.parameters()).device
            self.base_layer = self._replaced[0].to(now)
        self._restore(self._originals)
        self._originals, self._replaced, self._merged = {}, (), self._permanent
        self._refresh()

    def _restore(self, originals: Mapping[str, Tensor]) -> None:
        for key, value in originals.items():
            put(self.base_layer.get_parameter(key), value)  # the model may have moved, or been cast, since

    # -- looking like the base -------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules") or {}
        if name in modules:
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in modules:
                raise
        return getattr(modules["base_layer"], name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name[0] == "_" and not isinstance(value, (Tensor, nn.Module)):  # nothing that nn.Module would register
            self.__dict__[name] = value
        elif isinstance(value, nn.Parameter):  # such as lm_head.weight = embedding.weight, when weights are tied
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    @override
    def extra_repr(self) -> str:
        return f"active={list(self._active)}" + (f", merged={list(self._merged)}" if self._merged else "")


def _require(adapter: nn.Module, trained: bool) -> None:
    """Have the parameters of ``adapter`` require gradients, or not."""
    for parameter in adapter.parameters() if adapter._modules else adapter._parameters.values():
        if parameter is not None and parameter.requires_grad is not trained:
            parameter.requires_grad_(trained)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return an iterator over ``(path, module)`` of every place of the base, each module once.

    The paths are those of the model without adapters. Where a place is adapted, the module is its :class:`AdapterLayer`.
    """
    return walked(model, _walk)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    waiting = [(model, "")]
    while waiting:
        module, path = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if not module._modules.keys().isdisjoint(_TRANSPARENT):
            hidden = [child for key, child in module._modules.items() if key in _TRANSPARENT and child is not None]
            if hidden:
                waiting.append((hidden[0], path))
                continue
        yield path, module
        if isinstance(module, AdapterLayer):
            module = module.base_layer
            seen.add(id(module))
        if module._modules:
            dot = f"{path}." if path else ""
            waiting += [(child, dot + key) for key, child in reversed(module._modules.items()) if child is not None]


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the base module at a place: what an :class:`AdapterLayer` wraps, or ``module`` itself."""
    return module.base_layer if isinstance(module, AdapterLayer) else module


def parents_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return, by the id of a module, every module that holds it and under which name."""
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    waiting = [model]
    while waiting:
        parent = waiting.pop()
        for child_name, child in parent._modules.items():
            if child is not None:
                if id(child) not in parents:
                    waiting.append(child)
                parents.setdefault(id(child), []).append((parent, child_name))
    return parents


def put_in_place(new: nn.Module, places: Sequence[tuple[nn.Module, str]]) -> None:
    """Put ``new`` where ``places``, from :func:`parents_of`, say."""
    forget_walks()
    for parent, child_name in places:
        parent._modules[child_name] = new


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return every :class:`AdapterLayer` of ``model`` by the path its module has in the base model."""
    return {path: module for path, module in base_modules(model) if isinstance(module, AdapterLayer)}


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of all adapters in ``model``, place by place, at each in the order they were added."""
    return list(dict.fromkeys(name for layer in adapter_layers(model).values() for name in layer.adapters))


def has_adapter(model: nn.Module, name: str) -> bool:
    """Tell whether ``model`` has an adapter called ``name``."""
    return any(name in layer.adapters for layer in adapter_layers(model).values())


def adapters_named(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Return the adapters called ``name`` by module path.

    Raises:
        AdapterNotFoundError: there is none.
    """
    found = {path: layer._adapter(name) for path, layer in adapter_layers(model).items() if name in layer.adapters}
    if not found:
        names = adapter_names(model)
        held = f"it holds {', '.join(map(repr, names))}" if names else "it holds none; call inject(model, method) first"
        raise AdapterNotFoundError(
            f"adapter {name!r} was asked for, but {type(model).__name__} has no such adapter: {held}"
        )
    return found


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(name, parameter)`` of the base, names as in the model without adapters, shared parameters once."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, parameter in unwrapped(module)._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), parameter

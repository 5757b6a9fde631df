"""Trainable copies of a module's own parameters: what BitFit, norm tuning and the training of whole layers put around a module.

The base keeps its parameters as they are, and a forward with the adapter runs the module with the copies in their place::

    x ── module(weight, bias) ── y          disabled: the base, bit for bit
    x ── module(weight', bias') ── y        active: the copies, in the dtype of the base

Copies start at the values of the base, in float32 at least. The module is what does the arithmetic, so this works for every
kind of module that reads its parameters in forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import TargetError
from lightning_peft.interfaces import Adapter


class ParameterCopies(Adapter):
    """Copies of parameters of one module, which take their place in forward.

    Args:
        module: the module.
        names: the parameters to train, as ``module.get_parameter`` knows them.
        summed: whether several of these around one module add up what each changed. It costs a second copy of the
            base's values; without it the copies act alone at a place.
        prefix: what stands before the names in an adapter file.

    Raises:
        TargetError: a parameter is packed and cannot be trained.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], *, summed: bool = False, prefix: str = "") -> None:
        super().__init__()
        self.names, self.summed, self.prefix = tuple(names), summed, prefix
        # Name of a parameter that another adapter trains, because both modules hold it -> that adapter and its name there.
        self._leaders: dict[str, tuple[ParameterCopies, str]] = {}
        for name in self.names:
            parameter = module.get_parameter(name)
            if not parameter.is_floating_point():
                raise TargetError(
                    f"{name!r} of {type(module).__name__} is packed as {parameter.dtype} and cannot be trained; load the base in "
                    "16 or 32 bit, or choose other targets"
                )
            dtype = torch.promote_types(torch.float32, parameter.dtype)
            self.register_parameter(_copy_name(name), nn.Parameter(torch.empty_like(parameter, dtype=dtype)))
            if summed:
                base = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
                self.register_buffer(f"base_{_copy_name(name)}", base, persistent=False)

    @override
    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module) -> None:
        for name in self._own_names():
            self.copy_of(name).copy_(base_layer.get_parameter(name))
            if self.summed:
                self.get_buffer(f"base_{_copy_name(name)}").copy_(base_layer.get_parameter(name))

    def copy_of(self, name: str) -> Tensor:
        """Return the copy of the parameter ``name``."""
        if name in self._leaders:
            leader, there = self._leaders[name]
            return leader.copy_of(there)
        return self.get_parameter(_copy_name(name))

    def change_of(self, name: str) -> Tensor:
        """Return what training changed of the parameter ``name``, where changes are summed."""
        return self.copy_of(name) - self.get_buffer(f"base_{_copy_name(name)}")

    def follow(self, name: str, leader: ParameterCopies, there: str) -> None:
        """Train the parameter ``name``, which is also ``there`` of another module, as one tensor: that of ``leader``."""
        delattr(self, _copy_name(name))
        self._leaders[name] = (leader, there)
        self.tied_parameters |= {name}
        leader.tied_parameters |= {there}

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of the module."""
        copies, others = [self], []
        while isinstance(base, functools.partial):  # further adapters inside this one
            inner: Adapter = base.func  # type: ignore[assignment]
            if self.summed and isinstance(inner, ParameterCopies):
                copies.append(inner)
            else:
                others.append(inner)
            base = base.args[0]
        assert isinstance(base, nn.Module)
        call = functools.partial(_call_with, base, _values(base, copies))
        for adapter in reversed(others):
            call = functools.partial(adapter, call)
        return call(*args, **kwargs)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {f"{self.prefix}{name}": self.copy_of(name) for name in self._own_names()}

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        merged = {}
        for name in self._own_names():
            parameter = base_layer.get_parameter(name).detach()  # it may hold another merged adapter by now
            value = parameter + self.change_of(name).detach() if self.summed else self.copy_of(name).detach().clone()
            merged[name] = value.to(parameter.dtype)
        return merged

    def _own_names(self) -> list[str]:
        return [name for name in self.names if name not in self._leaders]


def replaced_names(adapter: Adapter) -> tuple[str, ...]:
    """Return the names of the parameters that ``adapter`` has its own values of, so that those of the base do not matter to it."""
    return adapter.names if isinstance(adapter, ParameterCopies) and not adapter.summed else ()


def trained_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that copies around ``module`` can stand for.

    These are its own, and those below it where it reads them itself, as ``nn.MultiheadAttention`` does.
    """
    return [name for name, _ in module.named_parameters(recurse=reads_below(module))]


def reads_below(module: nn.Module) -> bool:
    """Tell whether ``module`` reads the parameters of its children and does not call them."""
    return type(module).forward is nn.MultiheadAttention.forward


def parameter_places(model: nn.Module, roots: Sequence[str]) -> dict[str, list[str]]:
    """Return path to parameter names for every module at or below ``roots`` that has parameters, each parameter where it acts.

    A container that holds a parameter of a module inside it only lends it (the ``bias`` of BERT's heads) and is left out.
    """
    modules = {path: unwrapped(module) for path, module in base_modules(model) if path}
    places: dict[str, list[str]] = {}
    silent: list[str] = []  # paths of modules whose children are never called
    for path, module in modules.items():
        inside = any(path == root or path.startswith(f"{root}.") for root in roots)
        if not inside or any(path.startswith(f"{above}.") for above in silent):
            continue
        if reads_below(module):
            silent.append(path)
            lent: set[int] = set()
        else:
            lent = {id(parameter) for child in module.children() for parameter in _base_parameters(child)}
        names = [name for name in trained_names(module) if id(module.get_parameter(name)) not in lent]
        if names:
            places[path] = names
    return places


def train_tied_as_one(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Let copies among fresh ``adapters``, by module path, train a parameter that several modules hold as one tensor."""
    modules = {path: unwrapped(module) for path, module in base_modules(model)}
    leaders: dict[int, tuple[ParameterCopies, str]] = {}
    for path, adapter in adapters.items():
        if not isinstance(adapter, ParameterCopies):
            continue
        for name in adapter.names:
            key = id(modules[path].get_parameter(name))
            if key in leaders:
                adapter.follow(name, *leaders[key])
            else:
                leaders[key] = (adapter, name)


def _base_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    for _, inner in base_modules(module):
        yield from unwrapped(inner).parameters(recurse=False)


def _values(module: nn.Module, copies: Sequence[ParameterCopies]) -> dict[str, Tensor]:
    """Return the tensors that stand in for parameters of ``module``, in their dtypes."""
    values: dict[str, Tensor] = {}
    for adapter in copies:
        for name in adapter.names:
            if adapter.summed:
                values[name] = values.get(name, module.get_parameter(name)) + adapter.change_of(name)
            else:
                values[name] = adapter.copy_of(name)
    return {name: value.to(module.get_parameter(name).dtype) for name, value in values.items()}


def _call_with(module: nn.Module, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return torch.func.functional_call(module, dict(values), args, kwargs)


def _copy_name(name: str) -> str:
    return f"trained_{name.replace('.', '__')}"

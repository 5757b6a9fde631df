"""Parameters that FSDP2 shards over processes, changed in place.

FSDP2 gathers from memory of its own, of which the part that a parameter shows is a view. So values are copied into that part: a
parameter whose ``data`` is replaced would go on being gathered with its old values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Tell whether a tensor is one of several parts, of which each process holds one."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def has_shards(model: nn.Module) -> bool:
    """Tell whether a parameter of ``model`` is sharded."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def class_name(module: nn.Module) -> str:
    """Return the name of the class of ``module``, also where FSDP2 has put it into a class of its own made from that one."""
    kind, *bases = type(module).__mro__
    return (bases[1] if bases[0].__name__ == "FSDPModule" else kind).__name__


def reshard(model: nn.Module) -> None:
    """Have every unit of FSDP2 in ``model`` show its parts, also one that keeps its gathered parameters after a forward."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # type: ignore[operator]


def fsdp_parameters(model: nn.Module) -> list[tuple[nn.Parameter, Any]]:
    """Return the sharded parameters of ``model`` with what FSDP2 knows of each, which holds the gradients of a window as they are summed."""
    found: list[tuple[nn.Parameter, Any]] = []
    for module in model.modules():
        state: Any = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        found += [(known.sharded_param, known) for group in groups if group is not None for known in group.fsdp_params]
    return found


def merged_whole(adapter: Any, base_layer: nn.Module) -> dict[str, Tensor]:
    """Return ``adapter.merged_parameters(base_layer)``, of whole tensors: sharded ones are gathered for it, by all processes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_whole(adapter))
        stack.enter_context(_whole(base_layer))
        found: dict[str, Tensor] = adapter.merged_parameters(base_layer)
        return found


@contextlib.contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for inner in module.modules():
            for name, parameter in list(inner._parameters.items()):
                if is_sharded(parameter):
                    before.append((inner, name, parameter))
                    here: Any = parameter
                    inner._parameters[name] = nn.Parameter(here.detach().full_tensor(), here.requires_grad)
        yield
    finally:
        for inner, name, parameter in before:
            inner._parameters[name] = parameter


def kept(parameter: Tensor) -> Tensor:
    """Return the values of a parameter, which stay when :func:`put` gives it others."""
    return parameter.detach().clone() if is_sharded(parameter) else parameter.data


@torch.no_grad()
def put(parameter: Any, value: Any) -> None:
    """Give a parameter the values of a tensor, whole or sharded as it is, in its dtype and where it is."""
    if not is_sharded(parameter):
        parameter.data = value.to(parameter)
        return
    from torch.distributed.tensor import distribute_tensor

    if not is_sharded(value):  # every process has it, so nothing is sent
        value = distribute_tensor(
            value.to(parameter.to_local().device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.to_local().copy_(value.to_local())

"""Tensors that FSDP2 shards over processes, made whole, and back.

A checkpoint in one file is the same whichever strategy wrote it: whole tensors by the names of the parameters, and states of
optimizers by position. Only what the module's ``state_dict`` holds is gathered, adapters and no base::

    rank 0   [A0 B0]  ─┐
    rank 1   [A1 B1]  ─┴─▶  A, B whole on rank 0  ─▶  file  ─▶  each rank reads it and keeps its part
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_peft.adapter_layer import AdapterLayer
from lightning_peft.errors import CheckpointMismatchError


def gathered(value: Any, *, keep: bool) -> Any:
    """Return ``value`` with every sharded tensor in it whole and on the CPU. All processes must call it.

    Args:
        value: tensors in dicts, lists and tuples.
        keep: whether this process wants the result; the others help to gather and get tensors without elements.
    """
    if isinstance(value, DTensor):
        whole = cast("DTensor", value.detach()).full_tensor()
        return whole.cpu() if keep else whole.new_empty(0, device="cpu")
    if isinstance(value, Tensor):
        return value.detach().cpu() if keep else value.new_empty(0, device="cpu")
    if isinstance(value, dict):
        return {key: gathered(one, keep=keep) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(one, keep=keep) for one in value)
    return value


def sharded_like(whole: Tensor, here: Tensor) -> Tensor:
    """Return ``whole``, which each process holds, as ``here`` is sharded; nothing is sent."""
    if not isinstance(here, DTensor):
        return whole.to(here.device)
    whole = whole.to(here.to_local().device)
    return distribute_tensor(whole, here.device_mesh, here.placements, src_data_rank=None)


@torch.no_grad()
def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the parameters and buffers of ``module`` that have their names.

    Raises:
        CheckpointMismatchError: one has another shape here, or there is none of its name.
    """
    own: dict[str, Any] = module.state_dict(keep_vars=True)
    for name, value in state.items():
        here = own.get(name)
        if not isinstance(here, Tensor) or here.shape != value.shape:
            found = f"has the shape {list(here.shape)} here" if isinstance(here, Tensor) else "is not in the module"
            raise CheckpointMismatchError(f"the checkpoint holds {name!r} {list(value.shape)}, which {found}")
        here.copy_(sharded_like(value.to(here.dtype), here))


def sharded_optimizer_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer, by position and whole, with each tensor sharded as the parameter it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[Any, Any] = {}
    for position, entry in state["state"].items():
        parameter = parameters[position]
        entries[position] = {
            key: sharded_like(value, parameter)
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim()
            else value
            for key, value in entry.items()
        }
    return {**state, "state": entries}


@contextlib.contextmanager
def whole_adapters(module: nn.Module, *, keep: bool) -> Iterator[None]:
    """Have the adapters in ``module`` hold whole tensors on the CPU for the time of a ``with`` block. All processes must enter it.

    Args:
        module: what holds adapted models.
        keep: whether this process wants them; the others help to gather.
    """
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for layer in [one for one in module.modules() if isinstance(one, AdapterLayer)]:
            for inner in layer.adapters.modules():
                for name, parameter in list(inner._parameters.items()):
                    if parameter is None or not isinstance(parameter.data, DTensor):
                        continue
                    whole = gathered(parameter, keep=keep)
                    before.append((inner, name, parameter))
                    inner._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        yield
    finally:
        for inner, name, parameter in before:
            inner._parameters[name] = parameter

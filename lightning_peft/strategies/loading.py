"""Giving a sharded base its values: each process reads the rows that it keeps.

::

    file      [ W: 8 rows ]
    rank 0      rows 0-3 ──▶ its part of W        no process holds W, and none sends it
    rank 1      rows 4-7 ──▶ its part of W
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.errors import ConfigError
from lightning_peft.injection import adapted_roots
from lightning_peft.unread_weights import Unread, unread


def refuse_unmade(module: nn.Module) -> None:
    """Refuse adapters without values: their method made them of more than the module they adapt.

    Raises:
        ConfigError: there is one.
    """
    for root in adapted_roots(module):
        for path, layer in adapter_layers(root).items():
            for name, adapter in layer.adapters.items():
                if any(tensor.is_meta for tensor in (*adapter.parameters(), *adapter.buffers())):
                    raise ConfigError(
                        f"adapter {name!r} has no values at {path!r}: it is made of weights that are not read yet. Load the base whole in each process: "
                        "PEFTFSDPStrategy(read_weights=False)"
                    )


@torch.no_grad()
def read_weights(module: nn.Module, device: torch.device) -> int:
    """Give the unread parameters in ``module`` their values, as they are sharded; return how many elements were read.

    Args:
        module: sharded by FSDP2, or in part.
        device: where the values go.
    """
    made: dict[int, nn.Parameter] = {}
    count = 0
    for inner in module.modules():
        for name, value in unread(inner).items():
            parameter = inner._parameters[name]
            assert parameter is not None
            if id(parameter) not in made:  # tied weights stay tied
                local = _own_part(parameter, value).to(device)
                count += local.numel()
                made[id(parameter)] = nn.Parameter(_as(local, parameter), requires_grad=parameter.requires_grad)
            inner._parameters[name] = made[id(parameter)]
    return count


def _own_part(parameter: Any, value: Unread) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value.read().to(parameter.dtype)
    placements = parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, placements)
    found = value.rows(offset[0], offset[0] + shape[0])
    for dim in range(1, found.dim()):  # of a tensor that is split over a group, or by the user
        found = found.narrow(dim, offset[dim], shape[dim])
    return found.to(parameter.dtype).contiguous()


def _as(local: Tensor, parameter: Any) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

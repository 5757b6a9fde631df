"""Buffers that training may change, as the statistics of batch normalisation: before each step those of all processes are the first one's.

DDP sends every buffer in every step, those of a frozen base and the frozen matrices of methods with them, and FSDP2 sends none, so that
the statistics of its processes part. Here both send what may differ, and nothing else::

    frozen base        rotary frequencies, masks, statistics in eval mode            stay
    adapters           frozen matrices, first values, counts of the schedule         stay: the same on all processes
    all else           statistics that are counted, buffers of a head of one's own   sent
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.adapter_layer import adapter_layers, base_modules, unwrapped
from lightning_peft.injection import adapted_roots


def moving_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers in ``module`` that a step may change in another way on each process.

    Left out are those of frozen modules of an adapted base, but for statistics that are being counted, and those that adapters hold
    themselves, as what an adapter does not train it does not change in forward.
    """
    still: set[int] = set()
    for root in adapted_roots(module):
        for _, place in base_modules(root):
            held = unwrapped(place)
            counts = isinstance(held, nn.modules.batchnorm._NormBase) and held.training
            if not counts and not any(parameter.requires_grad for parameter in held.parameters(recurse=False)):
                still.update(map(id, held.buffers(recurse=False)))
        for layer in adapter_layers(root).values():
            for adapter in layer.adapters.values():
                still.update(map(id, adapter.buffers(recurse=False)))
    return [buffer for buffer in module.buffers() if id(buffer) not in still]


@torch.no_grad()
def share(tensors: list[Tensor]) -> None:
    """Give ``tensors`` the values that the first process has; all processes must call it, with the same ones.

    They are sent in one piece for each dtype.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        together = torch.cat([tensor.detach().flatten() for tensor in alike])
        dist.broadcast(together, src=0)
        for tensor, values in zip(alike, torch.split(together, [tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(values.view_as(tensor))

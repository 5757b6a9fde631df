"""Sharded training: an adapted model under FSDP2 is the model it is without."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_peft.state import adapter_state_dict
from lightning_peft.testing.subject import Subject


class ShardingTests(Subject):
    """Tests of ``fsdp_ready``, with the real ``fully_shard`` in one process."""

    def test_it_trains_sharded(self) -> None:
        """With ``fsdp_ready``, outputs and trained tensors are those of the unsharded model."""
        self.need("fsdp_ready")
        model = self.adapted()
        kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        if len(kinds) > 1:
            pytest.skip(
                f"FSDP2 wants trained parameters of one dtype in a group, this adapter has {sorted(map(str, kinds))}"
            )
        plain = copy.deepcopy(model)
        with _one_process():
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            for whole in (plain, model):
                self.train(whole, steps=2)
            assert torch.equal(self.outputs(model), self.outputs(plain)), (
                "trained under fully_shard, the adapter gives another output; read tensors in forward only, where they are "
                "gathered, and keep no other reference to them, or set fsdp_ready = False"
            )
            wanted = adapter_state_dict(plain)
            for name, tensor in adapter_state_dict(model).items():
                assert torch.equal(_whole(tensor), wanted[name]), (
                    f"trained under fully_shard, {name!r} has other values; set fsdp_ready = False if that cannot be"
                )


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Have a process group of this process alone, unless there is a group already."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()

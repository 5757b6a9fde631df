"""Sharded training: an adapted model under FSDP2 is the model it is without."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.interfaces import Adapter
from lightning_peft.state import adapter_state_dict
from lightning_peft.testing.subject import Subject


class ShardingTests(Subject):
    """Tests of ``fsdp_ready``, with the real ``fully_shard`` in one process, and of adapters that say how they are split."""

    def test_parts_of_a_split_layer_make_the_whole(self) -> None:
        """Where ``tensor_parallel_plan`` gives one, two halves of a linear layer with their adapters give what both give whole."""
        model = self.adapted()
        layers = {place: layer for place, layer in adapter_layers(model).items() if type(layer.base_layer) is nn.Linear}
        found = [
            (place, layer.base_layer, layer._adapter(name), style)
            for place, layer in layers.items()
            for name, style in itertools.product(layer.adapters, ("colwise", "rowwise"))
            if copy.deepcopy(layer._adapter(name)).tensor_parallel_plan(style, 0, 2) is not None
        ]
        if not found:
            pytest.skip(f"no adapter of {self.method.name} here says how it is split (tensor_parallel_plan)")
        self.train(model)
        for place, base, adapter, style in found:
            assert isinstance(base, nn.Linear)
            x = torch.randn(3, base.in_features, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                halves = [_half(adapter, base, style, index, x) for index in (0, 1)]
                whole = torch.cat(halves, -1) if style == "colwise" else halves[0] + halves[1]
                assert self.close(whole, adapter(base, x)), (
                    f"{type(adapter).__name__} at {place!r}: halves of a {style} layer do not make the whole; correct tensor_parallel_plan, or "
                    "return None from it"
                )

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


def _half(adapter: Adapter, base: nn.Linear, style: str, index: int, x: Tensor) -> Tensor:
    """Return what half of a linear layer gives with its adapter: half of the outputs, or of the sum over inputs."""
    part, out = copy.deepcopy(adapter), style == "colwise"
    plan = part.tensor_parallel_plan(style, index, 2)
    assert plan is not None
    assert set(plan) == {name for name, _ in part.named_parameters()}, (
        f"{type(adapter).__name__}.tensor_parallel_plan must name each parameter, got {sorted(plan)}"
    )
    values = {}
    for name, parameter in part.named_parameters():
        dim = plan[name]
        values[name] = parameter if dim is None else parameter.chunk(2, dim)[index]
    mine = copy.deepcopy(base)
    mine.weight = nn.Parameter(base.weight.chunk(2, 0 if out else 1)[index])
    if base.bias is not None:
        mine.bias = nn.Parameter(base.bias.chunk(2)[index] if out else base.bias * (index == 0))
    result: Tensor = torch.func.functional_call(part, values, (mine, x if out else x.chunk(2, -1)[index]))
    return result


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

"""Tensor parallelism: the linear layers of attention and feed-forward are split over a group of processes, and adapters as their layer is.

::

    mesh            replicate x shard          x   tensor_parallel
                    batches and FSDP2's parts      one batch, parts of heads and of hidden features

    region          self_attn                               mlp
    colwise         q_proj, k_proj, v_proj: some heads      gate_proj, up_proj: some features      rows of the weight
    rowwise         o_proj                                  down_proj                              its columns

Which layers these are stands in transformers' configurations (``base_model_tp_plan``). A region, which is a module with such layers, is
split if all that its plan asks for is known here; other regions, the embedding, the norms and the head stay whole in each process of
a group, and are sharded by FSDP2 over the others. A split parameter is a DTensor over the group before FSDP2 shards it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lightning_peft.adapter_layer import AdapterLayer, base_modules, unwrapped
from lightning_peft.data_position import same_samples, sample_of
from lightning_peft.errors import ConfigError
from lightning_peft.injection import adapted_roots, records
from lightning_peft.interfaces import Adapter
from lightning_peft.quantized_layers import is_packed
from lightning_peft.random_state import random_state, set_random_state
from lightning_peft.saved_modules import inside
from lightning_peft.strategies.split_forward import Entered, Held, SplitForward

_SPLIT, _SUMMED = ("colwise", "rowwise"), "replicated_with_grad_allreduce"
_HEADS = ("num_attention_heads", "num_key_value_heads")


def mesh_of(device_type: str, replicate: int, shard: int, tensor_parallel: int) -> DeviceMesh:
    """Return the mesh of all processes; the last dimension, of processes side by side, is there where models are split."""
    shape, names = (replicate, shard), ("replicate", "shard")
    if tensor_parallel > 1:
        shape, names = (*shape, tensor_parallel), (*names, "tensor_parallel")  # type: ignore[assignment]
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


# -- what is split -----------------------------------------------------------------------------------------------------


def plan_of(model: nn.Module) -> dict[str, str]:
    """Return module path to style, as transformers' configurations in ``model`` have it, with the layers' numbers filled in."""
    places = {path: unwrapped(module) for path, module in base_modules(model)}
    found: dict[str, str] = {}
    for path, module in places.items():
        if getattr(module, "base_model", None) is not module:  # only those that a configuration's paths start from
            continue
        plan: Mapping[str, str] = getattr(getattr(module, "config", None), "base_model_tp_plan", None) or {}
        for pattern, style in plan.items():
            below = f"{path}.{pattern}" if path else pattern
            shape = re.compile(re.escape(below).replace(r"\*", r"\d+"))
            hits = [other for other in places if shape.fullmatch(other)]
            # A parameter, such as those of fused experts, stands for the module that holds it.
            found |= dict.fromkeys(
                hits or [f"{other}.{below.rpartition('.')[2]}" for other in _holders(places, below)], style
            )
    return found


def _holders(places: Mapping[str, nn.Module], pattern: str) -> list[str]:
    shape = re.compile(re.escape(pattern.rpartition(".")[0]).replace(r"\*", r"\d+"))
    return [path for path in places if shape.fullmatch(path)]


def split_regions(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return by region what is split in it: path of the layer to style.

    Raises:
        ConfigError: the model has no plan, or none of which a region can be split.
    """
    places, regions = {path: unwrapped(module) for path, module in base_modules(model)}, dict[str, dict[str, str]]()
    plan = plan_of(model)
    for path, style in plan.items():
        regions.setdefault(path.rpartition(".")[0], {})[path] = style
    found = {region: styles for region, styles in regions.items() if region and _is_known(places, styles)}
    if not found:
        styles = f"its plan has the styles {', '.join(sorted(set(plan.values())))}" if plan else "it has no such plan"
        raise ConfigError(
            f"tensor_parallel splits the linear layers that base_model_tp_plan of a transformers configuration calls colwise and rowwise; for "
            f"{type(model).__name__} {styles}, and nothing can be split. Use tensor_parallel=1"
        )
    return found


def _is_known(places: Mapping[str, nn.Module], styles: Mapping[str, str]) -> bool:
    layers = [path for path, style in styles.items() if style in _SPLIT]
    return (
        {styles[path] for path in layers} == set(_SPLIT)
        and all(style in (*_SPLIT, _SUMMED) for style in styles.values())
        and all(isinstance(places.get(path), nn.Linear) or is_packed(places[path]) for path in layers if path in places)
        and all(path in places for path in styles)
    )


def check_splittable(model: nn.Module, regions: Mapping[str, Mapping[str, str]], count: int, index: int) -> None:
    """Refuse what cannot be split over ``count`` processes, of which this is number ``index``.

    Raises:
        ConfigError: heads or features do not divide; a layer is quantised; an adapter cannot be split, or acts within a region.
    """
    places = dict(base_modules(model))
    for region, styles in regions.items():
        _check_widths(model, places, region, styles, count)
        for path, place in places.items():
            if not inside(path, [region]) or not isinstance(place, AdapterLayer):
                continue
            if place.merged:
                raise ConfigError(
                    f"adapter {place.merged[0]!r} is merged at {path!r}, which is to be split; call unmerge_adapters(model) before training"
                )
            for name, adapter in place.adapters.items():
                assert isinstance(adapter, Adapter)
                if adapter.only_listens and next(adapter.parameters(), None) is None:
                    continue
                who = f"adapter {name!r} at {path!r} is {records(model)[name].method!r}"
                if styles.get(path) not in _SPLIT:
                    raise ConfigError(
                        f"{who}, which acts within {region!r}: under tensor_parallel each process has a part of what is computed there; target the "
                        f"linear layers {', '.join(sorted(p.rpartition('.')[2] for p, s in styles.items() if s in _SPLIT))}, or use tensor_parallel=1"
                    )
                if _dims(adapter, styles[path], index, count) is None:
                    raise ConfigError(
                        f"{who}, whose {type(adapter).__name__} does not say how its tensors are split with a {styles[path]} layer "
                        "(Adapter.tensor_parallel_plan); use LoRA without trained biases and without slices, or tensor_parallel=1"
                    )
        for path in styles:
            if is_packed(unwrapped(places[path])):
                raise ConfigError(
                    f"{path!r} is quantised ({type(unwrapped(places[path])).__name__}), and packed weights are not split: load the base in 16 or 32 bit, "
                    "or use tensor_parallel=1, under which FSDP2 shards them"
                )


def _check_widths(
    model: nn.Module, places: Mapping[str, nn.Module], region: str, styles: Mapping[str, str], count: int
) -> None:
    around = unwrapped(places[region])
    config = getattr(around, "config", getattr(model, "config", None))
    heads = {name: getattr(config, name) for name in _HEADS if isinstance(getattr(config, name, None), int)}
    if hasattr(around, "head_dim") and any(number % count for number in heads.values()):
        numbers = " and ".join(f"{name}={number}" for name, number in heads.items())
        raise ConfigError(
            f"tensor_parallel={count} processes share the heads of {region!r} equally, but {type(model).__name__} has {numbers}; choose a number that "
            "divides them"
        )
    for path, style in styles.items():
        layer = unwrapped(places[path])
        width = int(getattr(layer, "out_features" if style == "colwise" else "in_features", 0))
        if style in _SPLIT and width % count:
            raise ConfigError(
                f"tensor_parallel={count} does not divide the {width} {'outputs' if style == 'colwise' else 'inputs'} of {path!r}"
            )


def _dims(adapter: Adapter, style: str, index: int, count: int) -> Mapping[str, int | None] | None:
    """Return the dimension of each parameter of an adapter that is split, None for none; None if it cannot be."""
    found = adapter.tensor_parallel_plan(style, index, count)
    names = {name for name, _ in adapter.named_parameters()}
    return found if found is not None and set(found) == names and not any(True for _ in adapter.buffers()) else None


# -- splitting ---------------------------------------------------------------------------------------------------------


def split(module: LightningModule, mesh: DeviceMesh) -> list[str]:
    """Split the adapted models in ``module`` over ``mesh``, of one dimension, in place; return the paths of the layers.

    Args:
        module: with the same weights in every process, or not read yet; nothing in it is sharded.
        mesh: the group.

    Raises:
        ConfigError: there is nothing to split, or something that cannot be.
    """
    if any(isinstance(inner, FSDPModule) for inner in module.modules()):
        raise ConfigError(
            f"{type(module).__name__} calls fully_shard itself, so it is too late to split its layers; leave sharding to the strategy, or use tensor_parallel=1"
        )
    roots, found = adapted_roots(module), list[str]()
    if not roots:
        raise ConfigError(f"tensor_parallel splits adapted models, and {type(module).__name__} holds none; call inject")
    index, count = mesh.get_local_rank(), mesh.size()
    regions = {id(root): split_regions(root) for root in roots}
    for root in roots:
        check_splittable(root, regions[id(root)], count, index)
    divided, taken = _Divided(mesh), set[int]()
    for root in roots:
        places = dict(base_modules(root))
        for region, styles in regions[id(root)].items():
            entered = Entered()
            for path, style in styles.items():
                held = list(_held(places[path], style, index, count))
                taken |= {id(one.owner) for one, _ in held}
                divided.attach(places[path], held, "whole" if style == _SUMMED else style, entered)
                found += [path] if style in _SPLIT else []
            _refuse_trained(places, region, taken)
    for layer, rest in _trained_whole(module, taken):
        divided.attach(layer, [(one, None) for one in rest], "whole")
    return found


class _Divided:
    """Turns parameters into DTensors, each once, and has layers run with what is here of them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.made: dict[int, nn.Parameter] = {}

    def attach(
        self, layer: nn.Module, held: list[tuple[Held, int | None]], style: str, entered: Entered | None = None
    ) -> None:
        for one, dim in held:
            parameter = one.owner._parameters[one.name]
            assert parameter is not None
            if isinstance(parameter, DTensor):  # of a module that stands in two places
                continue
            if id(parameter) not in self.made:
                self.made[id(parameter)] = self._part(parameter, dim)
            one.owner._parameters[one.name] = self.made[id(parameter)]
        if held or style != "whole":
            SplitForward(self.mesh, [one for one, _ in held], style, entered).attach(layer)

    def _part(self, parameter: nn.Parameter, dim: int | None) -> nn.Parameter:
        local, placements = parameter.detach(), list[Placement]([Replicate()])
        if dim is not None:
            length = parameter.shape[dim] // self.mesh.size()
            local = local.narrow(dim, self.mesh.get_local_rank() * length, length).clone()  # the whole weight is freed
            placements = [Shard(dim)]
        stride = torch.empty(parameter.shape, device="meta").stride()
        whole = DTensor.from_local(
            local.contiguous(), self.mesh, placements, run_check=False, shape=parameter.shape, stride=stride
        )
        return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _held(place: nn.Module, style: str, index: int, count: int) -> Iterator[tuple[Held, int | None]]:
    """Yield the parameters of a layer of the plan, each with the dimension that is split."""
    layer = unwrapped(place)
    if style == _SUMMED:  # it sees heads of this process only
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield Held(layer, name, "sum"), None
        return
    yield Held(layer, "weight", "own"), 0 if style == "colwise" else 1
    if layer._parameters.get("bias") is not None:
        yield (Held(layer, "bias", "own"), 0) if style == "colwise" else (Held(layer, "bias", "first"), None)
    if isinstance(place, AdapterLayer):
        for adapter in place.adapters.values():
            assert isinstance(adapter, Adapter)
            for path, dim in (_dims(adapter, style, index, count) or {}).items():
                owner, _, name = path.rpartition(".")
                yield Held(adapter.get_submodule(owner), name, "sum" if dim is None else "own"), dim


def _refuse_trained(places: Mapping[str, nn.Module], region: str, taken: set[int]) -> None:
    """Refuse parameters that are trained in a region without being split with it: their gradients would be those of a part."""
    for path, place in places.items():
        if inside(path, [region]) and id(unwrapped(place)) not in taken:
            for name, parameter in unwrapped(place).named_parameters(recurse=False):
                if parameter.requires_grad:
                    raise ConfigError(
                        f"{path}.{name} is trained within {region!r}, where each process of tensor_parallel has a part of what is computed, and the "
                        "plan of the model does not say how; freeze it, or use tensor_parallel=1"
                    )


def _trained_whole(module: nn.Module, taken: set[int]) -> Iterator[tuple[nn.Module, list[Held]]]:
    """Yield the layers outside of regions that train parameters, with these: every process of a group computes their whole gradient."""
    waiting, seen = [module], set[int]()
    while waiting:
        inner = waiting.pop()
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        adapters = list(inner.adapters.modules()) if isinstance(inner, AdapterLayer) else []
        own = unwrapped(inner)
        held = [
            Held(owner, name, "own")
            for owner in [*adapters, own]
            if id(owner) not in taken
            for name, parameter in owner._parameters.items()
            if parameter is not None and (parameter.requires_grad or owner is not own)
        ]
        if held and inner is not module:
            yield inner, held
        waiting += [child for child in own._modules.values() if child is not None]


# -- one batch in a group ----------------------------------------------------------------------------------------------


def share_random_state(mesh: DeviceMesh) -> None:
    """Give all processes of a group the random numbers of its first, as each of them draws the masks of dropout for itself."""
    state: list[Any] = [random_state()]
    dist.broadcast_object_list(state, group=mesh.get_group(), group_src=0)
    if mesh.get_local_rank():
        set_random_state({**state[0], "cuda": None if state[0]["cuda"] is None else state[0]["cuda"].cpu()})


def check_batch(mesh: DeviceMesh, batch: Any) -> None:
    """Compare the batches of a group, which must be one.

    Raises:
        ConfigError: they differ, on every process.
    """
    everybody: list[Any] = [None] * mesh.size()
    here: list[Tensor] = [tensor.cpu() for tensor in sample_of(batch)]
    dist.all_gather_object(everybody, here, group=mesh.get_group())
    if not all(same_samples(everybody[0], other) for other in everybody[1:]):
        raise ConfigError(
            f"the {mesh.size()} processes of a tensor_parallel group got different batches, and would train on a mixture of them. A sampler of one's "
            "own takes its places from trainer.distributed_sampler_kwargs ('num_replicas' and 'rank'), not from the number of processes; an order "
            "drawn at random needs the same seed in all of them"
        )

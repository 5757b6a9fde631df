"""The optimizer state of a dense run, for the experts that its MLPs became.

At first the experts of an MLP get its gradient in parts: Σ_e g_e = g. With K of E experts a token, an expert's mean is g / E, and the mean
of its squares g² / (E K), as that is mostly noise. So of Adam's moments, by parameter name in the dense model::

    fresh     nothing
    copy      exp_avg          exp_avg_sq               Komatsuzaki et al., arXiv:2212.05055, for vision
    scaled    exp_avg / E      exp_avg_sq / (E K)

Routers always start without state. A parameter that is trained as a copy (``train="all"``) gets its own state in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapter_layer import adapters_named, base_parameters
from lightning_peft.arithmetic.parameter_copies import ParameterCopies
from lightning_peft.errors import AdapterMismatchError, ConfigError
from lightning_peft.moe.mixture import MixtureOfExperts

Mode = Literal["fresh", "copy", "scaled"]
"""What experts take over of the dense state."""
States = dict[str, dict[str, Any]]
"""Parameter name to the optimizer's state of it."""


def named_optimizer_state(model: nn.Module, optimizer: Optimizer) -> States:
    """Return the state of ``optimizer`` by the names of ``model``, which it trains and which has no adapters."""
    names = {id(parameter): name for name, parameter in base_parameters(model)}
    return {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items() if id(parameter) in names}


def upcycle_optimizer_state(
    model: nn.Module, dense_state: Mapping[str, Mapping[str, Any]], mode: Mode = "scaled", *, name: str = "default"
) -> States:
    """Return the optimizer state of the adapter ``name``, by name in ``model.named_parameters()``.

    Args:
        model: upcycled.
        dense_state: by parameter name of the dense model; its tensors of the parameter's shape, such as ``exp_avg``, are taken over, and
            other values, such as ``step``, as they are.
        mode: what experts get.
        name: of the adapter.

    Raises:
        AdapterMismatchError: ``dense_state`` has none of a parameter that an expert comes from, or tensors of another shape, as
            Adafactor and 8-bit optimizers have.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if mode == "fresh":
        return {}
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    result: States = {}
    for place, adapter in adapters_named(model, name).items():
        if isinstance(adapter, MixtureOfExperts):
            states = _experts(adapter, dense_state, scaled=mode == "scaled")
        elif isinstance(adapter, ParameterCopies):
            states = {_held(adapter, key): dict(dense_state.get(f"{place}.{key}", {})) for key in adapter.names}
        else:
            continue
        result |= {paths[id(adapter.get_parameter(key))]: state for key, state in states.items() if key and state}
    return result


def set_optimizer_state(optimizer: Optimizer, model: nn.Module, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Give ``optimizer`` the ``states`` of parameters of ``model`` by name, on the device of each."""
    parameters = dict(model.named_parameters())
    for name, state in states.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: value.to(parameter.device).clone() if isinstance(value, Tensor) and value.dim() else _copied(value)
            for key, value in state.items()
        }


def _experts(adapter: MixtureOfExperts, dense_state: Mapping[str, Mapping[str, Any]], *, scaled: bool) -> States:
    names = adapter.dense_names()
    missing = [name for name in names if not dense_state.get(name)]
    if missing:
        raise AdapterMismatchError(
            f"the dense optimizer state has nothing of {missing[0]!r}, which experts come from; it has {len(dense_state)} parameters, such as "
            f"{next(iter(dense_state), None)!r}. Give it by the names of the dense model, or mode='fresh'"
        )
    for name, shape in names.items():
        _refuse_foreign(name, shape, dense_state[name])
    shape = next(iter(names.values()))
    fields = [
        key
        for key, value in dense_state[next(iter(names))].items()
        if isinstance(value, Tensor) and value.shape == shape
    ]
    copies, choices = adapter.layout.copies, adapter.copies_per_token
    factors = {"exp_avg": 1 / copies, "exp_avg_sq": 1 / (copies * choices), "max_exp_avg_sq": 1 / (copies * choices)}
    tensors = adapter.tensors()
    states: States = {
        key: {field: value for field, value in dense_state[next(iter(names))].items() if field not in fields}
        for key in tensors
    }
    for field in fields:
        dense = adapter.dense({name: dense_state[name][field] for name in names})
        like = next(iter(dense.values()))
        filled = {
            key: torch.empty_like(tensor, dtype=like.dtype, device=like.device) for key, tensor in tensors.items()
        }
        adapter.layout.fill(filled, dense)
        for key, tensor in filled.items():
            states[key][field] = tensor.mul_(factors.get(field, 1.0)) if scaled else tensor
    return states


def _refuse_foreign(name: str, shape: Sequence[int], state: Mapping[str, Any]) -> None:
    """Refuse tensors that are neither numbers nor of the parameter's shape: nobody knows what of them belongs to which expert."""
    for field, value in state.items():
        if isinstance(value, Tensor) and value.dim() and tuple(value.shape) != tuple(shape):
            raise AdapterMismatchError(
                f"the dense optimizer state has {field!r} of shape {tuple(value.shape)} for {name!r} of shape {tuple(shape)}, as optimizers with "
                "factored or packed states do; such a state cannot be shared out among experts: use mode='fresh'"
            )


def _held(adapter: ParameterCopies, key: str) -> str:
    """Return under which name ``adapter`` holds the copy of ``key``; empty where another adapter trains it."""
    copy = adapter.copy_of(key)
    return next((name for name, parameter in adapter.named_parameters() if parameter is copy), "")


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

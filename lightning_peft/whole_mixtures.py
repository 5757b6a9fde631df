"""A model with mixtures of experts as one plain model of transformers: its parameters, wherever they are, under one configuration.

Nothing is held twice that need not be: the plain model shares the tensors of the live one, and the experts where they are held as
whole weights in the same precision.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.activation import active_adapters
from lightning_peft.adapter_layer import adapter_layers, base_parameters
from lightning_peft.errors import ExportError, MergeError
from lightning_peft.injection import records
from lightning_peft.merging import merge_adapters
from lightning_peft.moe.mixtures import Mixture, mixtures
from lightning_peft.moe.routing import ExpertChoiceRouter, Router, TopKRouter
from lightning_peft.moe.transformers_formats import SOURCES, MixtureShape, empty_experts_allowed, no_format, own_format


def acting_mixtures(model: nn.Module) -> dict[str, Mixture]:
    """Return the mixtures that act in ``model``, by place, in order.

    Raises:
        ExportError: there are none, or the model has no plain weights.
    """
    kind = type(model).__name__
    places = mixtures(model, {name: held.method for name, held in records(model).items()})
    if not places:
        raise ExportError(
            f"an export of a mixture of experts was asked for, but none is active in this {kind}; the exporter 'merged_transformers' writes "
            "models without one"
        )
    for name, parameter in base_parameters(model):
        if parameter.is_meta:
            raise ExportError(f"{name!r} is on the meta device and has no values to export; load the weights first")
        if not parameter.is_floating_point():
            raise ExportError(
                f"{name!r} is packed as {parameter.dtype}, and the exported model would not be; load the base in 16 or 32 bit"
            )
    if kind not in SOURCES:
        raise ExportError(no_format(kind))
    return places


def shape_of(places: Mapping[str, Mixture], rules: Mapping[str, Router]) -> MixtureShape:
    """Return what the mixtures have in common, when they are routed by ``rules``.

    Raises:
        ExportError: they differ, or no format of transformers has such experts or such a rule.
    """
    layers, shapes = [], {}
    for path, mixture in places.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.mlp", path)
        if match is None:
            raise ExportError(f"the mixture at {path!r} is not at the MLP of a decoder layer; {own_format()}")
        layers.append(int(match.group(1)))
        weights, rule = mixture.weights(), rules[path]
        if not weights.gated:
            raise ExportError(
                f"the experts at {path!r} are MLPs without a gate, which no format here has; {own_format()}"
            )
        if weights.gate_up_bias is not None or weights.down_bias is not None:
            raise ExportError(
                f"the experts at {path!r} have biases (mlp_bias=True), which no format here has; {own_format()}"
            )
        top_k, normalized = _top_k(path, rule)
        balance = getattr(mixture.method, "balance_coef", 0.0)
        shapes[path] = (len(weights.down), weights.down.shape[2], top_k, normalized, balance)
    first = next(iter(shapes))
    for path, shape in shapes.items():
        if shape != shapes[first]:
            names = "experts, hidden features, top_k, normalised weights, balance"
            raise ExportError(
                f"the mixtures differ, and the formats have one setting for all layers: ({names}) is {shapes[first]} at {first!r} and {shape} at "
                f"{path!r}; {own_format()}"
            )
    experts, hidden, top_k, normalized, balance = shapes[first]
    return MixtureShape(experts, hidden, top_k, normalized, tuple(sorted(layers)), balance)


def _top_k(path: str, rule: Router) -> tuple[int, bool]:
    """Return how many experts a token goes to, and whether their weights sum to one."""
    if isinstance(rule, ExpertChoiceRouter):
        raise ExportError(
            f"at {path!r} experts choose tokens, and in every format of transformers tokens choose experts; as_top_k=True writes that "
            f"other function, and {own_format()}"
        )
    if type(rule) is not TopKRouter:
        raise ExportError(
            f"the router {rule.name!r} at {path!r} has no format in transformers, which has 'topk' only; {own_format()}"
        )
    return rule.top_k, rule.combine != "softmax"


@contextlib.contextmanager
def others_merged(model: nn.Module, places: Mapping[str, Mixture]) -> Iterator[dict[str, Tensor]]:
    """Have adapters beside the mixtures merged for the time of a ``with`` block.

    Gives the parameters, by name, that the adapters of the mixtures train beside the experts: copies, which take the place of those
    of the base.

    Raises:
        ExportError: one cannot be merged.
    """
    own = {mixture.adapter_name for mixture in places.values()}
    layers = adapter_layers(model)
    before = {path: layer.merge_state() for path, layer in layers.items()}
    others = [
        name
        for name in active_adapters(model)
        if name not in own and not any(name in state.merged for state in before.values())
    ]
    try:
        if others:
            merge_adapters(model, others)
        beside = {}
        for path, layer in layers.items():
            for name in own.intersection(layer.active) if path not in places else ():
                adapter = layer._adapter(name)
                if next(adapter.parameters(), None) is not None:
                    for key, value in adapter.merged_parameters(layer.base_layer).items():
                        beside[f"{path}.{key}"] = value
    except MergeError as error:
        raise ExportError(
            f"adapters beside the mixture of experts are merged in an export, and one cannot be: {error}"
        ) from error
    try:
        yield beside
    finally:
        if others:
            for path, layer in layers.items():
                layer.restore_merge(before[path])


@torch.no_grad()
def target_model(
    model: Any, config: Any, places: Mapping[str, Mixture], beside: Mapping[str, Tensor], *, copies: bool = False
) -> Any:
    """Return the model of ``config`` that computes what ``model`` does.

    Args:
        model: the live model.
        config: a configuration of transformers.
        places: its mixtures.
        beside: parameters that take the place of those of the base, by name.
        copies: make every expert a copy of the MLP and every router zero: the base that low-rank experts are over.

    Raises:
        ExportError: the two do not have the same parameters.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), empty_experts_allowed():
        target = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    inside = tuple(f"{path}." for path in places)
    state = {name: parameter.detach() for name, parameter in base_parameters(model) if not name.startswith(inside)}
    state |= {name: value.to(model.dtype) for name, value in beside.items() if not name.startswith(inside)}
    for mixture in places.values():
        state |= _block(mixture, model.dtype, copies)
    wanted = target.state_dict()
    for name in wanted:  # the shared expert of Qwen2Moe, which has no neurons
        if name not in state and ".mlp.shared_expert" in name:
            state[name] = torch.zeros(wanted[name].shape, dtype=model.dtype, device=model.device)
    tied = config.tie_word_embeddings
    try:
        problems = target.load_state_dict(state, assign=True, strict=False)
    except RuntimeError as error:  # a shape
        raise ExportError(
            f"{type(target).__name__} cannot take the weights of this {type(model).__name__}: {error}; {own_format()}"
        ) from error
    missing = [name for name in problems.missing_keys if not (tied and name == "lm_head.weight")]
    if missing or problems.unexpected_keys:
        raise ExportError(
            f"{type(target).__name__} has other parameters than this {type(model).__name__}: it lacks {problems.unexpected_keys[:3]} and "
            f"needs {missing[:3]}; {own_format()}"
        )
    if tied:
        target.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        target.generation_config = copy.deepcopy(model.generation_config)
    return target


def _block(mixture: Mixture, dtype: torch.dtype, copies: bool) -> dict[str, Tensor]:
    """Return the parameters of one layer of experts by their name in transformers."""
    router = mixture.router
    if copies:
        base: Any = mixture.layer.base_layer
        fused = torch.cat([base.gate_proj.weight, base.up_proj.weight])
        size = (len(router), 1, 1)
        gate_up, down, router = fused.repeat(size), base.down_proj.weight.repeat(size), torch.zeros_like(router)
    else:
        weights = mixture.weights()
        gate_up, down = weights.gate_up, weights.down
    return {
        f"{mixture.path}.gate.weight": router,
        f"{mixture.path}.experts.gate_up_proj": gate_up.detach().to(dtype),
        f"{mixture.path}.experts.down_proj": down.detach().to(dtype),
    }

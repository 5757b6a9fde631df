"""The mixtures of experts in a model, as exporters read them: whole weights, the router, and its rule.

An adapter is a mixture if it has a ``router`` (experts, width) and either ``expert_weights(base_layer)`` or the stacked
parameters of its experts under the names of transformers: ``gate_up_proj`` (experts, 2 * ff, width) or ``up_proj``
(experts, ff, width), and ``down_proj`` (experts, width, ff).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapter_layer import AdapterLayer, adapter_layers
from lightning_peft.errors import ExportError
from lightning_peft.interfaces import Adapter, Method
from lightning_peft.moe.expert_weights import ExpertWeights
from lightning_peft.moe.experts import run_experts
from lightning_peft.moe.routing import ExpertChoiceRouter, Router, TopKRouter


@dataclass(frozen=True)
class Mixture:
    """The mixture of experts that acts at one place."""

    path: str
    """The place, in the model without adapters."""
    layer: AdapterLayer
    """What stands there."""
    adapter: Adapter
    """The adapter that holds it."""
    adapter_name: str
    """Its name in the model."""
    method: Method
    """Its hyperparameters."""
    rule: Router
    """How its tokens are routed."""

    @property
    def router(self) -> Tensor:
        """The weight of the router (experts, width)."""
        router: Tensor = self.adapter.get_parameter("router")
        return router.detach()

    def weights(self) -> ExpertWeights:
        """Return the experts as whole weights; those that are held so are not copied."""
        held = {key: value.detach() for key, value in self.adapter.named_parameters(recurse=False)}
        if "down_proj" not in held:
            whole: ExpertWeights = self.adapter.expert_weights(self.layer.base_layer)  # type: ignore[operator]
            return whole
        entry = "gate_up_proj" if "gate_up_proj" in held else "up_proj"
        return ExpertWeights(
            held[entry],
            held["down_proj"],
            held.get(f"{entry}_bias"),
            held.get("down_proj_bias"),
            gated=entry == "gate_up_proj",
        )


def is_mixture(adapter: nn.Module) -> bool:
    """Tell whether ``adapter`` is a mixture of experts whose weights can be read."""
    held = {name for name, _ in adapter.named_parameters(recurse=False)}
    whole = callable(getattr(adapter, "expert_weights", None)) or "down_proj" in held
    return "router" in held and whole


def mixtures(model: nn.Module, methods: Mapping[str, Method]) -> dict[str, Mixture]:
    """Return the mixtures that act in ``model``, by place.

    Args:
        model: a model with adapters.
        methods: adapter name to its method, for adapters that do not hold theirs.

    Raises:
        ExportError: two meet at one place, or one is switched off.
    """
    found = {}
    for path, layer in adapter_layers(model).items():
        names = [name for name in layer.active if is_mixture(layer.adapters[name])]
        if not names:
            continue
        if len(names) > 1 or len(layer.active) > 1:
            raise ExportError(
                f"adapters {list(layer.active)} act together at {path!r}, and a mixture of experts can be exported alone only; activate one"
            )
        if not layer._stack:
            raise ExportError(f"the adapters at {path!r} are disabled, so its experts do not act; enable them first")
        adapter = layer._adapter(names[0])
        own = getattr(adapter, "method", None)
        method = own if isinstance(own, Method) else methods[names[0]]
        found[path] = Mixture(path, layer, adapter, names[0], method, _rule(adapter, method))
    return found


def _rule(adapter: Adapter, method: Method) -> Router:
    """Return how ``adapter`` routes: what it or its method holds as a router, else Top-K by the fields of the method."""
    for holder in (adapter, method):
        held = [value for value in vars(holder).values() if isinstance(value, Router)]
        if held:
            return held[0]
    fields: Any = method
    return TopKRouter(top_k=fields.top_k, combine=getattr(fields, "combine", "renorm"))


def as_top_k(rule: Router) -> Router:
    """Return the Top-K rule nearest to Expert Choice: as many experts a token as it has there on average; others as they are."""
    if not isinstance(rule, ExpertChoiceRouter):
        return rule
    return TopKRouter(top_k=max(math.floor(rule.capacity + 0.5), 2), combine=rule.combine)


@contextlib.contextmanager
def routed_by(
    places: Mapping[str, Mixture], rules: Mapping[str, Router], activation: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Have the mixtures run as plain ones with other rules for the time of a ``with`` block."""

    def forward(mixture: Mixture, rule: Router) -> Callable[..., Tensor]:
        def run(base: Callable[..., Any], x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            router = mixture.router
            assignment = rule.route(F.linear(rows.to(router.dtype), router), training=False)
            weights = mixture.weights().to(x.dtype)
            return run_experts(rows, assignment, weights, activation).view(x.shape)

        return run

    changed = [places[path].adapter for path, rule in rules.items() if rule != places[path].rule]
    for path, rule in rules.items():
        if places[path].adapter in changed:
            places[path].adapter.__dict__["forward"] = forward(places[path], rule)
    try:
        with torch.no_grad():
            yield
    finally:
        for adapter in changed:
            del adapter.__dict__["forward"]

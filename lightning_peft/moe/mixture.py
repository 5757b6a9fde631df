"""The mixture of experts that takes the place of an MLP, as an adapter around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_peft.arithmetic.bottlenecks import parameters_beside
from lightning_peft.interfaces import Adapter
from lightning_peft.moe import initial_experts
from lightning_peft.moe.balance import load_balancing_loss, with_auxiliary_loss, z_loss
from lightning_peft.moe.expert_weights import ExpertWeights
from lightning_peft.moe.experts import Implementation, run_experts
from lightning_peft.moe.feed_forward import FeedForward, dense_tensors
from lightning_peft.moe.initial_experts import Layout
from lightning_peft.moe.padding import take_note
from lightning_peft.moe.statistics import Routed
from lightning_peft.routers import Assignment, Router
from lightning_peft.targets import is_conv1d_linear


class MixtureSettings(Protocol):
    """What a mixture asks the method that makes it."""

    @property
    def router_std(self) -> float:
        """Deviation of the router's first weights."""

    @property
    def expert_noise(self) -> float:
        """Noise on the first weights of each expert."""

    @property
    def reinit(self) -> float:
        """Share of the neurons that are drawn anew."""

    @property
    def balance_coef(self) -> float:
        """Factor of the load balancing loss."""

    @property
    def z_coef(self) -> float:
        """Factor of the z-loss."""

    @property
    def jitter(self) -> float:
        """Noise on what the router reads."""

    @property
    def uncovered(self) -> Literal["residual", "dense"]:
        """What a token without an expert gets."""

    @property
    def implementation(self) -> Implementation:
        """How the products run."""

    @property
    def dtype(self) -> Literal["float32", "base"]:
        """Precision of the experts."""

    def make_router(self) -> Router:
        """Return the rule that assigns tokens to experts."""

    def layout(self, feed_forward: FeedForward) -> Layout:
        """Return how the experts lie that an MLP becomes."""

    def scales(self) -> tuple[float, float, bool]:
        """Return the factor of the output, that of its last bias, and whether the former is spread over the matrices."""


class MixtureOfExperts(Routed, Adapter):
    """Router and experts of one MLP.

    Its tensors are named and laid out as the experts of transformers: ``gate_up_proj`` (experts, 2 * hidden, width), or ``up_proj``
    (experts, hidden, width) without a gate, ``down_proj`` (experts, width, hidden), each with a ``_bias`` where the MLP has one, and
    ``router`` (experts, width) in float32.

    Args:
        method: the hyperparameters.
        module: what stands at the place.
        feed_forward: the MLP.
    """

    replaces_base: ClassVar[bool] = True
    router: nn.Parameter

    def __init__(self, method: MixtureSettings, module: nn.Module, feed_forward: FeedForward) -> None:
        super().__init__()
        self.method, self.feed_forward = method, feed_forward
        self.layout, self.rule = method.layout(feed_forward), method.make_router()
        self.num_experts = self.layout.experts
        new = parameters_beside(module, method.dtype)
        biases = {"up_bias": feed_forward.up_bias, "down_bias": feed_forward.down_bias}
        for name, shape in self.layout.shapes(**biases).items():
            self.register_parameter(name, new(*shape))
        device = self.get_parameter("down_proj").device
        self.router = nn.Parameter(torch.empty(self.layout.experts, feed_forward.width, device=device))
        # Modules of the base, in a tuple so that they are not registered here too: the projections, and the activation.
        self._projections: tuple[tuple[str, nn.Module], ...] = ()
        self._activation: tuple[nn.Module, ...] = ()

    def connect(self, modules: Mapping[str, nn.Module]) -> None:
        """Take note of the modules of the MLP among those of the base, by path."""
        parts = self.feed_forward
        self._projections = tuple(
            (path, modules[path]) for path in (parts.gate, parts.up, parts.down) if path is not None
        )
        self._activation = (modules[parts.activation],)

    @override
    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module) -> None:
        if not self._projections:  # injection connects, and then comes back
            return
        layout, method, tensors = self.layout, self.method, self.tensors()
        held = {f"{path}.{name}": p for path, one in self._projections for name, p in one.named_parameters()}
        dense = self.dense(held)
        layout.fill(tensors, dense)
        if tensors["down_proj"].is_meta:
            return
        if method.reinit:
            initial_experts.redraw(tensors, layout, method.reinit)
        if method.expert_noise:
            initial_experts.add_noise(tensors, dense, layout, method.expert_noise)
        weights, bias, spread = method.scales()
        initial_experts.scale(tensors, layout, weights, bias, spread=spread)
        initial_experts.reset_router(self.router, layout, method.router_std)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the experts by name."""
        return {name: parameter for name, parameter in self.named_parameters() if name != "router"}

    def dense(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts of the MLP (``gate``, ``up``, ...) from tensors by their name in the dense model."""
        transposed = {path: is_conv1d_linear(module) for path, module in self._projections}
        return dense_tensors(self.feed_forward, named.get, transposed)

    def dense_names(self) -> dict[str, torch.Size]:
        """Return the names that the tensors of the MLP have in the dense model, with their shapes there."""
        return {f"{path}.{name}": p.shape for path, one in self._projections for name, p in one.named_parameters()}

    @property
    def copies_per_token(self) -> float:
        """How many copies of the MLP a token goes to, on average."""
        return self.rule.experts_per_token / self.layout.granularity

    def expert_weights(self) -> ExpertWeights:
        """Return the weights of the experts as the arithmetic takes them."""
        held = self._parameters
        first = self.layout.first
        gate_up, down = held[first], held["down_proj"]
        assert gate_up is not None
        assert down is not None
        return ExpertWeights(
            gate_up, down, held.get(f"{first}_bias"), held.get("down_proj_bias"), gated=self.layout.gated
        )

    def assign(self, tokens: Tensor, mask: Tensor | None, shape: tuple[int, int] | None) -> Assignment:
        """Return which of ``tokens`` (n, width) goes to which expert."""
        wide = torch.promote_types(torch.float32, tokens.dtype)
        read = tokens.to(wide)
        if self.method.jitter and self.training:
            read = read * torch.empty_like(read).uniform_(1 - self.method.jitter, 1 + self.method.jitter)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(read, self.router.to(wide))  # (n, experts)
        return self.rule.route(logits, mask=mask, shape=shape, training=self.training)

    def balanced(self, assignment: Assignment, mask: Tensor | None) -> Assignment:
        """Return ``assignment`` with the losses of this layer in its backward."""
        method = self.method
        loss: Tensor | None = None
        if method.balance_coef and not self.rule.balanced:
            loss = method.balance_coef * load_balancing_loss(assignment, mask)
        if method.z_coef:
            z = method.z_coef * z_loss(assignment, mask)
            loss = z if loss is None else loss + z
        if loss is None or not loss.requires_grad:
            return assignment
        return dataclasses.replace(assignment, weights=with_auxiliary_loss(assignment.weights, loss))

    @override
    def forward(self, base: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., width) to (..., width)."""
        parts, method = self.feed_forward, self.method
        tokens = x.reshape(-1, x.shape[-1])  # (n, width)
        grid = take_note(len(tokens))
        mask = grid.mask if grid is not None else None
        shape = grid.shape if grid is not None else (x.shape[0], x.shape[1]) if x.dim() == 3 else None
        assignment = self.assign(tokens, mask, shape)
        self.observe(assignment, mask)
        if self.training and torch.is_grad_enabled():
            assignment = self.balanced(assignment, mask)
        activation: Callable[[Tensor], Tensor] = self._activation[0]
        y = run_experts(
            tokens,
            assignment,
            self.expert_weights(),
            activation,
            dropout=parts.inner_dropout if self.training else 0.0,
            implementation=method.implementation,
        ).view(x.shape)
        if method.uncovered == "dense" and not self.rule.uniform:
            covered = (assignment.token_counts() > 0).view(x.shape[:-1])
            # What comes before the down-projection was bypassed, where the mixture stands around that alone.
            hidden = self._activation[0](dict(self._projections)[parts.up](x)) if parts.bypassed else x
            y = torch.where(covered[..., None], y, base(hidden))
        return F.dropout(y, parts.outer_dropout, self.training)

"""What an MLP is made of: which of its modules is the gate, the up- and the down-projection, and the function between them.

::

    gated   y = D (act(G x) * U x)      Llama, Mistral, Qwen, Gemma, T5 1.1; Phi-3 computes G and U in one module
    plain   y = D act(U x)              GPT-2, GPT-NeoX, Falcon, Phi, ViT, DistilBERT, T5 1.0

An MLP is known by the names of its children and by having nothing else that could change its result; where it has weights,
what these parts give is compared with what it gives itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import unwrapped
from lightning_peft.errors import TargetError
from lightning_peft.moe.between import Between
from lightning_peft.targets import is_conv1d_linear, is_linear


class _Names(NamedTuple):
    up: str
    down: str
    gate: str | None = None
    inner_dropout: bool = False  # whether a dropout acts before the down-projection; else behind it


_LAYOUTS = (
    _Names("up_proj", "down_proj", "gate_proj"),
    _Names("gate_up_proj", "down_proj", "gate_up_proj"),
    _Names("wi_1", "wo", "wi_0", inner_dropout=True),
    _Names("wi", "wo", inner_dropout=True),
    _Names("c_fc", "c_proj"),
    _Names("dense_h_to_4h", "dense_4h_to_h"),
    _Names("fc1", "fc2"),
    _Names("lin1", "lin2"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class MLPParts:
    """The parts of one kind of MLP, by name: the modules are asked for at every use, so that adapters around them act.

    Example:
        >>> from lightning_peft.testing import tiny_llama
        >>> parts = MLPParts.of(tiny_llama().model.layers[0].mlp)
        >>> parts.gated, parts.width, parts.inner
        (True, 64, 128)
    """

    up: str
    """Name of the up-projection."""
    down: str
    """Name of the down-projection."""
    activation: str
    """Name of the function between them."""
    gate: str | None
    """Name of the gate; None for an MLP without one, the name of the up-projection where one module computes both, gate first."""
    inner_dropout: bool
    """Whether the dropout of the MLP acts before the down-projection."""
    width: int
    """Features that go in and come out."""
    inner: int
    """Features between the projections."""

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.gate is not None

    @classmethod
    def of(cls, module: nn.Module) -> MLPParts | None:
        """Return the parts of ``module``, or None where it is no MLP of a known kind."""
        children = {name: unwrapped(child) for name, child in module.named_children()}
        for names in _LAYOUTS:
            linears = {name for name in (names.up, names.down, names.gate) if name is not None}
            if not all(name in children and is_linear(children[name]) for name in linears):
                continue
            others = [child for name, child in children.items() if name not in linears]
            activation = next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)
            asked = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
            if activation is None or len(asked) != 1 or any(True for child in others for _ in child.parameters()):
                return None
            (width, inner), (inner_too, out) = _features(children[names.up]), _features(children[names.down])
            fused = names.gate == names.up
            if out != width or inner != inner_too * (2 if fused else 1):
                return None
            return cls(names.up, names.down, activation, names.gate, names.inner_dropout, width, inner_too)
        return None

    def inward(self, module: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """X (..., width) -> what the gate, if any, and the up-projection of ``module`` make of it, each (..., inner)."""
        if self.gate is None:
            return None, self._part(module, self.up)(x)
        if self.gate == self.up:
            gate, up = self._part(module, self.up)(x).chunk(2, dim=-1)
            return gate, up
        return self._part(module, self.gate)(x), self._part(module, self.up)(x)

    def between(self, module: nn.Module) -> Between:
        """Return what stands between the projections of ``module``."""
        return Between(self._part(module, self.activation), self.gated)

    def outward(self, module: nn.Module, hidden: Tensor, update: Tensor | None = None) -> Tensor:
        """Hidden (..., inner) -> (..., width), by the down-projection of ``module``, to which ``update`` is added, and its dropout."""
        dropout = getattr(module, "dropout", None)
        if self.inner_dropout:
            hidden = dropout(hidden) if callable(dropout) else hidden
            weight = getattr(module, self.down).weight
            if weight.is_floating_point() and not hasattr(weight, "quant_state"):
                hidden = hidden.to(weight.dtype)  # T5 keeps it in float32 over a half-precision model
            dropout = None
        y: Tensor = self._part(module, self.down)(hidden)
        y = y if update is None else y + update.to(y.dtype)
        return dropout(y) if callable(dropout) else y

    @staticmethod
    def _part(module: nn.Module, name: str) -> Callable[..., Tensor]:
        part: Callable[..., Tensor] = getattr(module, name)
        return part

    @torch.no_grad()
    def check(self, module: nn.Module, path: str) -> None:
        """Compare what these parts give with what ``module`` gives; packed weights and those on the meta device are passed by.

        Raises:
            TargetError: it gives something else.
        """
        if any(p.is_meta or not p.is_floating_point() for p in module.parameters()):
            return
        weight = getattr(module, self.up).weight
        x = torch.linspace(-2.0, 2.0, 2 * self.width, device=weight.device, dtype=torch.float32)
        x = x.sin().view(1, 2, self.width).to(weight.dtype)
        modes = {part: part.training for part in module.modules()}
        for part in modes:
            part.training = False
        try:
            wanted = module(x)
            parts = [part for part in self.inward(module, x) if part is not None]
            found = self.outward(module, self.between(module)(parts))
        finally:
            for part, mode in modes.items():
                part.training = mode
        if not torch.allclose(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
            raise TargetError(
                f"{path!r} is a {type(module).__name__} with the modules of a known MLP, but it computes something else than "
                f"{'down(act(gate) * up)' if self.gated else 'down(act(up))'}; exclude it"
            )


def _features(linear: nn.Module) -> tuple[int, int]:
    """Return the input and output features of a linear layer."""
    if is_conv1d_linear(linear):
        weight = linear.get_parameter("weight")  # (in, out)
        return int(weight.shape[0]), int(weight.shape[1])
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]

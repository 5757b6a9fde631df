"""What stands between the projections of an MLP, and its derivative where backward runs it again.

::

    gated    h = act(g) * u         dL/du = act(g) * dL/dh        dL/dg = act'(g) * u * dL/dh
    plain    h = act(u)

SwiGLU (arXiv:2002.05202), the gate of Llama, Mistral, Qwen and most models since, is differentiated by its formula, in place: what is
written is the gradient and nothing else. Any other activation is differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Between:
    """An activation and its gate."""

    activation: Callable[[Tensor], Tensor]
    """Elementwise, such as ``torch.nn.functional.silu``."""
    gated: bool
    """Whether there is a gate."""
    dropout: float = 0.0
    """Probability with which a hidden feature is dropped; not part of the call."""

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the hidden features, of the shape of each of ``parts``: what the gate, if any, and the up-projection give.

        The parts are not written to. Without a gate the result may be a part itself, as that of ``nn.Identity`` is.
        """
        if self._is_swiglu(parts) and not torch.is_grad_enabled():
            return F.silu(parts[0]).mul_(parts[1])
        hidden = self.activation(parts[0].clone() if _writes(self.activation) else parts[0])
        return hidden * parts[1] if self.gated else hidden

    def _is_swiglu(self, parts: Sequence[Tensor]) -> bool:
        return self.gated and parts[0].dtype == parts[1].dtype and _is_silu(self.activation)

    def dropped(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the hidden features with dropout."""
        return F.dropout(self(parts), self.dropout)

    def draw(self, hidden: Tensor) -> Tensor:
        """Return a factor for each of the ``hidden`` features: 0 where it is dropped, 1 / (1 - p) elsewhere."""
        return F.dropout(torch.ones_like(hidden), self.dropout)

    def again(self, parts: Sequence[Tensor], autocast: Mapping[str, Any]) -> Again:
        """Run it once more, for its gradient; ``autocast`` is how autocast was set when it ran first, as arguments of it."""
        if self._is_swiglu(parts):
            return _SwiGLU(*parts)
        return _ByAutograd(self, parts, autocast)


class Again(Protocol):
    """A run of :class:`Between` whose gradient is wanted: first :attr:`hidden` is read, then :meth:`dot`, then :meth:`pull`, each once."""

    hidden: Tensor
    """What it gives (rows, features), detached; not to be written to, and another thing after :meth:`dot`."""

    def dot(self, gradient: Tensor) -> Tensor:
        """Return the sum over the features of ``hidden`` times ``gradient`` (rows,)."""

    def pull(self, gradient: Tensor, out: Sequence[Tensor] | None = None, *, keep: bool = False) -> Sequence[Tensor]:
        """Return the gradients of the parts from that of ``hidden``, which is overwritten but to ``keep`` it; in ``out``, if it is given."""


class _SwiGLU:
    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.gate, self.up = gate, up
        self.silu = F.silu(gate)
        self.hidden = self.silu * up

    def dot(self, gradient: Tensor) -> Tensor:
        return self.hidden.mul_(gradient).sum(-1)

    def pull(self, gradient: Tensor, out: Sequence[Tensor] | None = None, *, keep: bool = False) -> Sequence[Tensor]:
        to_silu = gradient * self.up if keep else None
        to_gate, to_up = (gradient if to_silu is None else to_silu, self.silu) if out is None else out
        torch.mul(self.silu, gradient, out=to_up)
        to_silu = gradient.mul_(self.up) if to_silu is None else to_silu
        torch.ops.aten.silu_backward.grad_input(to_silu, self.gate, grad_input=to_gate)
        return to_gate, to_up


class _ByAutograd:
    def __init__(self, between: Between, parts: Sequence[Tensor], autocast: Mapping[str, Any]) -> None:
        with torch.enable_grad(), torch.autocast(**autocast):
            self.parts = [part.detach().requires_grad_() for part in parts]
            self.result = between(self.parts)
        self.hidden = self.result.detach()

    def dot(self, gradient: Tensor) -> Tensor:
        return (self.hidden * gradient).sum(-1)

    def pull(self, gradient: Tensor, out: Sequence[Tensor] | None = None, *, keep: bool = False) -> Sequence[Tensor]:
        found = torch.autograd.grad(self.result, self.parts, gradient)
        for own, one in zip(out or (), found, strict=out is not None):
            own.copy_(one)
        return found if out is None else out


def autocast_of(device: str) -> dict[str, Any]:
    """Return how autocast is set on a kind of device, as arguments of ``torch.autocast``."""
    enabled = torch.is_autocast_enabled(device)
    return {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": enabled}


def _writes(activation: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether ``activation`` overwrites what it reads, as ``nn.ReLU(inplace=True)`` does."""
    return isinstance(activation, nn.Module) and any(getattr(one, "inplace", False) for one in activation.modules())


def _is_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether ``activation`` is SiLU and nobody listens to it."""
    if activation is F.silu:
        return True
    kind = type(activation)
    if kind is not nn.SiLU and (kind.__name__, kind.__module__) != ("SiLUActivation", "transformers.activations"):
        return False
    own = vars(activation)
    changed = "forward" in own or any(own[name] for name in _HOOKS)
    return not changed and not has_any_global_hook()  # type: ignore[no-untyped-call]

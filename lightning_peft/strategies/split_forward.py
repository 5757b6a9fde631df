"""How a split layer runs: on plain tensors, the parts that this process has, with one sum over the group where it is due.

::

                 ┌─ rank 0:  W0, A, B0 ─┐                     ┌─ rank 0:  W0, A0, B ─┐
    x, x ── f ──▶│                      │──▶ y0, y1 ── ... ──▶│                      │──▶ g ──▶ y, y
                 └─ rank 1:  W1, A, B1 ─┘                     └─ rank 1:  W1, A1, B ─┘
                        colwise                                      rowwise

    f   forward: as it is                backward: the sum of the gradients of all parts
    g   forward: the sum of all parts    backward: as it is

A factor that each process has whole (A of colwise, B of rowwise) sees a part of the gradient only, so its gradients are summed too. The
update of a rowwise layer goes into the output before g, which sums both at once. A bias behind rowwise is added by the first rank alone.

References:
    Shoeybi et al., "Megatron-LM", arXiv:1909.08053, for f and g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.adapter_layer import AdapterLayer
from lightning_peft.errors import ConfigError


class _Enter(torch.autograd.Function):
    """The identity, whose gradient is summed over a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    """The sum over a group, whose gradient is passed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


@dataclass(frozen=True)
class Held:
    """A parameter that a split layer, or one that is trained whole beside them, runs with."""

    owner: nn.Module
    """The module that holds it."""
    name: str
    """Its name there."""
    gradient: Literal["own", "sum", "first"]
    """``own``: as it comes. ``sum``: that of all processes of the group. ``first``: the same, and only the first process uses the
    parameter, while it is zero for the others."""


class Entered:
    """What went into a region last, so that its layers that read one tensor sum their gradients in one go."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget it."""
        self._last: tuple[Any, ...] | None = None

    def __call__(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return ``x`` for a colwise layer."""
        known = self._last
        now = (x._version, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if known is None or known[0] is not x or known[1] != now:
            entered: Tensor = _Enter.apply(x, group)  # type: ignore[no-untyped-call]
            self._last = known = (x, now, entered)
        result: Tensor = known[2]
        return result


class SplitForward:
    """Hooks on a layer that have it run with the parts of this process.

    Args:
        mesh: the group, of one dimension.
        held: the parameters of the layer, each a DTensor.
        style: ``colwise``, ``rowwise``, or ``whole`` for a layer that every process of the group runs alike.
        entered: shared by the layers of a region.
    """

    def __init__(self, mesh: Any, held: Sequence[Held], style: str, entered: Entered | None = None) -> None:
        self.mesh = mesh
        self.group: dist.ProcessGroup = mesh.get_group()
        self.first = mesh.get_local_rank() == 0
        self.held, self.style, self.entered = held, style, entered
        self._before: list[tuple[nn.Module, str, Any]] = []
        self._lent: SplitForward | None = None

    def attach(self, layer: nn.Module) -> None:
        """Have ``layer`` run so, and what it wraps for as long as its adapters are taken out."""
        self._hooks = [
            layer.register_forward_pre_hook(self.before, with_kwargs=True),
            layer.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        if isinstance(layer, AdapterLayer):
            layer.hand_over = self.hand_over

    def hand_over(self, base: nn.Module) -> None:
        """Have ``base`` run as the layer did that wrapped it."""
        held = [one for one in self.held if one.owner is base]
        if (held or self.style != "whole") and self._lent is None:
            self._lent = SplitForward(self.mesh, held, self.style, self.entered)
            self._lent.attach(base)

    def _take_back(self) -> None:
        for hook in self._lent._hooks if self._lent is not None else ():
            hook.remove()
        self._lent = None

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show the layer its parts as plain tensors, and let its input in."""
        self._take_back()
        if self.style != "whole":
            if isinstance(layer, AdapterLayer) and layer._rows is not None:
                raise ConfigError(
                    "adapters that a batch chooses by rows do not run under tensor_parallel; train with the active adapters, or with tensor_parallel=1"
                )
            if self.style == "colwise":
                assert self.entered is not None
                args, kwargs = _with_first(args, kwargs, lambda x: self.entered(x, self.group))
        for one in self.held:
            owned: dict[str, Any] = one.owner._parameters
            self._before.append((one.owner, one.name, owned[one.name]))
            owned[one.name] = self._local(owned[one.name], one.gradient)
        return args, kwargs

    def _local(self, parameter: Any, gradient: str) -> Tensor:
        if gradient == "first" and not self.first and not parameter.requires_grad:
            return torch.zeros_like(parameter._local_tensor)
        local: Tensor = parameter.to_local() if parameter.requires_grad else parameter._local_tensor.detach()
        if gradient == "own" or not parameter.requires_grad:
            return local
        entered: Tensor = _Enter.apply(local, self.group)  # type: ignore[no-untyped-call]
        return entered if gradient == "sum" or self.first else entered * 0

    def after(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Show the parameters themselves again, and let the output out. ``output`` is None where the forward failed."""
        while self._before:
            owner, name, parameter = self._before.pop()
            owner._parameters[name] = parameter
        if self.style != "rowwise":
            return None
        assert self.entered is not None
        self.entered.clear()
        return None if output is None else _Leave.apply(output, self.group)  # type: ignore[no-untyped-call]


def _with_first(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with the first tensor among them changed."""
    for number, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:number], change(value), *args[number + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: change(value)}
    return args, kwargs

"""Compacter: bottleneck adapters whose two layers are sums of Kronecker products, of small shared and thin private factors.

Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", 2021 (arXiv:2106.04647), on the
parameterised hypercomplex multiplication (PHM) of Zhang et al., "Beyond Fully-Connected Layers with Quaternions", 2021
(arXiv:2102.08597)::

    f(x) = U act(D x + d) + u       D: (m, width)   U: (width, m)   each of the form

    W = sum_i  A_i kron B_i         A_i: (n, n), i = 1 ... n, one set for the whole model
    B_i = s_i t_i                   s_i: (out/n, rank)   t_i: (rank, in/n)

Of L blocks of width k with two adapters each, the layers have 4 L rank (k + m) + n^3 parameters, beside the biases. W is never
made: with the input as a matrix X (n, in/n) and the output as Y (n, out/n), Y = sum_i A_i X B_i^T, from the thin side on.

The s_i of U (or, not factorized, its B_i) start at zero, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules
from lightning_peft.arithmetic.bottlenecks import (
    ACTIVATIONS,
    BottleneckAround,
    BottleneckMethod,
    parameters_beside,
    whole,
    width_of,
)
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.field_checks import check_switches
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target


@dataclass(frozen=True, kw_only=True)
class Compacter(BottleneckMethod):
    """Adapters of Kronecker products after the attention and the MLP of each block; :meth:`plus_plus` leaves attention out.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = inject(model, Compacter(bottleneck_size=8), "0")
        >>> trainable_summary(model).trainable  # 4**3 + 2 * (16 + 8), and the biases 16 + 8
        136
    """

    name: ClassVar[str] = "compacter"
    fsdp_ready: ClassVar[bool] = False

    phm_dim: int = 4
    """How many Kronecker products make a layer, n in the paper; divides both widths."""
    rank: int = 1
    """Rank of each B_i, where they are factorized."""
    factorized: bool = True
    """Whether each B_i is a product of two thin matrices; without it the layers are those of PHM."""
    share_rule: bool = True
    """Whether all layers of the model have one set of A_i; without it each has its own."""
    reduction_factor: float = 32.0
    """Width of the adapted features over that of the bottleneck, which is rounded down to a multiple of phm_dim, at least one."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How B_i of D and t_i of U start: so that W deviates as in nn.Linear, or by 0.01; A_i by 1 / sqrt(n). Biases are zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("phm_dim", "rank"):
            if not whole(getattr(self, field), 1):
                raise ConfigError(f"Compacter {field} must be a positive integer, got {getattr(self, field)!r}")
        check_switches(self)
        if self.bottleneck_size is not None and self.bottleneck_size % self.phm_dim:
            raise ConfigError(
                f"Compacter bottleneck_size must be a multiple of phm_dim={self.phm_dim}, got {self.bottleneck_size!r}"
            )
        if not self.factorized and self.rank != 1:
            raise ConfigError(
                f"Compacter rank={self.rank!r} is that of factorized layers, and factorized is false; leave rank out"
            )
        # One layer holds the rule of all, in a unit of FSDP2 that is not gathered while the others run.
        object.__setattr__(self, "fsdp_ready", not self.share_rule)

    @classmethod
    def plus_plus(cls, **fields: Any) -> Compacter:
        """Return Compacter++: after the MLP only; ``fields`` differ from that."""
        return cls(**{"sublayers": ("mlp",), **fields})

    @override
    def size_for(self, width: int) -> int:
        n = self.phm_dim
        return self.bottleneck_size or max(n, int(width / self.reduction_factor) // n * n)

    @override
    def around(self, module: nn.Module, target: Target) -> BottleneckAround:
        width = width_of(module)
        if width is not None and width % self.phm_dim:
            raise TargetError(
                f"Compacter phm_dim={self.phm_dim} does not divide the width {width} of {target.path!r}, a "
                f"{type(module).__name__}; choose a phm_dim that does, or other targets"
            )
        return CompacterAdapter(self, module)

    @override
    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Let all adapters read the A_i of the last one in the model, whom dropping the first layers reaches last."""
        if not self.share_rule:
            return
        found = [adapters[path] for path, _ in base_modules(model) if path in adapters]
        leader = found[-1]
        assert isinstance(leader, CompacterAdapter)
        for follower in found[:-1]:
            assert isinstance(follower, CompacterAdapter)
            follower.follow(leader)


class CompacterAdapter(BottleneckAround):
    """The two layers of one place: A_i as ``rule``, where another does not hold it, and their B_i.

    Args:
        method: the hyperparameters.
        module: the module to adapt: a linear layer, or one that maps (..., width) to (..., width) or to a tuple that begins so.
    """

    def __init__(self, method: Compacter, module: nn.Module) -> None:
        super().__init__(method, module)
        self.method = method
        # The adapter that holds the shared A_i, in a tuple so that it is not registered twice; empty if it is this one.
        self._leader: tuple[CompacterAdapter, ...] = ()
        new, n, rank = parameters_beside(module, method.dtype), method.phm_dim, method.rank
        for name in ("rule",) if method.share_rule else ("down_rule", "up_rule"):
            self.register_parameter(name, new(n, n, n))
        for side, wide, out in (("down", self.width, self.size), ("up", self.size, self.width)):
            if method.factorized:
                self.register_parameter(f"{side}_s", new(n, out // n, rank))
                self.register_parameter(f"{side}_t", new(n, rank, wide // n))
            else:
                self.register_parameter(f"{side}_B", new(n, out // n, wide // n))
            self.register_parameter(f"{side}_bias", new(out))

    def follow(self, leader: CompacterAdapter) -> None:
        """Read the A_i of ``leader`` from now on."""
        del self.rule
        self._leader = (leader,)

    def rule_of(self, side: str) -> Tensor:
        """Return the A_i (n, n, n) of the layer ``down`` or ``up``."""
        holder = self._leader[0] if self._leader else self
        return holder.get_parameter("rule" if self.method.share_rule else f"{side}_rule")

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        method = self.method
        for name, parameter in self.named_parameters():
            side = name.partition("_")[0]
            if name.endswith("rule"):
                nn.init.normal_(parameter, std=method.phm_dim**-0.5)  # so that W varies as the B_i do
            elif name.endswith("bias") or name in ("up_s", "up_B"):
                nn.init.zeros_(parameter)
            else:
                wide = self.width if side == "down" else self.size
                std = 0.01 if method.init == "gaussian" else 1 / math.sqrt(3 * wide)
                # An entry of s t is a sum of rank products.
                nn.init.normal_(parameter, std=math.sqrt(std / math.sqrt(method.rank)) if method.factorized else std)

    @override
    def update(self, x: Tensor) -> Tensor:
        method, dtype = self.method, x.dtype
        h = ACTIVATIONS[method.activation](self._layer("down", x))  # (..., m)
        if method.dropout and self.training:
            h = F.dropout(h, method.dropout)
        return (method.scale * self._layer("up", h)).to(dtype)  # (..., width)

    def _layer(self, side: str, x: Tensor) -> Tensor:
        """Return W x + b (..., out) for x (..., in)."""
        n = self.method.phm_dim
        rule = self.rule_of(side).to(device=x.device, dtype=x.dtype)  # (i, p, q): q of the input, p of the output
        x = torch.unflatten(x, -1, (n, -1))  # (..., q, in/n)
        if self.method.factorized:
            s, t = (self.get_parameter(f"{side}_{factor}").to(x.dtype) for factor in "st")
            h = torch.unflatten(_linear(x, t.flatten(0, 1)), -1, (n, -1))  # (..., q, i, rank)
            h = torch.einsum("ipq,...qir->...pir", rule, h).flatten(-2)
            y = _linear(h, s.transpose(1, 2).flatten(0, 1).mT)  # (..., p, out/n)
        else:
            B = self.get_parameter(f"{side}_B").to(x.dtype)  # (i, out/n, in/n)
            if side == "down":  # what is in between is n times the bottleneck, not n times the width
                h = torch.unflatten(_linear(x, B.flatten(0, 1)), -1, (n, -1))  # (..., q, i, out/n)
                y = torch.einsum("ipq,...qia->...pa", rule, h)
            else:
                h = torch.einsum("ipq,...qb->...pib", rule, x).flatten(-2)  # (..., p, i * in/n)
                y = _linear(h, B.transpose(0, 1).flatten(1))
        y = y.flatten(-2)  # (..., out)
        return y + self.get_parameter(f"{side}_bias").to(y.dtype)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``F.linear`` by way of a matrix: of more dimensions, its rounding depends on whether ``weight`` is trained."""
    return torch.unflatten(F.linear(x.flatten(0, -2), weight), 0, x.shape[:-1])


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register Compacter."""
    return [Compacter]

"""Small networks beside or behind a frozen sub-layer: where they stand, what they read and where their result goes.

Bottleneck adapters and their relatives differ in how they compute f; everything around it is here::

    sequential   y = h + s f(h)     x ── sub-layer ── h ──┬──────────(+)── y        h: the output of the adapted module
                                                          └── f ── s ─┘

    parallel     y = h + s f(x)     x ──┬── sub-layer ── h ──────────(+)── y        x: its input
                                        └── f ── s ───────────────────┘

A parallel adapter stands around the sub-layer that ends in the targeted linear layer: it reads what the sub-layer reads. BERT
has no module for that, only one for "linear layer, residual connection, norm"; there the update goes into the residual
connection, which is the same sum, before the norm.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import ConfigError, InjectionError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.targets import in_first_layers, is_conv1d_linear, is_linear, matches

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
_ROLE_OF = {"attention": "output", "mlp": "down", "block": "block"}
_RESIDUAL = "input_tensor"
"""How BERT and its relatives call the argument that is added to the output before the norm."""


@dataclass(frozen=True, kw_only=True)
class BottleneckMethod(Method):
    """What methods have in common whose adapters go through a narrow layer; a subclass makes the adapters."""

    default_targets: ClassVar[tuple[str, ...]] = ("output", "down")
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "activation": tuple(ACTIVATIONS),
        "placement": ("sequential", "parallel"),
        "init": ("kaiming", "gaussian"),
        "dtype": ("float32", "base"),
    }
    """The fields that take one of a few words, and the words."""

    reduction_factor: float = 16.0
    """Width of the adapted features over the width of the bottleneck."""
    bottleneck_size: int | None = None
    """Width of the bottleneck, m in the papers; takes the place of reduction_factor."""
    activation: Literal["relu", "gelu", "silu", "swish", "tanh"] = "gelu"
    """Function between the two layers; swish is another name of silu."""
    placement: Literal["sequential", "parallel"] = "sequential"
    """Whether the adapter reads the output of the sub-layer or its input; its result is added to the output in both."""
    scale: float = 1.0
    """Factor of what the adapter adds, s in the formula."""
    sublayers: Sequence[Literal["attention", "mlp", "block"]] = ("attention", "mlp")
    """Which parts of each block get an adapter when no targets are given."""
    dropout: float = 0.0
    """Probability of dropping a feature of the bottleneck in training."""
    drop_layers: int = 0
    """How many of the first layers of each stack get no adapter (AdapterDrop)."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How D starts: at random as nn.Linear does, or Gaussian with deviation 0.01. Biases start at zero."""
    dtype: Literal["float32", "base"] = "float32"
    """Precision of the adapter: at least float32, or that of the base."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{kind} {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not _number(self.reduction_factor) or self.reduction_factor <= 0:
            raise ConfigError(f"{kind} reduction_factor must be a positive number, got {self.reduction_factor!r}")
        if self.bottleneck_size is not None and not whole(self.bottleneck_size, 1):
            raise ConfigError(f"{kind} bottleneck_size must be a positive integer, got {self.bottleneck_size!r}")
        if not _number(self.scale) or self.scale == 0:
            raise ConfigError(f"{kind} scale must be a finite number other than zero, got {self.scale!r}")
        if not _number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"{kind} dropout must lie in [0, 1), got {self.dropout!r}")
        if not whole(self.drop_layers, 0):
            raise ConfigError(f"{kind} drop_layers must be an integer of at least 0, got {self.drop_layers!r}")
        parts = (self.sublayers,) if isinstance(self.sublayers, str) else tuple(self.sublayers)
        if not parts or any(part not in _ROLE_OF for part in parts) or len(set(parts)) < len(parts):
            raise ConfigError(f"{kind} sublayers must name some of {', '.join(_ROLE_OF)}, got {self.sublayers!r}")
        object.__setattr__(self, "sublayers", parts)
        # The library reads the default targets from the method it is given, so each may have its own.
        object.__setattr__(self, "default_targets", tuple(_ROLE_OF[part] for part in parts))

    def size_for(self, width: int) -> int:
        """Return the width of the bottleneck in features of ``width``; it is never empty."""
        return self.bottleneck_size or max(1, int(width / self.reduction_factor))

    @override
    def supports(self, module: nn.Module) -> bool:
        return width_of(module) is not None

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        kept = [target for target in targets if not in_first_layers(target.path, self.drop_layers)]
        if not kept:
            raise TargetError(
                f"{type(self).__name__} drop_layers={self.drop_layers!r} leaves none of the {len(targets)} places, such as "
                f"{targets[-1].path!r}; give a smaller number"
            )
        if self.placement == "sequential":
            return kept
        modules = {path: unwrapped(module) for path, module in base_modules(model)}
        blocks = matches("block", model, family) if family.globs("block") else set()
        places: dict[str, Target] = {}
        for target in kept:
            path = target.path
            if is_linear(modules[path]):
                path = path.rpartition(".")[0]
                if not path or path in blocks or not self.supports(modules[path]):
                    raise TargetError(
                        f"a parallel {type(self).__name__} at {target.path!r} needs the module of its sub-layer, and around it is "
                        f"{path or 'the whole model'!r}, a {type(modules[path]).__name__}; use placement='sequential'"
                    )
            places.setdefault(path, dataclasses.replace(target, path=path))
        return list(places.values())

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if target.slices:
            raise TargetError(f"{type(self).__name__} cannot adapt a slice of {target.path!r}; name the whole module")
        return self.around(module, target)

    @abstractmethod
    def around(self, module: nn.Module, target: Target) -> BottleneckAround:
        """Make the adapter for the whole of ``module``, which stands at ``target``."""


class BottleneckAround(Adapter):
    """What adapters of one place have in common: they add :meth:`update` of what they read to what the module returns.

    Args:
        method: the hyperparameters.
        module: the module to adapt: a linear layer, or one that maps (..., width) to (..., width) or to a tuple that begins so.
    """

    def __init__(self, method: BottleneckMethod, module: nn.Module) -> None:
        super().__init__()
        width = width_of(module)
        assert width is not None
        self.placement, self.kind = method.placement, type(method).__name__
        self.width, self.size = width, method.size_for(width)
        self.into_residual = method.placement == "parallel" and _takes_residual(module)

    @abstractmethod
    def update(self, x: Tensor) -> Tensor:
        """Return what the adapter adds, s f(x) (..., width), for x (..., width)."""

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module: its (first) output is (..., width), and so is its input if the adapter is parallel."""
        if self.placement == "sequential":
            output = base(*args, **kwargs)
            return self._add(output, self.update(self._first(output)))
        if self.into_residual:
            if len(args) > 1:
                args = (args[0], args[1] + self.update(args[1]), *args[2:])
            else:
                kwargs = {**kwargs, _RESIDUAL: kwargs[_RESIDUAL] + self.update(kwargs[_RESIDUAL])}
            return base(*args, **kwargs)
        x = args[0] if args else kwargs.get("hidden_states")
        if x is None:
            raise InjectionError(
                f"a parallel {self.kind} is around a module called without a first argument or hidden_states, with {sorted(kwargs)}; "
                "adapt another module, or use placement='sequential'"
            )
        return self._add(base(*args, **kwargs), self.update(x))

    def _first(self, output: Any) -> Tensor:
        """Return the hidden states in what a module returned: the tensor, or the first of a tuple."""
        first = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(first, Tensor):
            raise InjectionError(
                f"{self.kind} is around a module that returns a {type(output).__name__}, not a tensor or a tuple that begins with one; "
                "adapt the modules inside it"
            )
        return first

    def _add(self, output: Any, update: Tensor) -> Any:
        """Return ``output`` with ``update`` added to its hidden states; the rest of a tuple stays."""
        first = self._first(output)
        added = first + update.to(first.dtype)
        return added if first is output else type(output)([added, *output[1:]])

    @override
    def extra_repr(self) -> str:
        return f"{self.placement}, width={self.width}, bottleneck={self.size}"


def parameters_beside(module: nn.Module, dtype: Literal["float32", "base"]) -> Callable[..., nn.Parameter]:
    """Return what makes empty parameters of a shape on the device of ``module``, in its precision or at least in float32."""
    tensor = next(module.parameters())
    held = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    chosen = torch.promote_types(torch.float32, held) if dtype == "float32" else held

    def new(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, device=tensor.device, dtype=chosen))

    return new


def width_of(module: nn.Module) -> int | None:
    """Return the width of what comes out of ``module``, or None where it cannot be known.

    A linear layer says it. In any other module it is the output of its last linear layer among those whose output
    another one there can read: a sub-layer gives back the width it takes, which routers and gates of one feature do not.
    """
    if is_linear(module):
        return _features(module)[1]
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None  # never called
    inside = [_features(part) for _, held in base_modules(module) for part in [unwrapped(held)] if is_linear(part)]
    read = {features[0] for features in inside}
    return next((out for _, out in reversed(inside) if out in read or _takes_residual(module)), None)


def whole(value: Any, least: int) -> bool:
    """Tell whether ``value`` is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# -- details -----------------------------------------------------------------------------------------------------------


def _features(linear: nn.Module) -> tuple[int, int]:
    """Return the input and output features of a linear layer."""
    if is_conv1d_linear(linear):
        weight = linear.get_parameter("weight")  # (in, out)
        return int(weight.shape[0]), int(weight.shape[1])
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]


def _takes_residual(module: nn.Module) -> bool:
    """Tell whether ``module`` is a "linear layer, residual connection, norm" as in BERT: ``forward(hidden_states, input_tensor)``."""
    return list(inspect.signature(module.forward).parameters) == ["hidden_states", _RESIDUAL]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

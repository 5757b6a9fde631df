"""Bottleneck adapters: two small layers with an activation between them, beside or behind a frozen sub-layer.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019 (arXiv:1902.00751); Pfeiffer et al., "AdapterFusion",
2020 (arXiv:2005.00247); Lin et al., "Exploring Versatile Generative Language Model Via Parameter-Efficient Transfer
Learning", 2020 (arXiv:2004.03829); parallel and scaled: He et al., "Towards a Unified View of Parameter-Efficient Transfer
Learning", 2021 (arXiv:2110.04366); without the first layers: Rueckle et al., "AdapterDrop", 2020 (arXiv:2010.11918)::

    f(x) = U act(D x + d) + u       D: (m, width)  random       U: (width, m)  zero, so that a fresh adapter changes nothing

    sequential   y = h + s f(h)     x ── sub-layer ── h ──┬──────────(+)── y        h: the output of the adapted module
                                                          └── f ── s ─┘

    parallel     y = h + s f(x)     x ──┬── sub-layer ── h ──────────(+)── y        x: its input
                                        └── f ── s ───────────────────┘

Where it stands in a block: at the last linear layer of attention (role ``output``) and of the MLP (role ``down``), before
the residual connection and, in models that normalise after it, before the layer norm::

    Llama, GPT-2, T5, ViT    x ──┬── norm ── attention ... output ── ADAPTER ──(+)──┬── norm ── mlp ... down ── ADAPTER ──(+)──
                                 └──────────────────────────────────────────────┘   └─────────────────────────────────────┘
    BERT, RoBERTa            x ──┬── attention ... output ── ADAPTER ──(+)── norm ──┬── intermediate ... down ── ADAPTER ──(+)── norm ──
                                 └──────────────────────────────────────┘           └───────────────────────────────────────┘

A parallel adapter stands around the sub-layer that ends in that linear layer: it reads what the sub-layer reads. BERT has no
module for that, only one for "linear layer, residual connection, norm"; there the update goes into the residual connection,
which is the same sum, before the norm.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.activation import active_adapters
from lightning_peft.adapter_layer import adapter_layers, adapters_named, base_modules, unwrapped
from lightning_peft.errors import ConfigError, InjectionError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.targets import is_conv1d_linear, is_linear, layer_index, matches

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
_ROLE_OF = {"attention": "output", "mlp": "down", "block": "block"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": tuple(_ACTIVATIONS),
    "placement": ("sequential", "parallel"),
    "layer_norm": ("none", "before", "after"),
    "init": ("kaiming", "gaussian"),
    "dtype": ("float32", "base"),
}
_RESIDUAL = "input_tensor"
"""How BERT and its relatives call the argument that is added to the output before the norm."""


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """Bottleneck adapters after, or in parallel to, the sub-layers of a transformer.

    A plain ``Bottleneck()`` is that of Houlsby et al. without its trained layer norms; :meth:`pfeiffer`, :meth:`lin`,
    :meth:`parallel` and :meth:`scaled_parallel` are the others of the literature.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = inject(model, Bottleneck(bottleneck_size=2), "0")
        >>> trainable_summary(model).trainable  # 2 * 16 * 2 + 2 + 16
        82
    """

    name: ClassVar[str] = "bottleneck"
    default_targets: ClassVar[tuple[str, ...]] = ("output", "down")
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True

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
    layer_norm: Literal["none", "before", "after"] = "none"
    """A trained layer norm before the first layer, or after the second; after, its weight starts at zero and U at random."""
    dropout: float = 0.0
    """Probability of dropping a feature of the bottleneck in training."""
    drop_layers: int = 0
    """How many of the first layers of each stack get no adapter (AdapterDrop)."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How D starts: Kaiming uniform (as nn.Linear) or Gaussian with deviation 0.01 (Houlsby et al.). Biases start at zero."""
    dtype: Literal["float32", "base"] = "float32"
    """Precision of the adapter: at least float32, or that of the base."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"Bottleneck {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not _number(self.reduction_factor) or self.reduction_factor <= 0:
            raise ConfigError(f"Bottleneck reduction_factor must be a positive number, got {self.reduction_factor!r}")
        if self.bottleneck_size is not None and not _whole(self.bottleneck_size, 1):
            raise ConfigError(f"Bottleneck bottleneck_size must be a positive integer, got {self.bottleneck_size!r}")
        if not _number(self.scale) or self.scale == 0:
            raise ConfigError(f"Bottleneck scale must be a finite number other than zero, got {self.scale!r}")
        if not _number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"Bottleneck dropout must lie in [0, 1), got {self.dropout!r}")
        if not _whole(self.drop_layers, 0):
            raise ConfigError(f"Bottleneck drop_layers must be an integer of at least 0, got {self.drop_layers!r}")
        parts = (self.sublayers,) if isinstance(self.sublayers, str) else tuple(self.sublayers)
        if not parts or any(part not in _ROLE_OF for part in parts) or len(set(parts)) < len(parts):
            raise ConfigError(f"Bottleneck sublayers must name some of {', '.join(_ROLE_OF)}, got {self.sublayers!r}")
        object.__setattr__(self, "sublayers", parts)
        # The library reads the default targets from the method it is given, so each may have its own.
        object.__setattr__(self, "default_targets", tuple(_ROLE_OF[part] for part in parts))

    # -- the adapters of the papers --------------------------------------------------------------------------------

    @classmethod
    def houlsby(cls, **fields: Any) -> Bottleneck:
        """Return the adapter of Houlsby et al.: after attention and after the MLP; ``fields`` differ from that."""
        return cls(**{"init": "gaussian", **fields})

    @classmethod
    def pfeiffer(cls, **fields: Any) -> Bottleneck:
        """Return the adapter of Pfeiffer et al.: after the MLP only, with ReLU."""
        return cls(**{"sublayers": ("mlp",), "activation": "relu", **fields})

    @classmethod
    def lin(cls, **fields: Any) -> Bottleneck:
        """Return the adapter of Lin et al., also AdapterL: on top of each block, with a layer norm of its own and ReLU."""
        return cls(**{"sublayers": ("block",), "layer_norm": "before", "activation": "relu", **fields})

    @classmethod
    def parallel(cls, **fields: Any) -> Bottleneck:
        """Return the parallel adapter of He et al.: beside the MLP, with ReLU."""
        return cls(**{"sublayers": ("mlp",), "placement": "parallel", "activation": "relu", **fields})

    @classmethod
    def scaled_parallel(cls, **fields: Any) -> Bottleneck:
        """Return the scaled parallel adapter of He et al.: four times the parallel one, and half as wide as the model."""
        return cls.parallel(**{"scale": 4.0, "reduction_factor": 2.0, **fields})

    # -- the contract ----------------------------------------------------------------------------------------------

    @override
    def supports(self, module: nn.Module) -> bool:
        return _width(module) is not None

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        kept = [target for target in targets if not _in_first_layers(target.path, self.drop_layers)]
        if not kept:
            raise TargetError(
                f"Bottleneck drop_layers={self.drop_layers!r} leaves none of the {len(targets)} places, such as "
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
                        f"a parallel Bottleneck at {target.path!r} needs the module of its sub-layer, and around it is "
                        f"{path or 'the whole model'!r}, a {type(modules[path]).__name__}; use placement='sequential'"
                    )
            places.setdefault(path, dataclasses.replace(target, path=path))
        return list(places.values())

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if target.slices:
            raise TargetError(f"Bottleneck cannot adapt a slice of {target.path!r}; name the whole module")
        return BottleneckAdapter(self, module)


class BottleneckAdapter(Adapter):
    """The two layers, and where it was asked for the layer norm, at one place.

    Args:
        method: the hyperparameters.
        module: the module to adapt: a linear layer, or one that maps (..., width) to (..., width) or to a tuple that begins so.
    """

    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(self, method: Bottleneck, module: nn.Module) -> None:
        super().__init__()
        width = _width(module)
        assert width is not None
        self.method, self.width = method, width
        size = method.bottleneck_size or max(1, int(width / method.reduction_factor))
        tensor = next(module.parameters())
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        if method.dtype == "float32":
            dtype = torch.promote_types(torch.float32, dtype)
        self.into_residual = method.placement == "parallel" and _takes_residual(module)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=tensor.device, dtype=dtype))

        self.down_weight, self.down_bias = new(size, width), new(size)
        self.up_weight, self.up_bias = new(width, size), new(width)
        normed = method.layer_norm != "none"
        self.norm_weight = new(width) if normed else None
        self.norm_bias = new(width) if normed else None

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        after = self.method.layer_norm == "after"
        for matrix in (self.down_weight, self.up_weight) if after else (self.down_weight,):
            if self.method.init == "gaussian":
                nn.init.normal_(matrix, std=0.01)
            else:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        for tensor in (self.down_bias, self.up_bias) if after else (self.down_bias, self.up_bias, self.up_weight):
            nn.init.zeros_(tensor)
        if self.norm_weight is not None and self.norm_bias is not None:
            # A norm of zeros is zero, but its slope there is 300: it is the norm that starts at nothing instead of U.
            nn.init.constant_(self.norm_weight, 0.0 if after else 1.0)
            nn.init.zeros_(self.norm_bias)

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module: its (first) output is (..., width), and so is its input if the adapter is parallel."""
        if self.method.placement == "sequential":
            output = base(*args, **kwargs)
            return _add(output, self.update(_first(output)))
        if self.into_residual:
            if len(args) > 1:
                args = (args[0], args[1] + self.update(args[1]), *args[2:])
            else:
                kwargs = {**kwargs, _RESIDUAL: kwargs[_RESIDUAL] + self.update(kwargs[_RESIDUAL])}
            return base(*args, **kwargs)
        x = args[0] if args else kwargs.get("hidden_states")
        if x is None:
            raise InjectionError(
                f"a parallel Bottleneck is around a module called without a first argument or hidden_states, with {sorted(kwargs)}; "
                "adapt another module, or use placement='sequential'"
            )
        return _add(base(*args, **kwargs), self.update(x))

    def update(self, x: Tensor) -> Tensor:
        """Return what the adapter adds, s f(x) (..., width), for x (..., width)."""
        method, dtype = self.method, x.dtype
        h = self._normed(x) if method.layer_norm == "before" else x
        h = F.linear(h, self.down_weight.to(dtype), self.down_bias.to(dtype))  # (..., m)
        h = _ACTIVATIONS[method.activation](h)
        if method.dropout and self.training:
            h = F.dropout(h, method.dropout)
        h = F.linear(h, self.up_weight.to(dtype), self.up_bias.to(dtype))  # (..., width)
        h = self._normed(h) if method.layer_norm == "after" else h
        return (method.scale * h).to(dtype)

    def _normed(self, x: Tensor) -> Tensor:
        assert self.norm_weight is not None
        assert self.norm_bias is not None
        return F.layer_norm(x, (self.width,), self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype))

    @override
    def extra_repr(self) -> str:
        return f"{self.method.placement}, width={self.width}, bottleneck={self.down_weight.shape[0]}"


def drop_adapters(model: nn.Module, layers: int, *, name: str = "default") -> None:
    """Let the first ``layers`` layers of each stack run without the adapter ``name``, for speed (AdapterDrop at inference).

    ``set_active_adapters(model, name)`` brings them back. What is saved does not change.

    Args:
        model: a model with adapters, of this method or another.
        layers: how many layers, from the input on; a call with another number replaces the one before.
        name: the adapter, which must be active.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        ConfigError: ``layers`` is not an integer of at least 0.
        InjectionError: the adapter is not active.
    """
    adapters_named(model, name)
    if not _whole(layers, 0):
        raise ConfigError(f"drop_adapters needs layers as an integer of at least 0, got {layers!r}")
    active = active_adapters(model)
    if name not in active:
        raise InjectionError(
            f"adapter {name!r} is not active, so no layer can drop it; call set_active_adapters(model, {name!r}) first"
        )
    for path, layer in adapter_layers(model).items():
        here = set(layer.active) - {name} if _in_first_layers(path, layers) else {*layer.active, name}
        layer.activate([other for other in active if other in here])


# -- details -----------------------------------------------------------------------------------------------------------


def _width(module: nn.Module) -> int | None:
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


def _features(linear: nn.Module) -> tuple[int, int]:
    """Return the input and output features of a linear layer."""
    if is_conv1d_linear(linear):
        weight = linear.get_parameter("weight")  # (in, out)
        return int(weight.shape[0]), int(weight.shape[1])
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]


def _takes_residual(module: nn.Module) -> bool:
    """Tell whether ``module`` is a "linear layer, residual connection, norm" as in BERT: ``forward(hidden_states, input_tensor)``."""
    return list(inspect.signature(module.forward).parameters) == ["hidden_states", _RESIDUAL]


def _in_first_layers(path: str, layers: int) -> bool:
    index = layer_index(path)
    return index is not None and index < layers


def _first(output: Any) -> Tensor:
    """Return the hidden states in what a module returned: the tensor, or the first of a tuple."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, Tensor):
        raise InjectionError(
            f"Bottleneck is around a module that returns a {type(output).__name__}, not a tensor or a tuple that begins with one; "
            "adapt the modules inside it"
        )
    return first


def _add(output: Any, update: Tensor) -> Any:
    """Return ``output`` with ``update`` added to its hidden states; the rest of a tuple stays."""
    first = _first(output)
    added = first + update.to(first.dtype)
    return added if first is output else type(output)([added, *output[1:]])


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register bottleneck adapters."""
    return [Bottleneck]

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

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.activation import drop_adapters as drop_adapters  # for those who import it from here
from lightning_peft.arithmetic.bottlenecks import ACTIVATIONS, BottleneckAround, BottleneckMethod, parameters_beside
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Method, Target


@dataclass(frozen=True, kw_only=True)
class Bottleneck(BottleneckMethod):
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
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **BottleneckMethod.choices,
        "layer_norm": ("none", "before", "after"),
    }

    layer_norm: Literal["none", "before", "after"] = "none"
    """A trained layer norm before the first layer, or after the second; after, its weight starts at zero and U at random."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How D starts: Kaiming uniform (as nn.Linear) or Gaussian with deviation 0.01 (Houlsby et al.). Biases start at zero."""

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
    def around(self, module: nn.Module, target: Target) -> BottleneckAround:
        return BottleneckAdapter(self, module)


class BottleneckAdapter(BottleneckAround):
    """The two layers, and where it was asked for the layer norm, at one place.

    Args:
        method: the hyperparameters.
        module: the module to adapt: a linear layer, or one that maps (..., width) to (..., width) or to a tuple that begins so.
    """

    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(self, method: Bottleneck, module: nn.Module) -> None:
        super().__init__(method, module)
        self.method, width, size = method, self.width, self.size
        new = parameters_beside(module, method.dtype)
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
    def update(self, x: Tensor) -> Tensor:
        """Return what the adapter adds, s f(x) (..., width), for x (..., width)."""
        method, dtype = self.method, x.dtype
        h = self._normed(x) if method.layer_norm == "before" else x
        h = F.linear(h, self.down_weight.to(dtype), self.down_bias.to(dtype))  # (..., m)
        h = ACTIVATIONS[method.activation](h)
        if method.dropout and self.training:
            h = F.dropout(h, method.dropout)
        h = F.linear(h, self.up_weight.to(dtype), self.up_bias.to(dtype))  # (..., width)
        h = self._normed(h) if method.layer_norm == "after" else h
        return (method.scale * h).to(dtype)

    def _normed(self, x: Tensor) -> Tensor:
        assert self.norm_weight is not None
        assert self.norm_bias is not None
        return F.layer_norm(x, (self.width,), self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype))


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register bottleneck adapters."""
    return [Bottleneck]

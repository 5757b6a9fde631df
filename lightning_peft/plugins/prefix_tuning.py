"""Prefix tuning: trained keys and values in front of those that every attention layer makes of its input.

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021 (arXiv:2101.00190); the "PreLayer" that the
paper of LoRA compares with::

    y = softmax(q [P_k; k]^T / sqrt(d)) [P_v; v]        P_k, P_v: (num_virtual_tokens, heads, d), trained, of each layer

With ``reparametrize`` the prefixes of all layers come from one small network while training, as in the paper::

    P = W2 tanh(W1 E + b1) + b2         E: (num_virtual_tokens, width); E, W1, b1 are shared, W2 and b2 belong to a layer

Tokens stand at positions behind the prefix. What does this is in :mod:`lightning_peft.arithmetic.prefixes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.arithmetic.prefixes import (
    POSITIONS,
    PrefixAttention,
    PrefixPositions,
    is_known_attention,
    key_value_heads,
    position_places,
)
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.field_checks import check_switches
from lightning_peft.hf_types import refuse_other_keys
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target

_FILE_TENSOR = "prompt_embeddings"
_POSITIONS_RULE = "positions"


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Trained keys and values in front of every self-attention layer.

    Example:
        >>> from lightning_peft import inject, trainable_summary
        >>> from lightning_peft.testing import tiny_llama
        >>> model = tiny_llama()
        >>> inject(model, PrefixTuning(num_virtual_tokens=5)).paths
        ['model.layers.0.self_attn', 'model.layers.1.self_attn']
        >>> trainable_summary(model).trainable == 5 * 2 * 2 * 32  # tokens, layers, key and value, features of the two heads
        True
    """

    name: ClassVar[str] = "prefix_tuning"
    default_targets: ClassVar[tuple[str, ...]] = ("attention",)
    identity_at_init: ClassVar[bool] = False
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    hf_prefix: ClassVar[str] = "base_model."

    num_virtual_tokens: int = 20
    """Positions in front of the input, the length of the prefix."""
    reparametrize: bool = False
    """Train the prefixes as the output of one network for all layers; an adapter folder holds the prefixes alone."""
    hidden_size: int = 512
    """Width of the hidden layer of that network."""
    init_std: float = 0.1
    """Standard deviation of the first prefixes, where there is no network."""

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"PrefixTuning {name} must be a positive integer, got {value!r}")
        check_switches(self)
        std = self.init_std
        if not isinstance(std, (int, float)) or isinstance(std, bool) or not 0 < std < math.inf:
            raise ConfigError(
                f"PrefixTuning init_std must be positive (prefixes that start equal stay equal), got {std!r}"
            )

    @override
    def supports(self, module: nn.Module) -> bool:
        """Tell whether ``module`` is a self-attention; :meth:`expand` refuses those of unknown classes, naming the known ones."""
        return type(module).__name__.endswith("Attention") and not getattr(module, "is_cross_attention", False)

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        modules = {path: unwrapped(module) for path, module in base_modules(model)}
        for target in targets:
            if not is_known_attention(modules[target.path]):
                raise TargetError(
                    f"PrefixTuning was asked to adapt {target.path!r}, a {type(modules[target.path]).__name__} of an unknown kind; "
                    f"it knows the self-attention of transformers' {', '.join(sorted(POSITIONS))}"
                )
        chosen = {target.path for target in targets}
        left = [path for path in _attention(modules) if path not in chosen]
        if left:
            raise TargetError(
                f"PrefixTuning was asked to adapt {len(chosen)} of the {len(chosen) + len(left)} attention modules of "
                f"{type(model).__name__}, without {left[0]!r}; its file holds a prefix for every layer, so adapt them all"
            )
        found = {
            next((place for place in position_places(path, modules[path]) if place in modules), "") for path in chosen
        }
        if len(found) != 1 or "" in found:
            raise TargetError(
                f"PrefixTuning needs one module that takes the positions of all layers in {type(model).__name__}, found "
                f"{sorted(found - {''})}; adapt a whole model of transformers with a single stack of layers"
            )
        config = getattr(model, "config", None)
        room = getattr(config, "max_position_embeddings", math.inf)
        if room <= self.num_virtual_tokens:
            raise TargetError(
                f"PrefixTuning num_virtual_tokens={self.num_virtual_tokens} leaves no room for tokens in the {room} positions of "
                f"{type(model).__name__}; use fewer"
            )
        return [*targets, Target(path=found.pop(), rule=_POSITIONS_RULE)]

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        hidden = self.hidden_size if self.reparametrize else 0
        if target.rule == _POSITIONS_RULE:
            return PrefixPositions(module, self.num_virtual_tokens, hidden)
        return PrefixAttention(module, self.num_virtual_tokens, hidden, self.init_std)

    @override
    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        (shared,) = (adapter for adapter in adapters.values() if isinstance(adapter, PrefixPositions))
        for adapter in adapters.values():
            if isinstance(adapter, PrefixAttention) and self.reparametrize:
                adapter.follow(shared)

    # -- files: one tensor for all layers, as HF PEFT has it -----------------------------------------------------------

    @override
    def file_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layers = list(tensors.values())  # in the order of the model, each (tokens, 2, heads, head_dim)
        return {_FILE_TENSOR: torch.cat(layers, dim=1).flatten(1)}  # (tokens, layers * 2 * heads * head_dim)

    @override
    def placed_tensors(self, model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(stored) != {_FILE_TENSOR}:
            raise AdapterMismatchError(f"the file must hold {_FILE_TENSOR!r} alone, it holds {sorted(stored)[:5]}")
        modules = _attention({path: unwrapped(module) for path, module in base_modules(model)})
        if not modules:
            raise AdapterMismatchError(
                f"{type(model).__name__} has none of the attention modules that PrefixTuning knows: {', '.join(sorted(POSITIONS))}"
            )
        heads, features = key_value_heads(next(iter(modules.values())))
        whole, shape = stored[_FILE_TENSOR], (self.num_virtual_tokens, len(modules) * 2 * heads * features)
        if tuple(whole.shape) != shape:
            raise AdapterMismatchError(
                f"{_FILE_TENSOR!r} has shape {tuple(whole.shape)}, but {self.num_virtual_tokens} tokens and {len(modules)} layers of "
                f"{heads} key-value heads with {features} features need {shape}: another base?"
            )
        layers = whole.view(self.num_virtual_tokens, len(modules), 2, heads, features).unbind(1)
        return {f"{path}.prefix": layer for path, layer in zip(modules, layers, strict=True)}

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        layers = [adapter for adapter in adapters.values() if isinstance(adapter, PrefixAttention)]
        _, _, heads, features = layers[0].shape
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": heads * features,
            "num_layers": len(layers),
            "num_attention_heads": heads,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": heads * features,
            "prefix_projection": False,  # the file holds what the network gave
            "target_modules": None,  # the format has no such key
        }

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> PrefixTuning:
        if config.get("num_transformer_submodules") not in (None, 1):
            raise AdapterConfigError(
                f"num_transformer_submodules is {config['num_transformer_submodules']!r}: a prefix for a model with an encoder and a "
                "decoder, which PrefixTuning does not adapt"
            )
        refuse_other_keys("PrefixTuning", config, _HF_UNDERSTOOD)
        try:
            return cls(num_virtual_tokens=config.get("num_virtual_tokens"))  # type: ignore[arg-type]  # checked there
        except ConfigError as error:
            raise AdapterConfigError(str(error)) from error


_HF_UNDERSTOOD = frozenset(
    [
        *("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"),
        *("encoder_hidden_size", "prefix_projection", "init_weights"),
    ]
)


def _attention(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {path: module for path, module in modules.items() if is_known_attention(module)}


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register prefix tuning."""
    return [PrefixTuning]

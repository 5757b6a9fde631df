"""Prefixes of attention: trained keys and values in front of those that attention modules of transformers make of their input.

::

                   ┌────────┐┌─────────┐
    keys, values   │ prefix ││ tokens  │ <── the cache of the model holds these alone
                   └────────┘└─────────┘
    positions       0 .. n-1  n .. n+t-1     every token sees the whole prefix

:class:`PrefixAttention`, around an attention module, hands it a cache that puts the prefix in front, and a mask that shows it.
:class:`PrefixPositions`, around what turns positions into numbers, moves those of the tokens by n.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_peft.errors import TargetError
from lightning_peft.interfaces import Adapter

_ROTARY, _LEARNED = "rotary_emb", "embeddings.position_embeddings"
POSITIONS = {
    **dict.fromkeys(
        ["LlamaAttention", "MistralAttention", "MixtralAttention", "PhiAttention", "Phi3Attention"], _ROTARY
    ),
    **dict.fromkeys(["Qwen2Attention", "Qwen2MoeAttention", "Qwen3Attention", "Qwen3MoeAttention"], _ROTARY),
    **dict.fromkeys(["GemmaAttention", "Gemma2Attention", "Gemma3Attention", "GPTNeoXAttention"], _ROTARY),
    **dict.fromkeys(["BertAttention", "RobertaAttention", "XLMRobertaAttention"], _LEARNED),
    "GPT2Attention": "wpe",
    "OPTAttention": "embed_positions",
}
"""Attention class of transformers to the module that takes positions, in the module that holds the layers."""


def is_known_attention(module: nn.Module) -> bool:
    """Tell whether ``module`` is a self-attention that can have a prefix, by the class that defines its forward."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    known = owner.__module__.startswith("transformers.models.") and owner.__name__ in POSITIONS
    return known and not getattr(module, "is_cross_attention", False)


def key_value_heads(module: nn.Module) -> tuple[int, int]:
    """Return how many key-value heads an attention module has, and the features of each."""
    config = _core(module).config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def position_places(path: str, module: nn.Module) -> list[str]:
    """Return where the positions of the attention module at ``path`` may be taken, innermost first."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    parts = path.split(".")[:-1]
    return [".".join([*parts[:end], POSITIONS[owner.__name__]]) for end in range(len(parts), -1, -1)]


class PrefixPositions(Adapter):
    """Moves the positions of tokens behind the prefix, and holds what the prefixes of all layers share.

    Args:
        module: what takes positions: rotary embeddings, or an embedding of learned positions.
        num_virtual_tokens: length of the prefix.
        hidden_size: width of the shared hidden layer; 0 where the prefixes are trained as they are.
    """

    def __init__(self, module: nn.Module, num_virtual_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        names = tuple(inspect.signature(module.forward).parameters)
        # nn.Embedding calls them `input`.
        self.argument = names.index("position_ids") if "position_ids" in names else 0
        self.name = names[self.argument]
        # What padding has instead of a position, and keeps: -1 in OPT, the index of padding in RoBERTa.
        self.padding: int | None = None
        if isinstance(module, nn.Embedding):
            self.padding = -1 if self.name == "position_ids" else module.padding_idx
        if hidden_size:
            width: Any = getattr(module, "embedding_dim", None) or module.config.hidden_size  # type: ignore[union-attr]
            self.tokens = _empty(module, num_virtual_tokens, width)
            self.weight = _empty(module, hidden_size, width)
            self.bias = _empty(module, hidden_size)

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        if self._parameters:
            nn.init.normal_(self.tokens)
            _reset_linear(self.weight, self.bias)

    def features(self) -> Tensor:
        """Return what the layers make their prefixes of (tokens, hidden_size)."""
        return torch.tanh(F.linear(self.tokens, self.weight, self.bias))

    def discard(self) -> None:
        """Give up the shared tensors, as the prefixes stand for themselves."""
        self._parameters.clear()

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of the module."""
        if self.name in kwargs:
            kwargs[self.name] = self._moved(kwargs[self.name])
        else:
            args = (*args[: self.argument], self._moved(args[self.argument]), *args[self.argument + 1 :])
        return base(*args, **kwargs)

    def _moved(self, positions: Tensor) -> Tensor:
        """Return positions (batch, length) behind the prefix."""
        if self.padding is None:
            return positions + self.num_virtual_tokens
        return torch.where(positions.eq(self.padding), positions, positions + self.num_virtual_tokens)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {}  # an adapter file holds the prefixes


class PrefixAttention(Adapter):
    """The prefix of one attention module.

    Args:
        module: the attention module.
        num_virtual_tokens: length of the prefix.
        hidden_size: width of the hidden layer that the prefix comes from; 0 where it is trained as it is.
        init_std: standard deviation of the first prefix, where it is trained as it is.

    Raises:
        TargetError: the model runs an attention that reads no mask of four dimensions.
    """

    def __init__(self, module: nn.Module, num_virtual_tokens: int, hidden_size: int, init_std: float) -> None:
        super().__init__()
        core = _core(module)
        self.config, self.init_std = core.config, init_std
        self.causal = bool(getattr(core, "is_causal", True))
        self.arguments = tuple(inspect.signature(module.forward).parameters)
        self.cache = "layer_past" if "layer_past" in self.arguments else "past_key_values"
        self.shape = (num_virtual_tokens, 2, *key_value_heads(module))
        # What the prefixes of all layers share, where they share something. A tuple, so that it is not registered twice.
        self._shared: tuple[PrefixPositions, ...] = ()
        _implementation(self.config)
        if hidden_size:
            self.weight = _empty(module, math.prod(self.shape[1:]), hidden_size)
            self.bias = _empty(module, math.prod(self.shape[1:]))
        else:
            self.prefix = _empty(module, *self.shape)

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        if "prefix" in self._parameters:
            nn.init.normal_(self.prefix, std=self.init_std)
        else:
            _reset_linear(self.weight, self.bias)

    def follow(self, shared: PrefixPositions) -> None:
        """Make the prefix of what ``shared`` holds for all layers."""
        self._shared = (shared,)

    def states(self) -> Tensor:
        """Return the prefix (tokens, 2, heads, head_dim): keys, then values."""
        if not self._shared:
            return self.prefix
        with torch.autocast(self.weight.device.type, enabled=False):  # as precise as what a file holds
            features = self._shared[0].features().to(self.weight.device)
            return F.linear(features, self.weight, self.bias).view(self.shape)

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of the attention module; weights of attention have the prefix in front."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        mask, queries = given.get("attention_mask"), given["hidden_states"].shape[1]
        causal = given.get("is_causal")
        # Without a mask, torch's attention lets the first query see the first key alone, which is right for no prefix only.
        aligned = _implementation(self.config) == "sdpa" and mask is None and queries > 1
        aligned = aligned and (self.causal if causal is None else causal)
        given[self.cache] = _PrefixedCache(given.get(self.cache), self.states(), queries if aligned else None)
        if aligned:
            tokens = self.shape[0]
            seen = torch.ones(queries, tokens + queries, dtype=torch.bool, device=given["hidden_states"].device)
            given["attention_mask"] = seen.tril(tokens)[None, None]  # (1, 1, queries, tokens + queries)
        elif mask is not None:
            given["attention_mask"] = _with_visible(mask, self.shape[0])
        positional = [given.pop(name) for name in self.arguments[: len(args)]]
        return base(*positional, **given)

    # -- files hold the prefix, whatever it comes from -----------------------------------------------------------------

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"prefix": self.states()}

    @override
    def fit_to(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Become a prefix that stands for itself, where that is what was saved."""
        if self._shared and "prefix" in shapes:
            self._shared[0].discard()
            self._shared = ()
            prefix = torch.zeros(self.shape, dtype=self.weight.dtype, device=self.weight.device)
            trained = self.weight.requires_grad
            self._parameters.clear()
            self.prefix = nn.Parameter(prefix, requires_grad=trained)

    @override
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        self.fit_to({key: tuple(tensor.shape) for key, tensor in state.items()})
        super().import_state(state)


class _PrefixedCache:
    """Stands in for the cache of one call of an attention module: what it returns has the prefix in front.

    Args:
        cache: the cache of the model, which never holds the prefix; None where there is none.
        prefix: (tokens, 2, heads, head_dim).
        length: how many of the keys count, where a cache of fixed size returns more.
    """

    def __init__(self, cache: Any, prefix: Tensor, length: int | None) -> None:
        self.cache, self.prefix, self.length = cache, prefix, length

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values (batch, heads, length, head_dim) and return all, behind the prefix."""
        if self.cache is not None:
            cache = getattr(self.cache, "self_attention_cache", self.cache)
            key, value = cache.update(key, value, layer_idx, *args, **kwargs)
        if self.length is not None:
            key, value = key[:, :, : self.length], value[:, :, : self.length]
        prefix = self.prefix.to(key.dtype).permute(1, 2, 0, 3)  # (2, heads, tokens, head_dim)
        rows = prefix.unsqueeze(1).expand(-1, key.shape[0], -1, -1, -1)  # (2, batch, heads, tokens, head_dim)
        return torch.cat([rows[0], key], dim=2), torch.cat([rows[1], value], dim=2)


def _with_visible(mask: Any, tokens: int) -> Tensor:
    """Return a mask (batch, heads, queries, keys), of bool or of what is added to scores, with ``tokens`` keys in front."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        kind = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise TargetError(f"PrefixTuning can extend an attention mask of four dimensions, got one of {kind}")
    shape = (*mask.shape[:-1], tokens)
    return torch.cat([mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape), mask], dim=-1)


def _implementation(config: Any) -> str:
    """Return the name of the attention that a model runs."""
    name = getattr(config, "_attn_implementation", None) or "eager"
    if name not in ("eager", "sdpa"):
        raise TargetError(
            f"PrefixTuning works with the attention implementations 'eager' and 'sdpa', but the model runs {name!r}; load it with "
            "attn_implementation='sdpa'"
        )
    return str(name)


def _core(module: nn.Module) -> Any:
    """Return the module that computes attention: BERT's holds it beside the projection behind it."""
    return getattr(module, "self", module)


def _empty(module: nn.Module, *shape: int) -> nn.Parameter:
    device = next(tensor.device for tensor in [*module.parameters(), *module.buffers()])
    return nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))


def _reset_linear(weight: Tensor, bias: Tensor) -> None:
    """Give the tensors of a linear layer the values ``nn.Linear`` starts with."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(bias, -bound, bound)

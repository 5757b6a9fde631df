"""Virtual tokens in front of the input: what prompt tuning and p-tuning have in common.

The adapter stands around the backbone, inside the model with the head::

    input_ids ── embedding ── [P; x_1 ... x_L] ── blocks ── [h_P; h_1 ... h_L] ── cut ── h_1 ... h_L ── head, loss
                               P: (num_virtual_tokens, hidden), trained

What leaves the backbone has the length of what went in, so heads, labels and losses around it need no change. A head that classifies
a sequence by the first token of an encoder gets ``h_P1`` in place of ``h_1``: what comes first there is a virtual token. With a cache of
keys and values the virtual tokens are put in front of the first call, whose cache is empty, and stay in the cache.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.backbones import NEEDED, backbone_path, input_embedding, is_backbone
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError, InjectionError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.hf_types import refuse_other_keys
from lightning_peft.interfaces import Adapter, Method, Target

_FILE_TENSOR = "prompt_embeddings"
_DECODER_RULE = "decoder"


class PromptAdapter(Adapter):
    """Puts virtual tokens in front of the input of a backbone.

    Args:
        module: the backbone.
        num_virtual_tokens: how many.
    """

    def __init__(self, module: nn.Module, num_virtual_tokens: int) -> None:
        super().__init__()
        backbone: Any = module
        embedding, config = input_embedding(module), backbone.config
        self.num_virtual_tokens = num_virtual_tokens
        # Whether their hidden states are cut off again: not by an encoder, which hands them to its decoder.
        self.cut = True
        # Whether the head reads the first place alone, to classify a sequence: that of a virtual token.
        self.first_is_read = False
        self.features: int = embedding.embedding_dim
        self.device: torch.device = embedding.weight.device
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.arguments = tuple(inspect.signature(module.forward).parameters)
        self.causal = bool(next((m.is_causal for m in module.modules() if hasattr(m, "is_causal")), True))
        # RoBERTa counts positions from behind that of padding.
        counting = hasattr(getattr(module, "embeddings", None), "create_position_ids_from_input_ids")
        self.padding: int | None = backbone.embeddings.padding_idx if counting else None

    @abstractmethod
    def prompts(self) -> Tensor:
        """Return the embeddings of the virtual tokens (num_virtual_tokens, hidden)."""

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of the backbone; attention weights keep the virtual tokens among the keys."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and embeds is None:
            return base(**given)
        module: Any = base
        while isinstance(module, functools.partial):
            module = module.args[0]
        cached = _cached_length(given.get("past_key_values"))
        if cached:
            return base(**self._behind_a_cache(given, cached))
        if embeds is None:
            embeds = module.get_input_embeddings()(ids)  # (batch, length, hidden)
        prompts = self.prompts().to(embeds.dtype).expand(embeds.shape[0], -1, -1)
        given["attention_mask"] = self._mask(given.get("attention_mask"), given)
        given["position_ids"] = self._positions(given.get("position_ids"), module, ids)
        given["input_ids"], given["inputs_embeds"] = (
            None,
            torch.cat([prompts, embeds], dim=1),
        )  # (batch, n + length, hidden)
        if given.get("token_type_ids") is not None:
            types = given["token_type_ids"]
            given["token_type_ids"] = torch.cat(
                [types.new_zeros(types.shape[0], self.num_virtual_tokens), types], dim=1
            )
        as_dict = given.pop("return_dict", None)
        result = base(**{key: value for key, value in given.items() if value is not None}, return_dict=True)
        if self.cut:
            self._cut(result, module, *embeds.shape[:2])
        return result if (module.config.return_dict if as_dict is None else as_dict) else result.to_tuple()

    # -- arguments -----------------------------------------------------------------------------------------------------

    def _behind_a_cache(self, given: dict[str, Any], cached: int) -> dict[str, Any]:
        """Return the arguments of a call whose cache holds the virtual tokens already."""
        mask, positions, n = given.get("attention_mask"), given.get("position_ids"), self.num_virtual_tokens
        if mask is not None:
            _check_mask(mask)
            new = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
            extra = cached + new.shape[1] - mask.shape[-1]
            if extra < n:
                raise InjectionError(
                    f"the cache holds {cached} positions, {extra} more than the attention mask says, but {n} virtual tokens should be among them: "
                    "it was filled without this adapter, or cropped (assisted decoding does); start from an empty cache"
                )
            given["attention_mask"] = _with_visible(mask, n)
        if positions is not None:
            given["position_ids"] = positions + n
        return given

    def _mask(self, mask: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Return the mask of the first call with the virtual tokens, which everybody sees."""
        n, positions = self.num_virtual_tokens, given.get("position_ids")
        if mask is None:
            packed = given.get("cu_seq_lens_q") is not None
            if self.causal and positions is not None and positions.dim() == 2:
                packed = packed or bool((positions.diff() != 1).any())
            if packed:
                raise InjectionError(
                    "sequences packed into one row were given, but virtual tokens would stand in front of the first alone; give each a "
                    "row of its own, or an attention mask of four dimensions"
                )
            return None
        _check_mask(mask)
        if mask.dim() == 2:
            return _with_visible(mask, n)
        if not self.causal:
            raise InjectionError(
                "an attention mask of four dimensions does not say what virtual tokens may see in an encoder; give one of two"
            )
        yes, no = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        rows = mask.new_full((*mask.shape[:2], n, n + mask.shape[3]), no)
        seen = torch.ones(n, n + mask.shape[3], dtype=torch.bool, device=mask.device).tril()
        return torch.cat(
            [rows.masked_fill(seen, yes), _with_visible(mask, n)], dim=2
        )  # (batch, heads, n + length, n + length)

    def _positions(self, positions: Tensor | None, module: Any, ids: Tensor | None) -> Tensor | None:
        """Return positions in which the virtual tokens come first; None where the backbone counts by itself."""
        n = self.num_virtual_tokens
        if positions is None and self.padding is not None and ids is not None:
            positions = module.embeddings.create_position_ids_from_input_ids(ids, self.padding)
        if positions is None:
            return None
        if positions.dim() != 2:
            raise InjectionError(
                f"virtual tokens need position_ids of two dimensions, (batch, length), got {tuple(positions.shape)}"
            )
        first = 0 if self.padding is None else self.padding + 1
        front = torch.arange(first, first + n, device=positions.device).expand(positions.shape[0], -1)
        return torch.cat([front, positions + n], dim=1)  # (batch, n + length)

    # -- results -------------------------------------------------------------------------------------------------------

    def _cut(self, result: Any, module: Any, rows: int, length: int) -> None:
        """Cut the virtual tokens off what the backbone returns."""
        n, states = self.num_virtual_tokens, result["last_hidden_state"]
        result["last_hidden_state"] = states[:, n:]  # (batch, length, hidden)
        if self.first_is_read:
            result["last_hidden_state"] = torch.cat([states[:, :1], states[:, n + 1 :]], dim=1)
        if result.get("hidden_states") is not None:
            result["hidden_states"] = tuple(states[:, n:] for states in result["hidden_states"])
        for key in ("attentions", "cross_attentions"):
            if result.get(key) is not None:
                result[key] = tuple(weights[:, :, n:] for weights in result[key])  # (batch, heads, length, n + length)
        if result.get("router_logits") is not None:
            result["router_logits"] = tuple(
                logits.reshape(rows, n + length, -1)[:, n:].reshape(*logits.shape[:-2], -1, logits.shape[-1])
                for logits in result["router_logits"]
            )
        pooled = result.get("pooler_output") is not None and getattr(module, "pooler", None) is not None
        if pooled and not self.first_is_read:
            result["pooler_output"] = module.pooler(result["last_hidden_state"])


class CrossAttentionMask(Adapter):
    """Lets a decoder see the virtual tokens that its encoder hands on.

    Args:
        module: the decoder.
        num_virtual_tokens: how many come from the encoder.
    """

    def __init__(self, module: nn.Module, num_virtual_tokens: int) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        pass  # nothing is trained here

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of the decoder, which transformers calls with these by name."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        # States that come without virtual tokens, from another encoder, stay as they are.
        if states is not None and mask is not None and states.shape[1] > mask.shape[-1]:
            kwargs["encoder_attention_mask"] = _with_visible(mask, self.num_virtual_tokens)
        return base(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method):
    """What methods of virtual tokens share: where they go, and the one tensor of their files."""

    default_targets: ClassVar[tuple[str, ...]] = ("re:.*",)
    target_refusal: ClassVar[str] = NEEDED
    identity_at_init: ClassVar[bool] = False
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    _file_parts: ClassVar[int] = 1  # of HF PEFT's file: 2 where it stores, and never uses, as many tokens for a decoder

    num_virtual_tokens: int = 20
    """Virtual tokens in front of the input."""

    def __post_init__(self) -> None:
        value = self.num_virtual_tokens
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{type(self).__name__} num_virtual_tokens must be a positive integer, got {value!r}")

    @abstractmethod
    def prompt_adapter(self, module: nn.Module) -> PromptAdapter:
        """Make the adapter of the backbone."""

    @override
    def supports(self, module: nn.Module) -> bool:
        return is_backbone(module)

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        path = backbone_path(model)
        (target,) = targets  # as there is one backbone, and nothing else is supported
        modules = {place: unwrapped(module) for place, module in base_modules(model)}
        room = getattr(modules[path].config, "max_position_embeddings", None) or math.inf
        if room <= self.num_virtual_tokens:
            raise TargetError(
                f"{type(self).__name__} num_virtual_tokens={self.num_virtual_tokens} leaves no room for tokens in the {room} positions of "
                f"{type(model).__name__}; use fewer"
            )
        decoder = re.sub(r"encoder$", "decoder", path)
        paired = path.endswith("encoder") and decoder in modules
        return [target, Target(path=decoder, rule=_DECODER_RULE)] if paired else [target]

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if target.rule == _DECODER_RULE:
            return CrossAttentionMask(module, self.num_virtual_tokens)
        return self.prompt_adapter(module)

    @override
    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        for path, adapter in adapters.items():
            if isinstance(adapter, PromptAdapter):
                adapter.cut = len(adapters) == 1
                adapter.hands_on = not adapter.cut
                adapter.first_is_read = adapter.cut and not adapter.causal and _reads_the_first(model, path)

    # -- files: one tensor, as HF PEFT has it --------------------------------------------------------------------------

    @override
    def file_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (prompts,) = tensors.values()
        return {_FILE_TENSOR: prompts}

    @override
    def placed_tensors(self, model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(stored) != {_FILE_TENSOR}:
            raise AdapterMismatchError(f"the file must hold {_FILE_TENSOR!r} alone, it holds {sorted(stored)[:5]}")
        try:
            path = backbone_path(model)
        except TargetError as error:
            raise AdapterMismatchError(str(error)) from error
        prompts, n = stored[_FILE_TENSOR], self.num_virtual_tokens
        whole = len(prompts) == self._file_parts * n
        return {f"{path}.{_FILE_TENSOR}": prompts[:n] if whole else prompts}  # what has another shape is refused later

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        (adapter,) = (adapter for adapter in adapters.values() if isinstance(adapter, PromptAdapter))
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": adapter.features,
            "num_layers": adapter.layers,
            "num_attention_heads": adapter.heads,
            "num_transformer_submodules": 1,
            "target_modules": None,  # the format has no such key
        }

    @classmethod
    def from_hf_fields(cls, config: Mapping[str, Any], keys: Sequence[str], fields: Mapping[str, Any]) -> Self:
        """Return the method with ``fields`` and the virtual tokens of HF PEFT's ``config``, of which ``keys`` are understood too.

        Raises:
            AdapterConfigError: ``config`` sets something else, or a field is out of its range.
        """
        refuse_other_keys(cls.__name__, config, _HF_UNDERSTOOD.union(keys))
        try:
            method = cls(num_virtual_tokens=config.get("num_virtual_tokens"), **fields)  # type: ignore[arg-type]
        except ConfigError as error:
            raise AdapterConfigError(str(error)) from error
        if config.get("num_transformer_submodules") == 2:
            object.__setattr__(method, "_file_parts", 2)
        return method


_HF_UNDERSTOOD = frozenset(
    [
        "num_virtual_tokens",
        "token_dim",
        "num_layers",
        "num_attention_heads",
        "num_transformer_submodules",
    ]
)


def _reads_the_first(model: nn.Module, path: str) -> bool:
    """Tell whether the model around the backbone at ``path`` classifies a sequence by its first token, as those of encoders do."""
    around: Any = model.get_submodule(path.rpartition(".")[0])
    pooling = getattr(getattr(around, "config", None), "classifier_pooling", "cls")  # of ModernBERT: cls or mean
    return type(around).__name__.endswith("ForSequenceClassification") and pooling == "cls"


def _cached_length(cache: Any) -> int:
    """Return how many positions a cache of keys and values holds."""
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise InjectionError(
            f"virtual tokens need a cache that grows, but a {type(cache).__name__} of fixed size was given; use transformers' DynamicCache"
        )
    return int(cache.get_seq_length())


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        kind = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise InjectionError(f"virtual tokens need an attention mask of two or four dimensions, got one of {kind}")


def _with_visible(mask: Tensor, tokens: int) -> Tensor:
    """Return a mask with ``tokens`` visible keys in front: ones of a mask (batch, keys), or of bool; zeros where it is added."""
    shape = (*mask.shape[:-1], tokens)
    front = mask.new_ones(shape) if mask.dim() == 2 or mask.dtype == torch.bool else mask.new_zeros(shape)
    return torch.cat([front, mask], dim=-1)

"""The configurations under which transformers runs a mixture of experts: Mixtral, Qwen2Moe, Qwen3Moe.

::

    source            all layers, weights sum to one        some layers, or weights as the softmax gave them
    Llama, Mistral    Mixtral                               Qwen2Moe(qkv_bias=False), without a shared expert
    Qwen2             Qwen2Moe, without a shared expert     the same
    Qwen3             Qwen3Moe                              the same

Every key that decides what is computed is named here, since the defaults of these classes differ and a forgotten key gives
another model without a word. What a class has no key for is refused.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_peft.errors import ExportError

SOURCES: Mapping[str, tuple[str, ...]] = {
    "LlamaForCausalLM": ("mixtral", "qwen2_moe"),
    "MistralForCausalLM": ("mixtral", "qwen2_moe"),
    "Qwen2ForCausalLM": ("qwen2_moe",),
    "Qwen3ForCausalLM": ("qwen3_moe",),
}
"""Class of a model to the formats it can be written in, the most widely read one first."""

_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True)
class MixtureShape:
    """What the mixtures of a model have in common."""

    experts: int
    """Experts in a layer."""
    hidden: int
    """Features between the projections of an expert."""
    top_k: int
    """Experts a token goes to."""
    normalized: bool
    """Whether the weights of a token's experts sum to one."""
    layers: tuple[int, ...]
    """The layers that are mixtures."""
    balance: float
    """Factor of the load-balancing loss."""


def own_format() -> str:
    """Say what is left to a model that no other format can hold."""
    return "save_adapter(model, folder) writes any mixture in this library's own format"


def no_format(kind: str) -> str:
    """Say that a model of the class ``kind`` can be written in this library's own format only."""
    return f"no format of transformers holds a {kind} whose MLPs are mixtures of experts (known: {', '.join(SOURCES)}); {own_format()}"


def choose(kind: str, wanted: str, layers: int, shape: MixtureShape) -> str:
    """Return the format for a model of the class ``kind`` with so many ``layers``: ``wanted``, or the best one for ``auto``.

    Raises:
        ExportError: no format, or not the one wanted, can hold such a model.
    """
    formats = SOURCES.get(kind, ())
    if not formats:
        raise ExportError(no_format(kind))
    dense = layers - len(shape.layers)
    if wanted == "auto":
        return formats[-1] if dense or not shape.normalized else formats[0]
    if wanted not in formats:
        raise ExportError(
            f"a {kind} was to be written as {wanted!r}, which computes something else; it can be written as {' or '.join(map(repr, formats))}"
        )
    if wanted == "mixtral" and dense:
        raise ExportError(
            f"Mixtral has experts in every layer, but {dense} of the {layers} layers of this model are dense; write it as 'qwen2_moe'"
        )
    if wanted == "mixtral" and not shape.normalized:
        raise ExportError(
            "Mixtral divides the weights of a token's experts by their sum, but this model takes them as the softmax gives them "
            "(combine='softmax'); write it as 'qwen2_moe'"
        )
    return wanted


def target_config(source: Any, name: str, shape: MixtureShape) -> Any:
    """Return the configuration of the format ``name`` for a dense model with the configuration ``source``.

    Raises:
        ExportError: the format has no key for something in ``source``.
    """
    from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

    _refuse(source, name)
    keys = {key: copy.deepcopy(getattr(source, key)) for key in _SAME}
    keys |= {
        "num_experts_per_tok": shape.top_k,
        "output_router_logits": True,  # else nothing balances the load in further training
        "router_aux_loss_coef": shape.balance,
        "dtype": source.dtype,
    }
    width = source.hidden_size // source.num_attention_heads
    head_dim = getattr(source, "head_dim", None) or width
    if name == "mixtral":
        return MixtralConfig(
            **keys,
            intermediate_size=shape.hidden,
            num_local_experts=shape.experts,
            head_dim=head_dim,
            sliding_window=getattr(source, "sliding_window", None),
            router_jitter_noise=0.0,
        )
    keys |= {
        "intermediate_size": source.intermediate_size,
        "moe_intermediate_size": shape.hidden,
        "num_experts": shape.experts,
        "norm_topk_prob": shape.normalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index in range(source.num_hidden_layers) if index not in shape.layers],
    }
    windows = _windows(source)
    if name == "qwen3_moe":
        window = next(iter(windows), None)
        return Qwen3MoeConfig(
            **keys,
            head_dim=head_dim,
            attention_bias=source.attention_bias,
            use_sliding_window=window is not None,
            sliding_window=window,
        )
    window = next((window for window in windows if window is not None), None)
    return Qwen2MoeConfig(
        **keys,
        **({} if head_dim == width else {"head_dim": head_dim}),
        qkv_bias=source.model_type == "qwen2",
        shared_expert_intermediate_size=0,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=getattr(source, "max_window_layers", source.num_hidden_layers),
        layer_types=["full_attention" if one is None else "sliding_attention" for one in windows],
    )


def _windows(source: Any) -> Sequence[int | None]:
    """Return the window of attention of each layer, None for all that came before."""
    window = getattr(source, "sliding_window", None) or None
    types = source.layer_types if source.model_type in ("qwen2", "qwen3") else None
    if types is None:
        return [window] * source.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def _refuse(source: Any, name: str) -> None:
    """Refuse what the format ``name`` has no key for, or what programs that read it do not look at."""
    obstacles = {}
    if getattr(source, "attention_bias", False) and name != "qwen3_moe":
        obstacles["attention_bias=True"] = "has no biases there"
    if getattr(source, "mlp_bias", False):
        obstacles["mlp_bias=True"] = "has experts without biases"
    if source.hidden_act not in ("silu", "swish"):
        obstacles[f"hidden_act={source.hidden_act!r}"] = (
            "is run with SiLU, whatever its configuration says, by other programs"
        )
    if name == "qwen3_moe" and len(set(_windows(source))) > 1:
        obstacles["a sliding window in some layers only"] = "has it in all layers or in none"
    for what, why in obstacles.items():
        raise ExportError(f"the model has {what}, and {name!r} {why}; {own_format()}")


@contextlib.contextmanager
def empty_experts_allowed() -> Iterator[None]:
    """Keep torch from warning that the shared expert of a Qwen2Moe, which has no neurons, cannot be given first values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        yield

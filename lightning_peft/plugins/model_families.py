"""The model families: where the roles are in the models of transformers. Data only.

A glob is matched from the end of the module path, ``*`` within one part of it. Every role is exact: ``output`` is the
projection that ends attention and never the MLP's; ``up`` and ``down`` are the whole of an MLP without a gate;
``embedding`` is what turns tokens (ViT: patches) into vectors, not their positions; ``head`` is every linear layer
between the last hidden state and the logits. Where a model has no module for a role, the family does not name it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_peft.families import Fused, ModelFamily
from lightning_peft.hookspecs import hookimpl

# -- decoders ----------------------------------------------------------------------------------------------------------

_DECODER_HEADS = ("lm_head", "score", "classifier", "qa_outputs")
_LLAMA_ATTENTION = {
    "query": ("layers.*.self_attn.q_proj",),
    "key": ("layers.*.self_attn.k_proj",),
    "value": ("layers.*.self_attn.v_proj",),
    "output": ("layers.*.self_attn.o_proj",),
    "attention": ("layers.*.self_attn",),
    "mlp": ("layers.*.mlp",),
    "block": ("layers.*",),
    "embedding": ("embed_tokens",),
    "head": _DECODER_HEADS,
    "norm": ("layers.*.*layernorm", "layers.*.self_attn.*_norm", "norm"),
}
_LLAMA = {
    **_LLAMA_ATTENTION,
    "gate": ("layers.*.mlp.gate_proj",),
    "up": ("layers.*.mlp.up_proj",),
    "down": ("layers.*.mlp.down_proj",),
}
# Mixture-of-experts layers hold all their experts in one module, as three-dimensional parameters.
_EXPERTS = {"experts": ("layers.*.mlp.experts",)}
_QWEN_MOE = {
    **_LLAMA_ATTENTION,
    **_EXPERTS,
    "gate": ("layers.*.mlp.gate_proj", "layers.*.mlp.shared_expert.gate_proj"),
    "up": ("layers.*.mlp.up_proj", "layers.*.mlp.shared_expert.up_proj"),
    "down": ("layers.*.mlp.down_proj", "layers.*.mlp.shared_expert.down_proj"),
}
# The roles are those of the language model; its vision tower has modules of the same names.
_GEMMA3 = {
    role: globs if role == "head" else tuple(f"language_model.{glob}" for glob in globs)
    for role, globs in _LLAMA.items()
}
_PHI3 = {
    "qkv": ("layers.*.self_attn.qkv_proj",),
    "gate_up": ("layers.*.mlp.gate_up_proj",),
    **{role: globs for role, globs in _LLAMA.items() if role not in ("query", "key", "value", "gate", "up")},
}
_PHI = {
    **_LLAMA_ATTENTION,
    "output": ("layers.*.self_attn.dense",),
    "up": ("layers.*.mlp.fc1",),
    "down": ("layers.*.mlp.fc2",),
    "norm": ("layers.*.*layernorm", "layers.*.self_attn.*_layernorm", "final_layernorm"),
}
_OPT = {
    "query": ("self_attn.q_proj",),
    "key": ("self_attn.k_proj",),
    "value": ("self_attn.v_proj",),
    "output": ("self_attn.out_proj",),
    "up": ("layers.*.fc1",),
    "down": ("layers.*.fc2",),
    "attention": ("layers.*.self_attn",),
    "block": ("layers.*",),
    "embedding": ("embed_tokens",),
    "head": _DECODER_HEADS,
    "norm": ("*layer_norm",),
}
_GPT2 = {
    "qkv": ("attn.c_attn",),
    "output": ("attn.c_proj",),
    "up": ("mlp.c_fc",),
    "down": ("mlp.c_proj",),
    "attention": ("h.*.attn",),
    "mlp": ("h.*.mlp",),
    "block": ("h.*",),
    "embedding": ("wte",),
    "head": _DECODER_HEADS,
    "norm": ("ln_*",),
}
_GPT_NEOX = {
    "qkv": ("attention.query_key_value",),
    "output": ("attention.dense",),
    "up": ("mlp.dense_h_to_4h",),
    "down": ("mlp.dense_4h_to_h",),
    "attention": ("layers.*.attention",),
    "mlp": ("layers.*.mlp",),
    "block": ("layers.*",),
    "embedding": ("embed_in",),
    "head": _DECODER_HEADS,
    "norm": ("layers.*.*layernorm", "final_layer_norm"),
}
_BLOOM = {
    **_GPT_NEOX,
    "qkv": ("self_attention.query_key_value",),
    "output": ("self_attention.dense",),
    "attention": ("h.*.self_attention",),
    "mlp": ("h.*.mlp",),
    "block": ("h.*",),
    "embedding": ("word_embeddings",),
    "norm": ("word_embeddings_layernorm", "h.*.*layernorm", "h.*.ln_*", "ln_f"),
}

# -- encoders ----------------------------------------------------------------------------------------------------------

_BERT = {
    "query": ("attention.self.query",),
    "key": ("attention.self.key",),
    "value": ("attention.self.value",),
    "output": ("attention.output.dense",),
    "up": ("layer.*.intermediate.dense",),
    "down": ("layer.*.output.dense",),
    "attention": ("layer.*.attention",),
    "block": ("layer.*",),
    "embedding": ("word_embeddings",),
    "head": ("cls.predictions.transform.dense", "cls.predictions.decoder", "seq_relationship", "classifier", "qa_outputs"),
    "norm": ("embeddings.LayerNorm", "output.LayerNorm"),
}  # fmt: skip
_ROBERTA = {
    **_BERT,
    "head": ("lm_head.dense", "lm_head.decoder", "classifier", "classifier.dense", "classifier.out_proj", "qa_outputs"),
}
_DEBERTA_V2 = {
    **_BERT,
    "query": ("attention.self.query_proj",),
    "key": ("attention.self.key_proj",),
    "value": ("attention.self.value_proj",),
    "head": (*_BERT["head"], "lm_predictions.lm_head.dense", "pooler.dense"),
    "norm": (*_BERT["norm"], "encoder.LayerNorm", "conv.LayerNorm"),
}
_DISTILBERT = {
    "query": ("attention.q_lin",),
    "key": ("attention.k_lin",),
    "value": ("attention.v_lin",),
    "output": ("attention.out_lin",),
    "up": ("ffn.lin1",),
    "down": ("ffn.lin2",),
    "attention": ("layer.*.attention",),
    "mlp": ("layer.*.ffn",),
    "block": ("layer.*",),
    "embedding": ("word_embeddings",),
    "head": ("vocab_transform", "vocab_projector", "pre_classifier", "classifier", "qa_outputs"),
    "norm": ("embeddings.LayerNorm", "sa_layer_norm", "output_layer_norm"),
}
_VIT = {
    "query": ("attention.q_proj",),
    "key": ("attention.k_proj",),
    "value": ("attention.v_proj",),
    "output": ("attention.o_proj",),
    "up": ("mlp.fc1",),
    "down": ("mlp.fc2",),
    "attention": ("layers.*.attention",),
    "mlp": ("layers.*.mlp",),
    "block": ("layers.*",),
    "embedding": ("patch_embeddings.projection",),
    "head": ("classifier",),
    "norm": ("layernorm*",),
}

# -- encoders with decoders: self-attention and cross-attention share the roles ----------------------------------------

_T5 = {
    "query": ("*Attention.q",),
    "key": ("*Attention.k",),
    "value": ("*Attention.v",),
    "output": ("*Attention.o",),
    "gate": ("DenseReluDense.wi_0",),
    "up": ("DenseReluDense.wi", "DenseReluDense.wi_1"),
    "down": ("DenseReluDense.wo",),
    "attention": ("block.*.layer.*.*Attention",),
    "mlp": ("block.*.layer.*.DenseReluDense",),
    "block": ("block.*",),
    "embedding": ("embed_tokens",),  # `shared` lends them its weight and is never called
    "head": ("lm_head", "classifier", "classification_head.dense", "classification_head.out_proj", "qa_outputs"),
    "norm": ("*layer_norm",),
}
_WHISPER = {
    **_OPT,
    "query": ("*_attn.q_proj",),
    "key": ("*_attn.k_proj",),
    "value": ("*_attn.v_proj",),
    "output": ("*_attn.out_proj",),
    "attention": ("layers.*.*_attn",),
    "head": ("proj_out", "projector", "classifier"),
}

# -- fused projections -------------------------------------------------------------------------------------------------

_THIRDS = {"query": 1, "key": 1, "value": 1}
_QKV_IN_A_ROW = Fused(role="qkv", parts=_THIRDS)
_QKV_BY_HEAD = Fused(role="qkv", parts=_THIRDS, groups="num_attention_heads")
_QKV_GROUPED_QUERY = Fused(
    role="qkv", parts={"query": "num_attention_heads", "key": "num_key_value_heads", "value": "num_key_value_heads"}
)
_GATE_UP = Fused(role="gate_up", parts={"gate": 1, "up": 1})

FAMILIES = (
    ModelFamily(name="llama", model_types=("llama",), norm="rms", roles=_LLAMA),
    ModelFamily(name="mistral", model_types=("mistral",), norm="rms", roles=_LLAMA),
    ModelFamily(name="mixtral", model_types=("mixtral",), norm="rms", roles={**_LLAMA_ATTENTION, **_EXPERTS}),
    ModelFamily(name="qwen2", model_types=("qwen2",), norm="rms", roles=_LLAMA),
    ModelFamily(name="qwen2_moe", model_types=("qwen2_moe",), norm="rms", roles=_QWEN_MOE),
    ModelFamily(name="qwen3", model_types=("qwen3",), norm="rms", roles=_LLAMA),
    ModelFamily(name="qwen3_moe", model_types=("qwen3_moe",), norm="rms", roles={**_LLAMA, **_EXPERTS}),
    ModelFamily(name="gemma", model_types=("gemma",), norm="rms_offset", roles=_LLAMA),
    ModelFamily(name="gemma2", model_types=("gemma2",), norm="rms_offset", roles=_LLAMA),
    ModelFamily(name="gemma3_text", model_types=("gemma3_text",), norm="rms_offset", roles=_LLAMA),
    ModelFamily(name="gemma3", model_types=("gemma3",), norm="rms_offset", roles=_GEMMA3),
    ModelFamily(name="phi", model_types=("phi",), roles=_PHI),
    ModelFamily(name="phi3", model_types=("phi3",), norm="rms", roles=_PHI3, fused=(_QKV_GROUPED_QUERY, _GATE_UP)),
    ModelFamily(name="opt", model_types=("opt",), roles=_OPT),
    ModelFamily(name="gpt2", model_types=("gpt2",), roles=_GPT2, fused=(_QKV_IN_A_ROW,)),
    ModelFamily(name="gpt_neox", model_types=("gpt_neox",), roles=_GPT_NEOX, fused=(_QKV_BY_HEAD,)),
    ModelFamily(name="bloom", model_types=("bloom",), roles=_BLOOM, fused=(_QKV_BY_HEAD,)),
    # Falcon fuses query, key and value in three ways, depending on its configuration; only the whole is named.
    ModelFamily(name="falcon", model_types=("falcon",), roles=_BLOOM),
    ModelFamily(name="bert", model_types=("bert",), roles=_BERT),
    ModelFamily(name="roberta", model_types=("roberta", "xlm-roberta"), roles=_ROBERTA),
    ModelFamily(name="deberta_v2", model_types=("deberta-v2",), roles=_DEBERTA_V2),
    ModelFamily(name="distilbert", model_types=("distilbert",), roles=_DISTILBERT),
    ModelFamily(name="vit", model_types=("vit",), roles=_VIT),
    ModelFamily(name="t5", model_types=("t5", "mt5", "umt5"), roles=_T5),
    ModelFamily(name="whisper", model_types=("whisper",), roles=_WHISPER),
)


@hookimpl
def register_model_families() -> tuple[ModelFamily, ...]:
    """Register the families of transformers' models."""
    return FAMILIES


@hookimpl(trylast=True)
def resolve_model_family(model: nn.Module, families: dict[str, ModelFamily]) -> ModelFamily | None:
    """Find the family by the ``model_type`` of the model's configuration."""
    by_type: Mapping[str, ModelFamily] = {kind: family for family in families.values() for kind in family.model_types}
    return by_type.get(getattr(getattr(model, "config", None), "model_type", ""))

"""The model families: where the roles are in the models of transformers. Data only."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_peft.hookspecs import hookimpl
from lightning_peft.targets import Fused, ModelFamily

_LLAMA = {
    "query": ("self_attn.q_proj",),
    "key": ("self_attn.k_proj",),
    "value": ("self_attn.v_proj",),
    "output": ("self_attn.o_proj",),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj",),
    "down": ("mlp.down_proj",),
    "attention": ("layers.*.self_attn",),
    "mlp": ("layers.*.mlp",),
    "block": ("layers.*",),
    "embedding": ("embed_tokens",),
    "head": ("lm_head", "score"),
    "norm": ("input_layernorm", "post_attention_layernorm", "norm"),
}

FAMILIES = (
    ModelFamily(name="llama", model_types=("llama",), roles=_LLAMA),
    ModelFamily(
        name="gpt2",
        model_types=("gpt2",),
        roles={
            "qkv": ("attn.c_attn",),
            "output": ("attn.c_proj",),
            "up": ("mlp.c_fc",),
            "down": ("mlp.c_proj",),
            "attention": ("h.*.attn",),
            "mlp": ("h.*.mlp",),
            "block": ("h.*",),
            "embedding": ("wte",),
            "head": ("lm_head", "score"),
            "norm": ("ln_1", "ln_2", "ln_f"),
        },
        fused=(Fused(role="qkv", parts={"query": 1, "key": 1, "value": 1}),),
    ),
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

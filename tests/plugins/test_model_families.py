"""Every family against tiny random models of transformers: the expected paths are written out, not computed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.errors import TargetError
from lightning_peft.families import ROLES
from lightning_peft.plugins.lora import LoRA
from lightning_peft.plugins.model_families import FAMILIES
from lightning_peft.registry import get_registry
from lightning_peft.surgery import inject
from lightning_peft.targets import Targets, is_linear, resolve_targets

# -- tiny models -------------------------------------------------------------------------------------------------------

_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_TOKENS, **_SIZES, "max_position_embeddings": 32}
_GROUPED_QUERY = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 4}
_EXPERTS = {
    **_GROUPED_QUERY,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
}
_VISION = {**_SIZES, "image_size": 8, "patch_size": 4}
_T5 = {**_TOKENS, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_DISTILBERT = {**_TOKENS, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}
_DEBERTA = {
    **_ENCODER,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}
_WHISPER = {
    **_TOKENS,
    **{f"{side}_{name}": value for side in ("encoder", "decoder")
       for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 24}.items()},
    "d_model": 16, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16,
    "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip

_CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"], _GROUPED_QUERY),
    **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe"], _EXPERTS),
    "gemma3": {"text_config": _GROUPED_QUERY, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "phi": {**_GROUPED_QUERY, "qk_layernorm": True},
    "opt": {**_ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 8},
    "gpt2": {**_TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "gpt_neox": _ENCODER,
    "bloom": {**_TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "falcon": _ENCODER,
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "deberta-v2": _DEBERTA,
    "distilbert": _DISTILBERT,
    "vit": _VISION,
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "umt5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "whisper": _WHISPER,
}
_TASKS = {
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "deberta-v2", "distilbert"], "MaskedLM"),
    **dict.fromkeys(["t5", "mt5", "umt5"], "Seq2SeqLM"),
    "gemma3": "ImageTextToText",
    "vit": "ImageClassification",
    "whisper": "SpeechSeq2Seq",
}


def tiny(model_type: str, task: str | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**_CONFIGS[model_type], **changes})
    auto = getattr(transformers, f"AutoModelFor{task or _TASKS.get(model_type, 'CausalLM')}")
    return auto.from_config(config).eval()


def inputs(model_type: str) -> dict[str, Tensor]:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    if model_type == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8)}
    if model_type == "whisper":
        return {"input_features": torch.linspace(-1, 1, 256).view(1, 8, 32), "decoder_input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids} if "t5" in model_type else {"input_ids": ids}


def randomise(model: nn.Module) -> list[nn.Parameter]:
    """Give the adapters of ``model`` values that act, and return their parameters."""
    parameters = [p for layer in adapter_layers(model).values() for p in layer.adapters.parameters()]
    for parameter in parameters:
        nn.init.normal_(parameter)
    return parameters


# -- where the roles are: what each has outside the layers and in layer 0 ----------------------------------------------


def table(text: str, **changes: str) -> dict[str, list[str]]:
    """Read lines of a role and its paths, where ``L`` stands for the path of layer 0."""
    layer = changes.pop("L")
    rows = {role: paths for role, *paths in map(str.split, text.strip().splitlines())}
    rows |= {role: paths.split() for role, paths in changes.items()}
    return {
        role: [layer + path[1:] if path[0] == "L" else path for path in paths] for role, paths in rows.items() if paths
    }


_LLAMA_PATHS = """
    query      L.self_attn.q_proj
    key        L.self_attn.k_proj
    value      L.self_attn.v_proj
    output     L.self_attn.o_proj
    gate       L.mlp.gate_proj
    up         L.mlp.up_proj
    down       L.mlp.down_proj
    attention  L.self_attn
    mlp        L.mlp
    block      L
    embedding  model.embed_tokens
    head       lm_head
    norm       L.input_layernorm L.post_attention_layernorm model.norm
"""
_GPT2_PATHS = """
    query      L.attn.c_attn
    key        L.attn.c_attn
    value      L.attn.c_attn
    qkv        L.attn.c_attn
    output     L.attn.c_proj
    up         L.mlp.c_fc
    down       L.mlp.c_proj
    attention  L.attn
    mlp        L.mlp
    block      L
    embedding  transformer.wte
    head       lm_head
    norm       L.ln_1 L.ln_2 transformer.ln_f
"""
_GPT_NEOX_PATHS = """
    query      L.attention.query_key_value
    key        L.attention.query_key_value
    value      L.attention.query_key_value
    qkv        L.attention.query_key_value
    output     L.attention.dense
    up         L.mlp.dense_h_to_4h
    down       L.mlp.dense_4h_to_h
    attention  L.attention
    mlp        L.mlp
    block      L
    embedding  gpt_neox.embed_in
    head       lm_head
    norm       L.input_layernorm L.post_attention_layernorm gpt_neox.final_layer_norm
"""
_BERT_PATHS = """
    query      L.attention.self.query
    key        L.attention.self.key
    value      L.attention.self.value
    output     L.attention.output.dense
    up         L.intermediate.dense
    down       L.output.dense
    attention  L.attention
    block      L
    embedding  {0}.embeddings.word_embeddings
    head       cls.predictions.transform.dense cls.predictions.decoder
    norm       {0}.embeddings.LayerNorm L.attention.output.LayerNorm L.output.LayerNorm
"""
_DISTILBERT_PATHS = """
    query      L.attention.q_lin
    key        L.attention.k_lin
    value      L.attention.v_lin
    output     L.attention.out_lin
    up         L.ffn.lin1
    down       L.ffn.lin2
    attention  L.attention
    mlp        L.ffn
    block      L
    embedding  distilbert.embeddings.word_embeddings
    head       vocab_transform vocab_projector
    norm       distilbert.embeddings.LayerNorm L.sa_layer_norm L.output_layer_norm
"""
_OPT_PATHS = """
    query      L.self_attn.q_proj
    key        L.self_attn.k_proj
    value      L.self_attn.v_proj
    output     L.self_attn.out_proj
    up         L.fc1
    down       L.fc2
    attention  L.self_attn
    block      L
    embedding  model.decoder.embed_tokens
    head       lm_head
    norm       L.self_attn_layer_norm L.final_layer_norm model.decoder.final_layer_norm
"""
_VIT_PATHS = """
    query      L.attention.q_proj
    key        L.attention.k_proj
    value      L.attention.v_proj
    output     L.attention.o_proj
    up         L.mlp.fc1
    down       L.mlp.fc2
    attention  L.attention
    mlp        L.mlp
    block      L
    embedding  vit.embeddings.patch_embeddings.projection
    head       classifier
    norm       L.layernorm_before L.layernorm_after vit.layernorm
"""
_T5_PATHS = """
    query      encoder.L.0.SelfAttention.q decoder.L.0.SelfAttention.q decoder.L.1.EncDecAttention.q
    key        encoder.L.0.SelfAttention.k decoder.L.0.SelfAttention.k decoder.L.1.EncDecAttention.k
    value      encoder.L.0.SelfAttention.v decoder.L.0.SelfAttention.v decoder.L.1.EncDecAttention.v
    output     encoder.L.0.SelfAttention.o decoder.L.0.SelfAttention.o decoder.L.1.EncDecAttention.o
    gate       encoder.L.1.DenseReluDense.wi_0 decoder.L.2.DenseReluDense.wi_0
    up         encoder.L.1.DenseReluDense.wi_1 decoder.L.2.DenseReluDense.wi_1
    down       encoder.L.1.DenseReluDense.wo decoder.L.2.DenseReluDense.wo
    attention  encoder.L.0.SelfAttention decoder.L.0.SelfAttention decoder.L.1.EncDecAttention
    mlp        encoder.L.1.DenseReluDense decoder.L.2.DenseReluDense
    block      encoder.block.0 decoder.block.0
    embedding  encoder.embed_tokens decoder.embed_tokens
    head       lm_head
    norm       encoder.L.0.layer_norm encoder.L.1.layer_norm encoder.final_layer_norm decoder.L.0.layer_norm decoder.L.1.layer_norm decoder.L.2.layer_norm decoder.final_layer_norm
""".replace(".L.", ".block.0.layer.")  # fmt: skip
_WHISPER_PATHS = """
    query      model.encoder.L.self_attn.q_proj model.decoder.L.self_attn.q_proj model.decoder.L.encoder_attn.q_proj
    key        model.encoder.L.self_attn.k_proj model.decoder.L.self_attn.k_proj model.decoder.L.encoder_attn.k_proj
    value      model.encoder.L.self_attn.v_proj model.decoder.L.self_attn.v_proj model.decoder.L.encoder_attn.v_proj
    output     model.encoder.L.self_attn.out_proj model.decoder.L.self_attn.out_proj model.decoder.L.encoder_attn.out_proj
    up         model.encoder.L.fc1 model.decoder.L.fc1
    down       model.encoder.L.fc2 model.decoder.L.fc2
    attention  model.encoder.L.self_attn model.decoder.L.self_attn model.decoder.L.encoder_attn
    block      model.encoder.layers.0 model.decoder.layers.0
    embedding  model.decoder.embed_tokens
    head       proj_out
    norm       model.encoder.L.self_attn_layer_norm model.encoder.L.final_layer_norm model.encoder.layer_norm model.decoder.L.self_attn_layer_norm model.decoder.L.encoder_attn_layer_norm model.decoder.L.final_layer_norm model.decoder.layer_norm
""".replace(".L.", ".layers.0.")  # fmt: skip

_llama = functools.partial(table, _LLAMA_PATHS, L="model.layers.0")
_QK_NORM = "L.self_attn.q_norm L.self_attn.k_norm L.input_layernorm L.post_attention_layernorm model.norm"
_GEMMA_NORM = "L.pre_feedforward_layernorm L.post_feedforward_layernorm"
_FUSED = {"experts": "L.mlp.experts"}
_EXPERTS_ALONE = {**dict.fromkeys(["gate", "up", "down"], ""), **_FUSED}

PATHS: dict[str, dict[str, list[str]]] = {
    "llama": _llama(),
    "mistral": _llama(),
    "mixtral": _llama(**_EXPERTS_ALONE),
    "qwen2": _llama(),
    "qwen2_moe": _llama(
        gate="L.mlp.shared_expert.gate_proj",
        up="L.mlp.shared_expert.up_proj",
        down="L.mlp.shared_expert.down_proj",
        **_FUSED,
    ),
    "qwen3": _llama(norm=_QK_NORM),
    "qwen3_moe": _llama(**_EXPERTS_ALONE, norm=_QK_NORM),
    "gemma": _llama(),
    "gemma2": _llama(norm=f"{_GEMMA_NORM} L.input_layernorm L.post_attention_layernorm model.norm"),
    "gemma3_text": _llama(norm=f"{_GEMMA_NORM} {_QK_NORM}"),
    "gemma3": _llama(
        L="model.language_model.layers.0",
        embedding="model.language_model.embed_tokens",
        norm=f"{_GEMMA_NORM} {_QK_NORM}".replace("model.norm", "model.language_model.norm"),
    ),
    "phi": _llama(
        output="L.self_attn.dense",
        gate="",
        up="L.mlp.fc1",
        down="L.mlp.fc2",
        norm="L.input_layernorm L.self_attn.q_layernorm L.self_attn.k_layernorm model.final_layernorm",
    ),
    "phi3": _llama(
        **dict.fromkeys(["query", "key", "value", "qkv"], "L.self_attn.qkv_proj"),
        **dict.fromkeys(["gate", "up", "gate_up"], "L.mlp.gate_up_proj"),
    ),
    "opt": table(_OPT_PATHS, L="model.decoder.layers.0"),
    "gpt2": table(_GPT2_PATHS, L="transformer.h.0"),
    "gpt_neox": table(_GPT_NEOX_PATHS, L="gpt_neox.layers.0"),
    "bloom": table(
        _GPT_NEOX_PATHS.replace("L.attention", "L.self_attention"),
        L="transformer.h.0",
        embedding="transformer.word_embeddings",
        norm="transformer.word_embeddings_layernorm L.input_layernorm L.post_attention_layernorm transformer.ln_f",
    ),
    "falcon": table(
        _GPT_NEOX_PATHS.replace("L.attention", "L.self_attention"),
        L="transformer.h.0",
        query="",
        key="",
        value="",
        embedding="transformer.word_embeddings",
        norm="L.input_layernorm transformer.ln_f",
    ),
    "bert": table(_BERT_PATHS.format("bert"), L="bert.encoder.layer.0"),
    "roberta": table(_BERT_PATHS.format("roberta"), L="roberta.encoder.layer.0", head="lm_head.dense lm_head.decoder"),
    "deberta-v2": table(
        _BERT_PATHS.format("deberta"),
        L="deberta.encoder.layer.0",
        query="L.attention.self.query_proj",
        key="L.attention.self.key_proj",
        value="L.attention.self.value_proj",
        norm="deberta.embeddings.LayerNorm L.attention.output.LayerNorm L.output.LayerNorm deberta.encoder.LayerNorm deberta.encoder.conv.LayerNorm",
    ),
    "distilbert": table(_DISTILBERT_PATHS, L="distilbert.transformer.layer.0"),
    "vit": table(_VIT_PATHS, L="vit.layers.0"),
    "t5": table(_T5_PATHS.replace("wi_1", "wi"), L="", gate=""),
    "mt5": table(_T5_PATHS, L=""),
    "whisper": table(_WHISPER_PATHS, L=""),
}  # fmt: skip
PATHS |= {"xlm-roberta": PATHS["roberta"], "umt5": PATHS["mt5"]}


def both_layers(paths: list[str]) -> set[str]:
    return {*paths, *(path.replace(".0", ".1", 1) for path in paths)}


def test_every_family_is_tested() -> None:
    assert set(PATHS) == set(_CONFIGS) == {kind for family in FAMILIES for kind in family.model_types}


@pytest.mark.parametrize("model_type", PATHS)
def test_each_role_is_exactly_its_modules(model_type: str) -> None:
    model = tiny(model_type)
    family = get_registry().resolve_family(model)
    assert model_type in family.model_types
    assert set(PATHS[model_type]) <= set(family.role_names)
    for role, expected in PATHS[model_type].items():
        found = [target.path for target in resolve_targets(model, role, family)]
        assert len(found) == len(set(found))
        assert set(found) == both_layers(expected), role


@pytest.mark.parametrize("model_type", PATHS)
def test_a_role_that_a_model_has_no_layers_for_is_an_error(model_type: str) -> None:
    model = tiny(model_type)
    for role in set(ROLES) - {"all_linear", *PATHS[model_type]}:
        message = f"target '{role}' matches no module of {type(model).__name__}"
        if (model_type, role) == ("mixtral", "gate"):  # its routers have that name, but are no linear layers
            message = "target 'gate' matches 'model.layers.0.mlp.gate', a MixtralTopKRouter, which LoRA cannot adapt"
        with pytest.raises(TargetError, match=message):
            inject(model, LoRA(rank=2), role)


TIED = "ignore:the weight of .* is also that of:lightning_peft.errors.LightningPEFTWarning"


@pytest.mark.filterwarnings(TIED)  # most of these models tie their embeddings by default
@pytest.mark.parametrize("model_type", PATHS)
def test_lora_acts_at_each_role_and_every_parameter_of_it_learns(model_type: str) -> None:
    base = tiny(model_type)(**inputs(model_type)).logits
    for role in PATHS[model_type]:
        model = tiny(model_type)
        if not any(LoRA().supports(model.get_submodule(path)) for path in PATHS[model_type][role]):
            with pytest.raises(TargetError, match=f"target '{role}' matches .* which LoRA cannot adapt"):
                inject(model, LoRA(rank=2), role)
            continue
        assert set(inject(model, LoRA(rank=2), role).paths) == both_layers(PATHS[model_type][role])
        torch.testing.assert_close(model(**inputs(model_type)).logits, base)
        parameters = randomise(model)
        logits = model(**inputs(model_type)).logits
        assert not torch.allclose(logits, base)
        logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in parameters), role


# -- heads -------------------------------------------------------------------------------------------------------------

_HEADS = [
    (model_type, task)
    for task, model_types in {
        "CausalLM": "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text gemma3 phi phi3 opt gpt2 gpt_neox bloom falcon bert roberta xlm-roberta",
        "MaskedLM": "bert roberta xlm-roberta deberta-v2 distilbert",
        "PreTraining": "bert",
        "NextSentencePrediction": "bert",
        "SequenceClassification": "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text gemma3 phi phi3 opt gpt2 gpt_neox bloom falcon bert roberta xlm-roberta deberta-v2 distilbert t5 mt5 umt5",
        "TokenClassification": "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 phi phi3 gpt2 gpt_neox bloom falcon bert roberta xlm-roberta deberta-v2 distilbert t5 mt5 umt5",
        "QuestionAnswering": "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe opt gpt2 gpt_neox bloom falcon bert roberta xlm-roberta deberta-v2 distilbert t5 mt5 umt5",
        "MultipleChoice": "bert roberta xlm-roberta deberta-v2 distilbert",
        "Seq2SeqLM": "t5 mt5 umt5",
        "ImageClassification": "vit",
        "ImageTextToText": "gemma3",
        "SpeechSeq2Seq": "whisper",
        "AudioClassification": "whisper",
    }.items()
    for model_type in model_types.split()
]  # fmt: skip


def body(model: Any) -> tuple[str, ...]:
    """Return the prefixes of the pretrained body, as transformers names it."""
    names = [model.base_model_prefix, "encoder", "decoder"]
    return tuple(f"{name}." for name in names if isinstance(getattr(model, name, None), nn.Module))


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize(("model_type", "task"), _HEADS)
def test_the_head_is_all_that_is_linear_outside_the_body_and_all_linear_is_the_rest(model_type: str, task: str) -> None:
    changes = {"is_decoder": True} if task == "CausalLM" and "bert" in model_type else {}
    model = tiny(model_type, task, **changes)
    linear = {path for path, module in model.named_modules() if is_linear(module)}
    inside = {path for path in linear if path.startswith(body(model))}
    in_attention = {path for path in inside if path.endswith("vision_tower.head.attention.out_proj")}
    head = inject(model, LoRA(rank=2), "head", name="head").paths
    assert head
    assert set(head) == linear - inside
    experts = {path for path, module in model.named_modules() if type(module).__name__.endswith("Experts")}
    assert bool(experts) == ("moe" in model_type or model_type == "mixtral")
    assert set(inject(model, LoRA(rank=2), "all_linear").paths) == inside - in_attention | experts


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("legacy", [True, False])
def test_the_head_of_both_deberta_language_models_is_found(legacy: bool) -> None:
    model = tiny("deberta-v2", legacy=legacy)
    expected = ["cls.predictions.transform.dense", "cls.predictions.decoder"] if legacy else ["lm_predictions.lm_head.dense"]  # fmt: skip
    assert inject(model, LoRA(rank=2), "head").paths == expected


def test_dense_layers_among_layers_of_experts_have_gate_up_and_down() -> None:
    expected = {"qwen2_moe": {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared_expert.up_proj"}}
    expected["qwen3_moe"] = {"model.layers.0.mlp.up_proj"}
    for model_type, paths in expected.items():
        assert set(inject(tiny(model_type, mlp_only_layers=[0]), LoRA(rank=2), "up").paths) == paths


def test_a_language_model_without_its_head_has_the_same_roles() -> None:
    config = transformers.AutoConfig.for_model("llama", **_GROUPED_QUERY)
    bare = transformers.AutoModel.from_config(config)
    assert inject(bare, LoRA(rank=2), Targets(include="query", layers=[-1])).paths == ["layers.1.self_attn.q_proj"]


# -- fused projections -------------------------------------------------------------------------------------------------

_BY_HEAD = {
    "query": [*range(4), *range(12, 16), *range(24, 28), *range(36, 40)],
    "key": [*range(4, 8), *range(16, 20), *range(28, 32), *range(40, 44)],
    "value": [*range(8, 12), *range(20, 24), *range(32, 36), *range(44, 48)],
}
_FUSED = {  # features of the fused output that each part is, in models of four heads of width 4
    "gpt2": {"query": range(16), "key": range(16, 32), "value": range(32, 48)},
    "phi3": {"query": range(16), "key": range(16, 24), "value": range(24, 32), "gate": range(24), "up": range(24, 48)},
    "gpt_neox": _BY_HEAD,
    "bloom": _BY_HEAD,
}
_FUSED_ROLES = [(model_type, role) for model_type, parts in _FUSED.items() for role in parts]


@pytest.mark.parametrize(("model_type", "role"), _FUSED_ROLES)
def test_lora_on_a_part_changes_only_its_features(model_type: str, role: str) -> None:
    model = tiny(model_type)
    path = inject(model, LoRA(rank=2), Targets(include=role, layers=[0])).paths[0]
    randomise(model)
    layer = adapter_layers(model)[path]
    x = torch.randn(2, 3, 16)
    change = (layer(x) - layer.base_layer(x)).abs().amax(dim=(0, 1))
    assert change.nonzero().flatten().tolist() == list(_FUSED[model_type][role])


def attention_inputs(model_type: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Run ``model`` and return query, key and value of its first layer, as its own code cuts them."""
    seen: list[tuple[Tensor, ...]] = []
    if model_type == "bloom":
        attention = model.transformer.h[0].self_attention
        cut = attention._reshape
        monkeypatch.setattr(attention, "_reshape", lambda fused: seen.append(cut(fused)) or seen[-1])
    else:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((query, key, value))
            return sdpa(module, query, key, value, *args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    model(**inputs(model_type))
    monkeypatch.undo()
    return dict(zip(("query", "key", "value"), seen[0], strict=True))


@pytest.mark.parametrize(("model_type", "role"), [pair for pair in _FUSED_ROLES if pair[1] not in ("gate", "up")])
def test_a_part_of_qkv_is_what_the_model_cuts_out_of_it(
    model_type: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(model_type)
    base = attention_inputs(model_type, model, monkeypatch)
    inject(model, LoRA(rank=2), Targets(include=role, layers=[0]))
    randomise(model)
    adapted = attention_inputs(model_type, model, monkeypatch)
    for part in base:
        if part == role:
            assert (adapted[part] != base[part]).all()
        else:
            assert torch.equal(adapted[part], base[part])


@pytest.mark.parametrize("role", ["gate", "up"])
def test_a_part_of_gate_up_is_what_the_model_cuts_out_of_it(role: str) -> None:
    def gate_and_product(model: Any) -> Iterator[Tensor]:
        mlp, seen = model.model.layers[0].mlp, []
        for module in (mlp.activation_fn, mlp.down_proj):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**inputs("phi3"))
        return iter(seen)

    model = tiny("phi3")
    base_gate, base_product = gate_and_product(model)
    inject(model, LoRA(rank=2), Targets(include=role, layers=[0]))
    randomise(model)
    gate, product = list(gate_and_product(model))[:2]
    assert torch.equal(gate, base_gate) is (role == "up")
    assert (product != base_product).all()


def test_falcon_refuses_parts_it_does_not_know_the_place_of() -> None:
    with pytest.raises(TargetError, match="target 'query' matches no module of FalconForCausalLM"):
        inject(tiny("falcon"), LoRA(rank=2), "query")

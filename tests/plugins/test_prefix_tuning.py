"""Prefix tuning equals a cache that holds the prefix, and HF PEFT; in generation, under padding and in every family it knows."""

import json

import pytest
import safetensors.torch
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, EncoderDecoderCache

from lightning_peft import (
    LoRA,
    PrefixTuning,
    Targets,
    adapter_layers,
    adapter_state_dict,
    adapters_disabled,
    inject,
    load_adapter,
    save_adapter,
    set_active_adapters,
    trainable_summary,
)
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError, TargetError
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

TOKENS = 5
METHOD = PrefixTuning(num_virtual_tokens=TOKENS, init_std=1.0)
_SMALL = {"vocab_size": 128, "hidden_size": 64, "max_position_embeddings": 64, "num_hidden_layers": 2}
_DECODER = {**_SMALL, "num_attention_heads": 4, "intermediate_size": 96, "pad_token_id": 0}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 16}
_MOE = {**_GROUPED, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_ENCODER = {**_DECODER, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}

DECODERS = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 48}),
    "short_window": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_MOE, "shared_expert_intermediate_size": 32}),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _MOE),
    "gemma": ("GemmaForCausalLM", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", {**_GROUPED, "sliding_window": 48}),
    "gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "sliding_window": 48}),
    "phi": ("PhiForCausalLM", _DECODER),
    "phi3": ("Phi3ForCausalLM", {**_DECODER, "num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", _DECODER),
    "opt": ("OPTForCausalLM", {**_DECODER, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0},
    ),
}
ENCODERS = {
    "bert": ("BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaForMaskedLM", {**_ENCODER, "pad_token_id": 1}),
    "xlm_roberta": ("XLMRobertaForMaskedLM", {**_ENCODER, "pad_token_id": 1}),
}
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
RUNS = [(family, attention) for family in DECODERS for attention in ("sdpa", "eager")]
RUNS.remove(("gemma2", "sdpa"))  # which transformers does not have
SIDES = pytest.mark.parametrize("padding", ["none", "left", "right"])


def make(family, attention="sdpa"):
    """Return a small model of a family, with weights large enough for attention to look somewhere."""
    kind, config = {**DECODERS, **ENCODERS}[family]
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    model = kind(kind.config_class(**config, attn_implementation=attention))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()


def set_window(model, length):
    model.config.sliding_window = length
    for layer in model.model.layers:
        layer.self_attn.base_layer.sliding_window = length
    return model


def batch(padding="none", length=9):
    """Return three rows, of which two have padding on one side."""
    ids = torch.randint(2, 128, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :2], mask[2, :4] = 0, 0
    elif padding == "right":
        mask[1, -2:], mask[2, -4:] = 0, 0
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def states(model, name="default"):
    return [t.detach() for t in adapter_state_dict(model, name).values()]


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@torch.no_grad()
def logits(model, inputs, **options):
    return model(**inputs, **options).logits


@torch.no_grad()
def logits_with_a_filled_cache(model, prefixes, inputs, positions):
    """Run a bare model with a cache that holds the prefix: what prefix tuning is, without a line of ours."""
    rows = len(inputs["input_ids"])
    cache = DynamicCache()
    for layer, prefix in enumerate(prefixes):
        keys, values = prefix.permute(1, 2, 0, 3).unsqueeze(1).expand(2, rows, *prefix.permute(1, 2, 0, 3).shape[1:])
        cache.update(keys, values, layer)
    mask = torch.cat([torch.ones(rows, len(prefixes[0]), dtype=torch.long), inputs["attention_mask"]], 1)
    return model(
        input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache, position_ids=positions
    ).logits


# -- the formula -------------------------------------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize(("family", "attention"), [run for run in RUNS if run[0] != "short_window"])
def test_it_is_a_cache_filled_with_the_prefix(family, attention, padding):
    model, inputs = make(family, attention), batch(padding)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inject(model, METHOD)
    ours = logits(model, inputs, position_ids=positions)
    theirs = logits_with_a_filled_cache(make(family, attention), states(model), inputs, positions + TOKENS)
    real = inputs["attention_mask"].bool()
    assert relative(ours[real], theirs[real]) <= 1e-5
    assert relative(logits(make(family, attention), inputs)[real], ours[real]) > 1e-2


@SIDES
@ATTENTION
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_attend_to_the_prefix_from_everywhere(family, attention, padding):
    """The reference runs each real row alone, with keys and values put into attention by hand."""
    model, inputs = make(family, attention), batch(padding)
    pad = model.config.pad_token_id
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], pad)
    inject(model, METHOD)
    ours, prefixes, bare = logits(model, inputs), states(model), make(family, "eager")
    base = bare.base_model
    for row in range(3):
        kept = inputs["attention_mask"][row].bool()
        first = inputs["attention_mask"][row].tolist().index(1) if family == "bert" else pad + 1
        positions = torch.arange(int(kept.sum()))[None] + first + TOKENS

        def hook(module, args, kwargs, output, prefix):
            query, key, value = (
                getattr(module, part)(args[0]).unflatten(-1, (4, 16)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            keys, values = prefix.permute(1, 2, 0, 3).unsqueeze(1)
            scores = query @ torch.cat([keys, key], 2).mT / 4
            return (scores.softmax(-1) @ torch.cat([values, value], 2)).transpose(1, 2).flatten(2), None

        handles = [
            layer.attention.self.register_forward_hook(
                lambda m, a, k, o, prefix=prefix: hook(m, a, k, o, prefix), with_kwargs=True
            )
            for layer, prefix in zip(base.encoder.layer, prefixes, strict=True)
        ]
        with torch.no_grad():
            alone = bare(input_ids=inputs["input_ids"][row, kept][None], position_ids=positions).logits[0]
        for handle in handles:
            handle.remove()
        assert relative(ours[row, kept], alone) <= 1e-5
    assert relative(logits(make(family, attention), inputs), ours) > 1e-2


def test_two_prefixes_stand_one_in_front_of_the_other():
    model, inputs = make("llama"), batch("left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inject(model, METHOD, name="one")
    inject(model, PrefixTuning(num_virtual_tokens=3, init_std=1.0), name="two")
    set_active_adapters(model, ["one", "two"])
    both = [torch.cat(pair) for pair in zip(states(model, "one"), states(model, "two"), strict=True)]
    theirs = logits_with_a_filled_cache(make("llama"), both, inputs, positions + TOKENS + 3)
    real = inputs["attention_mask"].bool()
    assert relative(logits(model, inputs, position_ids=positions)[real], theirs[real]) <= 1e-5


def test_packed_sequences_see_the_prefix_and_not_each_other():
    model, ids = make("llama"), batch()["input_ids"][:1]
    inject(model, METHOD)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = logits(model, {"input_ids": ids}, position_ids=positions, use_cache=False)
    assert relative(packed[:, 4:], logits(model, {"input_ids": ids[:, 4:]})) <= 1e-5


def test_a_decoder_of_berts_class_is_causal():
    model = make("bert")
    config = model.config
    config.is_decoder = True
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).eval()
    inject(model, METHOD)
    inputs = batch()
    whole = logits(model, inputs, use_cache=False)
    part = logits(model, {key: value[:, :5] for key, value in inputs.items()}, use_cache=False)
    assert relative(part, whole[:, :5]) <= 1e-5


@ATTENTION
def test_a_sliding_window_moves_over_tokens_and_not_over_the_prefix(attention):
    model, inputs = make("short_window", attention), batch()
    inject(model, METHOD)
    cut = torch.ones(9, 9).tril().bool() & torch.ones(9, 9).triu(-3).bool()  # each sees itself and three before
    seen = torch.cat([torch.ones(9, TOKENS, dtype=torch.bool), cut], 1).expand(3, 1, 9, -1)
    mask = seen if attention == "sdpa" else torch.zeros(3, 1, 9, TOKENS + 9).masked_fill(~seen, -1e9)
    cache, prefixes = DynamicCache(), states(model)
    for layer, prefix in enumerate(prefixes):
        cache.update(*prefix.permute(1, 2, 0, 3).unsqueeze(1).expand(2, 3, 2, TOKENS, 16), layer)
    theirs = {"attention_mask": mask, "past_key_values": cache, "position_ids": torch.arange(9)[None] + TOKENS}
    whole = logits(model, inputs)
    assert relative(whole, logits(make("short_window", attention), {**inputs, **theirs})) <= 1e-5
    assert relative(whole, logits(set_window(model, 48), inputs)) > 1e-3


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "attention"), RUNS)
def test_token_by_token_is_the_whole(family, attention):
    model, inputs = make(family, attention), batch("left")
    inject(model, METHOD)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    whole, cache, pieces = logits(model, inputs, position_ids=positions), DynamicCache(config=model.config), []
    for start, end in [(0, 4), (4, 5), (5, 8), (8, 9)]:
        part = {"input_ids": inputs["input_ids"][:, start:end], "attention_mask": inputs["attention_mask"][:, :end]}
        options = {"position_ids": positions[:, start:end], "past_key_values": cache, "use_cache": True}
        pieces.append(logits(model, part, **options))
    assert cache.get_seq_length() == 9  # the prefix is not in it
    real = inputs["attention_mask"].bool()
    assert relative(torch.cat(pieces, 1)[real], whole[real]) <= 1e-5


def test_a_cache_for_cross_attention_too_gets_no_prefix():
    """A decoder with cross-attention keeps two caches in one; only that of self-attention has a prefix before it."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**DECODERS["gpt2"][1], add_cross_attention=True)
    ).eval()
    assert inject(model, METHOD).paths == ["transformer.h.0.attn", "transformer.h.1.attn"]
    ids, seen = batch()["input_ids"], {"encoder_hidden_states": torch.randn(3, 4, 64)}
    whole = logits(model, {"input_ids": ids}, use_cache=False, **seen)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    options = {"past_key_values": cache, "use_cache": True, **seen}
    pieces = [logits(model, {"input_ids": ids[:, part]}, **options) for part in (slice(0, 5), slice(5, 6), slice(6, 9))]
    assert relative(torch.cat(pieces, 1), whole) <= 1e-5
    assert cache.get_seq_length() == 9


def generate(model, inputs, **options):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


@ATTENTION
@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "gpt_neox", "opt", "gpt2"])
def test_generation_is_the_same_with_and_without_a_cache_and_row_by_row(family, attention):
    model, inputs = make(family, attention), batch("left")
    inject(model, METHOD)
    greedy = generate(model, inputs)
    assert torch.equal(generate(model, inputs, use_cache=False), greedy)
    assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), greedy)
    for row in range(3):
        kept = inputs["attention_mask"][row].bool()
        alone = {key: value[row, kept][None] for key, value in inputs.items()}
        assert torch.equal(generate(model, alone)[0], greedy[row])
    beams = generate(model, inputs, num_beams=3)
    assert torch.equal(generate(model, inputs, num_beams=3, use_cache=False), beams)
    assert not torch.equal(generate(make(family, attention), inputs), greedy)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_static_cache_without_padding_is_causal(family):
    """transformers leaves out the mask here and cuts the keys, which the prefix is in front of."""
    model, inputs = make(family), {"input_ids": batch()["input_ids"]}
    inject(model, METHOD)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    assert relative(logits(model, inputs, past_key_values=cache, use_cache=True), logits(model, inputs)) <= 1e-5


@pytest.mark.parametrize("reparametrize", [False, True])
def test_gradient_checkpointing_drops_the_cache_and_not_the_prefix(reparametrize):
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = make("llama").train()
        inject(model, PrefixTuning(num_virtual_tokens=TOKENS, reparametrize=reparametrize, hidden_size=8))
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch("left"), labels=batch()["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == (7 if reparametrize else 2)
    assert all(relative(one, other) <= 1e-5 for one, other in zip(*gradients, strict=True))


def test_disabled_generation_is_that_of_the_base():
    model, inputs = make("llama"), batch("left")
    inject(model, METHOD)
    with adapters_disabled(model):
        assert torch.equal(generate(model, inputs), generate(make("llama"), inputs))


# -- HF PEFT -----------------------------------------------------------------------------------------------------------

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
HF_MODELS = pytest.mark.parametrize("kind", [*MODELS, "opt", "gpt_neox", "qwen3"])


def model_of(kind):
    return MODELS[kind]() if kind in MODELS else make(kind)


@SIDES
@HF_MODELS
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits(kind, padding, tmp_path):
    model, inputs = model_of(kind), batch(padding)
    inject(model, METHOD)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(model_of(kind), tmp_path).eval()
    real = inputs["attention_mask"].bool()
    assert relative(logits(theirs, inputs)[real], logits(model, inputs)[real]) <= 1e-5
    if kind == "opt":  # which gives padding a position of its own
        assert relative(logits(theirs, inputs), logits(model, inputs)) <= 1e-5
    assert relative(logits(model_of(kind), inputs)[real], logits(model, inputs)[real]) > 1e-2
    if padding != "right":
        assert torch.equal(generate(theirs, inputs, use_cache=True), generate(model, inputs, use_cache=True))


def test_the_folder_has_the_keys_and_the_layout_of_hf_peft(tmp_path):
    model = tiny_llama()
    inject(model, METHOD)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": TOKENS,
        "token_dim": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": 32,
        "prefix_projection": False,
    }
    held = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert set(held) == {"prompt_embeddings"}
    seen = (
        held["prompt_embeddings"].view(TOKENS, 4, 2, 16).permute(1, 2, 0, 3)
    )  # (key, value of each layer; heads, ...)
    for layer, prefix in enumerate(states(model)):
        assert torch.equal(seen[2 * layer], prefix[:, 0].transpose(0, 1))
        assert torch.equal(seen[2 * layer + 1], prefix[:, 1].transpose(0, 1))


@pytest.mark.parametrize("projection", [False, True])
@HF_MODELS
def test_what_hf_peft_writes_loads_here(kind, projection, tmp_path):
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prefix_projection=projection, encoder_hidden_size=24
    )
    theirs = get_peft_model(model_of(kind), config).eval()
    theirs.save_pretrained(tmp_path)
    model, inputs = model_of(kind), batch()
    assert load_adapter(model, tmp_path).method == PrefixTuning(num_virtual_tokens=TOKENS)
    assert relative(logits(model, inputs), logits(theirs, inputs)) <= 1e-5


@SIDES
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_hf_peft_agrees_on_encoders_even_about_padding(family, padding, tmp_path):
    inputs, pad = batch(padding), ENCODERS[family][1]["pad_token_id"]
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], pad)
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=TOKENS)
    theirs, model = get_peft_model(make(family).base_model, config).eval(), make(family).base_model
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    with torch.no_grad():
        ours, wanted = model(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state
        assert relative(ours, wanted) <= 1e-5
        assert relative(make(family).base_model(**inputs).last_hidden_state, wanted) > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2: a prefix for a model with an encoder"),
        ({"modules_to_save": ["lm_head"]}, "does not have HF PEFT's 'modules_to_save'"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be a positive integer, got None"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(changes, message):
    with pytest.raises(AdapterConfigError, match=message):
        PrefixTuning.from_hf_config({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, **changes})


def test_a_folder_for_another_number_of_layers_is_refused(tmp_path):
    model = tiny_llama()
    inject(model, METHOD)
    save_adapter(model, tmp_path)
    (tmp_path / "lightning_peft.json").unlink()
    with pytest.raises(AdapterMismatchError, match=r"'prompt_embeddings' has shape \(5, 128\), .* need \(5, 192\)"):
        load_adapter(tiny_llama(num_hidden_layers=3), tmp_path)
    with pytest.raises(AdapterMismatchError, match="Sequential has none of the attention modules"):
        load_adapter(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path)


# -- reparametrisation -------------------------------------------------------------------------------------------------


def test_the_network_is_that_of_the_paper_and_shared():
    torch.manual_seed(0)
    model = tiny_llama()
    inject(model, PrefixTuning(num_virtual_tokens=TOKENS, reparametrize=True, hidden_size=8))
    shared = adapter_layers(model)["model.rotary_emb"].adapters["default"]
    for path, prefix in adapter_state_dict(model).items():
        layer = adapter_layers(model)[path.removesuffix(".prefix")].adapters["default"]
        hidden = torch.tanh(shared.tokens.double() @ shared.weight.double().T + shared.bias.double())
        wanted = (hidden @ layer.weight.double().T + layer.bias.double()).view(5, 2, 2, 16)
        assert relative(prefix.double(), wanted) <= 1e-6
    # The embedding of five tokens, the first layer, and for each of two layers what gives keys and values of 2 * 16 features.
    assert trainable_summary(model).trainable == 5 * 64 + 8 * 64 + 8 + 2 * (64 * 8 + 64)


def test_a_folder_holds_the_prefix_and_a_checkpoint_the_network(tmp_path):
    model, inputs = tiny_llama(), token_batch()
    method = PrefixTuning(num_virtual_tokens=TOKENS, reparametrize=True, hidden_size=8)
    inject(model, method)
    save_adapter(model, tmp_path)
    again = tiny_llama()
    assert load_adapter(again, tmp_path, trainable=True).method == method
    trained = {name.rpartition(".")[2]: p for name, p in again.named_parameters() if p.requires_grad}
    assert set(trained) == {"prefix"}
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(again, inputs), logits(model, inputs))
    again(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    frozen = tiny_llama()
    load_adapter(frozen, tmp_path)
    assert not [name for name, p in frozen.named_parameters() if p.requires_grad]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the run goes on in another folder
def test_resuming_goes_on_with_the_network(llama_dir, make_trainer, tmp_path):
    from lightning_peft import AdapterCheckpoint, CausalLMLoader, PEFTModule
    from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler

    def fit(folder, steps, ckpt_path=None):
        torch.manual_seed(0)
        module = PEFTModule(
            CausalLMLoader(path=llama_dir),
            PrefixTuning(num_virtual_tokens=3, reparametrize=True, hidden_size=8),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        )
        callbacks = [AdapterCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=2, save_top_k=0)]
        rows = torch.arange(96).view(8, 12) % 40
        loader = ResumableDataLoader(rows, batch_size=2, sampler=ResumableSampler(rows))
        make_trainer(folder, max_steps=steps, callbacks=callbacks).fit(module, loader, ckpt_path=ckpt_path)
        return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "part", 2)
    held = torch.load(tmp_path / "part" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.rpartition(".")[2] for name in held} == {"tokens", "weight", "bias"}
    resumed = fit(tmp_path / "rest", 4, str(tmp_path / "part" / "last.ckpt"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# -- what is counted, and refused --------------------------------------------------------------------------------------


def test_llama_2_7b_has_two_vectors_for_each_token_and_layer():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    inject(model, PrefixTuning(num_virtual_tokens=10))
    assert trainable_summary(model).trainable == 10 * 2 * 32 * 4096 == 2_621_440


def test_it_goes_into_a_bare_backbone_and_beside_lora():
    model, whole, inputs = make("llama"), make("llama"), batch("left")
    for one in (model.model, whole):
        torch.manual_seed(3)
        inject(one, METHOD)
    with torch.no_grad():
        assert torch.equal(model.model(**inputs).last_hidden_state, whole.model(**inputs).last_hidden_state)
    before = logits(whole, inputs)
    inject(whole, LoRA(rank=2), name="other")
    set_active_adapters(whole, ["default", "other"])
    assert torch.equal(logits(whole, inputs), before)


def test_an_unknown_attention_is_refused_by_its_class():
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(
        TargetError, match=r"a ViTAttention of an unknown kind; it knows .* BertAttention, GPT2Attention"
    ):
        inject(model, METHOD)
    with pytest.raises(TargetError, match="target 'q_proj' matches .* which PrefixTuning cannot adapt"):
        inject(tiny_llama(), METHOD, "q_proj")


def test_a_part_of_the_layers_is_refused():
    with pytest.raises(
        TargetError, match=r"adapt 1 of the 2 attention modules of LlamaForCausalLM, without 'model.layers.0"
    ):
        inject(tiny_llama(), METHOD, Targets(include=["attention"], layers=[1]))


def test_several_stacks_of_layers_are_refused():
    two = torch.nn.ModuleDict({"one": tiny_llama(), "two": tiny_llama()})
    with pytest.raises(
        TargetError, match=r"takes the positions of all layers in ModuleDict, found \['one.model.rotary_emb', 'two"
    ):
        inject(two, METHOD, family="llama")


def test_a_network_takes_the_values_of_a_prefix():
    one, other = tiny_llama(), tiny_llama()
    inject(one, METHOD)
    inject(other, PrefixTuning(num_virtual_tokens=TOKENS, reparametrize=True, hidden_size=8))
    for path, prefix in adapter_state_dict(one).items():
        adapter_layers(other)[path.removesuffix(".prefix")].adapters["default"].import_state({"prefix": prefix})
    assert torch.equal(logits(other, token_batch()), logits(one, token_batch()))


def test_a_prefix_that_fills_all_positions_is_refused():
    with pytest.raises(TargetError, match="num_virtual_tokens=64 leaves no room for tokens in the 64 positions"):
        inject(tiny_gpt2(), PrefixTuning(num_virtual_tokens=64))


def test_other_attention_implementations_are_refused():
    model = make("llama")
    inject(model, METHOD)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(TargetError, match="'eager' and 'sdpa', but the model runs 'flex_attention'"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, 64), attention_mask=None)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(TargetError, match="of four dimensions, got one of 2 dimensions"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, 64), attention_mask=torch.ones(1, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, got 0"),
        ({"hidden_size": True}, "hidden_size must be a positive integer, got True"),
        ({"reparametrize": "yes"}, "reparametrize must be true or false, got 'yes'"),
        ({"init_std": 0.0}, "init_std must be positive .* got 0.0"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PrefixTuning(**fields)


@pytest.mark.parametrize("reparametrize", [False, True])
def test_the_loss_of_a_real_model_falls(trained_on_e2e, reparametrize):
    losses = trained_on_e2e(PrefixTuning(num_virtual_tokens=10, reparametrize=reparametrize))
    assert losses[-1] < losses[0] - 0.2, losses

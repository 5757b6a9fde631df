"""Prompt tuning equals embeddings put in front by hand, and HF PEFT; in generation, under padding and in every family it knows."""

import json

import pytest
import torch
import transformers
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, StaticCache

from lightning_peft import (
    LoRA,
    PromptTuning,
    adapter_state_dict,
    adapters_disabled,
    inject,
    load_adapter,
    save_adapter,
    set_active_adapters,
    trainable_summary,
)
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError, InjectionError, TargetError
from lightning_peft.testing import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

TOKENS = 5
METHOD = PromptTuning(num_virtual_tokens=TOKENS)
_SMALL = {"vocab_size": 128, "hidden_size": 64, "max_position_embeddings": 64, "num_hidden_layers": 2}
_DECODER = {**_SMALL, "num_attention_heads": 4, "intermediate_size": 96, "pad_token_id": 0}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_ENCODER = {**_DECODER, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
_GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
_T5 = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 64,
}
_BART = {
    **_BART,
    "vocab_size": 128,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

DECODERS = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 48}),
    "short_window": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 6}),
    "mixtral": ("MixtralForCausalLM", _EXPERTS),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "gemma": ("GemmaForCausalLM", _GROUPED),
    "gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "sliding_window": 48}),
    "phi": ("PhiForCausalLM", _DECODER),
    "phi3": ("Phi3ForCausalLM", {**_DECODER, "num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", _DECODER),
    "opt": ("OPTForCausalLM", {**_DECODER, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
}
OTHERS = {
    "bert": ("BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaForMaskedLM", {**_ENCODER, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 128, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    ),
    "t5": ("T5ForConditionalGeneration", _T5),
    "bart": ("BartForConditionalGeneration", _BART),
}
SIDES = pytest.mark.parametrize("padding", ["none", "left", "right"])
PLACES = {
    "gpt2": "transformer",
    "bloom": "transformer",
    "gpt_neox": "gpt_neox",
    "t5": "encoder",
    "bart": "model.encoder",
    "opt": "model.decoder",
}
PLACES |= {family: family for family in ("bert", "roberta", "distilbert")}


def make(family, attention="sdpa", kind=None):
    """Return a small model of a family, with weights large enough for attention to look somewhere."""
    name, config = {**DECODERS, **OTHERS}[family]
    known = getattr(transformers, name)
    attention = "eager" if family == "bloom" else attention
    torch.manual_seed(0)
    model = (kind or known)(known.config_class(**config, attn_implementation=attention))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()


def batch(padding="none", length=9, pad=0):
    """Return three rows, of which two have padding on one side."""
    ids = torch.randint(2, 128, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :2], mask[2, :4] = 0, 0
    elif padding == "right":
        mask[1, -2:], mask[2, -4:] = 0, 0
    return {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask}


def prompts(model, name="default"):
    (tensor,) = adapter_state_dict(model, name).values()
    return tensor.detach()


def in_front(model, virtual, inputs):
    """Return the inputs of a bare model with the virtual tokens in front, without a line of ours."""
    rows, n = len(inputs["input_ids"]), len(virtual)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask = torch.cat([torch.ones(rows, n, dtype=torch.long), inputs["attention_mask"]], 1)
    return {"inputs_embeds": torch.cat([virtual.expand(rows, -1, -1), embeds], 1), "attention_mask": mask}


def positions_of(inputs):
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@torch.no_grad()
def logits(model, inputs, **options):
    return model(**inputs, **options).logits


# -- the formula -------------------------------------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize("family", DECODERS)
def test_it_is_embeddings_in_front(family, padding):
    model, bare, inputs = make(family), make(family), batch(padding)
    assert inject(model, METHOD).paths == [PLACES.get(family, "model")]
    theirs = logits(bare, in_front(bare, prompts(model), inputs))[:, TOKENS:]
    ours = logits(model, inputs)
    assert relative(ours, theirs) <= 1e-5
    assert relative(logits(bare, inputs), ours) > 1e-2


@SIDES
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_encoders_look_at_the_virtual_tokens(family, padding):
    model, bare = make(family), make(family)
    inputs = batch(padding, pad=model.config.pad_token_id)
    assert inject(model, METHOD).paths == [PLACES[family]]
    ours = logits(model, inputs)
    for row in range(3):  # alone, without padding, where a model that counts positions over padding counts other ones
        kept = inputs["attention_mask"][row].bool()
        if family != "roberta" and padding == "left":
            kept = torch.ones_like(kept)
        alone = {key: value[row, kept][None] for key, value in inputs.items()}
        theirs = logits(bare, in_front(bare, prompts(model), alone))[0, TOKENS:]
        assert relative(ours[row, kept], theirs) <= 1e-5
    assert relative(logits(bare, inputs), ours) > 1e-2


@SIDES
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoders_look_at_the_virtual_tokens_of_their_encoder(family, padding):
    model, bare, inputs = make(family), make(family), batch(padding)
    assert inject(model, METHOD).paths == [PLACES[family]]
    decoder = {"decoder_input_ids": batch(length=4)["input_ids"]}
    theirs = logits(bare, in_front(bare, prompts(model), inputs), **decoder)
    assert relative(logits(model, inputs, **decoder), theirs) <= 1e-5
    assert relative(logits(bare, inputs, **decoder), theirs) > 1e-2
    del inputs["attention_mask"]
    if padding == "none":
        assert relative(logits(model, inputs, **decoder), theirs) <= 1e-5


@SIDES
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_given_positions_move_behind_the_virtual_tokens(family, padding):
    model, bare, inputs = make(family), make(family), batch(padding)
    inject(model, METHOD)
    positions = torch.cat([torch.arange(TOKENS).expand(3, -1), positions_of(inputs) + TOKENS], 1)
    theirs = logits(bare, in_front(bare, prompts(model), inputs), position_ids=positions)[:, TOKENS:]
    assert relative(logits(model, inputs, position_ids=positions_of(inputs)), theirs) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@SIDES
def test_a_mask_of_four_dimensions_gives_what_one_of_two_gives(padding, attention):
    model, inputs = make("llama", attention), batch(padding)
    inject(model, METHOD)
    seen = torch.ones(9, 9).tril().bool() & inputs["attention_mask"].bool()[:, None, None, :]
    mask = seen if attention == "sdpa" else torch.zeros(3, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    real = inputs["attention_mask"].bool()
    found = logits(model, {"input_ids": inputs["input_ids"], "attention_mask": mask})
    assert relative(found[real], logits(model, inputs)[real]) <= 1e-5


def test_two_prompts_stand_one_in_front_of_the_other():
    model, bare, inputs = make("llama"), make("llama"), batch("left")
    inject(model, METHOD, name="one")
    inject(model, PromptTuning(num_virtual_tokens=3), name="two")
    set_active_adapters(model, ["one", "two"])
    both = torch.cat([prompts(model, "one"), prompts(model, "two")])
    theirs = logits(bare, in_front(bare, both, inputs))[:, TOKENS + 3 :]
    assert relative(logits(model, inputs), theirs) <= 1e-5
    generated = generate(model, inputs)
    assert torch.equal(generated, generate(model, inputs, use_cache=False))


def test_it_acts_together_with_an_adapter_inside_the_backbone():
    model, bare, inputs = make("llama"), make("llama"), batch("right")
    inject(model, METHOD, name="prompt")
    for each in (model, bare):
        torch.manual_seed(3)
        inject(each, LoRA(rank=2), name="lora")
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    set_active_adapters(model, ["prompt", "lora"])
    theirs = logits(bare, in_front(bare, prompts(model, "prompt"), inputs))[:, TOKENS:]
    assert relative(logits(model, inputs), theirs) <= 1e-5


def test_embeddings_may_be_given_instead_of_tokens():
    model, inputs = make("llama"), batch("right")
    inject(model, METHOD)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = logits(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(given, logits(model, inputs))


# -- what comes out ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_and_attention_are_those_of_the_tokens():
    model, inputs = make("llama", "eager"), batch("right")
    inject(model, METHOD)
    result = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in result.hidden_states] == [(3, 9, 64)] * 3
    assert [weights.shape for weights in result.attentions] == [(3, 4, 9, TOKENS + 9)] * 2
    assert torch.equal(model.lm_head(result.hidden_states[-1]), result.logits)


@torch.no_grad()
def test_a_tuple_is_returned_where_one_is_asked_for():
    model, inputs = make("gpt2"), batch("right")
    inject(model, METHOD)
    wanted = model.transformer(**inputs, use_cache=False).last_hidden_state
    (found,) = model.transformer(**inputs, use_cache=False, return_dict=False)
    assert torch.equal(found, wanted)
    model.config.return_dict = False
    (found,) = model.transformer(**inputs, use_cache=False)
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_the_balance_of_experts_is_that_of_the_tokens():
    model, inputs = make("mixtral"), batch("right")
    inject(model, METHOD)
    result = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert [routes.shape for routes in result.router_logits] == [(27, 4)] * 2
    assert torch.isfinite(result.aux_loss)


def test_the_loss_is_that_of_the_tokens_after_the_first():
    """Labels keep their length; unlike HF PEFT's, the loss does not have the first token predicted from the last virtual one."""
    model, inputs = make("llama"), batch()
    inject(model, METHOD)
    labels = inputs["input_ids"]
    loss = model(**inputs, labels=labels).loss
    wanted = nn.functional.cross_entropy(logits(model, inputs)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert relative(loss, wanted) <= 1e-5
    peer = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    with torch.no_grad():
        peer.prompt_encoder.default.embedding.weight.copy_(prompts(model))
    theirs = peer(**inputs, labels=labels)
    every = nn.functional.cross_entropy(theirs.logits[:, TOKENS - 1 : -1].flatten(0, 1), labels.flatten())
    assert relative(theirs.loss, every) <= 1e-5
    assert relative(theirs.loss, loss) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
@torch.no_grad()
def test_sequences_are_classified_by_what_leaves_the_backbone(family):
    names = {"llama": "Llama", "gpt2": "GPT2", "bert": "Bert", "roberta": "Roberta"}
    model = make(family, kind=getattr(transformers, f"{names[family]}ForSequenceClassification"))
    inputs = batch("right", pad=model.config.pad_token_id)
    inject(model, METHOD)
    whole = logits(model, inputs)
    states = model.base_model(**inputs).last_hidden_state
    if family in ("llama", "gpt2"):
        last = inputs["attention_mask"].sum(1) - 1
        wanted = model.score(states[torch.arange(3), last])
    elif family == "bert":
        wanted = model.classifier(model.bert.pooler(states))
    else:
        wanted = model.classifier(states)
    assert whole.shape == (3, 2)
    assert relative(whole, wanted) <= 1e-5


# -- generation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, inputs, new=6, **options):
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, **settings)[:, -new:]


@pytest.mark.parametrize("family", [*DECODERS, "t5", "bart"])
def test_generation_row_by_row_with_and_without_cache_is_one(family):
    model, inputs = make(family), batch("left")
    inject(model, METHOD)
    together = generate(model, inputs)
    assert torch.equal(generate(model, inputs, use_cache=False), together)
    for row in range(3):
        kept = inputs["attention_mask"][row].bool()
        alone = generate(model, {key: value[row, kept][None] for key, value in inputs.items()})
        # Not where padding takes room: in the positions of an encoder, or in a window.
        if family not in ("t5", "bart", "short_window"):
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_is_that_of_embeddings_in_front(family):
    model, bare, inputs = make(family), make(family), batch("left")
    inject(model, METHOD)
    for options in ({}, {"num_beams": 3}):
        theirs = generate(bare, in_front(bare, prompts(model), inputs), **options)
        assert torch.equal(generate(model, inputs, **options), theirs)


@pytest.mark.parametrize("family", DECODERS)
def test_token_by_token_is_the_whole(family):
    model, inputs = make(family), batch()
    inject(model, METHOD)
    whole, cache, pieces = logits(model, inputs), DynamicCache(config=model.config), []
    for end in (4, 5, 7, 9):
        start = cache.get_seq_length() and cache.get_seq_length() - TOKENS
        part = {"input_ids": inputs["input_ids"][:, start:end], "attention_mask": inputs["attention_mask"][:, :end]}
        pieces.append(logits(model, part, past_key_values=cache, use_cache=True))
    assert cache.get_seq_length() == TOKENS + 9
    assert relative(torch.cat(pieces, 1), whole) <= 1e-5


def test_a_cache_filled_without_the_prompt_is_refused():
    model, inputs = make("llama"), batch()
    inject(model, METHOD)
    with adapters_disabled(model), torch.no_grad():
        cache = model(input_ids=inputs["input_ids"][:, :8], use_cache=True).past_key_values
    with pytest.raises(InjectionError, match="the cache holds 8 positions, 0 more .* but 5 virtual tokens should be"):
        logits(
            model,
            {"input_ids": inputs["input_ids"][:, 8:], "attention_mask": inputs["attention_mask"]},
            past_key_values=cache,
        )


def test_what_would_be_silently_wrong_is_refused():
    model, inputs = make("llama"), batch()
    inject(model, METHOD)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(InjectionError, match="sequences packed into one row"):
        logits(model, {"input_ids": inputs["input_ids"][:1]}, position_ids=packed)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(InjectionError, match="a StaticCache of fixed size"):
        logits(model, inputs, past_key_values=cache)
    with pytest.raises(InjectionError, match="two or four dimensions, got one of 3 dimensions"):
        logits(model, {"input_ids": inputs["input_ids"], "attention_mask": torch.ones(3, 9, 9)})
    with pytest.raises(InjectionError, match="two or four dimensions, got one of dict"):
        logits(model, {"input_ids": inputs["input_ids"], "attention_mask": {}})
    with pytest.raises(InjectionError, match=r"position_ids of two dimensions, \(batch, length\), got \(3, 3, 9\)"):
        logits(model, inputs, position_ids=torch.arange(9).expand(3, 3, 9))
    encoder = make("bert")
    inject(encoder, METHOD)
    with pytest.raises(InjectionError, match="what virtual tokens may see in an encoder"):
        logits(encoder, {"input_ids": inputs["input_ids"], "attention_mask": torch.ones(3, 1, 9, 9).bool()})


# -- HF PEFT -----------------------------------------------------------------------------------------------------------

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}


def compared(family, padding):
    """Return inputs, and the positions of the tokens in HF PEFT's output."""
    inputs = batch(padding)
    return inputs | ({"decoder_input_ids": batch(length=4)["input_ids"]} if family == "t5" else {}), (
        slice(None) if family == "t5" else slice(TOKENS, None)
    )


@SIDES
@pytest.mark.parametrize("family", TASKS)
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits(family, padding, tmp_path):
    model = make(family)
    inject(model, METHOD)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == TASKS[family]
    theirs = PeftModel.from_pretrained(make(family), tmp_path).eval()
    inputs, kept = compared(family, padding)
    assert relative(logits(theirs, inputs)[:, kept], logits(model, inputs)) <= 1e-5
    assert relative(logits(make(family), inputs), logits(model, inputs)) > 1e-2


@SIDES
@pytest.mark.parametrize("family", TASKS)
def test_what_hf_peft_writes_loads_here(family, padding, tmp_path):
    config = PromptTuningConfig(task_type=TASKS[family], num_virtual_tokens=TOKENS, prompt_tuning_init="SAMPLE_VOCAB")
    theirs = get_peft_model(make(family), config).eval()
    theirs.save_pretrained(tmp_path)
    model = make(family)
    assert load_adapter(model, tmp_path).method == METHOD
    inputs, kept = compared(family, padding)
    assert relative(logits(model, inputs), logits(theirs, inputs)[:, kept]) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_it_generates_what_hf_peft_generates(family, tmp_path):
    model, inputs = make(family), batch()
    inject(model, METHOD)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(make(family), tmp_path).eval()
    assert torch.equal(generate(model, inputs), generate(theirs, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hf_peft_classifies_alike_with_a_decoder(family, tmp_path):
    kind = {"llama": transformers.LlamaForSequenceClassification, "gpt2": transformers.GPT2ForSequenceClassification}[
        family
    ]
    model = make(family, kind=kind)
    inject(model, METHOD)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    theirs, inputs = PeftModel.from_pretrained(make(family, kind=kind), tmp_path).eval(), batch("none")
    assert relative(logits(theirs, inputs), logits(model, inputs)) <= 1e-5


def test_a_configuration_that_cannot_be_honoured_is_refused(tmp_path):
    get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(
        tmp_path
    )
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    for change, message in (
        (
            {"prompt_tuning_init": "GUESS"},
            "prompt_tuning_init is 'GUESS', but PromptTuning knows SAMPLE_VOCAB, RANDOM, TEXT",
        ),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be a positive integer, got None"),
    ):
        file.write_text(json.dumps({**written, **change}))
        with pytest.raises(AdapterConfigError, match=message):
            load_adapter(make("llama"), tmp_path)
    file.write_text(json.dumps(written))
    with pytest.raises(AdapterMismatchError, match="Sequential has no backbones; virtual tokens go in front"):
        load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)


# -- first values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ab", "hello there"])
def test_text_starts_as_in_hf_peft(llama_dir, text):
    load = transformers.AutoModelForCausalLM.from_pretrained
    words = {"prompt_tuning_init_text": text, "tokenizer_name_or_path": llama_dir}
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, prompt_tuning_init="TEXT", **words)
    theirs = get_peft_model(load(llama_dir), config).prompt_encoder.default.embedding.weight
    for tokenizer in (llama_dir, None):
        model = load(llama_dir)
        inject(model, PromptTuning(num_virtual_tokens=7, init="text", text=text, tokenizer=tokenizer))
        assert torch.equal(prompts(model), theirs)


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_loads_without_the_tokenizer_of_its_text(llama_dir, named, tmp_path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, method = load(llama_dir), PromptTuning(init="text", text="hello", tokenizer=llama_dir if named else None)
    inject(model, method)
    folder = save_adapter(model, tmp_path / "adapter")
    assert PeftModel.from_pretrained(load(llama_dir), folder).peft_config["default"].num_virtual_tokens == 20
    own = json.loads((folder / "lightning_peft.json").read_text())
    own["method"]["fields"]["tokenizer"] = "no/such-tokenizer"
    (folder / "lightning_peft.json").write_text(json.dumps(own))
    again = load(llama_dir)
    assert load_adapter(again, folder).method == PromptTuning(init="text", text="hello", tokenizer="no/such-tokenizer")
    assert torch.equal(prompts(again), prompts(model))
    with pytest.raises(ConfigError, match="'no/such-tokenizer' cannot be loaded"):
        inject(load(llama_dir), PromptTuning(init="text", text="hello", tokenizer="no/such-tokenizer"))


def test_a_model_that_names_no_tokenizer_needs_one():
    with pytest.raises(ConfigError, match="text='a' must give tokens, but the model does not say which tokenizer"):
        inject(tiny_llama(), PromptTuning(init="text", text="a"))


def test_the_vocabulary_gives_embeddings_of_its_first_tokens():
    model = tiny_llama(vocab_size=6000)
    inject(model, PromptTuning(num_virtual_tokens=40))
    table = model.get_input_embeddings().weight
    found = (prompts(model)[:, None] == table).all(-1).nonzero()[:, 1]
    assert len(found) == 40
    assert found.max() < 5000
    assert len(found.unique()) > 30


def test_random_values_have_the_mean_and_the_deviation_of_the_embeddings():
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(torch.linspace(1, 5, 64)).add_(torch.linspace(-3, 3, 64))
    inject(
        model,
        PromptTuning(
            num_virtual_tokens=50,
            init="random",
        ),
    )
    table, found = model.get_input_embeddings().weight, prompts(model)
    assert relative(found.mean(0), table.mean(0)) < 0.1
    assert relative(found.std(0), table.std(0)) < 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, got 0"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens must be a positive integer, got True"),
        ({"init": "zeros"}, "init must be one of vocabulary, random, text, got 'zeros'"),
        ({"init": "text"}, "init='text' needs text, got text=None"),
        ({"text": "a"}, "text='a' is for init='text', got init='vocabulary'"),
        ({"tokenizer": "a"}, "tokenizer='a' is for init='text', got init='vocabulary'"),
        ({"init": "text", "text": ""}, "text must be a string that is not empty, got ''"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=f"PromptTuning {message}"):
        PromptTuning(**fields)


# -- places ------------------------------------------------------------------------------------------------------------


def test_what_has_no_backbone_inside_is_refused():
    refused = "which PromptTuning cannot adapt; virtual tokens go in front of one backbone .* and {} is no such model"
    for model in (tiny_llama().model, nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(TargetError, match=refused.format(type(model).__name__)):
            inject(model, METHOD)
    with pytest.raises(TargetError, match=r"'q_proj' matches .* a Linear, which PromptTuning cannot adapt"):
        inject(tiny_llama(), METHOD, "q_proj")


def test_recurrent_states_are_refused():
    config = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1)
    with pytest.raises(TargetError, match=r"PromptTuning cannot adapt; .*a cache of keys and values"):
        inject(transformers.MambaForCausalLM(config), METHOD)


def test_two_backbones_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = tiny_llama().model, tiny_gpt2().transformer

    with pytest.raises(TargetError, match=r"Two has 2 backbones \(\['one', 'two'\]\)"):
        inject(Two(), METHOD)


def test_the_backbone_is_found_inside_a_module_of_ones_own(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make("llama")

    model, again = Outer(), Outer()
    assert inject(model, METHOD).paths == ["net.model"]
    load_adapter(again, save_adapter(model, tmp_path))
    assert torch.equal(logits(again.net, batch()), logits(model.net, batch()))


def test_no_more_virtual_tokens_than_positions():
    with pytest.raises(
        TargetError, match="num_virtual_tokens=64 leaves no room for tokens in the 64 positions of GPT2LMHead"
    ):
        inject(tiny_gpt2(), PromptTuning(num_virtual_tokens=64))


def test_llama_2_7b_trains_one_embedding_a_virtual_token():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    inject(model, PromptTuning(num_virtual_tokens=20))
    assert trainable_summary(model).trainable == 20 * 4096 == 81_920


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(PromptTuning(), lr=0.1)
    assert losses[-1] < losses[0] - 0.2, losses

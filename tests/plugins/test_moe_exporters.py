"""Exports of mixtures of experts: what transformers and HF PEFT load computes what the live model computes."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_peft import (
    LoRA,
    LoRAMixture,
    MixLoRA,
    MoEUpcycling,
    Targets,
    adapters_disabled,
    get_registry,
    inject,
    load_adapter,
    save_adapter,
    set_active_adapters,
)
from lightning_peft.errors import ConfigError, ExportError, LightningPEFTWarning

# The shared expert of Qwen2Moe has no neurons here, and transformers wants to give them first values.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")

SIZE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
IDS = torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(1))


def dense(kind="llama", **changes):
    torch.manual_seed(0)
    config, model = KINDS[kind]
    built = model(config(**{**SIZE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **changes})).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # biases and norms are no longer what every class starts with
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


def shaken(model, by=0.05):
    """Move everything trained away from its first value, so that the experts differ."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * by)
    return model


def upcycled(kind="llama", method=None, targets=None, **changes):
    model = dense(kind, **changes)
    inject(model, method or MoEUpcycling(experts=4), targets)
    return shaken(model)


def export(model, path, name="transformers_moe", **fields):
    get_registry().get("exporter", name)(**fields).export(model, path)


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(ids).logits


def far(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 2e4},
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}
MODELS = [
    *[
        (kind, {"rope_parameters": rope, "tie_word_embeddings": tied})
        for kind in KINDS
        for rope in ROPES.values()
        for tied in (True, False)
    ],
    ("llama", {"head_dim": 16}),
    ("mistral", {"head_dim": 16}),
    ("qwen3", {"head_dim": 16}),
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"rms_norm_eps": 1e-2}),
]
EXPECTED = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=lambda value: str(value)[:120])
def test_every_layer_upcycled_is_a_model_of_transformers(kind, changes, tmp_path):
    model = upcycled(kind, **changes)
    wanted = logits(model)
    export(model, tmp_path / "out")
    assert torch.equal(logits(model), wanted)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.model_type == EXPECTED[kind]
    assert loaded.config.output_router_logits
    assert far(logits(loaded), wanted) <= 2e-6
    assert far(logits(loaded, IDS), logits(dense(kind, **changes))) > 1e-3  # the experts act


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", ["last_half", "every_other"])
def test_a_subset_of_layers_keeps_the_others_dense(kind, layers, tmp_path):
    changes = {"head_dim": 16} if kind == "llama" else {"sliding_window": 8} if kind == "mistral" else {}
    model = upcycled(kind, MoEUpcycling(experts=4, layers=layers), **changes)
    export(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.model_type == ("qwen3_moe" if kind == "qwen3" else "qwen2_moe")
    assert loaded.config.mlp_only_layers == {"last_half": [0, 1], "every_other": [0, 2]}[layers]
    assert far(logits(loaded), logits(model)) <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method",
    [
        MoEUpcycling(experts=4, combine="softmax"),
        MoEUpcycling(experts=4, top_k=1, combine="straight_through"),
        MoEUpcycling(experts=4, top_k=4, granularity=2),
        MoEUpcycling(experts=4, top_k=4, granularity=2, combine="softmax"),
        MoEUpcycling(experts=3, top_k=2, train="all"),
    ],
    ids=["softmax", "one", "granular", "granular-softmax", "all"],
)
def test_routers_and_granularity_are_kept(kind, method, tmp_path):
    model = upcycled(kind, method, tie_word_embeddings=method.train == "all")
    export(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if method.combine == "softmax":
        assert loaded.config.model_type in ("qwen2_moe", "qwen3_moe")
        assert not loaded.config.norm_topk_prob
    assert far(logits(loaded), logits(model)) <= 2e-6


def test_names_on_disk_are_the_classic_ones_and_a_second_save_is_bit_equal(tmp_path):
    model = upcycled(tie_word_embeddings=True)
    export(model, tmp_path / "out", "mixtral")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.3.block_sparse_moe.experts.2.w2.weight" in stored
    assert "model.layers.3.block_sparse_moe.gate.weight" in stored
    assert not [name for name in stored if "gate_up_proj" in name or "lm_head" in name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))
    adapter = model.model.layers[1].mlp.adapters["default"]
    assert torch.equal(loaded.model.layers[1].mlp.experts.gate_up_proj, adapter.gate_up_proj)
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["format"] == "mixtral"
    assert 0 <= report["difference"] <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_kept(dtype, tmp_path):
    model = dense().to(dtype)
    inject(model, MoEUpcycling(experts=4))
    shaken(model)
    export(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    assert loaded.dtype == dtype
    if dtype == torch.float64:
        assert far(logits(loaded), logits(model)) <= 2e-6
    assert loaded.model.layers[0].mlp.experts.down_proj.dtype == dtype


def test_other_adapters_are_merged_into_what_is_written_and_stay_in_the_model(tmp_path):
    model = upcycled()
    inject(model, LoRA(rank=2), ["query", "output"], name="attention")
    set_active_adapters(model, ["default", "attention"])
    shaken(model)
    wanted = logits(model)
    export(model, tmp_path / "out")
    assert torch.equal(logits(model), wanted)
    assert far(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), wanted) <= 5e-6


# -- low-rank experts ----------------------------------------------------------------------------------------------------


def low_rank(kind="llama", **fields):
    model = dense(kind)
    inject(model, MixLoRA(**{"experts": 4, "rank": 3, "alpha": 8.0, **fields}))
    return shaken(model)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_experts_are_written_as_whole_weights(kind, tmp_path):
    model = low_rank(kind, rslora=True)
    export(model, tmp_path / "out")
    assert far(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model)) <= 2e-6
    assert far(logits(model), logits(dense(kind))) > 1e-2


@pytest.mark.parametrize("fields", [{}, {"rslora": True, "alpha": 5.0}, {"top_k": 3}], ids=str)
def test_low_rank_experts_are_an_adapter_of_hf_peft_over_an_upcycled_mixtral(fields, tmp_path):
    model = low_rank(**fields)
    wanted = logits(model)
    export(model, tmp_path / "out", "mixtral_peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    assert far(logits(base), logits(dense())) <= 2e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert far(logits(adapted), wanted) <= 2e-6
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    load_adapter(ours, tmp_path / "out")
    assert far(logits(ours), wanted) <= 2e-6


def test_low_rank_experts_around_an_adapted_mlp_are_written_with_it(tmp_path):
    model = dense()
    inject(model, LoRA(rank=2), ["gate", "down", "value"], name="inner")
    inject(model, MixLoRA(experts=4, rank=3, alpha=8.0), name="outer")
    set_active_adapters(model, ["inner", "outer"])
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "router" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wanted = logits(model)
    for name in ("mixtral", "mixtral_peft"):
        export(model, tmp_path / name, name)
        assert torch.equal(logits(model), wanted)
    assert far(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")), wanted) <= 5e-6
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral_peft" / "base")
    assert far(logits(peft.PeftModel.from_pretrained(base, tmp_path / "mixtral_peft")), wanted) <= 5e-6


def test_fresh_low_rank_experts_are_the_dense_model_in_every_export(tmp_path):
    model = dense()
    inject(model, MixLoRA(experts=4, rank=3))
    export(model, tmp_path / "whole", "mixtral")
    assert far(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(dense())) <= 2e-6


def test_whole_experts_are_no_adapter_of_hf_peft(tmp_path):
    with pytest.raises(ExportError, match="are whole weights, not pairs of low rank"):
        export(upcycled(), tmp_path / "out", "mixtral_peft")
    assert not list(tmp_path.iterdir())


# -- refusals --------------------------------------------------------------------------------------------------------------


def expert_choice(**fields):
    return MoEUpcycling(experts=4, router="expert_choice", allow_noncausal=True, **fields)


REFUSED = {
    "attention_bias": (lambda: upcycled(attention_bias=True), {}, "attention_bias=True, and 'mixtral' has no biases"),
    "mlp_bias": (lambda: upcycled(mlp_bias=True), {}, r"have biases \(mlp_bias=True\)"),
    "gelu": (lambda: upcycled(hidden_act="gelu"), {}, "hidden_act='gelu', and 'mixtral' is run with SiLU"),
    "expert choice": (
        lambda: upcycled(method=expert_choice()),
        {},
        "experts choose tokens, and in every format .* as_top_k=True",
    ),
    "uncovered": (lambda: upcycled(method=expert_choice(uncovered="dense")), {}, "experts choose tokens"),
    "partial": (
        lambda: upcycled(method=MoEUpcycling(experts=4, layers="last_half")),
        {"name": "mixtral"},
        "2 of the 4 layers of this model are dense; write it as 'qwen2_moe'",
    ),
    "softmax": (
        lambda: upcycled(method=MoEUpcycling(experts=4, combine="softmax")),
        {"name": "mixtral"},
        "combine='softmax'",
    ),
    "another class": (
        lambda: upcycled("qwen2"),
        {"name": "mixtral"},
        "a Qwen2ForCausalLM was to be written as 'mixtral'",
    ),
    "some windows": (
        lambda: upcycled("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=2),
        {},
        "a sliding window in some layers only",
    ),
    "no mixture": (dense, {}, "none is active in this LlamaForCausalLM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_represent_is_refused_before_a_byte_is_written(case, tmp_path):
    make, fields, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        export(make(), tmp_path / "out", **fields)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", ["sigmoid", "noisy"])
def test_other_routers_are_refused(rule, tmp_path):
    from lightning_peft.moe.routing import NoisyTopKRouter, SigmoidRouter

    model = upcycled()
    for layer in model.model.layers:
        layer.mlp.adapters["default"].rule = {"sigmoid": SigmoidRouter, "noisy": NoisyTopKRouter}[rule]()
    with pytest.raises(ExportError, match=f"the router .*{rule}.* has no format in transformers"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_layers_that_differ_are_refused(tmp_path):
    model = dense()
    inject(model, MoEUpcycling(experts=4), Targets(include="down", layers=[0, 1]), name="few")
    inject(model, MoEUpcycling(experts=5), Targets(include="down", layers=[2, 3]), name="many")
    set_active_adapters(model, ["few", "many"])
    with pytest.raises(ExportError, match="the formats have one setting for all layers"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_gpt2_has_the_format_of_this_library_only(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    inject(model, MoEUpcycling(experts=4))
    shaken(model)
    with pytest.raises(
        ExportError,
        match=r"no format of transformers holds a GPT2LMHeadModel .* save_adapter\(model, folder\) writes any",
    ):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path / "own")
    again = GPT2LMHeadModel(config).eval()
    again.load_state_dict(base)
    load_adapter(again, tmp_path / "own")
    assert torch.equal(logits(again), logits(model))


def test_expert_choice_is_written_as_top_k_when_asked_with_a_warning(tmp_path):
    model = upcycled(method=expert_choice(capacity=2.0))
    wanted = logits(model)
    with pytest.warns(LightningPEFTWarning, match=r"another function, whose logits differ by up to \d"):
        export(model, tmp_path / "out", as_top_k=True)
    assert torch.equal(logits(model), wanted)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_experts_per_tok == 2
    assert far(logits(loaded), wanted) > 1e-3
    assert json.loads((tmp_path / "out" / "export.json").read_text())["difference_from_expert_choice"] > 1e-3


@pytest.mark.parametrize("key", ["rope_parameters", "rms_norm_eps", "num_key_value_heads", "norm_topk_prob"])
def test_a_folder_that_computes_something_else_is_removed(key, tmp_path, monkeypatch):
    from lightning_peft.plugins import moe_exporters

    true = moe_exporters.target_config

    def forgetful(*args):
        config = true(*args)
        wrong = {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "rms_norm_eps": 1e-6,
            "norm_topk_prob": False,
        }
        if key == "num_key_value_heads":
            config.num_key_value_heads = 4
        else:
            setattr(config, key, wrong[key])
        return config

    monkeypatch.setattr(moe_exporters, "target_config", forgetful)
    model = upcycled("qwen2")
    wanted = logits(model)
    with pytest.raises(ExportError, match="cannot take the weights|more than the 2e-06 allowed"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), wanted)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(ExportError, match="it is not empty; name a new folder"):
        export(upcycled(), tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_settings_out_of_range_are_refused():
    exporters = get_registry().exporters
    with pytest.raises(ConfigError, match="format must be one of auto, mixtral, qwen2_moe, qwen3_moe, got 'olmoe'"):
        exporters["transformers_moe"](format="olmoe")
    with pytest.raises(ConfigError, match="tolerance must be positive, got 0"):
        exporters["transformers_moe"](tolerance=0)
    with pytest.raises(ConfigError, match="tokens must be a positive integer, got 0"):
        exporters["transformers_moe"](tokens=0)
    with pytest.raises(ConfigError, match="Mixtral format must be 'mixtral', got 'qwen2_moe'"):
        exporters["mixtral"](format="qwen2_moe")


def test_the_written_model_shares_the_tensors_of_the_live_one():
    from lightning_peft import whole_mixtures
    from lightning_peft.moe.transformers_formats import target_config

    model = upcycled(tie_word_embeddings=True)
    places = whole_mixtures.acting_mixtures(model)
    shape = whole_mixtures.shape_of(places, {path: one.rule for path, one in places.items()})
    target = whole_mixtures.target_model(model, target_config(model.config, "mixtral", shape), places, {})
    live = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in target.parameters()} <= live


def test_a_pretrained_model_upcycled_and_trained_speaks_the_same_as_a_mixtral(data_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(data_dir / "models" / "stories260k")
    ids = torch.randint(3, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    inject(model, MoEUpcycling(experts=8))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    export(model, tmp_path / "out", "mixtral")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert far(logits(loaded, ids), logits(model, ids)) <= 2e-6
    said = [one.generate(ids[:, :8], max_new_tokens=24, do_sample=False, pad_token_id=0) for one in (loaded, model)]
    assert torch.equal(*said)


def test_models_without_plain_weights_that_act_are_refused(tmp_path):
    model = upcycled()
    with adapters_disabled(model), pytest.raises(ExportError, match="are disabled, so its experts do not act"):
        export(model, tmp_path / "out")
    packed = upcycled()
    packed.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ExportError, match=r"'lm_head.weight' is packed as torch.int8"):
        export(packed, tmp_path / "out")
    with pytest.raises(ExportError, match="is on the meta device and has no values to export"):
        export(upcycled().to("meta"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_cannot_be_merged_beside_the_mixture_is_refused(tmp_path):
    model = upcycled()
    inject(model, LoRAMixture(experts=2, rank=2), ["query"], name="mixture")
    set_active_adapters(model, ["default", "mixture"])
    with pytest.raises(
        ExportError, match="adapters beside the mixture of experts are merged in an export, and one cannot be"
    ):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())

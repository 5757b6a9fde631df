"""Which MLPs become mixtures: every family that is known, its biases, activations and dropout, and what is refused."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_peft import LoRA, ModelFamily, MoEUpcycling, Targets, adapter_layers, inject, set_active_adapters
from lightning_peft.activation import adapters_disabled
from lightning_peft.errors import TargetError
from lightning_peft.moe.mixture import MixtureOfExperts
from lightning_peft.testing import tiny_gpt2, tiny_llama

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
BERT = {**LLAMA, "max_position_embeddings": 32}
T5 = {
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 32,
    "decoder_start_token_id": 0,
}
GROUPED = {**LLAMA, "num_key_value_heads": 1}
TEXT = {"input_ids": torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(0))}
BOTH = {**TEXT, "decoder_input_ids": TEXT["input_ids"][:, :5]}
PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
SOUND = {
    "input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0)),
    "decoder_input_ids": BOTH["decoder_input_ids"],
}
WHISPER = {
    "vocab_size": 32, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 8, "pad_token_id": 0,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip

MODELS = {
    # name: class, configuration, inputs, where the first mixture stands, its tensors before the activation
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED, mlp_bias=True), TEXT, "model.layers.0.mlp", "gate_up_proj"),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED), TEXT, "model.layers.0.mlp", "gate_up_proj"),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**GROUPED), TEXT, "model.layers.0.mlp", "gate_up_proj"),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED, head_dim=8), TEXT, "model.layers.0.mlp", "gate_up_proj"),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig(**GROUPED, head_dim=8), TEXT, "model.layers.0.mlp", "gate_up_proj"),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**GROUPED, head_dim=8), TEXT, "model.layers.0.mlp", "gate_up_proj"),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config(**GROUPED, pad_token_id=0), TEXT, "model.layers.0.mlp", "gate_up_proj"),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig(**LLAMA), TEXT, "model.layers.0.mlp", "up_proj"),
    "gpt2": (
        hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32), TEXT, "transformer.h.0.mlp", "up_proj"
    ),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**LLAMA), TEXT, "gpt_neox.layers.0.mlp", "up_proj"),
    "falcon": (hf.FalconForCausalLM, hf.FalconConfig(**LLAMA), TEXT, "transformer.h.0.mlp", "up_proj"),
    "bloom": (
        hf.BloomForCausalLM, hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=32), TEXT,
        "transformer.h.0.mlp.dense_4h_to_h", "up_proj",
    ),
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, word_embed_proj_dim=16),
        TEXT, "model.decoder.layers.0.fc2", "up_proj",
    ),
    "bert": (hf.BertForMaskedLM, hf.BertConfig(**BERT), TEXT, "bert.encoder.layer.0.output.dense", "up_proj"),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**BERT), TEXT, "roberta.encoder.layer.0.output.dense", "up_proj"),
    "deberta": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config(**BERT), TEXT, "deberta.encoder.layer.0.output.dense", "up_proj"),
    "distilbert": (
        hf.DistilBertForMaskedLM, hf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=32), TEXT,
        "distilbert.transformer.layer.0.ffn", "up_proj",
    ),
    "vit": (
        hf.ViTForImageClassification, hf.ViTConfig(**{**LLAMA, "image_size": 8, "patch_size": 4}), PIXELS, "vit.layers.0.mlp", "up_proj"
    ),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5), BOTH, "encoder.block.0.layer.1.DenseReluDense", "up_proj"),
    "t5_gated": (
        hf.T5ForConditionalGeneration, hf.T5Config(**T5, feed_forward_proj="gated-gelu"), BOTH,
        "encoder.block.0.layer.1.DenseReluDense", "gate_up_proj",
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration, hf.WhisperConfig(**WHISPER), SOUND, "model.encoder.layers.0.fc2", "up_proj"
    ),
}  # fmt: skip


def make(name):
    kind, config, *_ = MODELS[name]
    torch.manual_seed(0)
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases would hide a mistake
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def mixtures(model, name="default"):
    return {
        path: layer.adapters[name]
        for path, layer in adapter_layers(model).items()
        if name in layer.adapters and isinstance(layer.adapters[name], MixtureOfExperts)
    }


@torch.no_grad()
def logits(model, inputs=TEXT):
    return model(**inputs).logits


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_every_family_starts_at_its_dense_output(name):
    *_, inputs, place, first = MODELS[name]
    model = make(name)
    base = logits(model, inputs)
    inject(model, MoEUpcycling(experts=4))
    found = mixtures(model)
    assert place in found
    assert len(found) == (4 if name in ("t5", "t5_gated", "whisper") else 2)
    assert first in dict(found[place].named_parameters())
    assert apart(logits(model, inputs), base) <= 2e-6
    with adapters_disabled(model):
        assert torch.equal(logits(model, inputs), base)
    with torch.no_grad():
        found[place].down_proj.zero_()
    assert apart(logits(model, inputs), base) > 1e-3  # it is the mixture that computes


@pytest.mark.parametrize("name", MODELS)
def test_every_family_trains_all_of_it(name):
    *_, inputs, _, _ = MODELS[name]
    model = make(name)
    inject(model, MoEUpcycling(experts=2, combine="softmax", train="all"))
    base = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    model.train()
    logits = model(**inputs).logits
    logits.square().mean().backward()
    for path, mixture in mixtures(model).items():
        for key, parameter in mixture.named_parameters():
            assert parameter.grad is not None, (path, key)
            assert parameter.grad.any(), (path, key)
    assert all(torch.equal(p, base[key]) for key, p in model.named_parameters() if key in base)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "t5", "distilbert"])
def test_dropout_of_the_mlp_is_kept(name):
    *_, place, _ = MODELS[name]
    model = make(name)
    inject(model, MoEUpcycling(experts=2))
    parts = mixtures(model)[place].feed_forward
    assert (parts.inner_dropout, parts.outer_dropout) == ((0.1, 0.0) if name == "t5" else (0.0, 0.1))
    layer, x = adapter_layers(model)[place], torch.randn(1, 4000, 16)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(1)
    share = float((layer(x) == 0).float().mean())
    torch.manual_seed(1)
    wanted = float((layer.base_layer(x) == 0).float().mean())
    assert share == pytest.approx(wanted, abs=0.01)
    assert (wanted > 0.05) == (name != "t5")
    assert apart(layer(x).mean(1), layer.base_layer(x).mean(1)) < 0.2
    assert not torch.equal(layer(x), layer(x))


def test_experts_are_copies_that_share_nothing():
    model = make("llama")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    inject(model, MoEUpcycling(experts=3))
    mixture = mixtures(model)["model.layers.0.mlp"]
    mlp = adapter_layers(model)["model.layers.0.mlp"].base_layer
    for expert in range(3):
        assert torch.equal(mixture.gate_up_proj[expert], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        assert torch.equal(mixture.gate_up_proj_bias[expert], torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias]))
        assert torch.equal(mixture.down_proj[expert], mlp.down_proj.weight)
        assert torch.equal(mixture.down_proj_bias[expert], mlp.down_proj.bias)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.fill_(3.0)
    now = {key.replace(".base_layer", ""): p for key, p in model.named_parameters() if ".adapters." not in key}
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in before)


def test_conv1d_weights_are_turned():
    model = tiny_gpt2()
    inject(model, MoEUpcycling(experts=2))
    mixture, mlp = mixtures(model)["transformer.h.0.mlp"], model.transformer.h[0].mlp.base_layer
    assert torch.equal(mixture.up_proj[1], mlp.c_fc.weight.t())
    assert torch.equal(mixture.down_proj[1], mlp.c_proj.weight.t())


@pytest.mark.parametrize(
    ("method", "targets", "layers"),
    [
        (MoEUpcycling(experts=2), None, [0, 1, 2, 3, 4]),
        (MoEUpcycling(experts=2, layers="last_half"), None, [2, 3, 4]),
        (MoEUpcycling(experts=2, layers="every_other"), None, [1, 3]),
        (MoEUpcycling(experts=2), Targets(include="down", layers="-2:"), [3, 4]),
        (MoEUpcycling(experts=2), Targets(include="down", layers="1::3"), [1, 4]),
        (MoEUpcycling(experts=2), Targets(include="mlp", layers=[0, -1]), [0, 4]),
        (MoEUpcycling(experts=2), "layers.2", [2]),
        (MoEUpcycling(experts=2), "block", [0, 1, 2, 3, 4]),
    ],
)
def test_layers_are_chosen(method, targets, layers):
    model = tiny_llama(num_hidden_layers=5)
    inject(model, method, targets)
    assert list(mixtures(model)) == [f"model.layers.{layer}.mlp" for layer in layers]


def test_stacks_are_halved_on_their_own():
    model = make("t5")
    inject(model, MoEUpcycling(experts=2, layers="last_half"))
    assert list(mixtures(model)) == ["encoder.block.1.layer.1.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense"]


def test_it_stands_beside_lora_on_attention():
    model = tiny_llama()
    inject(model, MoEUpcycling(experts=2), name="moe")
    inject(model, LoRA(rank=2), ["query", "value"], name="lora")
    set_active_adapters(model, ["moe", "lora"])
    model(input_ids=TEXT["input_ids"]).logits.square().mean().backward()
    assert mixtures(model, "moe")["model.layers.0.mlp"].down_proj.grad is not None


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_a_family_without_a_known_mlp_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(TargetError, match="family 'generic' names 0 modules of the role 'down'"):
        inject(model, MoEUpcycling(), "0")
    with pytest.raises(TargetError, match="target 'down' matches no module of Sequential"):
        inject(model, MoEUpcycling())
    with pytest.raises(TargetError, match="Roles of family 'mixtral'"):
        inject(hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=2)), MoEUpcycling())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(4, 8), nn.Linear(8, 4), nn.ReLU()

    def forward(self, x):
        return 2 * self.down(self.act(self.up(x)))


def test_an_mlp_that_does_more_is_refused():
    family = ModelFamily(name="toy", roles={"up": ("up",), "down": ("down",)})
    model = nn.Sequential(Twice())
    with pytest.raises(TargetError, match="a Twice computes something else than its projections do"):
        inject(model, MoEUpcycling(), "down", family=family)
    assert not adapter_layers(model)
    model[0].act = nn.PReLU()
    with pytest.raises(TargetError, match="an activation with parameters of its own is not copied"):
        inject(model, MoEUpcycling(), "down", family=family)


def test_packed_weights_are_refused():
    from lightning_peft import NF4

    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = NF4(compute_dtype="float32").quantize(mlp.up_proj)
    with pytest.raises(TargetError, match="has no plain weight to copy; load the base in 16 or 32 bit"):
        inject(model, MoEUpcycling())


def test_expert_choice_in_a_decoder_is_refused():
    method = MoEUpcycling(experts=4, router="expert_choice")
    for name in ("llama", "gpt2", "bloom", "opt", "phi3", "falcon", "gpt_neox"):
        with pytest.raises(
            TargetError, match="in a decoder: whether an expert takes a token would depend on later tokens"
        ):
            inject(make(name), method)
    with pytest.raises(TargetError, match="'decoder.block.0.layer.2.DenseReluDense.wo'"):
        inject(make("t5"), method)
    with pytest.raises(TargetError, match="in a decoder"):
        inject(make("whisper"), method)
    inject(make("t5"), method, "encoder.*.wo")
    for name in ("bert", "roberta", "deberta", "distilbert", "vit"):
        inject(make(name), method)
    inject(make("llama"), MoEUpcycling(experts=4, router="expert_choice", allow_noncausal=True))


def test_granularity_must_divide_the_hidden_features():
    with pytest.raises(
        TargetError, match="granularity=5 does not divide the 24 hidden features of 'model.layers.0.mlp'"
    ):
        inject(make("llama"), MoEUpcycling(granularity=5, top_k=5))


def test_a_family_without_a_known_mlp_is_named_and_leads_nowhere_wrong():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Olmo2ForCausalLM(Olmo2Config(vocab_size=32, pad_token_id=0, **sizes))
    with pytest.raises(
        TargetError,
        match=r"'down' matches no module of Olmo2ForCausalLM: it is a role, and nobody told family 'generic'",
    ) as error:
        inject(model, MoEUpcycling(experts=2))
    assert "did you mean" not in str(error.value)

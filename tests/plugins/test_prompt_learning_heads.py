"""A head trained beside virtual tokens: the folders of HF PEFT, which names heads in them otherwise than beside LoRA."""

import json

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from lightning_peft import (
    PrefixTuning,
    PromptTuning,
    PTuning,
    adapter_rows,
    adapters_disabled,
    inject,
    load_adapter,
    save_adapter,
    set_active_adapters,
)

IDS = torch.tensor([[5, 9, 31, 7, 12, 40, 3], [8, 8, 22, 50, 6, 11, 19]])
PEERS = {
    "prompt": (PromptTuning, PromptTuningConfig),
    "prefix": (PrefixTuning, PrefixTuningConfig),
    "p-tuning": (PTuning, PromptEncoderConfig),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config).eval()


def disturbed(model):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kind", PEERS)
def test_hf_peft_loads_what_is_saved(kind, tmp_path):
    method = PEERS[kind][0](num_virtual_tokens=4)
    model = classifier()
    inject(model, method, modules_to_save=["score"])
    disturbed(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"base_model.score.weight", "prompt_embeddings"}
    theirs = PeftModel.from_pretrained(classifier(), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) <= 1e-5
    assert relative(logits(classifier()), logits(model)) > 1e-2


@pytest.mark.parametrize("kind", PEERS)
def test_what_hf_peft_writes_loads_here(kind, tmp_path):
    theirs = disturbed(get_peft_model(classifier(), PEERS[kind][1](task_type="SEQ_CLS", num_virtual_tokens=4)))
    theirs.save_pretrained(tmp_path)
    model = classifier()
    load_adapter(model, tmp_path)
    assert relative(logits(model), logits(theirs)) <= 1e-5


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_without_a_head_the_folder_is_for_features(kind, tmp_path):
    model = classifier()
    inject(model, PEERS[kind][0](num_virtual_tokens=4))
    save_adapter(disturbed(model), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    theirs = PeftModel.from_pretrained(classifier().model, tmp_path).eval()
    with torch.no_grad():
        wanted = model.model(IDS).last_hidden_state
        found = theirs(input_ids=IDS).last_hidden_state[:, -IDS.shape[1] :]
    assert relative(found, wanted) <= 1e-5


# -- encoders, whose heads read the first place ------------------------------------------------------------------------

ENCODERS = {
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "roberta": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "electra": {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
}


def encoder(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=61, num_labels=3, pad_token_id=1, **ENCODERS[kind])
    return AutoModelForSequenceClassification.from_config(config).eval()


@torch.no_grad()
def classified(model, kind):
    ids = torch.tensor([[5, 9, 31, 7, 12, 40, 3], [8, 8, 22, 50, 1, 1, 1]])
    types = {"token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]])} if kind == "bert" else {}
    return model(input_ids=ids, attention_mask=(ids != 1).long(), **types).logits


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_an_encoder_classifies_as_it_does_in_hf_peft(method, kind, tmp_path):
    ours, theirs = PEERS[method]
    sizes = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4}  # which HF PEFT does not find in DistilBERT
    config = theirs(task_type="SEQ_CLS", num_virtual_tokens=4, **sizes)
    peer = disturbed(get_peft_model(encoder(kind), config))
    peer.save_pretrained(tmp_path / "theirs")
    model = encoder(kind)
    load_adapter(model, tmp_path / "theirs")
    wanted = classified(peer, kind)
    assert relative(classified(model, kind), wanted) <= 1e-5
    assert relative(classified(encoder(kind), kind), wanted) > 1e-2

    model = encoder(kind)
    inject(
        model,
        ours(num_virtual_tokens=4),
        modules_to_save=["classifier", "pre_classifier"] if kind == "distilbert" else ["classifier"],
    )
    save_adapter(disturbed(model), tmp_path / "ours")
    peer = PeftModel.from_pretrained(encoder(kind), tmp_path / "ours").eval()
    assert relative(classified(peer, kind), classified(model, kind)) <= 1e-5


def test_rows_of_several_prompts_are_classified_each_by_its_own(tmp_path):
    model = encoder("bert")
    inject(model, PromptTuning(num_virtual_tokens=4), name="a")
    inject(model, PromptTuning(num_virtual_tokens=2), name="b")
    disturbed(model)
    alone = {}
    for name in ("a", "b"):
        set_active_adapters(model, [name])
        alone[name] = classified(model, "bert")
    with adapter_rows(model, ["b", None]):
        together = classified(model, "bert")
    with adapters_disabled(model):
        base = classified(model, "bert")
    assert relative(together[0], alone["b"][0]) <= 1e-5
    assert relative(together[1], base[1]) <= 1e-5
    assert relative(alone["a"], alone["b"]) > 1e-3

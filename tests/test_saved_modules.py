"""Modules trained in full beside a method live in its adapter, and are HF PEFT's modules_to_save in files."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import (
    Adaptation,
    BitFit,
    FullFineTuning,
    LoRA,
    NormTuning,
    PEFTModule,
    QLoRA,
    adapter_layers,
    adapter_state_dict,
    adapters_disabled,
    delete_adapter,
    inject,
    inject_all,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_active_adapters,
    trainable_summary,
    unload_adapters,
    unmerge_adapters,
)
from lightning_peft.checkpoint_manifest import check_manifest, make_manifest
from lightning_peft.errors import (
    AdapterMismatchError,
    CheckpointMismatchError,
    ConfigError,
    InjectionError,
    MergeError,
    TargetError,
)
from lightning_peft.saved_modules import own_adapters
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


def classifier(kind, seed=0):
    import transformers

    torch.manual_seed(seed)
    small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 3}
    small |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    config = {"llama": transformers.LlamaConfig, "bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}
    name = {"llama": "Llama", "bert": "Bert", "roberta": "Roberta"}[kind] + "ForSequenceClassification"
    return getattr(transformers, name)(config[kind](**small)).eval()


HEAD = {"llama": "score", "bert": "classifier", "roberta": "classifier"}
LORA = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "roberta": ["query", "value"]}


def disturbed(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model):
    ids = token_batch()["input_ids"].clamp(min=3)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def adapted(kind, method=None, **options):
    model = classifier(kind)
    inject(model, method or LoRA(rank=2), LORA[kind], modules_to_save=[HEAD[kind]], **options)
    return model


@pytest.mark.parametrize("kind", HEAD)
def test_a_head_is_trained_in_full_and_disabled_is_the_base(kind):
    model, base = adapted(kind), classifier(kind)
    assert torch.equal(logits(model), logits(base))
    trained = {
        path for path, layer in adapter_layers(model).items() if any(p.requires_grad for p in layer.parameters())
    }
    assert {path for path in trained if path.startswith(HEAD[kind])} == (
        {"classifier.dense", "classifier.out_proj"} if kind == "roberta" else {HEAD[kind]}
    )
    before = adapter_state_dict(model)
    before = {key: value.clone() for key, value in before.items()}
    disturbed(model)
    assert all(not torch.equal(value, before[key]) for key, value in adapter_state_dict(model).items())
    assert relative(logits(model), logits(base)) > 1e-2
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("kind", HEAD)
def test_merged_is_active_and_unmerged_is_the_base(kind):
    model = disturbed(adapted(kind))
    active = logits(model)
    merge_adapters(model)
    assert relative(logits(model), active) <= 1e-5
    unmerge_adapters(model)
    assert torch.equal(logits(model), active)
    merge_adapters(model)
    assert relative(logits(unload_adapters(model)), active) <= 1e-5


@pytest.mark.parametrize("kind", HEAD)
def test_saved_and_loaded_is_the_same(kind, tmp_path):
    model = disturbed(adapted(kind))
    save_adapter(model, tmp_path)
    again = classifier(kind)
    injection = load_adapter(again, tmp_path)
    assert [target.path for target in injection.saved] == [HEAD[kind]]
    assert torch.equal(logits(again), logits(model))
    assert injection.method == LoRA(rank=2)


@pytest.mark.parametrize("kind", HEAD)
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits(kind, tmp_path):
    model = disturbed(adapted(kind))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", [HEAD[kind]])
    theirs = PeftModel.from_pretrained(classifier(kind), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) <= 1e-5
    assert relative(logits(classifier(kind)), logits(model)) > 1e-2


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize("kind", HEAD)
def test_what_hf_peft_writes_loads_here(kind, task, tmp_path):
    config = LoraConfig(
        r=2, target_modules=LORA[kind], task_type=task, modules_to_save=None if task else [HEAD[kind]], lora_alpha=4
    )
    theirs = disturbed(get_peft_model(classifier(kind), config))
    theirs.save_pretrained(tmp_path)
    model = classifier(kind)
    assert [target.path for target in load_adapter(model, tmp_path).saved] == [HEAD[kind]]
    assert relative(logits(model), logits(theirs)) <= 1e-5
    # Written again from here, it still is HF PEFT's.
    save_adapter(model, tmp_path / "again")
    assert (
        relative(logits(PeftModel.from_pretrained(classifier(kind), tmp_path / "again").eval()), logits(theirs)) <= 1e-5
    )


def test_heads_that_hf_peft_adds_by_task_type_are_found_without_being_named(tmp_path):
    theirs = disturbed(
        get_peft_model(classifier("bert"), LoraConfig(r=2, task_type="TOKEN_CLS", target_modules=["query"]))
    )
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": None}))
    model = classifier("bert")
    load_adapter(model, tmp_path)
    assert relative(logits(model), logits(theirs)) <= 1e-5


def test_an_embedding_of_hf_peft_is_trained_in_full(tmp_path):
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    theirs = disturbed(get_peft_model(tiny_llama(), config))
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    assert [target.path for target in load_adapter(model, tmp_path).saved] == ["model.embed_tokens", "lm_head"]
    assert relative(logits(model), logits(theirs)) <= 1e-5
    save_adapter(model, tmp_path / "again")
    assert relative(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "again").eval()), logits(theirs)) <= 1e-5


def test_names_of_hf_peft_without_a_module_or_a_tensor_are_refused(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "modules_to_save": ["pooler"]}))
    with pytest.raises(AdapterMismatchError, match="modules_to_save names 'pooler', but LlamaForCausalLM has no such"):
        load_adapter(tiny_llama(), tmp_path)
    file.write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    model = tiny_llama()
    with pytest.raises(AdapterMismatchError, match=r"Missing: \['lm_head.weight'\]"):
        load_adapter(model, tmp_path)
    assert not adapter_layers(model)


def test_a_missing_tensor_of_a_saved_module_is_refused(tmp_path):
    save_adapter(disturbed(adapted("roberta")), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.classifier.dense.bias"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "lightning_peft.json").unlink()
    with pytest.raises(AdapterMismatchError, match=r"Missing: \['classifier.dense.bias'\]"):
        load_adapter(classifier("roberta"), tmp_path)


@pytest.mark.parametrize("words", ["score", ["head"], "re:sco.*", "*sc?re"], ids=str)
def test_words_are_resolved_like_targets(words):
    model = classifier("llama")
    if words == ["head"]:
        with pytest.raises(TargetError, match="target 'head' matches no module"):
            inject(nn.Sequential(nn.Linear(2, 2)), LoRA(rank=1), modules_to_save=words)
    else:
        assert [target.path for target in inject(model, LoRA(rank=1), "q_proj", modules_to_save=words).saved] == [
            "score"
        ]


def test_a_word_without_a_match_is_refused_before_anything_changes():
    model = classifier("llama")
    with pytest.raises(
        TargetError, match="target 'scor' matches no module of LlamaForSequenceClassification; did you mean 'score'"
    ):
        inject(model, LoRA(rank=1), "q_proj", modules_to_save="scor")
    assert not adapter_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_without_parameters_is_refused():
    with pytest.raises(TargetError, match="target '1' matches '1', a ReLU, which modules_to_save cannot adapt"):
        inject(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), LoRA(rank=1), "0", modules_to_save="1")


def test_a_slice_is_refused():
    with pytest.raises(TargetError, match="modules_to_save 'query' is a slice of 'transformer.h.0.attn.c_attn'"):
        inject(tiny_gpt2(), LoRA(rank=1), "down", modules_to_save="query")


def test_a_place_the_method_adapts_as_well_is_refused():
    model = classifier("roberta")
    with pytest.raises(TargetError, match="'classifier.dense' was asked for twice: modules_to_save trains it in full"):
        inject(model, LoRA(rank=1), ["query", "classifier.dense"], modules_to_save="classifier")
    assert not adapter_layers(model)


def test_biases_of_the_whole_model_leave_the_saved_modules_out(tmp_path):
    model = classifier("bert")
    inject(model, LoRA(rank=1, bias="all"), "query", modules_to_save="classifier")
    assert list(own_adapters(model, "default")).count("classifier") == 0
    assert "bert.pooler.dense" in own_adapters(model, "default")
    disturbed(model)
    save_adapter(model, tmp_path)
    again = classifier("bert")
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    peer = PeftModel.from_pretrained(classifier("bert"), tmp_path).eval()
    assert relative(logits(peer), logits(model)) <= 1e-5


def test_a_head_of_hf_peft_beside_all_biases_is_read(tmp_path):
    config = LoraConfig(r=2, target_modules=LORA["bert"], task_type="SEQ_CLS", bias="all")
    theirs = disturbed(get_peft_model(classifier("bert"), config))
    theirs.save_pretrained(tmp_path)
    ours = classifier("bert")
    load_adapter(ours, tmp_path)
    assert relative(logits(ours), logits(theirs)) <= 1e-5


def test_all_biases_in_a_list_of_methods_leave_the_saved_modules_out():
    model = classifier("bert")
    lora = Adaptation(LoRA(rank=1, bias="all"), targets="query", modules_to_save="classifier")
    inject_all(model, [lora, Adaptation(LoRA(rank=1), targets="value")])
    assert "classifier" not in own_adapters(model, "lora")


@pytest.mark.parametrize("method", [BitFit(), NormTuning(), LoRA(rank=2), FullFineTuning()], ids=lambda m: m.name)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_default_targets_leave_the_saved_modules_out(kind, method, tmp_path):
    model = classifier(kind)
    injection = inject(model, method, modules_to_save="classifier")
    assert not any(path.startswith("classifier") for path in injection.paths)
    assert not any(path.startswith("classifier") for path in own_adapters(model, "default"))
    disturbed(model)
    save_adapter(model, tmp_path)
    again = classifier(kind)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_nothing_left_for_the_method_is_refused():
    with pytest.raises(TargetError, match="leaves nothing of Sequential for FullFineTuning to adapt"):
        inject(nn.Sequential(nn.Linear(2, 2)), FullFineTuning(), modules_to_save="0")


def test_two_adapters_with_copies_at_one_place_act_one_at_a_time():
    model = disturbed(adapted("llama"))
    first = logits(model)
    inject(model, LoRA(rank=2), ["k_proj"], modules_to_save="score", name="other")
    with pytest.raises(InjectionError, match=r"are all at 'score', but adapter 'default' trains the module in full"):
        set_active_adapters(model, ["default", "other"])
    with pytest.raises(MergeError, match=r"are all at 'score', but adapter 'default' trains the module in full"):
        merge_adapters(model, ["default", "other"])
    set_active_adapters(model, "default")
    assert torch.equal(logits(model), first)
    delete_adapter(model, "other")
    delete_adapter(model, "default")
    assert torch.equal(logits(model), logits(classifier("llama")))
    assert not adapter_layers(model)


def test_an_adapter_around_a_copy_is_refused():
    model = adapted("llama")
    inject(model, LoRA(rank=2), ["score"], name="other")
    with pytest.raises(InjectionError, match="trains the module in full"):
        set_active_adapters(model, ["other", "default"])


def test_tied_weights_are_trained_apart_and_not_merged():
    model = tiny_gpt2()
    inject(model, LoRA(rank=1), "query", modules_to_save="lm_head")
    disturbed(model)
    assert torch.equal(model.transformer.wte.weight, tiny_gpt2().transformer.wte.weight)
    with pytest.raises(MergeError, match="is shared by"):
        merge_adapters(model)


def test_qlora_leaves_what_is_trained_in_full_unquantised():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    head = model[2].weight.clone()
    inject(model, QLoRA(rank=2, quantization="int8"), ["0"], modules_to_save="2")
    assert type(model[1]).__name__ == "Linear8bitLt"
    assert type(model[2].base_layer) is nn.Linear
    assert torch.equal(model[2].base_layer.weight, head)
    inject(model, QLoRA(rank=2, quantization="int8"), ["1"], name="other")
    assert type(model[2].base_layer) is nn.Linear


def test_the_summary_counts_them():
    model = adapted("llama")
    assert trainable_summary(model).trainable == 2 * (2 * (32 + 32) * 2) + 3 * 32


def test_a_checkpoint_says_which_modules_were_trained_in_full():
    one, other = adapted("llama"), classifier("llama")
    inject(other, LoRA(rank=2), LORA["llama"])
    state = {key: value for key, value in one.state_dict().items() if "adapters" in key}
    with pytest.raises(
        CheckpointMismatchError, match=r"modules_to_save of the checkpoint and of the module differ: was \['score'\]"
    ):
        check_manifest({"lightning_peft": make_manifest(one, state)}, other, state)


def test_a_module_trains_resumes_and_saves_them(tmp_path, make_trainer):
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(3, 128, (24, 8), generator=generator), torch.randint(0, 3, (24,), generator=generator)
    rows = [
        {"input_ids": a, "attention_mask": torch.ones_like(a), "labels": b} for a, b in zip(ids, labels, strict=True)
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)

    def module():
        return PEFTModule(classifier("llama"), LoRA(rank=2), LORA["llama"], modules_to_save=["score"])

    whole, start, resumed = module(), module(), module()
    torch.manual_seed(0)
    make_trainer(tmp_path, max_epochs=2).fit(whole, loader)
    first = make_trainer(tmp_path, max_epochs=1)
    torch.manual_seed(0)
    first.fit(start, loader)
    first.save_checkpoint(tmp_path / "one.ckpt")
    make_trainer(tmp_path, max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "one.ckpt")
    states = adapter_state_dict(whole.model), adapter_state_dict(resumed.model)
    assert "score.weight" in states[0]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["score.weight"], classifier("llama").score.weight)
    assert whole.hparams["peft"]["modules_to_save"] == "['score']"


def test_an_adapter_folder_brings_its_own_saved_modules():
    with pytest.raises(ConfigError, match=r"leave out targets=None and modules_to_save='score'"):
        PEFTModule(nn.Linear(2, 2), adapter="folder", modules_to_save="score")

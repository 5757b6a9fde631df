"""Folders of HF PEFT in the layouts of its versions, and those of transformers, against both themselves."""

import json
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_peft import (
    AdaLoRA,
    DoRA,
    LoftQ,
    LoRA,
    NormTuning,
    VeRA,
    adapter_state_dict,
    get_registry,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.adapter_files import HF_CONFIG, OWN_CONFIG, PICKLED_WEIGHTS, WEIGHTS
from lightning_peft.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError
from lightning_peft.interfaces import HF_PREFIX
from lightning_peft.registry import Registry
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

TARGETS = ["q_proj", "v_proj"]


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def shake(model, part):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that HF PEFT has written, and the logits of its model."""
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    ).eval()
    shake(model, "lora_")
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return folder, logits(model)


# The fields in adapter_config.json by the release that first wrote them, as folders have them that 0.10.0, 0.11.1, 0.12.0, 0.13.2, 0.14.0,
# 0.15.2, 0.16.0, 0.17.1, 0.18.0, 0.19.1, 0.20.0 and 0.21.0 wrote; each has those of the releases before too. Of 0.10 are: the first line.
FIELDS = {
    "0.10": "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layer_replication "
    "layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config megatron_core modules_to_save peft_type r "
    "rank_pattern revision target_modules task_type use_dora use_rslora",
    "0.14": "eva_config exclude_modules lora_bias",
    "0.15": "corda_config trainable_token_indices",
    "0.16": "qalora_group_size use_qalora",
    "0.17": "target_parameters",
    "0.18": "alora_invocation_tokens arrow_config ensure_weight_tying peft_version",
    "0.19": "lora_ga_config use_bdlora",
    "0.20": "monteclora_config velora_config",
    "0.21": "*",
}


def as_written_by(release, theirs, folder):
    """Rewrite a folder of today's HF PEFT to the keys of an older release."""
    shutil.copytree(theirs, folder)
    config = json.loads((folder / HF_CONFIG).read_text())
    known = " ".join(names for version, names in FIELDS.items() if float(version[2:]) <= float(release[2:])).split()
    kept = config if "*" in known else {key: value for key, value in config.items() if key in known}
    (folder / HF_CONFIG).write_text(json.dumps(kept))
    return len(kept)


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("release", FIELDS)
def test_a_folder_in_the_layout_of_any_release_is_read_as_hf_peft_reads_it(release, weights, theirs, tmp_path):
    folder, expected = tmp_path / "old", theirs[1]
    number = as_written_by(release, theirs[0], folder)
    assert release == "0.21" or number == sum(
        len(n.split()) for v, n in FIELDS.items() if float(v[2:]) <= float(release[2:])
    )
    if weights == "bin":
        torch.save(load_file(folder / WEIGHTS), folder / PICKLED_WEIGHTS)
        (folder / WEIGHTS).unlink()
    model = tiny_llama()
    load_adapter(model, folder)
    assert relative(logits(model), expected) <= 1e-5
    assert relative(logits(peft.PeftModel.from_pretrained(tiny_llama(), folder)), expected) <= 1e-5


def test_biases_that_older_releases_did_not_save_are_missed_with_what_to_do(tmp_path):
    """Releases before 0.21 wrote bias='lora_only' without a single bias; 0.21 writes them as ``<place>.base_layer.bias``."""
    model = peft.get_peft_model(
        tiny_gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    )
    shake(model, "lora_")
    shake(model, "c_attn.base_layer.bias")
    model.save_pretrained(tmp_path)
    expected = logits(model.eval())
    found = tiny_gpt2()
    load_adapter(found, tmp_path)
    assert relative(logits(found), expected) <= 1e-5
    tensors = load_file(tmp_path / WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("base_layer.bias")}
    assert len(kept) == len(tensors) - 2
    save_file(kept, tmp_path / WEIGHTS)
    with pytest.raises(
        AdapterMismatchError, match="holds no bias, such as that of 'transformer.h.0.attn.c_attn': HF PEFT"
    ):
        load_adapter(tiny_gpt2(), tmp_path)
    config = json.loads((tmp_path / HF_CONFIG).read_text())
    (tmp_path / HF_CONFIG).write_text(json.dumps({**config, "bias": "none"}))
    rest, theirs = tiny_gpt2(), peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    load_adapter(rest, tmp_path)
    assert relative(logits(rest), logits(theirs)) <= 1e-5


def pickled(folder):
    """Turn the weights of a folder into HF PEFT's older file."""
    torch.save(load_file(folder / WEIGHTS), folder / PICKLED_WEIGHTS)
    (folder / WEIGHTS).unlink()


def bare(folder):
    """Turn a folder into the layout of transformers."""
    tensors = load_file(folder / WEIGHTS)
    save_file({key.removeprefix(HF_PREFIX): value for key, value in tensors.items()}, folder / WEIGHTS)


NAME = "base_model.model.model.layers.1.self_attn.q_proj"
DAMAGE = {
    "missing": (lambda t: t.pop(f"{NAME}.lora_B.weight"), AdapterMismatchError, r"Missing: \['model.layers.1.self_attn.q_proj.lora_B.weight'\]"),
    "extra": (lambda t: t.update({f"{NAME}.lora_C.weight": torch.zeros(1)}), AdapterMismatchError, "not expected: .*lora_C"),
    "of the base": (lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(64)}), AdapterMismatchError, "some would overwrite the base.*model.norm.weight"),
    "of an adapted layer": (lambda t: t.update({f"{NAME}.base_layer.weight": torch.zeros(64, 64)}), BaseMismatchError, "would overwrite the base"),
    "misshapen": (lambda t: t.update({f"{NAME}.lora_A.weight": torch.zeros(4, 63)}), AdapterMismatchError, r"shape \(4, 63\), this model needs \(4, 64\)"),
    "not finite": (lambda t: t[f"{NAME}.lora_A.weight"].fill_(float("inf")), AdapterMismatchError, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("layout", [pickled, bare], ids=["adapter_model.bin", "transformers"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_in_every_layout(case, layout, theirs, tmp_path):
    damage, error, message = DAMAGE[case]
    folder = tmp_path / "damaged"
    shutil.copytree(theirs[0], folder)
    tensors = load_file(folder / WEIGHTS)
    damage(tensors)
    save_file(tensors, folder / WEIGHTS)
    layout(folder)
    model = tiny_llama()
    before = logits(model)
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert torch.equal(logits(model), before)


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixed", [True, False], ids=["with HF PEFT's prefix", "its own layout"])
def test_what_transformers_saves_of_a_model_with_an_adapter_is_read(prefixed, tmp_path):
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    shake(model, "lora_")
    model.save_pretrained(tmp_path, save_peft_format=prefixed)
    assert any(key.startswith(HF_PREFIX) for key in load_file(tmp_path / WEIGHTS)) == prefixed
    again = tiny_llama()
    load_adapter(again, tmp_path)
    assert relative(logits(again), logits(model)) <= 1e-5
    other = "peft" if prefixed else "transformers"
    assert [n for n, kind in get_registry().adapter_formats.items() if kind().reads(tmp_path)] == [other]


RULES = {
    "a layer": {"layers_to_transform": [0]},
    "a layer by its number": {"layers_to_transform": 1},
    "no list of layers": {"layers_to_transform": []},
    "a layer of a stack": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "a layer of one of two stacks": {"layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    "excluded by name": {"exclude_modules": ["v_proj"]},
    "excluded by path": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "excluded in a layer": {"exclude_modules": ["v_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("rule", RULES)
def test_the_modules_that_hf_peft_adapts_under_a_rule_are_read_and_no_others(rule, theirs, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", **RULES[rule])
    model = peft.get_peft_model(tiny_llama(), config).eval()
    shake(model, "lora_")
    model.save_pretrained(tmp_path / "theirs")
    ours = tiny_llama()
    injection = load_adapter(ours, tmp_path / "theirs")
    assert injection.paths
    assert relative(logits(ours), logits(model)) <= 1e-5
    whole = shutil.copytree(theirs[0], tmp_path / "whole")  # tensors of all layers, of which HF PEFT takes some
    shutil.copy(tmp_path / "theirs" / HF_CONFIG, whole)
    if len(injection.paths) < 4:
        with pytest.raises(
            AdapterMismatchError, match="do not agree.*Modules without tensors: .. .0.; tensors for other"
        ):
            load_adapter(tiny_llama(), whole)


def test_hf_peft_itself_reads_its_folder_without_the_prefix_as_the_base(theirs, tmp_path):
    """Why the layout of transformers is a format of its own: there the adapter is lost with a warning only."""
    shutil.copytree(theirs[0], tmp_path / "bare")
    bare(tmp_path / "bare")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "bare")
    assert torch.equal(logits(model), logits(tiny_llama()))
    again = tiny_llama()
    load_adapter(again, tmp_path / "bare")
    assert relative(logits(again), theirs[1]) <= 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("method", [LoRA(rank=4, alpha=6), AdaLoRA(), NormTuning()], ids=lambda method: method.name)
def test_transformers_reads_our_folder(method, tmp_path):
    assert method.transformers_loads
    model = tiny_llama()
    inject(model, method, None if method.name == "norm_tuning" else TARGETS)
    shake(model, "adapters.")
    save_adapter(model, tmp_path)
    again = tiny_llama()
    again.load_adapter(str(tmp_path))
    assert relative(logits(again), logits(model)) <= 1e-5
    assert "With transformers:" in (tmp_path / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", [DoRA(rank=4), VeRA(rank=4), LoftQ(rank=4)], ids=lambda method: method.name)
def test_a_page_shows_no_code_that_would_load_something_else(method, tmp_path):
    model = tiny_llama()
    inject(model, method, TARGETS)
    shake(model, "adapters.")
    save_adapter(model, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "With transformers:" not in page
    assert ("With HF PEFT:" in page) == (not method.exact_packed_base)
    again = tiny_llama()
    if method.name == "vera":
        with pytest.raises(ValueError, match="does not support PeftType.VERA"):
            again.load_adapter(str(tmp_path))
    else:
        again.load_adapter(str(tmp_path))
        assert relative(logits(again), logits(model)) > 1e-3


# -- there and back ----------------------------------------------------------------------------------------------------

METHODS = sorted(
    name
    for name, kind in Registry(entry_points=False).methods.items()
    if kind.peft_type and name not in ("qlora", "loftq")
)
"""Every method that HF PEFT knows. QLoRA and LoftQ quantise the base, which takes a GPU library; their files are LoRA's."""
SETTINGS = {"trainable_tokens": {"tokens": [1, 5]}, "adalora": {"total_steps": 100}}


def test_every_method_with_a_peft_type_is_here():
    assert {"lora", "dora", "vera", "adalora", "norm_tuning", "prefix_tuning", "prompt_tuning", "p_tuning"} <= set(
        METHODS
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ours_through_hf_peft_and_back_is_bit_equal(name, tmp_path):
    kind = get_registry().method(name)
    fields = {key: value for key, value in SETTINGS.get(name, {}).items() if key in kind.__dataclass_fields__}
    model = tiny_llama()
    inject(model, kind(**fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ours, theirs = save_adapter(model, tmp_path / "ours"), tmp_path / "theirs"
    peft.PeftModel.from_pretrained(tiny_llama(), ours).save_pretrained(theirs)
    written, back = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    assert set(written) <= set(back)
    assert all(torch.equal(back[key], value) for key, value in written.items())
    again, plain = tiny_llama(), tiny_llama()
    load_adapter(again, theirs)
    (ours / OWN_CONFIG).unlink()
    load_adapter(plain, ours)
    first, second = adapter_state_dict(again), adapter_state_dict(plain)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], value) for key, value in second.items())
    assert torch.equal(logits(again), logits(plain))
    assert relative(logits(again), logits(model)) <= 1e-5


# -- what vLLM asks of a folder ----------------------------------------------------------------------------------------


def test_our_folder_keeps_to_what_vllm_takes(tmp_path):
    """vLLM is not run here. Its reader wants r, lora_alpha and target_modules, no modules_to_save and no DoRA, and splits names in this way."""
    model = tiny_llama()
    inject(model, LoRA(rank=4), "all_linear")
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / HF_CONFIG).read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    modules = {name for name, _ in tiny_llama().named_modules()}
    for key in load_file(tmp_path / WEIGHTS):
        found = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.weight", key)
        assert found, key
        assert found[1] in modules


# -- asking ------------------------------------------------------------------------------------------------------------


def test_our_own_folder_without_hf_pefts_configuration_is_not_hf_pefts(tmp_path):
    model = tiny_llama()
    inject(model, get_registry().method("bitfit")(add_missing=True))
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterFileError, match="has no adapter_config.json, so it is no folder of HF PEFT"):
        load_adapter(tiny_llama(), tmp_path, format="peft")

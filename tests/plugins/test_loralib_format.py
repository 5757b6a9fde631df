"""Files of loralib: the published one of RoBERTa, and small ones written here after loralib's own layers."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_peft import LoralibFile, adapter_state_dict, load_adapter, merge_adapters, save_adapter, unmerge_adapters
from lightning_peft.errors import AdapterConfigError, AdapterFileError, AdapterMismatchError, ConfigError
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

DATA = os.environ.get("LIGHTNING_PEFT_DATA")
QUERY, VALUE = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture
def tensors():
    made = {}
    for layer in (0, 1):
        for number, (name, out) in enumerate(((QUERY, 64), (VALUE, 32))):
            made[f"{name.format(layer)}.lora_A"] = randn(4, 64, seed=layer * 7 + number)
            made[f"{name.format(layer)}.lora_B"] = randn(out, 4, seed=layer * 7 + number + 3)
    return made


def written(tensors, folder, name="lora.bin"):
    torch.save(tensors, folder / name)
    return folder / name


def with_updates(model, tensors, scale):
    """Add scale * B A to the weights: the merge of ``loralib.Linear``."""
    with torch.no_grad():
        for name in tensors:
            if name.endswith("lora_A"):
                model.get_parameter(name.replace("lora_A", "weight")).add_(
                    scale * (tensors[name[:-1] + "B"] @ tensors[name])
                )
    return model


@pytest.mark.parametrize("suffix", ["bin", "pt"])
def test_a_file_computes_what_loralib_merges(suffix, tensors, tmp_path):
    model = tiny_llama()
    injection = load_adapter(model, written(tensors, tmp_path, f"l.{suffix}"), format=LoralibFile(alpha=6))
    assert (injection.method.rank, injection.method.alpha) == (4, 6)
    assert relative(logits(model), logits(with_updates(tiny_llama(), tensors, 6 / 4))) <= 1e-5


def test_it_becomes_a_folder_of_ours(tensors, tmp_path):
    model, again = tiny_llama(), tiny_llama()
    load_adapter(model, written(tensors, tmp_path), format=LoralibFile(alpha=6))
    save_adapter(model, tmp_path / "ours")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


def test_ranks_may_differ_and_each_place_is_scaled_by_its_own(tensors, tmp_path):
    name = QUERY.format(1)
    tensors |= {f"{name}.lora_A": randn(2, 64), f"{name}.lora_B": randn(64, 2, seed=1)}
    model = tiny_llama()
    load_adapter(model, written(tensors, tmp_path), format=LoralibFile(alpha=6))
    expected = with_updates(tiny_llama(), {k: v for k, v in tensors.items() if name not in k}, 6 / 4)
    expected = with_updates(expected, {k: v for k, v in tensors.items() if name in k}, 6 / 2)
    assert relative(logits(model), logits(expected)) <= 1e-5


@pytest.mark.parametrize("kept", ["lora_only", "all"])
def test_trained_biases_come_along(kept, tmp_path):
    biased = {"attention_bias": True}
    base = tiny_llama(**biased)
    tensors = {
        f"{QUERY.format(i)}.lora_{p}": randn(*s, seed=i) for i in (0, 1) for p, s in (("A", (4, 64)), ("B", (64, 4)))
    }
    names = [n for n, _ in base.named_parameters() if n.endswith("bias") and (kept == "all" or "q_proj" in n)]
    tensors |= {name: randn(*base.get_parameter(name).shape, seed=9) for name in names}
    model, expected = tiny_llama(**biased), with_updates(tiny_llama(**biased), tensors, 1.5)
    injection = load_adapter(model, written(tensors, tmp_path), format=LoralibFile(alpha=6))
    assert injection.method.bias == kept
    with torch.no_grad():
        for name in names:
            expected.get_parameter(name).copy_(tensors[name])
    assert relative(logits(model), logits(expected)) <= 1e-5


def test_embeddings_are_read(tmp_path):
    tensors = {"model.embed_tokens.lora_A": randn(3, 128), "model.embed_tokens.lora_B": randn(64, 3, seed=1)}
    model, expected = tiny_llama(), tiny_llama()
    load_adapter(model, written(tensors, tmp_path), format=LoralibFile(alpha=6))
    with torch.no_grad():
        expected.model.embed_tokens.weight.add_(
            2 * (tensors["model.embed_tokens.lora_B"] @ tensors["model.embed_tokens.lora_A"]).T
        )
    assert relative(logits(model), logits(expected)) <= 1e-5


# -- fused projections -------------------------------------------------------------------------------------------------


def merged_linear(down, up, enabled, out, scale):
    """Return the update (out, in) of ``loralib.MergedLinear``: a grouped convolution of the factors, put where it is enabled."""
    groups = sum(enabled)
    delta = F.conv1d(down.unsqueeze(0), up.unsqueeze(-1), groups=groups).squeeze(0)
    padded = torch.zeros(out, down.shape[1])
    padded[torch.tensor(enabled).repeat_interleave(out // len(enabled))] = delta
    return scale * padded


@pytest.mark.parametrize(
    ("enabled", "given"),
    [([True, False, True], [True, False, True]), ([False, False, True], [False, False, True]), ([True] * 3, None)],
)
def test_a_fused_projection_gets_its_parts(enabled, given, tmp_path):
    groups, model, expected = sum(enabled), tiny_gpt2(), tiny_gpt2()
    tensors = {}
    for layer in (0, 1):
        name = f"transformer.h.{layer}.attn.c_attn"
        tensors[f"{name}.lora_A"] = randn(4 * groups, 64, seed=layer)
        tensors[f"{name}.lora_B"] = randn(64 * groups, 4, seed=layer + 5)
        delta = merged_linear(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], enabled, 192, 32 / 4)
        with torch.no_grad():
            expected.get_parameter(f"{name}.weight").add_(delta.T)
    path = written({"model_state_dict": tensors}, tmp_path, "gpt2.pt")  # as the scripts of the paper write it
    if groups == 1:  # nothing in the file says that it is fused: its rows do
        with pytest.raises(AdapterMismatchError, match="enable_lora=None does not say which parts these are"):
            load_adapter(tiny_gpt2(), path, format=LoralibFile(alpha=32))
    injection = load_adapter(model, path, format=LoralibFile(alpha=32, enable_lora=given))
    assert all(len(target.slices) == groups for target in injection.targets)
    assert relative(logits(model), logits(expected)) <= 1e-5


@pytest.mark.parametrize("given", [None, [True, True, True], [True, False], [True, False, False]])
def test_parts_that_nobody_names_are_refused(given, tmp_path):
    tensors = {"transformer.h.0.attn.c_attn.lora_A": randn(8, 64), "transformer.h.0.attn.c_attn.lora_B": randn(128, 4)}
    with pytest.raises(
        AdapterMismatchError,
        match="holds 2 updates of rank 4 for 128 of 192 output features, so it is a MergedLinear, or of another base",
    ):
        load_adapter(tiny_gpt2(), written(tensors, tmp_path), format=LoralibFile(alpha=8, enable_lora=given))


# -- refusals ----------------------------------------------------------------------------------------------------------


FIRST = f"{QUERY.format(0)}.lora_A"
REFUSED = {
    "missing": (lambda t: t.pop(FIRST), "needs lora_A and lora_B, both matrices, found"),
    "a place that is not there": (lambda t: t.update({"model.layers.9.lora_A": randn(4, 64), "model.layers.9.lora_B": randn(64, 4)}), "the adapter has a place 'model.layers', a ModuleList in this model, which 'lora' cannot adapt"),
    "of the base": (lambda t: t.update({"model.norm.weight": torch.zeros(64)}), r"also holds whole weights of the base, such as \['model.norm.weight'\] \(1\).*modules_to_save="),
    "misshapen": (lambda t: t.update({FIRST: randn(4, 63)}), r"has shape \(4, 63\), this model needs \(4, 64\)"),
    "not finite": (lambda t: t[FIRST].fill_(float("nan")), "not finite"),
    "not matrices": (lambda t: t.update({FIRST: randn(4)}), "both matrices"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_file_is_refused_and_the_model_is_what_it_was(case, tensors, tmp_path):
    damage, message = REFUSED[case]
    damage(tensors)
    model = tiny_llama()
    before = logits(model)
    with pytest.raises(AdapterMismatchError, match=message):
        load_adapter(model, written(tensors, tmp_path), format=LoralibFile(alpha=6))
    assert torch.equal(logits(model), before)
    assert not [m for m in model.modules() if type(m).__name__ == "AdapterLayer"]


def test_without_alpha_it_is_refused_by_that_name(tensors, tmp_path):
    with pytest.raises(AdapterConfigError, match=r"does not hold alpha.*format=LoralibFile\(alpha=\.\.\.\)"):
        load_adapter(tiny_llama(), written(tensors, tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": float("inf")}, "alpha must be a finite number, got inf"),
        ({"alpha": "8"}, "alpha must be a finite number, got '8'"),
        (
            {"alpha": 1, "enable_lora": [False]},
            r"enable_lora must be a list of booleans, one of them true, got \[False\]",
        ),
        ({"alpha": 1, "modules_to_save": "classifier"}, "modules_to_save must be a list of names, got 'classifier'"),
    ],
)
def test_a_wrong_field_is_refused_at_once(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoralibFile(**fields)


def test_a_file_of_something_else_is_nobodys(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.bin")
    with pytest.raises(
        AdapterFileError,
        match=r"is a file that no registered format reads; the formats are \['gguf', 'litgpt', 'loralib', ",
    ):
        load_adapter(tiny_llama(), tmp_path / "x.bin")
    with pytest.raises(AdapterFileError, match="must hold tensors by name, found 'epoch': int"):
        load_adapter(tiny_llama(), tmp_path / "x.bin", format=LoralibFile(alpha=1))


# -- the published file ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    path = Path(DATA or "") / "adapters" / "roberta_base_lora_mnli.bin"
    if not DATA or not path.is_file():
        pytest.skip("set LIGHTNING_PEFT_DATA to a folder with adapters/roberta_base_lora_mnli.bin of microsoft/LoRA")
    return path


def roberta():
    """A model of RoBERTa-base's shape with the three classes of MNLI, random weights and a short vocabulary, which the file does not touch."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(vocab_size=64, max_position_embeddings=34, type_vocab_size=1, num_labels=3)
    torch.manual_seed(0)
    return RobertaForSequenceClassification(config).eval()


def test_the_published_file_lands_where_its_names_say_merges_and_unmerges(published):
    model, ids = roberta(), torch.arange(5, 21).view(2, 8)
    expected = copy.deepcopy(model)
    stored = torch.load(published, map_location="cpu", weights_only=True)
    assert sum("lora_" in name for name in stored) == 48
    load_adapter(model, published, format=LoralibFile(alpha=16, modules_to_save=["classifier"]))
    found = adapter_state_dict(model)
    assert found.keys() == {f"{name}.weight" if "lora_" in name else name for name in stored}
    assert all(
        torch.equal(found[f"{name}.weight" if "lora_" in name else name], value) for name, value in stored.items()
    )
    with torch.no_grad():
        active = model(ids).logits
        for name, value in stored.items():
            if name.endswith("lora_A"):
                expected.get_parameter(name.replace("lora_A", "weight")).add_(2.0 * (stored[name[:-1] + "B"] @ value))
            elif name.startswith("classifier"):
                expected.get_parameter(name).copy_(value)
        assert relative(active, expected(ids).logits) <= 1e-5
        before = {name: p.clone() for name, p in model.named_parameters() if "query.base_layer" in name}
        merge_adapters(model)
        assert relative(model(ids).logits, active) <= 1e-5
        unmerge_adapters(model)
        assert before
        assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
        assert torch.equal(model(ids).logits, active)


def test_the_classifier_of_the_published_file_is_loaded_only_if_asked_for(published):
    with pytest.raises(AdapterMismatchError, match=r"classifier.dense.weight.*modules_to_save=\['classifier'\]"):
        load_adapter(nn.Sequential(), published, format=LoralibFile(alpha=16))

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import (
    FullFineTuning,
    LoRA,
    active_adapters,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.adapter_files import HF_CONFIG, OWN_CONFIG, WEIGHTS, read_adapter
from lightning_peft.errors import (
    AdapterConfigError,
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    InjectionError,
    PluginLoadError,
)
from lightning_peft.interfaces import HF_PREFIX

METHOD = LoRA(rank=2, alpha=3, rank_pattern={"2": 3})
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def net(seed=0, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, 8)).eval()


def shake(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture
def saved(tmp_path):
    model = net()
    inject(model, METHOD, ["0", "2"])
    shake(model)
    return model, save_adapter(model, tmp_path / "adapter")


def rewrite(path, change):
    """Change the JSON object in ``path``."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def unvouched(folder):
    """Leave the two files of HF PEFT only."""
    (folder / OWN_CONFIG).unlink()
    return folder


def retensor(folder, change):
    """Change the tensors of a folder and make it plain HF PEFT."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return unvouched(folder)


@pytest.mark.parametrize("plain", [False, True], ids=["our folder", "HF PEFT's two files"])
def test_what_is_saved_comes_back_bit_equal(saved, plain):
    model, folder = saved
    if plain:
        unvouched(folder)
    again = net()
    injection = load_adapter(again, folder)
    assert torch.equal(again(X), model(X))
    before, after = adapter_state_dict(model), adapter_state_dict(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert injection.paths == ["0", "2"]
    assert plain or injection.method == METHOD
    assert not any(p.requires_grad for p in again.parameters())


def test_a_loaded_adapter_is_trained_further_if_asked(saved):
    _, folder = saved
    model = net()
    load_adapter(model, folder, name="again", trainable=True)
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"again"}


def test_the_files_are_those_of_hf_peft_and_one_of_ours(saved):
    _, folder = saved
    assert sorted(os.listdir(folder)) == sorted([WEIGHTS, HF_CONFIG, OWN_CONFIG, "README.md"])
    tensors = load_file(folder / WEIGHTS)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "base_model.model.0.lora_A.weight": (2, 16),
        "base_model.model.0.lora_B.weight": (32, 2),
        "base_model.model.2.lora_A.weight": (3, 32),
        "base_model.model.2.lora_B.weight": (8, 3),
    }
    config = json.loads((folder / HF_CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3)
    assert config["rank_pattern"] == {"2": 3}
    assert config["target_modules"] == ["0", "2"]
    own = json.loads((folder / OWN_CONFIG).read_text())
    assert own["method"] == {"name": "lora", "fields": METHOD.to_config()}
    assert own["base"]["class"] == "Sequential"


def test_saving_again_replaces_the_files_and_leaves_others_alone(saved):
    model, folder = saved
    (folder / "notes.txt").write_text("mine")
    shake(model)
    save_adapter(model, folder)
    assert sorted(os.listdir(folder)) == sorted([WEIGHTS, HF_CONFIG, OWN_CONFIG, "README.md", "notes.txt"])
    again = net()
    load_adapter(again, folder)
    assert torch.equal(again(X), model(X))


def test_loading_draws_no_random_number(saved):
    _, folder = saved
    model = net()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_adapter(model, folder)
    assert torch.equal(torch.rand(3), expected)


def test_an_adapter_trained_in_float32_loads_over_a_bfloat16_base_of_the_same_checkpoint(saved):
    model, folder = saved
    again = net().to(torch.bfloat16)
    load_adapter(again, folder)
    assert torch.allclose(again(X.bfloat16()).float(), model(X), atol=0.1)
    assert again[0].adapters["default"].lora_A.dtype == torch.float32


# -- refusals ----------------------------------------------------------------------------------------------------------


def other_base(folder):
    return net(seed=1), folder


def one_weight_changed(folder):
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    return model, folder


def narrower(folder):
    return net(width=8), unvouched(folder)


def fewer_layers(folder):
    return nn.Sequential(*list(net())[:2]), unvouched(folder)


REFUSED = {
    "another base": (other_base, BaseMismatchError, r"was trained on the base 'Sequential' with fingerprint \w{16}, but this Sequential has fingerprint \w{16}: 4 of 4 parameters differ, first '0.bias'.*check_base=False"),
    "a base that differs in one weight": (one_weight_changed, BaseMismatchError, "1 of 4 parameters differ, first '0.weight'"),
    "a narrower base": (narrower, AdapterMismatchError, r"'0.lora_A.weight' has shape \(2, 16\), this model needs \(2, 8\): another base, or another rank"),
    "a base with fewer layers": (fewer_layers, AdapterMismatchError, "has '2.lora_[AB].weight', but Sequential has no module for it: wrong base"),
    "a missing tensor": (lambda f: (net(), retensor(f, lambda t: t.pop("base_model.model.0.lora_B.weight"))), AdapterMismatchError, r"Missing: \['0.lora_B.weight'\] \(1\); not expected: \[\] \(0\)"),
    "a missing place": (lambda f: (net(), retensor(f, lambda t: [t.pop(k) for k in list(t) if ".0." in k])), AdapterMismatchError, r"Modules without tensors: \['0'\] \(1\); tensors for other modules: \[\] \(0\)"),
    "an extra tensor": (lambda f: (net(), retensor(f, lambda t: t.update({"base_model.model.0.lora_C.weight": torch.zeros(1)}))), AdapterMismatchError, r"not expected: \['0.lora_C.weight'\] \(1\)"),
    "a weight of the base": (lambda f: (net(), retensor(f, lambda t: t.update({"base_model.model.2.weight": torch.zeros(8, 32)}))), AdapterMismatchError, r"not expected \(some would overwrite the base\): \['2.weight'\]"),
    "a weight of a place that is not adapted": (lambda f: (nn.Sequential(*net(), nn.Linear(8, 8)), retensor(f, lambda t: t.update({"base_model.model.3.weight": torch.zeros(8, 8)}))), AdapterMismatchError, r"not expected \(some would overwrite the base\): \['3.weight'\]"),
    "a weight of an adapted layer": (lambda f: (net(), retensor(f, lambda t: t.update({"base_model.model.0.base_layer.weight": torch.zeros(32, 16)}))), BaseMismatchError, "'0.base_layer.weight', which would overwrite the base: it differs"),
    "keys without the prefix": (lambda f: (net(), retensor(f, lambda t: [t.update({k.removeprefix("base_model.model."): t.pop(k)}) for k in list(t) if ".0." in k])), AdapterMismatchError, "the file has the key '0.lora_[AB].weight', which does not start with 'base_model.model.'"),
    "another rank in the configuration": (lambda f: (net(), unvouched(f) if not rewrite(f / HF_CONFIG, lambda c: c.update(r=4)) else None), AdapterMismatchError, r"'0.lora_A.weight' has shape \(2, 16\), this model needs \(4, 16\)"),
    "a value that is not a number": (lambda f: (net(), retensor(f, lambda t: t["base_model.model.0.lora_A.weight"].fill_(float("nan")))), AdapterMismatchError, r"'0.lora_A.weight' \(torch.float32\) has values that are not finite"),
    "a value that is too large here": (lambda f: (net(), retensor(f, lambda t: t.update({"base_model.model.0.lora_A.weight": torch.full((2, 16), 1e300, dtype=torch.float64)}))), AdapterMismatchError, r"'0.lora_A.weight' \(torch.float64\) has values that are not finite floating-point numbers in torch.float32"),
    "not a number in eight bits": (lambda f: (net(), retensor(f, lambda t: t.update({"base_model.model.0.lora_A.weight": torch.full((2, 16), float("nan")).to(torch.float8_e4m3fn)}))), AdapterMismatchError, r"'0.lora_A.weight' \(torch.float8_e4m3fn\) has values that are not finite"),
    "targets that are excluded": (lambda f: (net(), unvouched(f) if not rewrite(f / HF_CONFIG, lambda c: c.update(exclude_modules=["2"], rank_pattern={})) else None), AdapterMismatchError, r"exclude_modules \['2'\] of adapter_config.json .* tensors for other modules: \['2'\] \(1\)"),
    "integers": (lambda f: (net(), retensor(f, lambda t: t.update({"base_model.model.0.lora_A.weight": torch.ones(2, 16, dtype=torch.int8)}))), AdapterMismatchError, r"'0.lora_A.weight' \(torch.int8\)"),
    "targets that are not those of the tensors": (lambda f: (net(), unvouched(f) if not rewrite(f / HF_CONFIG, lambda c: c.update(target_modules=["0"], rank_pattern={})) else None), AdapterMismatchError, r"tensors for other modules: \['2'\] \(1\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_adapter_is_refused_and_the_model_is_what_it_was(case, saved):
    make, error, message = REFUSED[case]
    model, folder = make(saved[1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert torch.equal(torch.rand(2), expected)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_refused_adapter_leaves_the_adapters_that_are_there_alone(saved):
    _, folder = saved
    model = net()
    inject(model, LoRA(rank=1), "0", name="mine")
    retensor(folder, lambda t: t.pop("base_model.model.0.lora_B.weight"))
    with pytest.raises(AdapterMismatchError, match="Missing"):
        load_adapter(model, folder, name="other")
    assert active_adapters(model) == ["mine"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "0.adapters.mine.lora_A",
        "0.adapters.mine.lora_B",
    ]


def test_another_base_is_accepted_when_told_so(saved):
    load_adapter(net(seed=1), saved[1], check_base=False)


def test_a_name_that_is_taken_is_refused(saved):
    model, folder = saved
    with pytest.raises(
        InjectionError, match="Sequential already has an adapter 'default'; load .* under another name="
    ):
        load_adapter(model, folder)
    load_adapter(model, folder, name="twin")
    assert active_adapters(model) == ["twin"]


def append(path, content):
    with open(path, "ab") as file:
        file.write(content)


UNREADABLE = {
    "no folder": (lambda f: f / "nowhere", AdapterFileError, "is not a folder; an adapter folder holds adapter_config.json or lightning_peft.json"),
    "an empty folder": (lambda f: [p.unlink() for p in list(f.iterdir())], AdapterFileError, "has neither lightning_peft.json nor adapter_config.json: it holds"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), AdapterFileError, "has no adapter_model.safetensors"),
    "other weights beside our file": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), AdapterFileError, "has no adapter_model.safetensors"),
    "a pickle that runs code": (lambda f: (unvouched(f), (f / WEIGHTS).unlink(), (f / "adapter_model.bin").write_bytes(pickle.dumps(os.getcwd))), AdapterFileError, "adapter_model.bin' cannot be read as a file of tensors .weights_only=True, so no code in it is run."),
    "weights changed behind our back": (lambda f: append(f / WEIGHTS, b"x"), AdapterFileError, "is not the file that lightning_peft.json was written for"),
    "one bit flipped": (lambda f: (f / WEIGHTS).write_bytes((b := (f / WEIGHTS).read_bytes())[:-1] + bytes([b[-1] ^ 1])), AdapterFileError, "is not the file that lightning_peft.json was written for"),
    "configuration changed behind our back": (lambda f: rewrite(f / HF_CONFIG, lambda c: c.update(lora_alpha=99)), AdapterFileError, "adapter_config.json' is not the file"),
    "configuration gone": (lambda f: (f / HF_CONFIG).unlink(), AdapterFileError, "adapter_config.json' is not the file"),
    "cut weights": (lambda f: (unvouched(f), (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:50])), AdapterFileError, "is not a readable safetensors file"),
    "empty weights": (lambda f: (unvouched(f), (f / WEIGHTS).write_bytes(b"")), AdapterFileError, "is not a readable safetensors file"),
    "no JSON": (lambda f: (f / OWN_CONFIG).write_text("{"), AdapterFileError, "lightning_peft.json' cannot be read as JSON"),
    "a list": (lambda f: (f / OWN_CONFIG).write_text("[]"), AdapterFileError, "must hold a JSON object, found list"),
    "a key twice": (lambda f: (unvouched(f), (f / HF_CONFIG).write_text('{"r": 1, "r": 2}')), AdapterFileError, "the key 'r' stands twice"),
    "NaN": (lambda f: (unvouched(f), (f / HF_CONFIG).write_text('{"r": NaN}')), AdapterFileError, "NaN is not a number"),
    "not UTF-8": (lambda f: (unvouched(f), (f / HF_CONFIG).write_bytes(b"\xff\xfe{")), AdapterFileError, "cannot be read as JSON"),
    "deep nesting": (lambda f: (unvouched(f), (f / HF_CONFIG).write_text("[" * 100_000)), AdapterFileError, "cannot be read as JSON"),
    "a newer format": (lambda f: rewrite(f / OWN_CONFIG, lambda c: c.update(format_version=99)), AdapterConfigError, "has format_version 99; this version reads 1"),
    "an unknown method": (lambda f: rewrite(f / OWN_CONFIG, lambda c: c["method"].update(name="lorra")), AdapterConfigError, "unknown method 'lorra'; did you mean 'lora'"),
    "an unknown field": (lambda f: rewrite(f / OWN_CONFIG, lambda c: c["method"]["fields"].update(rnak=3)), AdapterConfigError, "'lora' has no field 'rnak'; did you mean 'rank'"),
    "a field out of range": (lambda f: rewrite(f / OWN_CONFIG, lambda c: c["method"]["fields"].update(rank=0)), AdapterConfigError, "LoRA rank must be a positive integer, got 0"),
    "no method": (lambda f: rewrite(f / OWN_CONFIG, lambda c: c.pop("method")), AdapterConfigError, "needs 'method' with 'name' and 'fields', found None"),
    "no peft_type": (lambda f: (unvouched(f), rewrite(f / HF_CONFIG, lambda c: c.pop("peft_type"))), AdapterConfigError, "'peft_type' must be a string such as 'LORA', found None"),
    "an unknown peft_type": (lambda f: (unvouched(f), rewrite(f / HF_CONFIG, lambda c: c.update(peft_type="LORRA"))), AdapterConfigError, "no registered method reads HF PEFT's type 'LORRA'; did you mean 'LORA'"),
    "a peft_type that is a path": (lambda f: (unvouched(f), rewrite(f / HF_CONFIG, lambda c: c.update(peft_type="os.system"))), AdapterConfigError, "no registered method reads HF PEFT's type 'os.system'"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_folder_that_cannot_be_read_is_refused_with_the_file_and_the_reason(case, saved):
    damage, error, message = UNREADABLE[case]
    other = damage(saved[1])
    folder = other if case == "no folder" else saved[1]
    with pytest.raises(error, match=message) as caught:
        load_adapter(net(), folder)
    assert str(saved[1]) in str(caught.value)


def test_an_adapter_of_a_broken_plugin_raises_the_cause_of_its_failure(saved, monkeypatch):
    from lightning_peft import registry

    own = registry.Registry(entry_points=False)
    with pytest.warns(UserWarning, match="was left out"):
        own._break(
            registry.PluginInfo(source="fancy 1.0 (fancy = fancy)", hints=("fancy",)),
            ImportError("no module named fancy_dep"),
        )
    monkeypatch.setattr("lightning_peft.adapter_files.get_registry", lambda: own)
    rewrite(saved[1] / OWN_CONFIG, lambda c: c["method"].update(name="fancy"))
    with pytest.raises(
        PluginLoadError,
        match=r"'fancy' is not registered, .*fancy 1.0 \(fancy = fancy\): ImportError: no module named fancy_dep",
    ):
        load_adapter(net(), saved[1])


def test_a_non_finite_or_unmaterialised_adapter_is_not_saved_over_a_good_one(saved):
    model, folder = saved
    before = (folder / WEIGHTS).read_bytes()
    with torch.no_grad():
        model[0].adapters["default"].lora_A[0, 0] = float("inf")
    with pytest.raises(
        AdapterFileError, match="'0.lora_A.weight' of adapter 'default' has non-finite values; it is not saved"
    ):
        save_adapter(model, folder)
    assert (folder / WEIGHTS).read_bytes() == before
    with torch.device("meta"):
        hollow = nn.Sequential(nn.Linear(2, 2))
    inject(hollow, LoRA(rank=1), "0")
    with pytest.raises(AdapterFileError, match="is on the meta device and has no values to save"):
        save_adapter(hollow, folder)


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(saved, monkeypatch):
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    shake(model)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_a_folder_is_read_without_a_model(saved):
    folder = read_adapter(saved[1])
    assert folder.method == METHOD
    assert folder.base_name_or_path is None
    keys = ["0.lora_A.weight", "0.lora_B.weight", "2.lora_A.weight", "2.lora_B.weight"]
    assert sorted(folder.tensors) == [HF_PREFIX + key for key in keys]


def test_an_adapter_saved_from_a_merged_model_still_fits_its_base(saved, tmp_path):
    from lightning_peft import merge_adapters

    model, _ = saved
    out = model(X)
    merge_adapters(model)
    save_adapter(model, tmp_path / "merged")
    again = net()
    load_adapter(again, tmp_path / "merged")
    assert torch.allclose(again(X), out, atol=1e-6)


def test_an_adapter_that_hf_peft_does_not_know_leaves_none_of_its_configuration(saved):
    _, folder = saved
    model = net()
    inject(model, FullFineTuning(), ["0"])
    save_adapter(model, folder)
    assert HF_CONFIG not in os.listdir(folder)
    load_adapter(net(), folder)

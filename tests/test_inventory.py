import copy
import sys

import pytest
import torch
from torch import nn

from lightning_peft import (
    LoRA,
    NormTuning,
    active_adapters,
    adapter_layers,
    adapter_names,
    adapter_scale,
    delete_adapter,
    inject,
    inject_all,
    list_adapters,
    load_adapter,
    merge_adapters,
    rename_adapter,
    save_adapter,
    save_adapters,
    scale_adapters,
    set_active_adapters,
    swap_adapter,
    unmerge_adapters,
)
from lightning_peft.errors import AdapterNotFoundError, ConfigError, InjectionError
from lightning_peft.testing.toys import tiny_llama

from .test_scaling import logits, shake


def two():
    model = tiny_llama()
    inject(model, LoRA(rank=2), ["query"], name="a")
    shake(model, "a")
    inject(model, NormTuning(), name="b", trainable=False)
    return model


def test_the_list_says_what_there_is_to_know():
    model = two()
    scale_adapters(model, {"a": 0.5})
    first, second = list_adapters(model)
    assert (first.name, first.method, first.active, first.trainable, first.scale) == ("a", "lora", False, True, 0.5)
    assert first.places == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    assert (first.parameters, first.bytes, first.device) == (2 * 2 * (64 + 64), 4 * 2 * 2 * (64 + 64), "cpu")
    assert (second.name, second.method, second.active, second.trainable) == ("b", "norm_tuning", True, False)
    assert str(first) == "a: lora, trainable, scale 0.5, 512 parameters (2,048 bytes) at 2 places, on cpu"
    assert not any(info.merged for info in (first, second))
    merge_adapters(model, "b")
    assert [info.merged for info in list_adapters(model)] == [False, True]
    assert list_adapters(tiny_llama()) == []


def test_shared_tensors_count_once():
    model = tiny_llama(tie_word_embeddings=True)
    inject(model, LoRA(rank=2, tied="both"), ["embed_tokens"])
    (info,) = list_adapters(model)
    assert len(info.places) == 2
    assert info.parameters == 2 * (128 + 64)


def test_renaming_keeps_order_state_and_values(tmp_path):
    model = tiny_llama()
    inject_all(model, [LoRA(rank=2), LoRA(rank=2), LoRA(rank=2)])
    for seed, name in enumerate(adapter_names(model)):
        shake(model, name, seed)
    scale_adapters(model, {"lora_2": 0.5})
    output, flags = logits(model), [p.requires_grad for p in model.parameters()]
    rename_adapter(model, "lora_2", "middle")
    assert adapter_names(model) == active_adapters(model) == ["lora", "middle", "lora_3"]
    assert [info.name for info in list_adapters(model)] == ["lora", "middle", "lora_3"]
    assert adapter_scale(model, "middle") == 0.5
    assert torch.equal(logits(model), output)
    assert [p.requires_grad for p in model.parameters()] == flags
    set_active_adapters(model, "lora")
    set_active_adapters(model, ["lora", "middle", "lora_3"])
    assert [p.requires_grad for p in model.parameters()] == flags
    save_adapters(model, tmp_path)
    assert (tmp_path / "middle" / "adapter_model.safetensors").exists()
    delete_adapter(model, "middle")
    assert adapter_names(model) == ["lora", "lora_3"]


def test_a_merged_adapter_can_be_renamed():
    model = two()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    set_active_adapters(model, "a")
    merge_adapters(model)
    rename_adapter(model, "a", "c")
    assert [info.merged for info in list_adapters(model)] == [True, False]
    unmerge_adapters(model)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in base.items())
    assert active_adapters(model) == ["c"]


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("a", "b", InjectionError, "already has an adapter 'b'"),
        ("a", "../x", ConfigError, "an adapter name is .* got '../x'"),
        ("a", "keys", ConfigError, "an adapter name is .* got 'keys'"),
        ("c", "d", AdapterNotFoundError, "'c' was asked for"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_changes(old, new, error, message):
    model = two()
    before = (adapter_names(model), active_adapters(model), list_adapters(model))
    with pytest.raises(error, match=message):
        rename_adapter(model, old, new)
    assert (adapter_names(model), active_adapters(model), list_adapters(model)) == before
    rename_adapter(model, "a", "a")
    assert list_adapters(model) == before[2]


def test_an_adapter_of_a_part_is_renamed_from_outside_but_not_from_inside():
    whole = nn.ModuleDict({"part": nn.Sequential(nn.Linear(4, 4))})
    inject(whole["part"], LoRA(rank=1), "0", name="inner")
    rename_adapter(whole, "inner", "outer")
    assert [info.method for info in list_adapters(whole["part"])] == ["lora"]
    assert adapter_names(whole) == ["outer"]
    other = nn.ModuleDict({"part": nn.Sequential(nn.Linear(4, 4))})
    inject(other, LoRA(rank=1), "part.0", name="x")
    with pytest.raises(AdapterNotFoundError, match="hand over that model"):
        rename_adapter(other["part"], "x", "y")
    assert adapter_names(other) == ["x"]


# -- hundreds ----------------------------------------------------------------------------------------------------------


def calls(work):
    """Count the functions, Python's and C's, that ``work`` calls: what it costs, whatever else the machine does."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def test_each_of_two_hundred_costs_what_the_first_did(tmp_path):
    model = tiny_llama()
    inject(model, LoRA(rank=2), ["query", "value"])
    save_adapter(model, tmp_path)
    model = tiny_llama()

    def load(name):
        return calls(lambda: load_adapter(model, tmp_path, name=name))

    def verbs():
        return [
            calls(lambda: set_active_adapters(model, "a2")),
            calls(lambda: set_active_adapters(model, ["a1", "a3"])),
            calls(lambda: scale_adapters(model, {"a1": 0.5})),
            calls(lambda: swap_adapter(model, tmp_path, name="a1")),
            calls(lambda: delete_adapter(model, "a3")),
            load("a3"),
        ]

    loads = [load(f"a{i}") for i in range(4)]
    few = verbs()
    for i in range(4, 199):
        load_adapter(model, tmp_path, name=f"a{i}", check_base=False)
    loads.append(load("a199"))
    assert len(adapter_names(model)) == 200
    assert loads[-1] <= 1.5 * loads[0], (loads[0], loads[-1])
    assert loads[-1] <= 1.05 * loads[3], (loads[3], loads[-1])
    for before, after in zip(few, verbs(), strict=True):
        assert after <= 1.05 * before, (before, after)


def test_only_what_is_switched_is_touched(monkeypatch):
    model = tiny_llama()
    for i in range(20):
        inject(model, LoRA(rank=1), "query", name=f"a{i}")
    names = {id(adapter): name for layer in adapter_layers(model).values() for name, adapter in layer.adapters.items()}
    touched = []
    monkeypatch.setattr(
        "lightning_peft.adapter_layer._require", lambda adapter, trained: touched.append(names[id(adapter)])
    )
    set_active_adapters(model, "a3")
    assert set(touched) == {"a3", "a19"}


def test_gradients_are_asked_of_the_active_alone_through_every_verb():
    model = two()
    inject(model, LoRA(rank=1), "value", name="c")
    for names in (["a"], ["c"], ["a", "c"], [], ["b"], ["c"]):
        set_active_adapters(model, names)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        expected = {f".{name}." for name in names if name != "b"}
        assert {f".{key.split('.adapters.')[1].split('.')[0]}." for key in trained} == expected
    twin = copy.deepcopy(model)
    set_active_adapters(twin, "a")
    assert any(p.requires_grad for n, p in twin.named_parameters() if ".a." in n)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".a." in n)

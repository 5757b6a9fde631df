import os

import pytest
import torch
from torch import nn

from lightning_peft import (
    DoRA,
    LoRA,
    NormTuning,
    adapter_layers,
    adapter_scale,
    adapters_disabled,
    adapters_scaled,
    combine_folders,
    delete_adapter,
    inject,
    load_adapter,
    load_adapters,
    merge_adapters,
    prune_folder,
    rename_adapter,
    save_adapter,
    save_adapters,
    scale_adapters,
    set_active_adapters,
    unmerge_adapters,
)
from lightning_peft.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    ConfigError,
    InjectionError,
    LightningPEFTWarning,
    MergeError,
)
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama, token_batch


def shake(model, name="default", seed=1, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            if name in layer.adapters:
                for parameter in layer.adapters[name].parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def two(model=None, **options):
    model = model or tiny_llama()
    for seed, name in enumerate(("a", "b")):
        inject(model, LoRA(rank=2 + seed, **options), ["query", "value"], name=name)
        shake(model, name, seed)
    return model


@torch.no_grad()
def logits(model):
    return model(**token_batch()).logits


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6), {"bias": "lora_only"}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4)), torch.arange(6), {}),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3)), torch.randn(2, 2, 5, 5), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_effect_is_multiplied_also_when_merged(kind):
    make, x, options = KINDS[kind]
    model = make().double().eval()
    base = model(x.double() if x.is_floating_point() else x).detach()
    inject(model, LoRA(rank=2, **options), "0")
    shake(model)
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        whole = model(x)
        assert distance(whole, base) > 1e-3
        scale_adapters(model, {"default": -0.3})
        torch.testing.assert_close(model(x), base - 0.3 * (whole - base), rtol=0, atol=1e-12)
        merge_adapters(model)
        torch.testing.assert_close(model(x), base - 0.3 * (whole - base), rtol=0, atol=1e-12)
        unmerge_adapters(model)
        scale_adapters(model, {"default": 1.0})
        assert torch.equal(model(x), whole)
        scale_adapters(model, {"default": 0.0})
        torch.testing.assert_close(model(x), base, rtol=0, atol=1e-14)


def test_attention_is_scaled_too():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}).eval()
    inject(model, LoRA(rank=2), "attention")
    shake(model)
    weight = model["attention"].base_layer.in_proj_weight.detach().clone()
    merge_adapters(model)
    whole = model["attention"].base_layer.in_proj_weight.detach() - weight
    unmerge_adapters(model)
    scale_adapters(model, {"default": 0.25})
    x = torch.randn(3, 1, 8)
    scaled = model["attention"](x, x, x)[0]
    merge_adapters(model)
    torch.testing.assert_close(model["attention"].base_layer.in_proj_weight.detach() - weight, 0.25 * whole)
    torch.testing.assert_close(model["attention"](x, x, x)[0], scaled)


def test_a_weighted_sum_is_that_of_hf_peft(tmp_path):
    import peft

    model = two()
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.eval()
    theirs.base_model.set_adapter(["a", "b"])
    set_active_adapters(model, ["a", "b"])
    assert distance(logits(model), logits(theirs)) < 1e-5
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("a", 0.5)
            module.set_scale("b", -2.0)
    unscaled = logits(model)
    scale_adapters(model, {"a": 0.5, "b": -2.0})
    assert distance(logits(model), unscaled) > 1e-3
    assert distance(logits(model), logits(theirs)) < 1e-5


def test_slices_of_a_fused_projection_are_scaled():
    model = tiny_gpt2()
    inject(model, LoRA(rank=2), ["query", "value"])
    shake(model)
    scale_adapters(model, {"default": 0.5})
    output = logits(model)
    merge_adapters(model)
    assert distance(logits(model), output) < 1e-5


def test_the_block_puts_back_what_was_there():
    model = two()
    scale_adapters(model, {"a": 0.5})
    seen = []

    def fail():
        with adapters_scaled(model, {"a": 0.1}, b=2):
            seen.append((adapter_scale(model, "a"), adapter_scale(model, "b")))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [(0.1, 2.0)]
    assert (adapter_scale(model, "a"), adapter_scale(model, "b")) == (0.5, 1.0)


def test_zero_is_the_base_and_switching_keeps_the_factor():
    model = two()
    with adapters_disabled(model):
        base = logits(model)
    scale_adapters(model, {"a": 0.0})
    set_active_adapters(model, "b")
    set_active_adapters(model, "a")
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 10**400, "1", True, None])
def test_what_is_no_finite_number_is_refused_and_nothing_changes(factor):
    model = two()
    with pytest.raises(ConfigError, match="must be a finite number, got"):
        scale_adapters(model, {"a": 0.5, "b": factor})
    assert adapter_scale(model, "a") == 1.0


def test_names_alone_are_no_factors():
    with pytest.raises(ConfigError, match=r"needs a mapping such as \{'a': 0.5\}, got \['a'\]"):
        scale_adapters(two(), ["a"])


@pytest.mark.parametrize("method", [DoRA(rank=2), NormTuning()])
def test_kinds_without_a_factor_are_refused(method):
    model = two()
    inject(model, method, "query" if method.name == "dora" else None, name="other")
    with pytest.raises(InjectionError, match="whose effect has no factor"):
        scale_adapters(model, {"a": 0.5, "other": 0.5})
    assert adapter_scale(model, "a") == 1.0
    with pytest.raises(AdapterNotFoundError, match="'c' was asked for"):
        scale_adapters(model, {"a": 0.5, "c": 0.5})


def test_a_merged_adapter_keeps_its_scale():
    model = two()
    merge_adapters(model, "b")
    with pytest.raises(MergeError, match="its scale cannot change there"):
        scale_adapters(model, {"b": 0.5})
    assert adapter_scale(model, "b") == 1.0


def test_a_folder_holds_the_adapter_unscaled_and_a_folder_of_several_the_factors(tmp_path):
    model = two()
    set_active_adapters(model, ["a", "b"])
    scale_adapters(model, {"a": 0.25})
    with pytest.warns(LightningPEFTWarning, match="has the scale 0.25, which an adapter folder does not hold"):
        save_adapter(model, tmp_path / "one", name="a")
    again = tiny_llama()
    load_adapter(again, tmp_path / "one", name="a")
    scale_adapters(model, {"a": 1.0})
    set_active_adapters(model, "a")
    assert torch.equal(logits(again), logits(model))
    set_active_adapters(model, ["a", "b"])
    scale_adapters(model, {"a": 0.25})
    save_adapters(model, tmp_path / "all")
    again = tiny_llama()
    load_adapters(again, tmp_path / "all")
    assert adapter_scale(again, "a") == 0.25
    assert torch.equal(logits(again), logits(model))


def test_a_single_scaled_adapter_comes_back_scaled(tmp_path):
    model = tiny_llama()
    inject(model, LoRA(rank=2), "query")
    shake(model)
    scale_adapters(model, {"default": 0.5})
    save_adapters(model, tmp_path)
    again = tiny_llama()
    load_adapters(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_folder_that_is_written_again_keeps_no_factor_and_no_adapter_of_before(tmp_path):
    model = two()
    rename_adapter(model, "a", "default")
    scale_adapters(model, {"default": 0.5})
    save_adapters(model, tmp_path)
    with pytest.raises(AdapterFileError, match="was written for several or scaled adapters"):
        save_adapter(model, tmp_path, name="b")
    delete_adapter(model, "b")
    scale_adapters(model, {"default": 1.0})
    save_adapters(model, tmp_path)
    again = tiny_llama()
    assert list(load_adapters(again, tmp_path)) == ["default"]
    assert torch.equal(logits(again), logits(model))
    (tmp_path / "alone").mkdir()
    scale_adapters(model, {"default": 0.5})
    save_adapters(model, tmp_path / "alone")
    scale_adapters(model, {"default": 1.0})
    save_adapters(model, tmp_path / "alone")
    assert "lightning_peft_adapters.json" not in os.listdir(tmp_path / "alone")


def test_tools_take_the_factor_of_a_folder(tmp_path):
    model = tiny_llama()
    inject(model, LoRA(rank=2), "query")
    shake(model)
    scale_adapters(model, {"default": 0.5})
    save_adapters(model, tmp_path / "a")
    prune_folder(tmp_path / "a", tmp_path / "pruned", rank=2)
    combine_folders([tmp_path / "a"], tmp_path / "combined", weights=[1.0], method="cat")
    for folder in ("pruned", "combined"):
        again = tiny_llama()
        load_adapter(again, tmp_path / folder)
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="was written for several or scaled adapters"):
        prune_folder(tmp_path / "pruned", tmp_path / "a", rank=1)


def test_an_index_with_a_factor_that_is_none_is_refused_and_nothing_goes_in(tmp_path):
    model = two()
    scale_adapters(model, {"a": 0.5})
    save_adapters(model, tmp_path)
    index = tmp_path / "lightning_peft_adapters.json"
    index.write_text(index.read_text().replace("0.5", '"much"'))
    again = tiny_llama()
    with pytest.raises((ConfigError, AdapterFileError), match="finite number"):
        load_adapters(again, tmp_path)
    assert not adapter_layers(again)


def test_deleting_one_leaves_the_factor_of_the_other():
    model = two()
    scale_adapters(model, {"a": 0.5, "b": 0.25})
    delete_adapter(model, "a")
    assert adapter_scale(model, "b") == 0.25

"""Several adapters as one, against HF PEFT's ``add_weighted_adapter`` with the same tensors, and against the formulas."""

import math

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import nn

from lightning_peft import (
    BitFit,
    DoRA,
    FullFineTuning,
    LoRA,
    VeRA,
    active_adapters,
    adapter_layers,
    adapter_names,
    combine_adapters,
    combine_folders,
    inject,
    load_adapter,
    save_adapter,
    set_active_adapters,
)
from lightning_peft.adapter_tools.combining import METHODS
from lightning_peft.errors import (
    AdapterNotFoundError,
    BaseMismatchError,
    ConfigError,
    InjectionError,
    MergeError,
)
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft", "ignore::lightning_peft.LightningPEFTWarning"
)
PEFT_METHODS = [method for method in METHODS if method != "task_arithmetic"]
SAME_RANK = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def shake(model, name, scale=0.2):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for layer in adapter_layers(model).values():
        for parameter in layer.adapters[name].parameters() if name in layer.adapters else ():
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def with_adapters(make, **adapters):
    """Return a model with the adapters, ``name=(method, targets)``, and random values in them."""
    model = make()
    for name, (method, targets) in adapters.items():
        inject(model, method, targets, name=name)
        shake(model, name)
    return model


CASES = {
    "llama": (tiny_llama, (LoRA(rank=4), ["query", "value"]), (LoRA(rank=4, alpha=3), ["query", "value"])),
    "llama rslora, other targets": (
        tiny_llama,
        (LoRA(rank=4, alpha=4, rslora=True), ["query", "up"]),
        (LoRA(rank=4, alpha=9), ["query", "down"]),
    ),
    "llama embedding": (tiny_llama, (LoRA(rank=3), ["embedding", "key"]), (LoRA(rank=3), ["embedding"])),
    "gpt2 Conv1D": (tiny_gpt2, (LoRA(rank=4), ["qkv", "down"]), (LoRA(rank=4), ["qkv", "down"])),
    "gpt2 slices": (tiny_gpt2, (LoRA(rank=2), ["query", "value"]), (LoRA(rank=4), ["key"])),
    "convolution": (Convolution, (LoRA(rank=2), ["conv", "head"]), (LoRA(rank=2), ["conv"])),
    "ranks differ": (tiny_llama, (LoRA(rank=3), ["query", "up"]), (LoRA(rank=5), ["query"])),
    "rank pattern": (
        tiny_llama,
        (LoRA(rank=3, rank_pattern={"up": 2}, alpha_pattern={"up": 5}), ["query", "up"]),
        (LoRA(rank=5), ["query"]),
    ),
}


def peft_combined(make, model, folder, weights, method, seed=0, **options):
    """Return HF PEFT's model with the combined adapter active; its random draws start where ours do."""
    for name in weights:
        save_adapter(model, folder / name, name=name)
    first, *others = weights
    theirs = PeftModel.from_pretrained(make(), folder / first, adapter_name=first)
    for name in others:
        theirs.load_adapter(folder / name, adapter_name=name)
    inject_adapter = LoraModel.inject_adapter

    def seeded(self, *args, **kwargs):
        inject_adapter(self, *args, **kwargs)
        torch.manual_seed(seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraModel, "inject_adapter", seeded)
        theirs.add_weighted_adapter(list(weights), list(weights.values()), "merged", combination_type=method, **options)
    theirs.set_adapter("merged")
    return theirs


def their_deltas(theirs, *, whole=True):
    """Return HF PEFT's updates by path; ``whole=False`` leaves out the scale, which with rsLoRA it gives its result a second time."""
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight("merged")
        / (1.0 if whole else module.scaling["merged"])
        for path, module in theirs.named_modules()
        if hasattr(module, "get_delta_weight") and ("merged" in module.lora_A or "merged" in module.lora_embedding_A)
    }


def our_deltas(model, name="merged"):
    found = {}
    for path, layer in adapter_layers(model).items():
        if name in layer.adapters:
            merged = layer.adapters[name].merged_parameters(_zeroed(layer.base_layer))
            if "weight" in merged:  # not where the tensors are those of another place
                found[path] = merged["weight"]
    return found


def _zeroed(module):
    import copy

    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.data.zero_()
    return twin


@pytest.mark.parametrize("method", PEFT_METHODS)
@pytest.mark.parametrize(("case", "weights"), [("llama", (0.7, 0.3)), *((case, (1.5, -0.4)) for case in CASES)])
def test_every_method_is_that_of_hf_peft(case, method, weights, tmp_path):
    make, a, b = CASES[case]
    if method in SAME_RANK and case in ("ranks differ", "rank pattern"):
        pytest.skip("HF PEFT refuses it, and so do we: see below")
    weights = {"a": weights[0], "b": weights[1]}
    model = with_adapters(make, a=a, b=b)
    options = {} if method in ("linear", "cat", "svd") else {"density": 0.4, "majority_sign_method": "frequency"}
    expected = their_deltas(
        peft_combined(make, model, tmp_path, weights, method, seed=5, **options), whole="rslora" not in case
    )
    combine_adapters(model, weights, method=method, density=0.4, majority_sign="frequency", seed=5)
    found = our_deltas(model)
    assert found.keys() == expected.keys()
    for path, delta in found.items():
        assert (delta - expected[path]).abs().max() <= 1e-5 * expected[path].abs().max(), path
        assert expected[path].abs().max() > 0


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_signs_are_elected_as_hf_peft_elects_them_and_logits_agree(sign, tmp_path):
    adapters = {name: (LoRA(rank=4), ["query", "value", "down"]) for name in "abc"}
    model = with_adapters(tiny_llama, **adapters)
    weights = {"a": 0.5, "b": 0.9, "c": -0.3}
    options = {"density": 0.3, "majority_sign_method": sign}
    theirs = peft_combined(tiny_llama, model, tmp_path, weights, "ties", **options)
    combine_adapters(model, weights, method="ties", density=0.3, majority_sign=sign)
    ids = token_batch()
    torch.testing.assert_close(model(**ids).logits, theirs(**ids).logits, rtol=1e-5, atol=1e-5)


def test_a_smaller_rank_of_svd_is_that_of_hf_peft(tmp_path):
    make, a, b = CASES["llama"]
    model = with_adapters(make, a=a, b=b)
    expected = their_deltas(peft_combined(make, model, tmp_path, {"a": 1, "b": 1}, "svd", svd_rank=2))
    report = combine_adapters(model, {"a": 1, "b": 1}, rank=2)
    exact = with_adapters(make, a=a, b=b)
    combine_adapters(exact, {"a": 1, "b": 1}, method="cat")
    whole = our_deltas(exact)
    for path, delta in our_deltas(model).items():
        torch.testing.assert_close(delta, expected[path], rtol=1e-4, atol=1e-5)
        error = torch.linalg.matrix_norm(whole[path] - delta) / torch.linalg.matrix_norm(whole[path])
        assert report.errors[path] == pytest.approx(float(error), rel=1e-4)
    assert set(report.ranks.values()) == {2}


def test_cat_is_the_weighted_sum_and_linear_says_how_far_it_is_from_it():
    make, a, b = CASES["llama"]
    model = with_adapters(make, a=a, b=b)
    parts = [our_deltas(model, name) for name in "ab"]
    exact = {path: 0.7 * parts[0][path] - 0.2 * parts[1][path] for path in parts[0]}
    cat = combine_adapters(model, {"a": 0.7, "b": -0.2}, method="cat", name="cat")
    for path, delta in our_deltas(model, "cat").items():
        torch.testing.assert_close(delta, exact[path], rtol=1e-5, atol=1e-6)
    assert cat.error == 0
    linear = combine_adapters(model, {"a": 0.7, "b": -0.2}, method="linear", name="linear")
    for path, delta in our_deltas(model, "linear").items():
        error = torch.linalg.matrix_norm(delta - exact[path]) / torch.linalg.matrix_norm(exact[path])
        assert linear.errors[path] == pytest.approx(float(error), rel=1e-4)
    assert linear.error > 0.1


def test_a_task_added_and_taken_away_leaves_the_base():
    model = with_adapters(tiny_llama, a=CASES["llama"][1], same=CASES["llama"][1])
    for layer in adapter_layers(model).values():
        layer.adapters["same"].load_state_dict(layer.adapters["a"].state_dict())
    combine_adapters(model, {"a": 1.0, "same": -1.0}, method="svd")
    torch.testing.assert_close(model(**token_batch()).logits, tiny_llama()(**token_batch()).logits, rtol=0, atol=1e-6)


def test_dare_keeps_the_share_and_rescales_it():
    model = nn.Sequential(nn.Linear(400, 300, bias=False))
    inject(model, LoRA(rank=20, alpha=20), "0", name="a")
    for parameter in model[0].adapters["a"].parameters():
        parameter.data.fill_(1.0)
    combine_adapters(model, {"a": 1.0}, method="dare_linear", density=0.3, seed=1)
    for matrix in (model[0].adapters["merged"].lora_A, model[0].adapters["merged"].lora_B):
        kept = matrix != 0
        assert abs(kept.float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / matrix.numel())
        torch.testing.assert_close(matrix[kept], torch.full_like(matrix[kept], 1 / 0.3))


def test_dare_draws_by_its_seed_alone():
    model = with_adapters(tiny_llama, a=CASES["llama"][1], b=CASES["llama"][2])
    drawn = []
    for name, seed in {"one": 1, "again": 1, "other": 2}.items():
        torch.rand(3)
        state = torch.get_rng_state()
        combine_adapters(model, {"a": 1, "b": 1}, method="dare_ties", seed=seed, name=name)
        assert torch.equal(state, torch.get_rng_state())
        drawn.append(our_deltas(model, name)["model.layers.0.self_attn.q_proj"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_density_one_prunes_nothing():
    model = with_adapters(tiny_llama, a=CASES["llama"][1], b=CASES["llama"][2])
    for name in ("linear", "dare_linear", "magnitude_prune"):
        combine_adapters(model, {"a": 0.5, "b": 0.5}, method=name, name=name, density=1)
    for path, delta in our_deltas(model, "linear").items():
        torch.testing.assert_close(our_deltas(model, "dare_linear")[path], delta)
        torch.testing.assert_close(our_deltas(model, "magnitude_prune")[path], delta)


def test_tied_weights_stay_one_update():
    method = LoRA(rank=2, tied="both")
    model = with_adapters(tiny_gpt2, a=(method, ["wte"]), b=(LoRA(rank=2), ["down"]))
    parts = our_deltas(model, "a")["transformer.wte"]
    combine_adapters(model, {"a": 0.5, "b": 1.0}, method="cat")
    torch.testing.assert_close(our_deltas(model)["transformer.wte"], 0.5 * parts, rtol=1e-5, atol=1e-6)
    head = adapter_layers(model)["lm_head"].adapters["merged"]
    torch.testing.assert_close(head.lora_B.t() @ head.lora_A * head.scaling, 0.5 * parts, rtol=1e-5, atol=1e-6)


def test_attention_of_torch_is_combined_in_both_its_projections():
    def attention():
        torch.manual_seed(0)
        return nn.ModuleDict({"mha": nn.MultiheadAttention(16, 4, batch_first=True)})

    model = with_adapters(attention, a=(LoRA(rank=2), "mha"), b=(LoRA(rank=3), "mha"))
    layer = model["mha"]
    exact = {
        key: 0.5 * value - layer.adapters["b"].deltas()[key] for key, value in layer.adapters["a"].deltas().items()
    }
    combine_adapters(model, {"a": 0.5, "b": -1}, method="cat")
    for key, delta in layer.adapters["merged"].deltas().items():
        torch.testing.assert_close(delta, exact[key])


def test_copies_add_up_exactly_as_copies():
    for method, targets in ((BitFit(), None), (FullFineTuning(), None)):
        model = with_adapters(tiny_llama if targets else tiny_gpt2, a=(method, targets), b=(method, targets))
        combine_adapters(model, {"a": 0.7, "b": -0.3}, method="task_arithmetic")
        for layer in adapter_layers(model).values():
            parts = [layer.adapters[name].merged_parameters(layer.base_layer) for name in ("a", "b", "merged")]
            for key, value in parts[2].items():
                base = layer.base_layer.get_parameter(key)
                torch.testing.assert_close(value, base + 0.7 * (parts[0][key] - base) - 0.3 * (parts[1][key] - base))


def test_task_arithmetic_of_unlike_methods_is_a_lora_of_the_sum():
    make = tiny_llama
    model = with_adapters(
        make, a=(DoRA(rank=2), ["query"]), b=(VeRA(rank=4, d_initial=0.5), ["query"]), c=(LoRA(rank=2), ["value"])
    )
    exact = {}
    for path, layer in adapter_layers(model).items():
        twin = _zeroed(layer.base_layer).double()
        twin.weight.data += layer.base_layer.weight.double()
        for name, weight in {"a": 0.5, "b": -1.0, "c": 2.0}.items():
            if name in layer.adapters:
                change = layer.adapters[name].merged_parameters(twin)["weight"] - twin.weight
                exact[path] = exact.get(path, 0) + weight * change.detach()
    report = combine_adapters(model, {"a": 0.5, "b": -1.0, "c": 2.0}, method="task_arithmetic", rank=3)
    for path, delta in our_deltas(model).items():
        U, S, Vh = torch.linalg.svd(exact[path])
        torch.testing.assert_close(delta.double(), U[:, :3] * S[:3] @ Vh[:3], rtol=1e-4, atol=1e-6)
        lost = (S[3:].norm() / S.norm()).item()
        assert report.errors[path] == pytest.approx(lost, abs=1e-6)
    assert report.error > 0.01


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "cat", "linear", "ties", "ties_svd", "magnitude_prune"])
@pytest.mark.parametrize("case", CASES)
def test_folders_are_combined_as_adapters_in_a_model_are(case, method, tmp_path):
    make, a, b = CASES[case]
    if method in ("linear", "ties", "magnitude_prune") and case in ("ranks differ", "rank pattern"):
        pytest.skip("refused")
    model = with_adapters(make, a=a, b=b)
    for name in "ab":
        save_adapter(model, tmp_path / name, name=name)
    combine_adapters(model, {"a": 0.6, "b": -0.5}, method=method)
    combine_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[0.6, -0.5], method=method)
    loaded, expected = make(), our_deltas(model)
    load_adapter(loaded, tmp_path / "out")
    for path, delta in our_deltas(loaded, "default").items():
        torch.testing.assert_close(delta, expected[path], rtol=1e-5, atol=1e-6)
    theirs = PeftModel.from_pretrained(make(), tmp_path / "out", adapter_name="merged")
    found = their_deltas(theirs)
    assert found.keys() == expected.keys()
    for path, delta in found.items():
        torch.testing.assert_close(delta, expected[path], rtol=1e-5, atol=1e-6)


def test_folders_of_hf_peft_are_combined_too(tmp_path):
    make, a, b = CASES["rank pattern"]
    model = with_adapters(make, a=a, b=b)
    for name in "ab":
        save_adapter(model, tmp_path / name, name=name)
        (tmp_path / name / "lightning_peft.json").unlink()
    combine_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[1, 2], method="cat")
    combine_adapters(model, {"a": 1, "b": 2}, method="cat")
    loaded = make()
    load_adapter(loaded, tmp_path / "out")
    assert not (tmp_path / "out" / "lightning_peft.json").exists()
    for path, delta in our_deltas(loaded, "default").items():
        torch.testing.assert_close(delta, our_deltas(model)[path], rtol=1e-5, atol=1e-6)


def test_folders_of_different_bases_are_refused(tmp_path):
    for name, seed in {"a": 0, "b": 1}.items():
        model = with_adapters(lambda seed=seed: tiny_llama(seed), **{name: (LoRA(rank=2), ["query"])})
        save_adapter(model, tmp_path / name, name=name)
    folders, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    with pytest.raises(BaseMismatchError, match="updates of different bases cannot be put together"):
        combine_folders(folders, out, weights=[1, 1])
    assert not out.exists()
    combine_folders(folders, out, weights=[1, 1], check_base=False)
    assert out.exists()


def test_folders_that_are_no_low_rank_products_are_refused(tmp_path):
    model = with_adapters(
        tiny_gpt2, a=(DoRA(rank=2), ["qkv"]), b=(LoRA(rank=2, bias="lora_only"), ["qkv"]), c=(LoRA(rank=2), ["qkv"])
    )
    for name in "abc":
        save_adapter(model, tmp_path / name, name=name)
    for name, message in {"a": "is a 'dora' adapter", "b": "which is no low-rank product"}.items():
        with pytest.raises(ConfigError, match=message):
            combine_folders([tmp_path / "c", tmp_path / name], tmp_path / "out", weights=[1, 1])
    with pytest.raises(ConfigError, match="is one of the adapters that are read"):
        combine_folders([tmp_path / "c"], tmp_path / "c", weights=[1])
    with pytest.raises(ConfigError, match="got 1 adapters and 2 weights"):
        combine_folders([tmp_path / "c"], tmp_path / "out", weights=[1, 2])
    with pytest.raises(ConfigError, match="task_arithmetic needs the base model"):
        combine_folders([tmp_path / "c"], tmp_path / "out", weights=[1], method="task_arithmetic")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ({}, {}, ConfigError, "name at least one adapter"),
        ({"a": float("nan")}, {}, ConfigError, "a weight must be a finite number, got nan"),
        ({"a": 1, "nobody": 1}, {}, AdapterNotFoundError, "adapter 'nobody' was asked for"),
        ({"a": 1}, {"name": "b"}, InjectionError, "already has an adapter 'b'"),
        ({"a": 1}, {"method": "tis"}, ConfigError, "method must be one of svd, cat, .*, got 'tis'"),
        ({"a": 1}, {"rank": 0}, ConfigError, "rank must be a positive integer, got 0"),
        ({"a": 1}, {"rank": 4, "method": "cat"}, ConfigError, "rank=4 was given, but 'cat' has the rank that follows"),
        ({"a": 1}, {"density": 0.0}, ConfigError, "density must be a share above 0 and at most 1, got 0.0"),
        ({"a": 1}, {"majority_sign": "most"}, ConfigError, "majority_sign must be 'total' or 'frequency', got 'most'"),
        ({"a": 1, "b": 1}, {"method": "ties"}, ConfigError, r"needs adapters of one rank, but at .* \[2, 3\]"),
        ({"a": 1, "dora": 1}, {}, ConfigError, "is a 'dora' adapter, which at .* is not one low-rank product"),
        ({"a": 1, "biased": 1}, {}, ConfigError, "trains the bias of .* too"),
        ({"a": 1, "saved": 1}, {}, ConfigError, "trains 'lm_head' in full"),
        ({"a": 1, "b": 1}, {"method": "task_arithmetic"}, ConfigError, "copies of the same parameters, but"),
        ({"a": 1e39, "b": 1}, {"method": "linear", "name": "x"}, ConfigError, "needs adapters of one rank"),
        ({"a": 1e60}, {"method": "cat"}, ConfigError, "would be non-finite; the model is unchanged"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_the_model_unchanged(weights, options, error, message):
    model = with_adapters(
        lambda: tiny_llama(attention_bias=True),
        a=(LoRA(rank=2), ["query"]),
        b=(LoRA(rank=3), ["query"]),
        dora=(DoRA(rank=2), ["query"]),
        biased=(LoRA(rank=2, bias="lora_only"), ["query"]),
    )
    inject(model, LoRA(rank=2), ["query"], modules_to_save="lm_head", name="saved")
    set_active_adapters(model, ["a", "b"])
    held, before = adapter_names(model), model(**token_batch()).logits
    with pytest.raises(error, match=message):
        combine_adapters(model, weights, **options)
    assert adapter_names(model) == held
    assert active_adapters(model) == ["a", "b"]
    assert torch.equal(model(**token_batch()).logits, before)


def test_nothing_is_combined_over_a_merged_base():
    from lightning_peft import merge_adapters

    model = with_adapters(tiny_llama, a=CASES["llama"][1], b=CASES["llama"][2])
    merge_adapters(model, "b")
    with pytest.raises(MergeError, match="'b' is merged into"):
        combine_adapters(model, {"a": 1, "b": 1})
    with pytest.raises(MergeError, match="'b' is merged into"):
        combine_adapters(model, {"a": 1, "b": 1}, method="task_arithmetic", rank=2)
    assert adapter_names(model) == ["a", "b"]

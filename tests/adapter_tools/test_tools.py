"""Comparing, pruning, converting and distilling, against torch.linalg on written-out matrices in float64."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from torch import nn

from lightning_peft import (
    AdaLoRA,
    BitFit,
    DoRA,
    FullFineTuning,
    LoRA,
    NormTuning,
    OLoRA,
    PiSSA,
    PrefixTuning,
    TopLayers,
    VeRA,
    active_adapters,
    adapter_layers,
    adapter_names,
    combine_adapters,
    diff_adapters,
    distil_adapter,
    extract_lora,
    inject,
    load_adapter,
    merge_adapters,
    prune_folder,
    prune_rank,
    save_adapter,
    set_active_adapters,
    spectrum,
    to_lora,
)
from lightning_peft.adapter_tools.comparing import total_difference
from lightning_peft.errors import AdapterMismatchError, ConfigError, InjectionError, MergeError
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft", "ignore::lightning_peft.LightningPEFTWarning"
)


def shake(model, name="default", scale=0.1):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for layer in adapter_layers(model).values():
        for parameter in layer.adapters[name].parameters() if name in layer.adapters else ():
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def change(layer, name="default", key="weight"):
    """Return what an adapter adds to a weight, through a merge into a copy of the layer in float64."""
    twin = copy.deepcopy(layer.base_layer).double()
    return (layer.adapters[name].merged_parameters(twin)[key] - twin.get_parameter(key)).detach()


def two(tmp_path):
    model = tiny_gpt2()
    inject(model, LoRA(rank=4, rslora=True), ["qkv", "wte", "down"], name="a")
    inject(model, LoRA(rank=3), ["query", "down", "up"], name="b")
    for name in "ab":
        shake(model, name)
        save_adapter(model, tmp_path / name, name=name)
    return model


def test_the_difference_of_two_adapters_is_that_of_the_matrices(tmp_path):
    model = two(tmp_path)
    found = diff_adapters((model, "a"), (model, "b"))
    from_folders = diff_adapters(tmp_path / "a", tmp_path / "b")
    assert found.keys() == from_folders.keys() == set(adapter_layers(model))
    for path, layer in adapter_layers(model).items():
        D = [change(layer, name) if name in layer.adapters else torch.zeros(1) for name in "ab"]
        one = found[path]
        assert one.norm_a == pytest.approx(float(D[0].norm()), rel=1e-6)
        assert one.norm_b == pytest.approx(float(D[1].norm()), rel=1e-6)
        assert one.difference == pytest.approx(float((D[0] - D[1]).norm()), rel=1e-6)
        assert from_folders[path].difference == pytest.approx(one.difference, rel=1e-6)
        if len(layer.adapters) == 2:
            assert one.cosine == pytest.approx(float((D[0] * D[1]).sum() / (D[0].norm() * D[1].norm())), abs=1e-7)
            bases = [torch.linalg.svd(d.t()) for d in D]  # of Conv1D: (in, out)
            for side, angles in (("U", one.output_angles), ("V", one.input_angles)):
                Q = [b.U[:, :r] if side == "U" else b.Vh[:r].t() for b, r in zip(bases, (4, 3), strict=True)]
                cosines = torch.linalg.svdvals(Q[0].t() @ Q[1])
                torch.testing.assert_close(angles.cos(), cosines, rtol=1e-6, atol=1e-6)
        else:
            assert math.isnan(one.cosine)
    whole = total_difference(found)
    assert whole.norm_a == pytest.approx(math.hypot(*(one.norm_a for one in found.values())))


def test_an_adapter_does_not_differ_from_itself(tmp_path):
    model = two(tmp_path)
    for one in diff_adapters((model, "a"), tmp_path / "a").values():
        assert one.difference == pytest.approx(0, abs=1e-12)
        assert one.cosine == pytest.approx(1)
        assert float(one.output_angles.max()) < 1e-6


def test_adapters_of_different_shapes_are_not_compared(tmp_path):
    for name, width in {"a": 64, "b": 128}.items():
        model = tiny_llama(hidden_size=width)
        inject(model, LoRA(rank=2), ["query"])
        save_adapter(model, tmp_path / name)
    with pytest.raises(AdapterMismatchError, match="as a weight of shape"):
        diff_adapters(tmp_path / "a", tmp_path / "b")


def test_the_spectrum_is_that_of_the_matrices(tmp_path):
    model = two(tmp_path)
    for path, one in spectrum((model, "b")).items():
        values = torch.linalg.svdvals(change(adapter_layers(model)[path], "b"))
        torch.testing.assert_close(one.values.double(), values[: len(one.values)], rtol=1e-6, atol=1e-9)
        assert one.rank == 3
        assert one.norm == pytest.approx(float(values.norm()), rel=1e-6)
        shares = values[:3] / values[:3].sum()
        assert one.effective_rank == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-5)
        assert one.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-5)


# -- pruning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.8}])
def test_pruning_is_the_best_approximation_of_each_weight(tmp_path, options):
    model = two(tmp_path)
    report = prune_rank(model, "a", **options)
    prune_folder(tmp_path / "a", tmp_path / "out", **options)
    loaded = tiny_gpt2()
    load_adapter(loaded, tmp_path / "out")
    theirs = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "out")
    for path, layer in adapter_layers(model).items():
        if "a" not in layer.adapters:
            continue
        U, S, Vh = torch.linalg.svd(change(layer, "a"), full_matrices=False)
        r = report.ranks[path]
        share = S.square().cumsum(0) / S.square().sum()
        assert r == options.get("rank", int((share < 0.8).sum()) + 1)
        best = U[:, :r] * S[:r] @ Vh[:r]
        torch.testing.assert_close(change(layer, "pruned"), best, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(change(adapter_layers(loaded)[path]), best, rtol=1e-4, atol=1e-6)
        assert report.errors[path] == pytest.approx(float(S[r:].norm() / S.norm()), rel=1e-4)
        assert layer.adapters["pruned"].rank == r
    set_active_adapters(model, "pruned")
    logits = model(**token_batch()).logits
    torch.testing.assert_close(loaded(**token_batch()).logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(**token_batch()).logits, logits, rtol=1e-5, atol=1e-5)


def test_pruning_refuses_what_it_cannot_do(tmp_path):
    model = two(tmp_path)
    with pytest.raises(InjectionError, match="already has an adapter 'b'"):
        prune_rank(model, "a", rank=2, new_name="b")
    with pytest.raises(ConfigError, match="give one of rank= and energy="):
        prune_folder(tmp_path / "a", tmp_path / "out")
    inject(model, DoRA(rank=2), ["up"], name="dora")
    with pytest.raises(ConfigError, match="is a 'dora' adapter.*convert it with to_lora"):
        prune_rank(model, "dora", rank=1)


# -- conversion --------------------------------------------------------------------------------------------------------

CONVERTED = {
    "dora": (tiny_llama, DoRA(rank=2), ["query", "up"], 64),
    "dora Conv1D": (tiny_gpt2, DoRA(rank=2), ["qkv", "wte"], 64),
    "vera": (tiny_llama, VeRA(rank=4, d_initial=0.5), ["query", "value"], 4),
    "adalora": (tiny_llama, AdaLoRA(init_rank=3, target_rank=2), ["query", "down"], 3),
    "pissa": (tiny_llama, PiSSA(rank=2), ["query"], 4),
    "olora slices": (tiny_gpt2, OLoRA(rank=2), ["query", "value"], 8),
    "lora tied": (tiny_gpt2, LoRA(rank=2, tied="both"), ["wte"], 2),
    "lora bias": (tiny_gpt2, LoRA(rank=2, bias="lora_only"), ["qkv"], 2),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_a_converted_adapter_acts_as_the_original_where_the_rank_is_enough(case, tmp_path):
    make, method, targets, rank = CONVERTED[case]
    model = make()
    inject(model, method, targets)
    shake(model)
    expected = model(**token_batch()).logits
    report = to_lora(model, rank=rank)
    assert active_adapters(model) == ["converted"]
    assert 0 <= report.error <= 1e-5
    found = model(**token_batch()).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (make()(**token_batch()).logits - expected).abs().max() > 1e-3
    save_adapter(model, tmp_path, name="converted")
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(theirs(**token_batch()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [FullFineTuning(), TopLayers(num_blocks=1)], ids=["full", "top_layers"])
def test_what_was_trained_in_full_becomes_a_lora_with_its_error(method):
    model = tiny_llama()
    inject(model, method)
    shake(model, scale=0.02)
    with pytest.raises(
        ConfigError, match=r"parameters that a LoRA has no update for, such as 'model.layers.*norm.weight'"
    ):
        to_lora(model, rank=8)
    assert adapter_names(model) == ["default"]
    report = to_lora(model, rank=8, drop_rest=True)
    assert all("norm" in name for name in report.left_out)
    for path, layer in adapter_layers(model).items():
        if "converted" in layer.adapters:
            exact, found = change(layer), change(layer, "converted")
            S = torch.linalg.svdvals(exact)
            assert float((found - exact).norm() / exact.norm()) == pytest.approx(report.errors[path], rel=1e-4)
            assert report.errors[path] == pytest.approx(float(S[8:].norm() / S.norm()), rel=1e-4)
    assert report.error > 0.1


def test_the_base_in_half_precision_costs_no_digits():
    model = tiny_llama().to(torch.bfloat16)
    inject(model, VeRA(rank=4, d_initial=0.5), ["query"])
    shake(model, scale=1e-4)
    report = to_lora(model, rank=4)
    assert report.error <= 1e-5
    for layer in adapter_layers(model).values():
        exact = change(layer)
        assert (change(layer, "converted") - exact).norm() <= 1e-5 * exact.norm()


def test_biases_alone_become_a_lora_with_biases():
    model = tiny_gpt2()
    inject(model, BitFit(), ["qkv", "up", "down"])
    shake(model)
    expected = model(**token_batch()).logits
    to_lora(model, rank=2)
    torch.testing.assert_close(model(**token_batch()).logits, expected, rtol=1e-5, atol=1e-5)


TOOLS = {
    "spectrum": lambda model: spectrum((model, "a")),
    "diff": lambda model: diff_adapters((model, "a"), (model, "b")),
    "prune": lambda model: prune_rank(model, "a", rank=1, new_name="c"),
    "combine": lambda model: combine_adapters(model, {"a": 1.0, "b": 1.0}, method="svd", name="c"),
    "convert": lambda model: to_lora(model, "a", rank=1, new_name="c"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_values_that_are_not_finite_are_refused_with_their_place(tool):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for name in ("a", "b"):
        inject(model, LoRA(rank=2), ["0", "1"], name=name)
    model[1].adapters["a"].lora_A.data[0, 0] = float("nan")
    with pytest.raises(
        ConfigError, match=r"adapter 'a' has values at '1' that are not finite|change of 1.weight is non-finite"
    ):
        TOOLS[tool](model)
    assert adapter_names(model) == ["a", "b"]
    assert active_adapters(model) == ["b"]


def test_what_is_no_change_of_weights_is_refused():
    for method, error, message in (
        (PrefixTuning(), MergeError, "is a 'prefix_tuning' adapter"),
        (NormTuning(), ConfigError, "has no update for"),
    ):
        model = tiny_llama()
        inject(model, method)
        shake(model)
        with pytest.raises(error, match=message):
            to_lora(model, rank=2)
        assert adapter_names(model) == ["default"]
    model = tiny_llama()
    inject(model, DoRA(rank=2), ["query"])
    merge_adapters(model)
    with pytest.raises(MergeError, match="'default' is merged into"):
        to_lora(model, rank=2)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_two_checkpoints_become_a_lora(make, tmp_path):
    tuned = make()
    inject(tuned, LoRA(rank=3, tied="both"), ["all_linear"])
    shake(tuned)
    merge_adapters(tuned)
    from lightning_peft import unload_adapters

    unload_adapters(tuned)
    model = make()
    report = extract_lora(model, tuned, rank=3)
    assert set(report.ranks.values()) == {3}
    assert report.error <= 1e-5
    expected = tuned(**token_batch()).logits
    assert (model(**token_batch()).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ConfigError, match="must have the same parameters in the same shapes"):
        extract_lora(make(), tiny_llama(hidden_size=32), rank=3)
    with pytest.raises(ConfigError, match="changes nothing that a LoRA could hold"):
        extract_lora(make(), make(), rank=3)


def test_tied_embeddings_of_two_checkpoints_stay_tied():
    tuned, model = tiny_gpt2(), tiny_gpt2()
    tuned.transformer.wte.weight.data.addr_(torch.ones(128), torch.randn(64), alpha=0.3)
    extract_lora(model, tuned, rank=1)
    torch.testing.assert_close(model(**token_batch()).logits, tuned(**token_batch()).logits, rtol=1e-4, atol=1e-5)


def test_convolutions_and_attention_of_torch_are_converted():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 16, 3, padding=1)
            self.mha = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            h = self.conv(x).flatten(2).transpose(1, 2)
            return self.mha(h, h, h)[0]

    base, tuned = Both().eval(), Both().eval()
    with torch.no_grad():
        for parameter in (tuned.conv.weight, tuned.mha.in_proj_weight, tuned.mha.out_proj.weight):
            flat = parameter.view(len(parameter), -1)
            flat.addr_(torch.randn(flat.shape[0]), torch.randn(flat.shape[1]), alpha=0.1)
        tuned.conv.bias += 0.1
    with pytest.raises(Exception, match="bias is not possible|not modules"):
        extract_lora(base, tuned, rank=1)  # torch's attention has no place for trained biases beside
    tuned.conv.bias.data -= 0.1
    tuned.conv.bias.data.copy_(base.conv.bias)
    report = extract_lora(base, tuned, rank=1)
    assert report.ranks == {"conv": 1, "mha": 1, "mha.out_proj": 1}
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(base(x), tuned(x), rtol=1e-5, atol=1e-5)


# -- distilling --------------------------------------------------------------------------------------------------------


def kl(model, teacher, student, batches):
    found = []
    with torch.no_grad():
        for batch in batches:
            set_active_adapters(model, teacher)
            told = model(**batch).logits.log_softmax(-1)
            set_active_adapters(model, student)
            said = model(**batch).logits.log_softmax(-1)
            found.append(float((told.exp() * (told - said)).sum(-1).mean()))
    return sum(found) / len(found)


def test_a_distilled_adapter_is_nearer_to_its_teacher_than_the_truncated_one_on_new_data():
    model = tiny_llama()
    inject(model, LoRA(rank=64, alpha=64), ["all_linear"])
    shake(model, scale=0.05)
    base = [parameter.clone() for parameter in tiny_llama().parameters()]
    prune_rank(model, rank=8, new_name="truncated")
    batches = [token_batch(seed, rows=16, length=16) for seed in range(12)]
    report = distil_adapter(model, rank=8, batches=batches, steps=60, learning_rate=3e-3)
    held_out = [token_batch(seed, rows=16, length=16) for seed in range(100, 103)]
    truncated = kl(model, "default", "truncated", held_out)
    assert kl(model, "default", "distilled", held_out) < 0.9 * truncated
    assert report.after < report.before
    assert report.before == pytest.approx(kl(model, "default", "truncated", batches), rel=1e-3)
    assert report.after == pytest.approx(kl(model, "default", "distilled", batches), rel=1e-3)
    set_active_adapters(model, "distilled")
    assert all(not parameter.requires_grad for parameter in model.parameters())
    kept = [layer.base_layer.weight for layer in adapter_layers(model).values()]
    assert all(any(torch.equal(weight, other) for other in base if other.shape == weight.shape) for weight in kept)
    ranks = {layer.adapters["distilled"].rank for layer in adapter_layers(model).values()}
    assert ranks == {8}


def test_a_model_without_logits_is_distilled_by_its_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
    inject(model, LoRA(rank=8), ["0", "2"])
    shake(model, scale=0.3)
    batches = [torch.randn(32, 12) for _ in range(4)]
    report = distil_adapter(model, rank=2, batches=batches, steps=80, learning_rate=1e-2, loss="mse", new_name="small")
    assert report.after < 0.7 * report.before


def test_distilling_leaves_the_model_as_it_was_if_it_fails():
    model = tiny_llama()
    inject(model, LoRA(rank=8), ["down"])
    shake(model)
    model.train()
    for options, message in (
        ({"batches": []}, "needs batches to teach on"),
        ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
        ({"learning_rate": 0}, "learning_rate must be a positive number, got 0"),
        ({"temperature": math.inf}, "temperature must be a positive number, got inf"),
        ({"loss": "l1"}, "loss must be 'kl' or 'mse', got 'l1'"),
        ({"learning_rate": 1e25}, "the loss of step .* is (nan|inf); take a smaller learning_rate"),
    ):
        with pytest.raises(ConfigError, match=message):
            distil_adapter(model, **{"rank": 2, "batches": [token_batch()], "steps": 4, **options})
        assert adapter_names(model) == active_adapters(model) == ["default"]
        assert model.training
        assert any(parameter.requires_grad for parameter in model.parameters())

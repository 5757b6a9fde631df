import pytest
import torch
from torch import nn

from lightning_peft import Adapter, LoRA, adapter_layers, inject, merge_adapters, set_active_adapters, unmerge_adapters
from lightning_peft.errors import LightningPEFTWarning, MergeError
from lightning_peft.merging import adapters_merged


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(dtype)


def shake(model, scale=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 0.03), (torch.float16, 0.004)],
)
def test_a_hundred_merges_and_unmerges_lose_no_bit_in_any_precision(dtype, tolerance):
    model = net(dtype)
    inject(model, LoRA(rank=2), "all_linear")
    shake(model)
    before, out = bits(model), model(X.to(dtype))
    for _ in range(100):
        merge_adapters(model)
        merged = model(X.to(dtype))
        unmerge_adapters(model)
    assert ((merged - out).abs().max() / out.abs().max()).item() <= tolerance
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())
    assert torch.equal(model(X.to(dtype)), out)


def test_a_merge_into_bfloat16_rounds_once():
    model = net(torch.bfloat16)
    inject(model, LoRA(rank=2), "0")
    shake(model, 0.01)
    adapter, weight = model[0].adapters["default"], model[0].base_layer.weight.clone()
    exact = weight.double() + adapter.scaling * (adapter.lora_B.double().t() @ adapter.lora_A.double())
    merge_adapters(model)
    rounded = (model[0].base_layer.weight.double() - exact).abs()
    assert (rounded <= 2**-8 * exact.abs() + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_was_merged_in_one_precision_is_taken_out_in_the_one_that_the_model_was_cast_to(dtype):
    model, expected = net(), net().to(dtype).state_dict()
    inject(model, LoRA(rank=2), ["0", "2"])
    shake(model)
    merge_adapters(model)
    model.to(dtype)
    unmerge_adapters(model)
    model(torch.ones(1, 16, dtype=dtype))
    assert all(torch.equal(model[place].base_layer.weight, expected[f"{place}.weight"]) for place in (0, 2))


def test_a_second_merge_of_one_adapter_is_refused():
    model = net()
    inject(model, LoRA(rank=2), "all_linear")
    shake(model)
    merge_adapters(model)
    before = bits(model)
    with pytest.raises(MergeError, match="adapter 'default' is merged already; a second merge would apply it twice"):
        merge_adapters(model)
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())


def test_merging_two_adapters_one_after_the_other_or_at_once_is_their_sum():
    model = net()
    inject(model, LoRA(rank=2), "all_linear", name="a")
    inject(model, LoRA(rank=3), "0", name="b")
    shake(model)
    set_active_adapters(model, ["a", "b"])
    out = model(X)
    merge_adapters(model)
    assert torch.allclose(model(X), out, atol=1e-5)
    unmerge_adapters(model)
    merge_adapters(model, "a")
    assert torch.allclose(model(X), out, atol=1e-5)  # b still acts beside it
    merge_adapters(model, ["b"])
    assert torch.allclose(model(X), out, atol=1e-5)
    unmerge_adapters(model)
    assert torch.equal(model(X), out)


def test_a_non_finite_merge_is_refused_and_changes_no_weight_of_any_layer():
    model = net()
    inject(model, LoRA(rank=2), "all_linear")
    shake(model)
    with torch.no_grad():
        model[2].adapters["default"].lora_A[0, 0] = float("nan")
    before = bits(model)
    with pytest.raises(
        MergeError, match="merging adapter 'default' makes 'weight' non-finite; the weights are unchanged"
    ):
        merge_adapters(model)
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())
    assert not model[0].merged


def test_merging_into_tied_weights_is_refused_naming_both_users():
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    with pytest.warns(LightningPEFTWarning, match="the weight of 'head', .* is also that of 'embedding'"):
        inject(model, LoRA(rank=2), "head")
    with pytest.raises(
        MergeError, match=r"head.weight is shared by embedding.weight, head.weight: merging the adapter"
    ):
        merge_adapters(model)


def test_a_merged_adapter_is_not_deleted():
    from lightning_peft import delete_adapter

    model = net()
    inject(model, LoRA(rank=2), "0")
    merge_adapters(model)
    with pytest.raises(MergeError, match="adapter 'default' is merged into the base; unmerge it before deleting it"):
        delete_adapter(model, "default")


def test_a_merge_for_the_time_of_a_block_leaves_no_trace():
    model = net()
    inject(model, LoRA(rank=2), "all_linear")
    shake(model)
    before, out = bits(model), model(X)
    with adapters_merged(model):
        assert model[0].merged == ("default",)
        assert torch.allclose(model(X), out, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())
    merge_adapters(model)
    with adapters_merged(model):
        pass
    assert model[0].merged == ("default",)


def test_merging_does_not_change_what_a_module_computes_by_switching_mode():
    model = net()
    inject(model, LoRA(rank=2, dropout=0.5), "all_linear")
    shake(model)
    before = bits(model)
    model.eval()
    model.train()
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())


class Doubling(Adapter):
    """Doubles the output: it does not commute with an added update."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]))

    def reset_parameters(self, base_layer):
        nn.init.constant_(self.factor, 2.0)

    def forward(self, base, x):
        return base(x) * self.factor

    def merged_parameters(self, base_layer):
        return {name: p.detach() * self.factor.detach() for name, p in base_layer.named_parameters()}


def test_a_method_that_forgets_about_packed_weights_is_stopped():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRA(rank=1), "0")
    layer = model[0]
    layer.base_layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    layer.add("other", Doubling(), trainable=False)
    with pytest.raises(
        MergeError,
        match=r"'weight' the shape \(8, 1\), but the base holds torch.uint8 of shape \(8, 1\): packed weights",
    ):
        layer.merge(["other"])


def test_adapters_that_do_not_commute_are_merged_in_the_order_in_which_they_act_or_refused():
    model = net()
    inject(model, LoRA(rank=2), "0", name="inner")
    shake(model)
    model[0].add("outer", Doubling(), trainable=True)
    set_active_adapters(model, ["inner", "outer"])
    out = model(X)
    with pytest.raises(
        MergeError, match="adapter 'outer' acts around 'inner', which is of another kind and not merged"
    ):
        merge_adapters(model, "outer")
    for names in ("inner", ["outer", "inner"]):
        merge_adapters(model, names)
        assert torch.allclose(model(X), out, atol=1e-5)
        unmerge_adapters(model)
        assert torch.equal(model(X), out)


def test_adapters_that_act_alone_are_not_merged_over_each_other():
    from lightning_peft import NormTuning

    model = nn.Sequential(nn.LayerNorm(4))
    for name in ("one", "two"):
        inject(model, NormTuning(), name=name)
    message = "are all at '0', but 'norm_tuning' acts alone at a place; merge one of them"
    with pytest.raises(MergeError, match=message):
        merge_adapters(model, ["one", "two"])
    merge_adapters(model, "one")
    with pytest.raises(MergeError, match=message):
        merge_adapters(model, "two")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_is_as_exact_as_that_of_hf_peft_in_every_precision(dtype, tmp_path):
    import peft

    from lightning_peft import save_adapter
    from lightning_peft.merging import outputs
    from lightning_peft.testing import tiny_llama, token_batch

    model, batch = tiny_llama().to(dtype), token_batch()
    inject(model, LoRA(rank=4))
    shake(model, 0.1)
    save_adapter(model, tmp_path)
    exact = tiny_llama().to(dtype)  # the same rounded weights, summed in float64
    inject(exact, LoRA(rank=4))
    shake(exact, 0.1)
    expected = outputs(exact.double(), batch)
    before, out = bits(model), outputs(model, batch)
    merge_adapters(model)
    ours = (outputs(model, batch).double() - expected).abs().mean()
    unmerge_adapters(model)
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())
    assert torch.equal(outputs(model, batch), out)
    theirs = peft.PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path, autocast_adapter_dtype=True)
    theirs = theirs.merge_and_unload().eval()
    assert ours <= 1.1 * (outputs(theirs, batch).double() - expected).abs().mean() + 1e-7


def test_without_keeping_originals_the_weights_are_the_same_and_nothing_is_held():
    kept, lost = net(torch.bfloat16), net(torch.bfloat16)
    for model in (kept, lost):
        torch.manual_seed(2)
        inject(model, LoRA(rank=2), "all_linear")
        shake(model)
    merge_adapters(kept)
    merge_adapters(lost, keep_originals=False)
    assert all(torch.equal(bits(kept)[name], value) for name, value in bits(lost).items())
    assert kept[0]._originals
    assert not lost[0]._originals
    assert torch.equal(kept(X.bfloat16()), lost(X.bfloat16()))


def test_what_was_merged_without_keeping_originals_is_not_unmerged_disabled_or_merged_again():
    from lightning_peft import adapters_disabled

    model = net()
    inject(model, LoRA(rank=2), "0", name="a")
    inject(model, LoRA(rank=2), "0", name="b")
    shake(model)
    set_active_adapters(model, ["a", "b"])
    merge_adapters(model, "a", keep_originals=False)
    before = bits(model)
    why = (
        r"it was merged at '0' with keep_originals=False, so the weights that it replaced are gone; load the base again"
    )
    with pytest.raises(MergeError, match=f"adapter 'a' cannot be taken out: {why}"):
        unmerge_adapters(model)
    with pytest.raises(MergeError, match=f"adapter 'a' cannot be disabled: {why}"), adapters_disabled(model):
        pass
    with pytest.raises(MergeError, match="adapter 'a' is merged already"):
        merge_adapters(model, "a", keep_originals=False)
    with adapters_merged(model):  # the other one comes and goes
        assert model[0].merged == ("a", "b")
    assert model[0].merged == ("a",)
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())


@pytest.mark.parametrize("keep", [True, False])
def test_a_non_finite_merge_in_a_later_layer_changes_no_weight_whether_originals_are_kept_or_not(keep):
    model = net()
    inject(model, LoRA(rank=2), "all_linear")
    shake(model)
    with torch.no_grad():
        model[2].adapters["default"].lora_A[0, 0] = float("inf")
    before = bits(model)
    with pytest.raises(MergeError, match="non-finite"):
        merge_adapters(model, keep_originals=keep)
    assert all(torch.equal(before[name], value) for name, value in bits(model).items())
    assert not any(layer.merged or layer.permanent for layer in adapter_layers(model).values())


def test_memory_that_two_weights_of_a_model_share_is_not_written_to():
    """Tied by their memory, not by being one parameter: merging one leaves the other as it is, with originals kept or not."""
    for keep in (False, True):
        model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
        nn.init.eye_(model[0].weight)
        model[1].weight = nn.Parameter(model[0].weight.data)
        inject(model, LoRA(rank=2), "1")
        shake(model)
        out = model(X)
        merge_adapters(model, keep_originals=keep)
        assert torch.allclose(model(X), out, atol=1e-5)
        assert torch.equal(model[0].weight, torch.eye(16))


def test_backward_of_a_graph_from_before_the_weights_were_overwritten_is_refused():
    model = net()
    inject(model, LoRA(rank=2), "all_linear")
    shake(model)
    out = model(X).sum()
    merge_adapters(model, keep_originals=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_an_adapter_saved_after_its_base_was_overwritten_does_not_vouch_for_the_merged_weights(tmp_path):
    from lightning_peft import load_adapter, save_adapter

    model = net()
    inject(model, LoRA(rank=2), "0")
    shake(model)
    merge_adapters(model, keep_originals=False)
    save_adapter(model, tmp_path)
    fresh = net()
    load_adapter(fresh, tmp_path)
    assert torch.allclose(fresh(X), model(X), atol=1e-5)


def test_a_probe_says_how_far_the_merged_model_is():
    model = net(torch.bfloat16)
    inject(model, LoRA(rank=2), "all_linear")
    shake(model)
    x = X.bfloat16()
    out = model(x)
    report = merge_adapters(model, probe=x)
    off = (model(x).float() - out.float()).abs()
    assert report.max_logit_error == off.max().item() > 0
    assert report.mean_logit_error == off.mean().item()
    assert report.max_logit == out.abs().max().item()
    assert not report.weights
    with pytest.raises(ValueError, match="quantized must be one of refuse, requantize, dequantize, got 'yes'"):
        merge_adapters(model, quantized="yes")

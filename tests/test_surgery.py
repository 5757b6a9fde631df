import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_peft import (
    AdapterLayer,
    LoRA,
    active_adapters,
    adapter_layers,
    adapter_names,
    adapters_disabled,
    delete_adapter,
    inject,
    materialize_adapters,
    merge_adapters,
    save_adapter,
    set_active_adapters,
    trainable_summary,
    unload_adapters,
    unmerge_adapters,
)
from lightning_peft.errors import AdapterNotFoundError, ConfigError, InjectionError, MergeError, TargetError
from lightning_peft.state import load_adapter


class Net(nn.Module):
    """An MLP with two blocks, a shared module and a tied head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


IDS = torch.arange(10).view(2, 5)


def shake(model, name="default", seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            if name in layer.adapters:
                for parameter in layer.adapters[name].parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(targets="all_linear", **options):
    model = Net().eval()
    inject(model, LoRA(rank=2, **options), targets)
    shake(model)
    return model


def test_injecting_freezes_the_base_and_trains_the_adapter_alone():
    model = Net()
    injection = inject(model, LoRA(rank=2), ["blocks.0.0", "head"])
    assert injection.paths == ["blocks.0.0", "head"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{place}.adapters.default.{t}" for place in ("blocks.0.0", "head") for t in ("lora_A", "lora_B")
    }
    summary = trainable_summary(model)
    assert summary.trainable == 2 * (8 + 8) + 2 * (8 + 11)
    assert summary.layers == 2
    assert summary.percent == pytest.approx(100 * summary.trainable / summary.total)
    assert (
        str(summary)
        == f"{summary.trainable:,} of {summary.total:,} parameters are trained ({summary.percent:.3f} %), at 2 places"
    )


def test_a_fresh_adapter_changes_no_bit():
    model = Net().eval()
    before = model(IDS)
    inject(model, LoRA(rank=2), ["all_linear", "embedding"])
    assert torch.equal(model(IDS), before)


def test_disabled_is_the_base_bit_for_bit_and_ends_with_the_block_even_after_an_error():
    base, model = Net().eval(), adapted()
    with adapters_disabled(model):
        assert torch.equal(model(IDS), base(IDS))
    out = model(IDS)
    assert not torch.equal(out, base(IDS))
    with pytest.raises(RuntimeError, match="inside"), adapters_disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(IDS), out)


def test_disabling_takes_merged_adapters_out_as_well_and_puts_them_back():
    base, model = Net().eval(), adapted()
    merge_adapters(model)
    merged = model(IDS)
    with adapters_disabled(model):
        assert torch.equal(model(IDS), base(IDS))
    assert torch.equal(model(IDS), merged)


def test_disabled_blocks_can_be_nested():
    base, model = Net().eval(), adapted()
    with adapters_disabled(model):
        with adapters_disabled(model):
            pass
        assert torch.equal(model(IDS), base(IDS))
    assert not torch.equal(model(IDS), base(IDS))


def test_several_adapters_are_switched_summed_and_only_the_active_ones_are_trained():
    model = adapted("blocks.0.0")
    one = model(IDS)
    inject(model, LoRA(rank=3), ["blocks.0.0", "blocks.1.2"], name="other")
    assert adapter_names(model) == ["default", "other"]
    assert active_adapters(model) == ["other"]
    shake(model, "other", seed=2)
    two = model(IDS)
    assert not any("default" in name for name, p in model.named_parameters() if p.requires_grad)
    set_active_adapters(model, "default")
    assert torch.equal(model(IDS), one)
    set_active_adapters(model, ["default", "other"])
    both = model(IDS)
    set_active_adapters(model, ["other", "default"])
    assert torch.allclose(model(IDS), both, atol=1e-6)
    x = torch.randn(3, 8)
    layer = model.get_submodule("blocks.0.0")
    delta = [layer.adapters[name](layer.base_layer, x) - layer.base_layer(x) for name in ("default", "other")]
    assert torch.allclose(layer(x), layer.base_layer(x) + delta[0] + delta[1], atol=1e-6)
    set_active_adapters(model, [])
    assert torch.equal(model(IDS), Net().eval()(IDS))
    assert trainable_summary(model).trainable == 0
    set_active_adapters(model, "other")
    assert torch.equal(model(IDS), two)


def test_deleting_an_adapter_leaves_the_others_and_the_last_one_unwraps_the_model():
    model = adapted("blocks.0.0")
    inject(model, LoRA(rank=3), ["blocks.0.0", "head"], name="other")
    delete_adapter(model, "default")
    assert adapter_names(model) == ["other"]
    delete_adapter(model, "other")
    assert not adapter_layers(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in Net().modules()]
    assert list(model.state_dict()) == list(Net().state_dict())
    inject(model, LoRA(rank=1), "head")  # the names are free again
    assert adapter_names(model) == ["default"]


def test_unloading_leaves_the_base_and_what_was_merged_into_it():
    model = adapted()
    out = model(IDS)
    merge_adapters(model)
    merged = model(IDS)
    assert unload_adapters(model) is model
    assert not any(isinstance(m, AdapterLayer) for m in model.modules())
    assert torch.equal(model(IDS), merged)
    assert torch.allclose(merged, out, atol=1e-5)
    with pytest.raises(
        AdapterNotFoundError, match=r"Net has no adapters to unload; call inject\(model, method\) first"
    ):
        unload_adapters(model)


def test_a_whole_block_and_the_layers_inside_it_can_be_adapted_at_once():
    from lightning_peft.adapter_layer import base_modules

    model = Net().eval()
    inject(model, LoRA(rank=2), "blocks.0.0", name="inner")
    layer = AdapterLayer(model.blocks[0])
    model.blocks[0] = layer
    assert "blocks.0.0" in dict(base_modules(model))
    assert list(adapter_layers(model)) == ["blocks.0", "blocks.0.0"]
    assert torch.equal(model(IDS), Net().eval()(IDS))


def test_a_module_that_stands_in_two_places_is_adapted_in_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    inject(model, LoRA(rank=2), "a")
    assert model["a"] is model["b"]
    assert isinstance(model["b"], AdapterLayer)
    delete_adapter(model, "default")
    assert model["a"] is model["b"] is shared


def test_an_adapted_layer_still_shows_what_others_look_for_in_it():
    model = adapted("head")
    assert model.head.weight is model.head.base_layer.weight
    assert (model.head.in_features, model.head.out_features, model.head.bias) == (8, 11, None)
    model.head.weight = model.embedding.weight
    assert model.head.base_layer.weight is model.embedding.weight
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'nonsense'"):
        _ = model.head.nonsense


def test_an_adapted_model_is_copied_and_pickled_whole():
    model = adapted()
    out = model(IDS)
    assert torch.equal(copy.deepcopy(model)(IDS), out)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS), out)
    assert active_adapters(again) == ["default"]
    set_active_adapters(again, [])
    assert not torch.equal(again(IDS), out)


def test_adapters_follow_the_mode_of_the_module_they_stand_at():
    model = Net().eval()
    inject(model, LoRA(rank=2, dropout=0.5), "head")
    assert not model.head.adapters["default"].training
    assert not model.head.training
    model.train()
    assert model.head.adapters["default"].training


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: inject(m, LoRA(), "head"), InjectionError, r"Net already has an adapter 'default' \(it holds: 'default'\); give another name="),
        (lambda m: inject(m, LoRA(), "head", name="a.b"), ConfigError, "an adapter name is 1 to 64 letters, digits, '_' or '-', .* got 'a.b'"),
        (lambda m: inject(m, LoRA(), "head", name="keys"), ConfigError, "no attribute of nn.ModuleDict such as 'keys', got 'keys'"),
        (lambda m: inject(m, LoRA(), "head", name="../x"), ConfigError, "got '../x'"),
        (lambda m: inject(m, LoRA, "head", name="b"), ConfigError, "inject needs an instance of a Method such as LoRA"),
        (lambda m: inject(m, LoRA(), ["head", "hed"], name="b"), TargetError, "target 'hed' matches no module of Net; did you mean 'head'"),
        (lambda m: set_active_adapters(m, ["default", "x"]), AdapterNotFoundError, "adapter 'x' was asked for, but Net has no such adapter: it holds 'default'"),
        (lambda m: delete_adapter(m, "x"), AdapterNotFoundError, "adapter 'x' was asked for"),
        (lambda m: merge_adapters(m, "x"), AdapterNotFoundError, "adapter 'x' was asked for"),
        (lambda m: save_adapter(m, "nowhere", name="x"), AdapterNotFoundError, "adapter 'x' was asked for"),
        (lambda m: unmerge_adapters(m), MergeError, "Net has no merged adapter to unmerge"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_changes_nothing(call, error, message):
    model = adapted()
    before, out = {k: v.clone() for k, v in model.state_dict().items()}, model(IDS)
    with pytest.raises(error, match=message):
        call(model)
    assert before.keys() == model.state_dict().keys()
    assert torch.equal(model(IDS), out)
    assert active_adapters(model) == ["default"]


@pytest.mark.parametrize(
    "verb", [merge_adapters, lambda m: save_adapter(m, "nowhere"), lambda m: set_active_adapters(m, "default")]
)
def test_a_model_without_adapters_is_told_so(verb):
    with pytest.raises(
        AdapterNotFoundError,
        match=r"adapter 'default' was asked for, but Net has no such adapter: it holds none; call inject",
    ):
        verb(Net())


def test_a_failed_injection_leaves_the_model_as_it_was():
    model = Net()
    with pytest.raises(
        TargetError, match="rank_pattern 'embedding' matches none of the 1 adapted places, such as 'head'"
    ):
        inject(model, LoRA(rank_pattern={"embedding": 3}), "head")
    assert all(p.requires_grad for p in model.parameters())
    assert not adapter_layers(model)


def test_what_is_injected_while_adapters_are_disabled_acts_when_they_act_again():
    model, base = Net().eval(), Net().eval()
    inject(model, LoRA(rank=2), "head", name="a")
    with adapters_disabled(model):
        with adapters_disabled(model):
            inject(model, LoRA(rank=2), "all_linear", name="b")
            for layer in adapter_layers(model).values():
                nn.init.ones_(layer.adapters["b"].lora_B)
        assert all(not layer._enabled for layer in adapter_layers(model).values())
        assert torch.equal(model(IDS), base(IDS))
    assert all(layer._enabled for layer in adapter_layers(model).values())
    assert not torch.equal(model(IDS), base(IDS))


def test_an_adapter_of_a_part_is_not_saved_through_the_whole(tmp_path):
    model = nn.ModuleDict({"net": Net()})
    inject(model["net"], LoRA(rank=2), "head")
    with pytest.raises(AdapterNotFoundError, match="lives inside ModuleDict, but was injected into a part of it"):
        save_adapter(model, tmp_path)


def test_an_adapter_of_the_whole_is_not_saved_through_a_part(tmp_path):
    model = nn.ModuleDict({"net": Net()})
    inject(model, LoRA(rank=2), "net.head")
    with pytest.raises(AdapterNotFoundError, match="into a model that this is a part of: hand over that model"):
        save_adapter(model["net"], tmp_path)


def test_adapters_are_injected_on_the_meta_device_and_materialised_after_the_base():
    with torch.device("meta"):
        model = Net()
    inject(model, LoRA(rank=2), ["all_linear", "embedding"])
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(InjectionError, match="the base at 'embedding' is on the meta device; load its weights before"):
        materialize_adapters(model)
    source = Net()
    for layer in adapter_layers(model).values():
        layer.base_layer.to_empty(device="cpu")
    names = dict(source.named_parameters())
    from lightning_peft.adapter_layer import base_parameters

    with torch.no_grad():
        for name, parameter in base_parameters(model):
            parameter.copy_(names[name])
    materialize_adapters(model)
    assert torch.equal(model.eval()(IDS), source.eval()(IDS))
    assert model.head.adapters["default"].lora_A.std() > 0
    assert all(p.requires_grad for n, p in model.named_parameters() if "adapters" in n)


def test_a_compiled_or_checkpointed_module_keeps_its_path(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = adapted()
    out = model(IDS)
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    assert list(adapter_layers(model)) == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "head"]
    save_adapter(model, tmp_path)
    plain = Net().eval()
    load_adapter(plain, tmp_path)
    assert torch.equal(plain(IDS), out)


def test_a_pattern_for_one_of_several_slices_of_a_fused_projection_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(
        TargetError,
        match="rank_pattern 'query' is one slice of 'transformer.h.0.attn.c_attn', where value would get its value too",
    ):
        inject(model, LoRA(rank=2, rank_pattern={"query": 4}), ["query", "value"])
    inject(model, LoRA(rank=2, rank_pattern={"query": 4}), "query")
    assert model.transformer.h[0].attn.c_attn.adapters["default"].rank == 4


def test_a_name_given_twice_counts_once():
    model = adapted()
    out = model(IDS)
    set_active_adapters(model, ["default", "default"])
    assert torch.equal(model(IDS), out)
    merge_adapters(model, ["default", "default"])
    assert torch.allclose(model(IDS), out, atol=1e-5)
    assert model.head.merged == ("default",)


def test_nothing_is_merged_where_nothing_is_active():
    model = adapted()
    set_active_adapters(model, [])
    for names in (None, []):
        with pytest.raises(MergeError, match="no adapter was named and none is active: Net holds 'default'"):
            merge_adapters(model, names)


def test_while_an_adapter_is_merged_no_other_goes_in_or_takes_its_place(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    inject(model, LoRA(rank=1), "head", name="other")
    set_active_adapters(model, "default")
    merge_adapters(model)
    out = model(IDS)
    for names in ([], ["other"]):
        with pytest.raises(MergeError, match="adapter 'default' is merged into the base and would go on acting beside"):
            set_active_adapters(model, names)
    with pytest.raises(MergeError, match="adapter 'third' cannot go in while 'default' is merged into the base"):
        inject(model, LoRA(rank=1), "head", name="third")
    with pytest.raises(Exception, match="adapter 'third' cannot go in while 'default' is merged"):
        load_adapter(model, tmp_path, name="third")
    assert torch.equal(model(IDS), out)
    set_active_adapters(model, ["default", "other"])


def test_a_second_injection_leaves_alone_what_its_user_unfroze():
    model = adapted("head")
    model.embedding.weight.requires_grad_(True)
    inject(model, LoRA(rank=1), "head", name="other")
    assert model.embedding.weight.requires_grad


def test_a_trained_parameter_of_the_base_is_said_to_be_missing_from_the_folder_and_is_not_compared(tmp_path):
    model = adapted("head")
    with torch.no_grad():
        model.embedding.weight.requires_grad_(True).add_(1.0)
    with pytest.warns(
        UserWarning,
        match="1 parameters of the base are trained, such as 'embedding.weight'; an adapter folder does not hold",
    ):
        save_adapter(model, tmp_path)
    load_adapter(Net(), tmp_path)


def test_a_base_on_the_meta_device_takes_no_trained_adapter(tmp_path):
    save_adapter(adapted("head"), tmp_path)
    with torch.device("meta"):
        model = Net()
    with pytest.raises(
        Exception, match="cannot be loaded while Net is on the meta device; load the weights of the base first"
    ):
        load_adapter(model, tmp_path)
    assert not adapter_layers(model)


def test_a_layer_whose_forward_was_replaced_is_called():
    model = Net().eval()
    head = model.head
    original = head.forward
    head.forward = lambda x: original(x) * 0 + 7
    inject(model, LoRA(rank=1), "head")
    assert torch.equal(model(IDS), torch.full((2, 5, 11), 7.0))


def test_an_adapter_is_saved_through_a_compiled_model(tmp_path):
    model = adapted()
    save_adapter(torch.compile(model, backend="eager"), tmp_path)
    again = Net().eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))


def test_active_adapters_are_named_in_the_order_in_which_they_act():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    inject(model, LoRA(rank=1), "1", name="first")
    inject(model, LoRA(rank=1), ["0", "1"], name="second")
    inject(model, LoRA(rank=1), ["0", "2"], name="third")
    for order in (["first", "second", "third"], ["third", "second", "first"]):
        set_active_adapters(model, order)
        assert active_adapters(model) == order
        set_active_adapters(model, active_adapters(model))
        assert [list(layer.active) for layer in adapter_layers(model).values()] == [
            [name for name in order if name in layer.adapters] for layer in adapter_layers(model).values()
        ]

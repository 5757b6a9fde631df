"""Methods change the base before adapters go in, but for the layers that have to stay as they are."""

import pytest
import torch
from torch import nn

from lightning_peft import (
    Adaptation,
    CausalLMLoader,
    DoRA,
    FullFineTuning,
    LightningPEFTWarning,
    LoftQ,
    LoRA,
    PEFTModule,
    QLoRA,
    TopLayers,
    adapter_layers,
    adapters_disabled,
    inject,
    inject_all,
    load_adapters,
    save_adapters,
    set_active_adapters,
)
from lightning_peft.errors import InjectionError, TargetError
from lightning_peft.quantized_layers import packed_layers
from lightning_peft.testing import tiny_llama, token_batch

# bitsandbytes compiles a function when a layer is first packed.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")

METHOD = QLoRA(rank=2, compute_dtype="float32")
FULL_AND_QLORA = [Adaptation(FullFineTuning(), targets=["down"]), Adaptation(METHOD, targets=["query"])]


def logits(model):
    with torch.no_grad():
        return model.eval()(**token_batch()).logits


def losses(model, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch, found = token_batch(), []
    for _ in range(steps):
        loss = model.train()(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def down(model):
    return {path for path, _ in model.named_modules() if path.endswith("down_proj")}


@pytest.mark.parametrize("order", [1, -1])
def test_layers_of_a_method_that_needs_them_unpacked_stay_so(order):
    model = tiny_llama()
    kept, weights = down(model), {path: model.get_submodule(path).weight for path in down(model)}
    with pytest.warns(LightningPEFTWarning, match="does not work over a quantised base"):
        inject_all(model, FULL_AND_QLORA[::order])
    assert len(packed_layers(model)) == 12
    assert not packed_layers(model).keys() & kept
    for path, weight in weights.items():
        assert adapter_layers(model)[path].base_layer.weight is weight
    found = losses(model)
    assert found[-1] < found[0]


def test_naming_them_in_skip_says_that_this_is_wanted():
    model = tiny_llama()
    qlora = QLoRA(rank=2, compute_dtype="float32", skip="down")
    inject_all(model, [FULL_AND_QLORA[0], Adaptation(qlora, targets=["query"])])
    assert len(packed_layers(model)) == 12


def test_one_after_the_other_layers_with_adapters_stay_as_they_were():
    model = tiny_llama()
    inject(model, TopLayers(num_blocks=1), name="top")
    with pytest.warns(
        LightningPEFTWarning, match=r"layers\.1\..*\(7\). The first: .* holds the adapter 'top', which was made over"
    ):
        inject(model, METHOD, ["re:.*layers.0.*q_proj"], name="qlora")
    assert {path.split(".")[2] for path in packed_layers(model)} == {"0"}
    found = losses(model)
    assert found[-1] < found[0]
    set_active_adapters(model, ["top", "qlora"])
    assert losses(model)[-1] < found[-1]


def test_nothing_left_to_change_is_refused_and_the_model_is_what_it_was():
    model = tiny_llama()
    inject(model, FullFineTuning(), "all_linear", name="full")
    expected, modules = logits(model), list(model.modules())
    with pytest.raises(InjectionError, match=r"would change only layers that have to stay as they are: .*\(14\)"):
        inject(model, METHOD, name="qlora")
    assert list(model.modules()) == modules
    assert torch.equal(logits(model), expected)
    everything = [Adaptation(FullFineTuning(), targets=["all_linear"]), Adaptation(METHOD, targets=["lm_head"])]
    with pytest.raises(
        InjectionError, match="'full.*which does not work over a quantised base. Give the adapters other"
    ):
        inject_all(tiny_llama(), everything)


@pytest.mark.parametrize("method", [METHOD, LoftQ(rank=2, compute_dtype="float32")], ids=lambda method: method.name)
def test_every_base_is_prepared_before_an_adapter_measures_it(method):
    model = tiny_llama()
    inject_all(model, [Adaptation(DoRA(rank=2), targets=["value"]), Adaptation(method, targets=["query"])])
    assert len(packed_layers(model)) == 14
    dora = adapter_layers(model)["model.layers.0.self_attn.v_proj"]
    x = torch.randn(3, 64)
    with torch.no_grad():
        base = dora.base_layer(x)
        assert torch.allclose(dora(x), base, atol=1e-6 * float(base.abs().max()))


def test_a_fresh_dora_beside_qlora_is_the_base():
    model = tiny_llama()
    inject_all(model, [Adaptation(DoRA(rank=2), targets=["value"]), Adaptation(METHOD, targets=["query"])])
    fresh = logits(model)
    with adapters_disabled(model):
        base = logits(model)
    assert float((fresh - base).abs().max() / base.abs().max()) < 1e-6


@pytest.mark.parametrize("first", [LoRA(rank=2), FullFineTuning()], ids=lambda method: method.name)
@pytest.mark.filterwarnings("ignore:preparing the base")
def test_several_adapters_load_over_the_base_they_were_trained_on(first, tmp_path):
    model = tiny_llama()
    method = LoftQ(rank=2, compute_dtype="float32")  # its folder refuses other packed weights
    inject_all(model, [Adaptation(first, targets=["down"]), Adaptation(method, targets=["query"])])
    losses(model, steps=1)
    save_adapters(model, tmp_path)
    again = tiny_llama()
    load_adapters(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert packed_layers(again).keys() == packed_layers(model).keys()


@pytest.mark.filterwarnings("ignore:preparing the base")
def test_a_module_loads_its_base_so_that_they_stay(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    module = PEFTModule(CausalLMLoader(path=str(tmp_path)), FULL_AND_QLORA)
    module.configure_model()
    assert len(packed_layers(module.model)) == 12
    assert not packed_layers(module.model).keys() & down(tiny_llama())


def test_a_pattern_that_matches_nothing_is_refused_before_the_base_changes():
    model = tiny_llama()
    names = list(model.modules())
    with pytest.raises(TargetError, match="rank_pattern 'up' matches none"):
        inject_all(model, [METHOD, Adaptation(LoRA(rank=2, rank_pattern={"up": 1}), targets=["query"])])
    assert list(model.modules()) == names
    assert not any(
        isinstance(module, nn.Linear) and not module.weight.is_floating_point() for module in model.modules()
    )

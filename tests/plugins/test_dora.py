"""DoRA keeps the contract, equals its formula in float64, and equals HF PEFT: the same tensors, logits and gradients, both ways."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lightning_peft import (
    NF4,
    DoRA,
    Int8,
    LightningPEFTWarning,
    LoRA,
    Quantizer,
    adapter_layers,
    adapter_state_dict,
    get_registry,
    inject,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_active_adapters,
    unmerge_adapters,
)
from lightning_peft.errors import AdapterConfigError, InjectionError, MergeError, PluginConflictError, TargetError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.quantized_layers import unpacked_weight
from lightning_peft.registry import Registry
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


class TestDoRA(MethodConformance):
    method = DoRA()


class TestOnGPT2(MethodConformance):
    method = DoRA(rank=4)
    targets = ["qkv", "output", "up", "down"]  # noqa: RUF012

    def model(self):
        return tiny_gpt2()


class TestRankStabilisedWithDropoutAndBiases(MethodConformance):
    method = DoRA(rank=4, alpha=8, rslora=True, dropout=0.1, bias="lora_only", rank_pattern={"down": 2})

    def model(self):
        return tiny_llama(attention_bias=True, mlp_bias=True)


class TestInThePrecisionOfTheBase(MethodConformance):
    method = DoRA(init="gaussian", dtype="base")
    adapter_dtype = None


class TestOnAnEmbedding(MethodConformance):
    method = DoRA(rank=4)
    targets = ["embedding", "query"]  # noqa: RUF012


class Convolutions(nn.Module):
    def __init__(self, dilation=1):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 6, (3, 2), stride=2)
        self.three = nn.Conv3d(2, 5, 3, padding="same", dilation=dilation)

    def forward(self, x):
        y = self.one(x)  # (batch, 4, 8)
        z = self.two(y.unsqueeze(-1).expand(-1, -1, -1, 5))
        w = self.three(y.reshape(y.shape[0], 2, 4, 2, 2))
        return torch.cat([z.flatten(1), w.flatten(1)], dim=1)


class TestOnConvolutions(MethodConformance):
    method = DoRA(rank=2)
    targets = ["one", "two", "three"]  # noqa: RUF012

    def model(self):
        return Convolutions(dilation=2).eval()

    def inputs(self, seed=0):
        return torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(seed))


def shake(model, std=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def untied_gpt2():
    return tiny_gpt2(tie_word_embeddings=False)


def outputs(model):
    return model(**token_batch()).logits


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


CASES = {
    "llama all linear": (tiny_llama, DoRA(rank=4), "all_linear"),
    "llama rslora, patterns": (
        tiny_llama,
        DoRA(rank=4, alpha=3, rslora=True, rank_pattern={"down": 2}, alpha_pattern={"*.layers.0.mlp.up_proj": 5.5}),
        "all_linear",
    ),
    "llama embedding and head": (tiny_llama, DoRA(rank=3), ["embedding", "head"]),
    "llama bias lora_only": (
        lambda: tiny_llama(attention_bias=True, mlp_bias=True),
        DoRA(rank=2, bias="lora_only"),
        ["query", "down"],
    ),
    "gpt2 Conv1D": (untied_gpt2, DoRA(rank=4), ["qkv", "output", "up", "down"]),
    "gpt2 bias all": (untied_gpt2, DoRA(rank=4, bias="all"), ["qkv"]),
    "gpt2 embedding, rslora": (untied_gpt2, DoRA(rank=3, rslora=True), ["wte", "down"]),
}


@pytest.mark.parametrize("case", CASES)
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits_and_gradients(case, tmp_path):
    make, method, targets = CASES[case]
    ours = make()
    inject(ours, method, targets)
    shake(ours)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).eval()
    assert relative(outputs(ours), outputs(theirs)) <= 1e-5
    assert relative(outputs(ours), outputs(make())) > 1e-2
    # In float64, where rounding through the layers does not hide a wrong term.
    ours, theirs = ours.double(), theirs.double()
    out, expected = outputs(ours), outputs(theirs)
    assert relative(out, expected) <= 1e-12
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    found = {
        name.replace(".default", "").removesuffix(".weight"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    compared = 0
    for path, layer in adapter_layers(ours).items():
        adapter = layer.adapters["default"]
        on_disk = list(adapter.disk_tensors())
        for name, parameter in adapter.named_parameters():
            key = next(key for key in on_disk if name in (key.removesuffix(".weight"), key.removeprefix("base_layer.")))
            other = found[f"base_model.model.{path}.{key}".removesuffix(".weight")]
            transposed = name in ("lora_B", "lora_embedding_A", "lora_embedding_B")
            assert relative(parameter.grad, other.t() if transposed else other) <= 1e-10, (path, name)
            compared += 1
    assert compared == sum(1 for p in ours.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", CASES)
def test_what_hf_peft_writes_loads_as_dora_and_comes_back_bit_equal(case, tmp_path):
    make, method, targets = CASES[case]
    ours = make()
    inject(ours, method, targets)
    shake(ours)
    save_adapter(ours, tmp_path / "ours")
    PeftModel.from_pretrained(make(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = make()
    assert type(load_adapter(again, tmp_path / "theirs").method) is DoRA
    assert relative(outputs(again), outputs(ours)) <= 1e-6
    before, after = adapter_state_dict(ours), adapter_state_dict(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_made_by_hf_peft_from_scratch_loads_and_fresh_ones_have_the_same_magnitudes(use_rslora, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 3},
        task_type="CAUSAL_LM",
        use_dora=True,
        use_rslora=use_rslora,
    )
    theirs = get_peft_model(tiny_llama(), config).eval()
    fresh = tiny_llama()
    inject(fresh, DoRA(), ["query", "down"])
    for path, layer in adapter_layers(fresh).items():
        other = theirs.base_model.model.get_submodule(path).lora_magnitude_vector["default"].weight
        assert relative(layer.adapters["default"].lora_magnitude_vector, other) <= 1e-6
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny_llama()
    method = load_adapter(ours, tmp_path).method
    assert method == DoRA(rank=4, alpha=6, rslora=use_rslora, rank_pattern={"down_proj": 3})
    assert relative(outputs(ours), outputs(theirs)) <= 1e-5


def test_convolutions_equal_hf_peft_both_ways(tmp_path):
    # Without dilation, which HF PEFT 0.21.2 leaves out of the low-rank path.
    x = torch.randn(2, 3, 8)
    ours = Convolutions().eval()
    inject(ours, DoRA(rank=2), ["one", "two", "three"])
    shake(ours, 0.2)
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(Convolutions(), tmp_path / "ours")
    assert relative(ours(x), theirs(x)) <= 1e-5
    assert relative(ours(x), Convolutions()(x)) > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    again = Convolutions()
    load_adapter(again, tmp_path / "theirs")
    assert all(torch.equal(v, adapter_state_dict(ours)[k]) for k, v in adapter_state_dict(again).items())


# -- the formula -------------------------------------------------------------------------------------------------------


def linear(std=0.3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40))
    inject(model, DoRA(rank=4, **options), "0")
    return shake(model, std), model[0].adapters["default"]


def test_a_layer_is_its_formula_in_float64():
    model, adapter = linear()
    x = torch.randn(7, 48)
    W, b = model[0].base_layer.weight.double(), model[0].base_layer.bias.double()
    V = W + adapter.scaling * adapter.lora_B.double().t() @ adapter.lora_A.double()
    m = adapter.lora_magnitude_vector.double()
    expected = x.double() @ (V * (m / V.norm(dim=1)).unsqueeze(1)).t() + b
    assert relative(model(x).double(), expected) <= 1e-6


def test_the_norm_takes_no_part_in_backward():
    model, adapter = linear()
    model.double()
    x, weights = torch.randn(7, 48).double(), torch.randn(7, 40).double()
    (model(x) * weights).sum().backward()
    W = model[0].base_layer.weight.detach()
    A, B, m = (
        p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector)
    )
    V = W + adapter.scaling * B.t() @ A

    def gradients(norm):
        y = x @ (V * (m / norm).unsqueeze(1)).t()
        return torch.autograd.grad((y * weights).sum(), (A, B, m), retain_graph=True)

    found = (adapter.lora_A.grad, adapter.lora_B.grad, adapter.lora_magnitude_vector.grad)
    assert all(relative(a, b) <= 1e-10 for a, b in zip(found, gradients(V.norm(dim=1).detach()), strict=True))
    assert relative(found[0], gradients(V.norm(dim=1))[0]) > 1e-2


def test_the_length_of_each_merged_weight_vector_is_its_magnitude():
    model, adapter = linear()
    x = torch.randn(7, 48)
    out, before = model(x), model[0].base_layer.weight.clone()
    merge_adapters(model)
    lengths = adapter.lora_magnitude_vector.abs()  # a negative one turns the vector around
    assert relative(model[0].base_layer.weight.norm(dim=1), lengths) <= 1e-5
    assert relative(model(x), out) <= 1e-6
    unmerge_adapters(model)
    assert torch.equal(model[0].base_layer.weight, before)


def test_dropout_leaves_the_frozen_path_alone_and_keeps_the_mean():
    model, _ = linear(dropout=0.5)
    x = torch.ones(1, 48)
    expected = model.eval()(x)
    model.train()
    assert not torch.equal(model(x), model(x))
    mean = torch.stack([model(x) for _ in range(3000)]).mean(0)
    assert torch.allclose(mean, expected, atol=0.15)


def test_a_weight_vector_of_zeros_stays_finite_and_learns():
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[1] = 0
    x = torch.randn(5, 6)
    base = model(x)
    inject(model, DoRA(rank=2), "0")
    assert torch.equal(model(x), base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    assert model(x).isfinite().all()
    assert not torch.equal(model(x)[:, 1], base[:, 1])


# -- quantised bases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [NF4(compute_dtype="float32"), Int8()], ids=lambda q: q.name)
def test_over_a_quantised_layer_it_is_the_formula_with_the_unpacked_weight(quantizer):
    torch.manual_seed(0)
    packed = quantizer.quantize(nn.Linear(64, 32))
    model, x = nn.Sequential(packed).train(), torch.randn(5, 64)
    base = model(x).detach()
    inject(model, DoRA(rank=4), "0")
    assert torch.equal(model(x), base)
    shake(model, 0.1)
    adapter = model[0].adapters["default"]
    V = quantizer.dequantized(packed).double() + adapter.scaling * adapter.lora_B.double().t() @ adapter.lora_A.double()
    factor = adapter.lora_magnitude_vector.double() / V.norm(dim=1)
    expected = x.double() @ (V * factor.unsqueeze(1)).t() + packed.bias.double()
    assert relative(model(x).double(), expected) <= (1e-5 if quantizer.name == "nf4" else 1e-2)
    with pytest.raises(MergeError, match="a quantised base cannot be merged into; load the base in 16 or 32 bit"):
        merge_adapters(model)


def test_each_quantizer_knows_its_own_layers():
    plain = nn.Linear(64, 32)
    for kind in get_registry().quantizers.values():
        packed = kind().quantize(plain)
        assert [other.name for other in get_registry().quantizers.values() if other.packs(packed)] == [kind.name]
        assert torch.equal(unpacked_weight(packed), kind().dequantized(packed))
        assert not kind.packs(plain)
    assert unpacked_weight(plain) is plain.weight
    assert not Quantizer.packs(plain)


def test_a_layer_packed_by_nobody_known_is_refused_and_nothing_changes():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model = nn.Sequential(layer)
    with pytest.raises(
        TargetError, match=r"packed as torch.uint8 and none of the registered quantizers \(fp4, int8, nf4\)"
    ):
        inject(model, DoRA(), "0")
    assert model[0] is layer


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_slices_and_attention_modules_are_refused():
    with pytest.raises(
        TargetError, match="DoRA was asked for at query, value of .*c_attn', a fused projection, .* such as 'c_attn'"
    ):
        inject(tiny_gpt2(), DoRA(), ["query", "value"])
    with pytest.raises(TargetError, match="'0', a MultiheadAttention, which DoRA cannot adapt"):
        inject(nn.Sequential(nn.MultiheadAttention(8, 2)), DoRA(), "0")


def test_it_acts_alone_at_a_place():
    model = tiny_llama()
    inject(model, LoRA(rank=2), "query", name="one")
    inject(model, DoRA(rank=2), ["query", "value"], name="two")
    with pytest.raises(InjectionError, match="'dora' acts alone at a place"):
        set_active_adapters(model, ["one", "two"])


# -- who reads HF PEFT's files -------------------------------------------------------------------------------------------


def folder(tmp_path, **options):
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_of_hf_peft_with_use_dora_is_dora_and_one_without_is_lora(tmp_path):
    assert type(load_adapter(tiny_llama(), folder(tmp_path / "a", use_dora=True)).method) is DoRA
    assert type(load_adapter(tiny_llama(), folder(tmp_path / "b")).method) is LoRA
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_qalora": True}))
    with pytest.raises(AdapterConfigError, match="does not have HF PEFT's 'use_qalora'"):
        load_adapter(tiny_llama(), tmp_path / "a")
    with pytest.raises(AdapterConfigError, match="this LoRA does not have HF PEFT's 'use_dora'"):
        LoRA.from_hf_config({"use_dora": True})


@dataclass(frozen=True, kw_only=True)
class Signed(LoRA):
    """A third-party relative of LoRA that claims some of its configurations."""

    name: ClassVar[str] = "signed"

    @classmethod
    def reads_hf_config(cls, config):
        return config.get("sign") is True


@dataclass(frozen=True, kw_only=True)
class Silent(Signed):
    """Inherits the answer, and so gives none of its own."""

    name: ClassVar[str] = "silent"


@dataclass(frozen=True, kw_only=True)
class Finer(Signed):
    """More derived, and says yes to part of what its parent does."""

    name: ClassVar[str] = "finer"

    @classmethod
    def reads_hf_config(cls, config):
        return config.get("sign") is True and config.get("fine") is True


@dataclass(frozen=True, kw_only=True)
class Rival(LoRA):
    """Claims the same as Signed, and neither inherits from the other."""

    name: ClassVar[str] = "rival"

    @classmethod
    def reads_hf_config(cls, config):
        return config.get("sign") is True


def plugin(*kinds):
    def register_methods():
        return list(kinds)

    return SimpleNamespace(__name__=kinds[0].name, register_methods=hookimpl(register_methods))


@pytest.mark.parametrize("order", [(Signed, Silent, Finer), (Finer, Silent, Signed)])
def test_the_most_derived_method_that_claims_a_configuration_reads_it(order):
    registry = Registry(entry_points=False)
    registry.register(plugin(*order))
    for config, kind in [
        ({}, LoRA),
        ({"sign": False, "fine": True}, LoRA),
        ({"sign": True}, Signed),
        ({"sign": True, "fine": True}, Finer),
        ({"use_dora": True}, DoRA),
    ]:
        assert registry.method_for_peft_type("LORA", config) is kind, config
    registry.register(plugin(Rival))
    with pytest.raises(
        PluginConflictError,
        match="'signed' and 'rival' would both read this configuration .* 'LORA'|'rival' and 'signed'",
    ):
        registry.method_for_peft_type("LORA", {"sign": True})
    assert registry.method_for_peft_type("LORA", {"use_dora": True}) is DoRA


@dataclass(frozen=True, kw_only=True)
class Failing(LoRA):
    """Cannot answer."""

    name: ClassVar[str] = "failing"

    @classmethod
    def reads_hf_config(cls, config):
        return config["not there"]


def test_a_method_that_fails_to_answer_is_left_out_and_the_others_read():
    registry = Registry(entry_points=False)
    registry.register(plugin(Failing))
    with pytest.warns(
        LightningPEFTWarning, match=r"failing is broken .* failing.reads_hf_config\(\) raised KeyError: 'not there'"
    ):
        assert registry.method_for_peft_type("LORA", {"use_dora": True}) is DoRA
    assert "failing" not in registry.methods
    assert registry.method_for_peft_type("LORA", {}) is LoRA


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(DoRA())
    assert losses[-1] < losses[0] - 0.2, losses

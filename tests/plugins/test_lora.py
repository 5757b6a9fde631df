"""LoRA against HF PEFT itself: the same tensors give the same outputs and gradients, and folders load both ways."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_peft import (
    LoRA,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
    merge_adapters,
    save_adapter,
    trainable_summary,
    unload_adapters,
    unmerge_adapters,
)
from lightning_peft.errors import AdapterConfigError, ConfigError, MergeError, TargetError
from lightning_peft.interfaces import HF_PREFIX

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


def llama(**options):
    torch.manual_seed(0)
    config = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                **config,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "tie_word_embeddings": False,
                **options,
            }
        )
    )


def gpt2():
    torch.manual_seed(0)
    size = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(
        GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False)
    )


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 6, (3, 2), stride=2)
        self.three = nn.Conv3d(2, 5, 3, padding="same")

    def forward(self, x):
        y = self.one(x)  # (batch, 4, 8)
        z = self.two(y.unsqueeze(-1).expand(-1, -1, -1, 5))
        w = self.three(y.reshape(y.shape[0], 2, 4, 2, 2))
        return z.flatten(1), w.flatten(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


def shake(model, std=0.05):
    """Give every adapter tensor a value, so that nothing is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


IDS = torch.arange(24).view(2, 12) % 61

CASES = {
    "llama q,v": (llama, LoRA(rank=4), ["query", "value"]),
    "llama all linear, rslora": (llama, LoRA(rank=4, alpha=3, rslora=True), "all_linear"),
    "llama patterns": (
        llama,
        LoRA(
            rank=4, rank_pattern={"down": 2, "re:.*layers\\.1\\..*q_proj": 7}, alpha_pattern={"*.layers.0.mlp.*": 5.5}
        ),
        "all_linear",
    ),
    "llama some layers": (llama, LoRA(rank=2), ["re:model.layers.1.*_proj"]),
    "llama embedding": (llama, LoRA(rank=3), ["embedding", "query"]),
    "llama head": (llama, LoRA(rank=3), ["head"]),
    "llama bias lora_only": (
        lambda: llama(attention_bias=True, mlp_bias=True),
        LoRA(rank=2, bias="lora_only"),
        ["query", "down"],
    ),
    "gpt2 Conv1D": (gpt2, LoRA(rank=4), ["qkv", "output", "up", "down"]),
    "gpt2 bias all": (gpt2, LoRA(rank=4, bias="all"), ["qkv"]),
    "gpt2 slices query,value": (gpt2, LoRA(rank=4), ["query", "value"]),
    "gpt2 slices rslora": (gpt2, LoRA(rank=4, alpha=5, rslora=True), ["key"]),
    "gpt2 embedding": (gpt2, LoRA(rank=3), ["wte"]),
}


def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits_and_gradients(case, tmp_path):
    make, method, targets = CASES[case]
    ours = make()
    inject(ours, method, targets)
    shake(ours)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    out, expected = logits(ours), logits(theirs)
    assert relative(out, expected) <= 1e-6
    assert relative(out, logits(make())) > 1e-3  # the adapter does something
    # Gradients in float64, where rounding through the layers does not hide a wrong term.
    ours, theirs = ours.double(), theirs.double()
    out, expected = logits(ours), logits(theirs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    compared = 0
    for path, layer in adapter_layers(ours).items():
        adapter = layer.adapters["default"]
        on_disk = dict.fromkeys(adapter.disk_tensors())
        for name, parameter in adapter.named_parameters():
            key = next(key for key in on_disk if name in (key.removesuffix(".weight"), key.removeprefix("base_layer.")))
            theirs_grad = gradients[f"{HF_PREFIX}{path}.{key}"]
            if name == "lora_B" and adapter.slices:
                blocks = zip(adapter.slices, theirs_grad.t().split(adapter.rank), strict=True)
                theirs_grad = torch.cat([part.view(block).flatten(1) for part, block in blocks], dim=1)
            elif name in ("lora_B", "lora_embedding_A", "lora_embedding_B"):
                theirs_grad = theirs_grad.t()
            assert relative(parameter.grad, theirs_grad) <= 1e-10, (path, name)
            compared += 1
    assert compared == sum(1 for p in ours.parameters() if p.requires_grad)


@pytest.mark.parametrize("rows", [1, 33])
def test_the_gradients_of_one_layer_equal_hf_pefts_in_float32(rows, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 40))
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    inject(ours, LoRA(rank=4), "0")
    shake(ours)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    x, weights = torch.randn(rows, 48), torch.randn(rows, 40)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    for model, data in zip((ours, theirs), xs, strict=True):
        (model(data) * weights).sum().backward()
    adapter, layer = ours[0].adapters["default"], theirs.base_model.model[0]
    assert relative(xs[0].grad, xs[1].grad) <= 1e-6
    assert relative(adapter.lora_A.grad, layer.lora_A["default"].weight.grad) <= 1e-6
    assert relative(adapter.lora_B.grad, layer.lora_B["default"].weight.grad.t()) <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_what_hf_peft_writes_loads_here_and_comes_back_bit_equal(case, tmp_path):
    make, method, targets = CASES[case]
    ours = make()
    inject(ours, method, targets)
    shake(ours)
    save_adapter(ours, tmp_path / "ours")
    PeftModel.from_pretrained(make(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = make()
    load_adapter(again, tmp_path / "theirs")
    assert relative(logits(again), logits(ours)) <= 1e-6
    before, after = adapter_state_dict(ours), adapter_state_dict(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("case", CASES)
def test_merging_is_the_same_function_and_unmerging_restores_every_bit(case):
    make, method, targets = CASES[case]
    model = make()
    inject(model, method, targets)
    shake(model)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    out = logits(model)
    merge_adapters(model)
    assert relative(logits(model), out) <= 5e-6
    unmerge_adapters(model)
    assert torch.equal(logits(model), out)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_an_adapter_made_by_hf_peft_from_scratch_loads(tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"q_proj": 9},
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(llama(), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = llama()
    injection = load_adapter(ours, tmp_path, trainable=True)
    assert injection.method.rank_pattern == {"down_proj": 3}
    assert relative(logits(ours), logits(theirs)) <= 1e-6
    assert trainable_summary(ours).trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_convolutions_equal_hf_peft(tmp_path):
    x = torch.randn(2, 3, 8)
    ours = Convolutions()
    inject(ours, LoRA(rank=2), ["one", "two", "three"])
    shake(ours, 0.2)
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(Convolutions(), tmp_path / "ours")
    for a, b, base in zip(ours(x), theirs(x), Convolutions()(x), strict=True):
        assert relative(a, b) <= 1e-6
        assert relative(a, base) > 1e-3
    out = ours(x)
    merge_adapters(ours)
    assert all(relative(a, b) <= 5e-6 for a, b in zip(ours(x), out, strict=True))
    theirs.save_pretrained(tmp_path / "theirs")
    again = Convolutions()
    load_adapter(again, tmp_path / "theirs")
    assert all(torch.equal(v, adapter_state_dict(ours)[k]) for k, v in adapter_state_dict(again).items())


def test_a_convolution_with_dilation_merges_to_the_same_function():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2, padding=1))
    inject(model, LoRA(rank=2), "0")
    shake(model, 0.2)
    x = torch.randn(2, 3, 9, 9)
    out = model(x)
    merge_adapters(model)
    assert relative(model(x), out) <= 5e-6


def test_multi_head_attention_is_the_sum_of_weights_and_updates_while_hf_peft_adds_one_of_them_twice(tmp_path):
    x = torch.randn(2, 5, 16)
    ours = Attention()
    inject(ours, LoRA(rank=2), "mha")
    shake(ours, 0.2)
    save_adapter(ours, tmp_path / "ours")
    deltas = ours.mha.adapters["default"].deltas()

    def with_updates(times_output):
        model = Attention()
        with torch.no_grad():
            model.mha.in_proj_weight += deltas["in_proj_weight"]
            model.mha.out_proj.weight += times_output * deltas["out_proj.weight"]
        return model(x)

    assert relative(ours(x), with_updates(1)) <= 1e-6
    # HF PEFT 0.21.2 adds the update of the output projection once in the layer and once more in out_proj.merge().
    theirs = PeftModel.from_pretrained(Attention(), tmp_path / "ours")
    assert relative(theirs(x), with_updates(2)) <= 1e-6
    out = ours(x)
    merge_adapters(ours)
    assert relative(ours(x), out) <= 5e-6
    theirs.save_pretrained(tmp_path / "theirs")
    again = Attention()
    load_adapter(again, tmp_path / "theirs")
    assert relative(again(x), out) <= 1e-6


def test_two_adapters_on_multi_head_attention_add_up():
    x = torch.randn(2, 5, 16)
    model = Attention().eval()
    inject(model, LoRA(rank=2), "mha", name="a")
    shake(model)
    inject(model, LoRA(rank=2), "mha", name="b")
    shake(model)
    from lightning_peft import set_active_adapters

    set_active_adapters(model, ["a", "b"])
    both = model(x)
    merge_adapters(model)
    assert relative(model(x), both) <= 5e-6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", [["layers.0.linear1"], ["layers.*.self_attn"]])
def test_adapters_act_in_eval_mode_inside_torchs_own_encoder_despite_its_fused_path(targets):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0), 2).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        base, base_padded = encoder(x), encoder(x, src_key_padding_mask=padding)
    inject(encoder, LoRA(rank=2), targets)
    encoder.eval()
    with torch.no_grad():
        assert torch.allclose(encoder(x), base, atol=1e-6)
        shake(encoder, 0.5)
        assert relative(encoder(x), base) > 1e-2
        assert relative(encoder(x, src_key_padding_mask=padding)[0], base_padded[0]) > 1e-2
        expected = encoder.train()(x)
        assert relative(encoder.eval()(x), expected) <= 1e-5
        unload_adapters(encoder)
        assert torch.equal(encoder(x, src_key_padding_mask=padding), base_padded)


# -- precision and cost ------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self):
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.append((func.__name__, out))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_input_is_never_copied_to_the_precision_of_the_adapter(dtype):
    linear = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    inject(linear, LoRA(rank=4), "0")
    shake(linear)
    x = torch.randn(600, 64, dtype=dtype, requires_grad=True)  # so many that its products are in 16 bits too
    with Operations() as operations:
        y = linear(x)
        y.float().square().sum().backward()
    assert y.dtype == dtype
    adapter = linear[0].adapters["default"]
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == torch.float32
    assert adapter.lora_A.grad.dtype == torch.float32
    copies = [
        out
        for name, out in operations.seen
        if "_to_copy" in name and out.dtype == torch.float32 and out.numel() >= x.numel()
    ]
    assert len(copies) == 1  # the test's own y.float()


def test_a_bfloat16_base_with_float32_adapters_is_as_near_to_float64_as_rounding_allows():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(128, 128, bias=False, dtype=torch.bfloat16))
    inject(linear, LoRA(rank=8), "0")
    shake(linear)
    x = torch.randn(64, 128, dtype=torch.bfloat16)
    a = linear[0].adapters["default"]
    exact = x.double() @ linear[0].base_layer.weight.double().t() + a.scaling * (
        x.double() @ a.lora_A.double().t() @ a.lora_B.double()
    )
    assert relative(linear(x).double(), exact) <= 2**-7


def test_one_active_adapter_on_a_linear_layer_costs_two_thin_products_and_no_copy_of_the_output():
    linear = nn.Sequential(nn.Linear(16, 16, bias=False))
    inject(linear, LoRA(rank=2), "0")
    with Operations() as operations:
        linear(torch.randn(5, 16))
    arithmetic = [
        name.split(".")[0] for name, _ in operations.seen if name.split(".")[0] not in ("t", "view", "detach", "randn")
    ]
    assert arithmetic == ["mm", "mm", "addmm_"]


@pytest.mark.parametrize("bits", [torch.float32, torch.bfloat16])
def test_a_linear_layer_that_somebody_listens_to_is_still_called(bits):
    linear = nn.Sequential(nn.Linear(16, 16, dtype=bits))
    x = torch.randn(3, 5, 16, dtype=bits)
    base = linear(x)
    inject(linear, LoRA(rank=2), "0")
    shake(linear)
    fast = linear(x)
    heard = []
    handle = linear[0].base_layer.register_forward_hook(lambda module, args, output: heard.append(output.clone()))
    slow = linear(x)
    handle.remove()
    assert torch.equal(heard[0], base)
    assert relative(slow, fast) <= (1e-6 if bits == torch.float32 else 2**-7)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(64, 4, bias=False))
    inject(linear, LoRA(rank=2, dropout=0.5), "0")
    shake(linear)
    x = torch.ones(1, 64)
    linear.eval()
    assert torch.equal(linear(x), linear(x))
    expected = linear(x)
    linear.train()
    assert not torch.equal(linear(x), linear(x))
    mean = torch.stack([linear(x) for _ in range(2000)]).mean(0)
    assert torch.allclose(mean, expected, atol=0.02)


# -- hyperparameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "LoRA rank must be a positive integer, got 0"),
        ({"rank": -3}, "got -3"),
        ({"rank": 2.5}, "got 2.5"),
        ({"rank": True}, "got True"),
        ({"alpha": float("nan")}, "LoRA alpha must be a finite number, got nan"),
        ({"alpha": float("inf")}, "got inf"),
        ({"alpha": 0}, "LoRA alpha must not be zero, .* got 0"),
        ({"alpha_pattern": {"query": 0.0}}, r"LoRA alpha_pattern\['query'\] must not be zero, .* got 0.0"),
        ({"rslora": "yes"}, "LoRA rslora must be true or false, got 'yes'"),
        ({"dropout": 1.0}, r"LoRA dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"rank_pattern": {"query": 0}}, r"LoRA rank_pattern\['query'\] must be a positive integer, got 0"),
        ({"alpha_pattern": {"query": float("nan")}}, r"alpha_pattern\['query'\] must be a finite number"),
        ({"init": "xavier"}, "LoRA init must be one of kaiming, gaussian, got 'xavier'"),
        ({"bias": "some"}, "LoRA bias must be one of none, all, lora_only, got 'some'"),
        ({"dtype": "int8"}, "LoRA dtype must be one of float32, base, got 'int8'"),
    ],
)
def test_a_hyperparameter_out_of_range_is_refused_with_its_value(options, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**options)


def test_gaussian_init_has_deviation_one_over_rank_and_kaiming_that_of_hf_peft():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4000, 8), nn.Linear(4000, 8))
    inject(model, LoRA(rank=8, init="gaussian"), "0")
    inject(model, LoRA(rank=8), "1", name="other")
    gaussian, kaiming = model[0].adapters["default"].lora_A, model[1].adapters["other"].lora_A
    assert gaussian.std().item() == pytest.approx(1 / 8, rel=0.05)
    theirs = get_peft_model(nn.Sequential(nn.Linear(4000, 8)), LoraConfig(r=8, target_modules=["0"]))
    bound = theirs.base_model.model[0].lora_A["default"].weight.abs().max().item()
    assert kaiming.abs().max().item() == pytest.approx(bound, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qalora": True}, "does not have HF PEFT's 'use_qalora', which the adapter sets to True"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights before training"),
        ({"r": 0}, "rank must be a positive integer"),
        ({"lora_alpha": None}, "alpha must be a finite number"),
        ({"lora_alpha": 0}, "alpha must not be zero"),
        ({"use_rslora": "no"}, "rslora must be true or false, got 'no'"),
        ({"rank_pattern": {"(a+)+$": 3}}, "nested repetitions"),
        ({"modules_to_save": "lm_head"}, "'modules_to_save' must be a list of names of modules, found 'lm_head'"),
    ],
)
def test_a_configuration_of_hf_peft_that_cannot_be_honoured_is_refused(change, message, tmp_path):
    theirs = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(AdapterConfigError, match=message):
        load_adapter(llama(), tmp_path)


def test_grouped_convolutions_and_containers_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TargetError, match="target '0' matches '0', a Conv2d, which LoRA cannot adapt"):
        inject(model, LoRA(), "0")
    with pytest.raises(TargetError, match="target '1' matches '1', a Sequential"):
        inject(model, LoRA(), "1")


def test_dropout_on_multi_head_attention_is_refused():
    with pytest.raises(TargetError, match=r"LoRA dropout=0.1 was asked for at 'mha', an nn.MultiheadAttention"):
        inject(Attention(), LoRA(dropout=0.1), "mha")


def test_merging_into_a_quantised_base_is_refused():
    from lightning_peft import NF4

    model = nn.Sequential(NF4(compute_dtype="float32").quantize(nn.Linear(64, 32)))
    inject(model, LoRA(rank=2), "0")
    x = torch.randn(3, 64)
    shake(model)
    assert model(x).isfinite().all()
    with pytest.raises(MergeError, match="a quantised base cannot be merged into"):
        merge_adapters(model)


def test_an_embedding_that_scales_its_output_has_its_update_scaled_too():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    model = nn.Sequential(Gemma3TextScaledWordEmbedding(11, 8, 0, embed_scale=3.0))
    inject(model, LoRA(rank=2), "0")
    shake(model)
    out = model(torch.arange(1, 11))
    merge_adapters(model)
    assert relative(model(torch.arange(1, 11)), out) <= 1e-6


def test_a_model_with_adapters_can_be_copied_deeply():
    model = llama()
    inject(model, LoRA(rank=2), "query")
    shake(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    shake(twin)
    assert not torch.equal(logits(twin), logits(model))

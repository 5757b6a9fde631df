"""MixLoRA: numbers against experts written out one by one and against transformers' Mixtral, gradients, families, refusals."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from lightning_peft import (
    Adaptation,
    LoRA,
    MixLoRA,
    adapter_layers,
    adapters_disabled,
    inject,
    inject_all,
    set_active_adapters,
    trainable_summary,
)
from lightning_peft.errors import ConfigError, MergeError, TargetError
from lightning_peft.merging import merge_adapters, unmerge_adapters
from lightning_peft.moe.balance import load_balancing_loss
from lightning_peft.moe.between import Between
from lightning_peft.moe.experts import run_experts
from lightning_peft.moe.low_rank_segments import SegmentPlan, Segments, run_segments
from lightning_peft.moe.mlp_parts import MLPParts
from lightning_peft.moe.routing import TopKRouter
from lightning_peft.moe.statistics import RouterStatistics
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

BOTH = pytest.mark.parametrize("implementation", ["segments", "wide"])
TOKENS = {"vocab_size": 128}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def randomised(model, seed=0, std=0.2):
    """Give every tensor of the adapters a random value, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return model


def mixtures(model):
    """The adapted MLPs by path."""
    return {
        path: layer for path, layer in adapter_layers(model).items() if hasattr(layer.adapters["default"], "router")
    }


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or token_batch())).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def by_hand(layer, x):
    """The paper's formula, one token and one expert at a time, in float64."""
    base, own = layer.base_layer, layer.adapters["default"]
    conv = hasattr(base, "c_fc")
    names = {"up": "c_fc", "down": "c_proj"} if conv else {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    act = base.act if conv else base.act_fn
    scale = own.method.alpha / own.method.rank

    def project(name, expert, x):
        linear = getattr(base, names[name])
        W = (linear.weight.t() if conv else linear.weight).double()
        A, B = (getattr(own, f"{name}_lora_{letter}")[expert].double() for letter in "AB")
        y = (W + scale * B.t() @ A) @ x
        return y if linear.bias is None else y + linear.bias.double()

    rows = []
    for token in x.double().view(-1, x.shape[-1]):
        p = torch.softmax(own.router.double() @ token, dim=0)
        values, experts = p.topk(own.method.top_k)
        y = 0
        for weight, expert in zip(values / values.sum(), experts.tolist(), strict=True):
            hidden = project("up", expert, token)
            hidden = act(hidden) if conv else act(project("gate", expert, token)) * hidden
            y = y + weight * project("down", expert, hidden)
        rows.append(y)
    return torch.stack(rows).view(x.shape)


# -- the formula -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("make", "place"), [(tiny_llama, lambda m: m.model.layers[0].mlp), (tiny_gpt2, lambda m: m.transformer.h[0].mlp)]
)
@pytest.mark.parametrize("top_k", [2, 3])
def test_the_output_is_that_of_experts_written_out_one_by_one(make, place, top_k, implementation):
    model = make()
    inject(model, MixLoRA(experts=5, top_k=top_k, rank=3, alpha=5.0, implementation=implementation))
    layer = place(randomised(model))
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        found, wanted = layer(x), by_hand(layer, x)
        assert relative(found, wanted) <= 2e-6
        assert relative(layer.base_layer(x), wanted) > 0.05


@BOTH
def test_gradients_are_those_of_whole_experts(implementation):
    """Experts W + s B_e A_e, made from the adapter's own tensors and run as whole experts, in float64."""
    model = tiny_llama().double()
    inject(model, MixLoRA(experts=4, rank=3, dropout=0.0, balance_coef=0.0, implementation=implementation))
    layer = randomised(model).model.layers[0].mlp
    own, base = layer.adapters["default"], layer.base_layer
    x = torch.randn(20, 64, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(20, 64, dtype=torch.float64)
    named = {"x": x, **dict(own.named_parameters())}
    found = torch.autograd.grad((layer(x) * goal).sum(), list(named.values()))

    def whole(name):
        A, B = own.pair(name)
        return getattr(base, f"{name}_proj").weight + own.scaling * torch.einsum("ero,eri->eoi", B, A)

    G, U, D = whole("gate"), whole("up"), whole("down")
    p = torch.softmax(F.linear(x, own.router), -1)
    top, chosen = p.topk(2)
    w = torch.zeros_like(p).scatter(1, chosen, top / top.sum(-1, keepdim=True))
    hidden = F.silu(torch.einsum("eoi,ni->neo", G, x)) * torch.einsum("eoi,ni->neo", U, x)
    y = torch.einsum("ne,eio,neo->ni", w, D, hidden)
    wanted = torch.autograd.grad((y * goal).sum(), list(named.values()))
    for name, one, other in zip(named, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", [F.silu, F.gelu], ids=["by formula", "by autograd"])
def test_the_segments_are_differentiated_right(activation):
    """Against finite differences, dropout and empty experts included."""
    torch.manual_seed(0)
    chosen = torch.tensor([[0, 3], [3, 0], [2, 0], [0, 2], [3, 2]])  # expert 1 has no token
    segments = Segments.of(chosen, 4)
    assert [sum(sizes) for sizes in segments.sizes] == [4, 0, 3, 3]
    scores = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in
               [(10, 4), (4, 2, 3), (5, 3), (5, 3), (4, 2, 3), (4, 2, 3)]]  # fmt: skip

    def run(scores, low, down, gate, up, gate_b, up_b, dropout=0.4):
        torch.manual_seed(1)
        plan = SegmentPlan(segments, Between(activation, gated=True), 0.7, dropout)
        return run_segments(plan, torch.softmax(scores, -1), low, down, [gate, up], [gate_b, up_b])

    assert torch.autograd.gradcheck(run, (scores, *tensors))
    assert torch.autograd.gradcheck(functools.partial(run, dropout=0.0), (scores, *tensors))


@BOTH
def test_a_fresh_mixture_is_the_model_whatever_the_router_says(implementation):
    model, plain = tiny_llama(), tiny_llama()
    inject(model, MixLoRA(experts=6, top_k=3, rank=2, implementation=implementation))
    for layer in mixtures(model).values():
        nn.init.normal_(layer.adapters["default"].router, std=3.0)
    assert torch.equal(logits(model), logits(plain))


def test_the_scale_is_alpha_over_the_rank_or_its_root():
    def change(**fields):
        model = tiny_llama()
        inject(model, MixLoRA(experts=2, rank=4, **fields))
        randomised(model)
        own = adapter_layers(model)["model.layers.0.mlp"].adapters["default"]
        return own.update_of("up")

    torch.testing.assert_close(change(alpha=8.0), 2 * change(alpha=4.0))
    torch.testing.assert_close(change(alpha=8.0, rslora=True), 2 * change(alpha=8.0))
    assert relative(change(alpha=8.0), 0.5 * change(alpha=8.0)) > 0.4


@pytest.mark.parametrize("combine", ["together", "one by one"])
def test_mixtral_with_the_experts_as_whole_weights_gives_the_same_logits(combine):
    model = tiny_llama()
    inject(model, MixLoRA(experts=4, rank=3))
    randomised(model, std=0.05)
    live = logits(model)
    config = transformers.MixtralConfig(
        **TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rms_norm_eps=model.config.rms_norm_eps,
        rope_parameters=model.config.rope_parameters,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    config._experts_implementation = "eager" if combine == "one by one" else "batched_mm"
    mixtral = transformers.MixtralForCausalLM(config).eval()
    layers = mixtures(model)
    with adapters_disabled(model), torch.no_grad():
        dense = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".adapters." not in k}
        missing = mixtral.load_state_dict({k: v for k, v in dense.items() if ".mlp." not in k}, strict=False)
        assert all(".mlp." in key for key in missing.missing_keys)
        for path, layer in layers.items():
            own, block = layer.adapters["default"], mixtral.get_submodule(path)
            weights = own.expert_weights(layer.base_layer)
            block.gate.weight.copy_(own.router)
            block.experts.gate_up_proj.copy_(weights.gate_up)
            block.experts.down_proj.copy_(weights.down)
    assert relative(live, logits(mixtral)) <= 2e-6
    assert relative(live, logits(tiny_llama())) > 0.01


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_whole_experts_act_as_the_mixture(make):
    model = make()
    inject(model, MixLoRA(experts=4, rank=3))
    randomised(model)
    layer = next(iter(mixtures(model).values()))
    own, x = layer.adapters["default"], torch.randn(9, 64)
    with torch.no_grad():
        activation = getattr(layer.base_layer, own.parts.activation)
        wanted = run_experts(x, own.assign(x, None), own.expert_weights(layer.base_layer), activation)
        assert relative(layer(x), wanted) <= 2e-6


# -- training ----------------------------------------------------------------------------------------------------------


@BOTH
def test_an_expert_without_tokens_gets_gradients_of_zero(implementation):
    model = tiny_llama()
    inject(model, MixLoRA(experts=4, rank=2, implementation=implementation, balance_coef=0.0))
    layer = randomised(model).model.layers[0].mlp
    own, x = layer.adapters["default"], torch.randn(6, 64)
    with torch.no_grad():
        own.router.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None] * x.mean(0))
    x = x.mean(0).expand(6, 64) + 0.01 * x
    layer(x).square().sum().backward()
    for name in own.pairs:
        for tensor in own.pair(name):
            assert tensor.grad is not None
            assert tensor.grad[:2].abs().sum() > 0
            assert torch.equal(tensor.grad[2:], torch.zeros_like(tensor.grad[2:]))


def test_the_router_learns_from_the_balance_until_the_experts_differ():
    sizes = {}
    for coef in (0.0, 1e-3):
        model = tiny_llama()
        inject(model, MixLoRA(experts=4, rank=2, balance_coef=coef))
        model.train()(**token_batch()).logits.square().mean().backward()
        gradients = [layer.adapters["default"].router.grad for layer in mixtures(model).values()]
        sizes[coef] = [float(gradient.norm()) for gradient in gradients]
    assert max(sizes[0.0]) < 1e-4 * min(sizes[1e-3])


@BOTH
def test_training_adds_the_balance_loss_of_each_layer(implementation):
    def gradients(coef):
        model = tiny_llama()
        torch.manual_seed(0)
        inject(model, MixLoRA(experts=4, rank=2, balance_coef=coef, dropout=0.0, implementation=implementation))
        layer = randomised(model).model.layers[0].mlp.train()
        x = torch.randn(10, 64, generator=torch.Generator().manual_seed(3))
        return layer, x, layer(x).square().mean()

    layer, x, loss = gradients(0.0)
    router = layer.adapters["default"].router
    assignment = TopKRouter(top_k=2).route(F.linear(x, router))
    (wanted,) = torch.autograd.grad(loss + 3e3 * load_balancing_loss(assignment), router)
    layer, _, loss = gradients(3e3)
    (found,) = torch.autograd.grad(loss, layer.adapters["default"].router)
    assert relative(found, wanted) <= 1e-5
    layer, x, _ = gradients(3e3)
    (quiet,) = torch.autograd.grad(layer.eval()(x).square().mean(), layer.adapters["default"].router)
    assert relative(quiet, found) > 1e-3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_a_compiled_step_of_training_is_the_eager_one():
    def gradients(compiled):
        model = tiny_llama()
        inject(model, MixLoRA(experts=4, rank=2, dropout=0.0))
        randomised(model).train()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        run(**token_batch()).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    torch._dynamo.reset()
    eager, compiled = gradients(False), gradients(True)
    torch._dynamo.reset()
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)


def test_padding_has_no_part_in_the_losses_and_the_figures():
    """A batch with padding gives the router the gradient of the same batch without."""

    def gradients(left_out):
        model = tiny_llama()
        torch.manual_seed(0)
        inject(model, MixLoRA(experts=4, rank=2, dropout=0.0, balance_coef=1.0))
        randomised(model).train()
        ids = token_batch(rows=1)["input_ids"]
        mask = torch.ones_like(ids)
        own = model.model.layers[0].mlp.adapters["default"]
        own.statistics = RouterStatistics(4)
        if not left_out:
            ids, mask = (F.pad(part, (0, 5), value=value) for part, value in ((ids, 7), (mask, 0)))
        model(input_ids=ids, attention_mask=mask).logits[:, :12].square().mean().backward()
        return own.statistics.report(), own.router.grad

    (report, padded), (bare_report, bare) = gradients(False), gradients(True)
    assert relative(padded, bare) <= 1e-4
    assert report.load == pytest.approx(bare_report.load)
    assert report.load != pytest.approx((0.25,) * 4)


@BOTH
def test_dropout_acts_in_training_only(implementation):
    model = tiny_llama()
    inject(model, MixLoRA(experts=4, rank=2, dropout=0.5, implementation=implementation))
    randomised(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_it_learns_on_a_real_model(trained_on_e2e):
    losses = trained_on_e2e(MixLoRA(experts=4, rank=4))
    assert losses[-1] < 0.8 * losses[0]


# -- where it goes -----------------------------------------------------------------------------------------------------


def tiny(kind, config, **fields):
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**fields)).eval()


FAMILIES = {
    "phi3": lambda: tiny("Phi3ForCausalLM", "Phi3Config", **SMALL, **TOKENS, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "gpt_neox": lambda: tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL, **TOKENS),
    "gemma2": lambda: tiny("Gemma2ForCausalLM", "Gemma2Config", **SMALL, **TOKENS, num_key_value_heads=2, head_dim=8),
    "vit": lambda: tiny("ViTForImageClassification", "ViTConfig", **SMALL, image_size=16, patch_size=8),
    "distilbert": lambda: tiny("DistilBertForMaskedLM", "DistilBertConfig", **TOKENS, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "t5": lambda: tiny("T5EncoderModel", "T5Config", **TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "t5_gated": lambda: tiny("T5EncoderModel", "T5Config", **TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_mlp_starts_as_it_is_and_acts_as_whole_experts(family):
    model = FAMILIES[family]()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)} if family == "vit" else token_batch()
    with torch.no_grad():
        base = model(**batch)[0]
        inject(model, MixLoRA(experts=3, rank=2))
        fresh = model(**batch)[0]
        # Phi-3's gate and up-projection are halves of one tensor, where the activation may round otherwise.
        assert relative(fresh, base) <= 1e-6 if family == "phi3" else torch.equal(fresh, base)
        randomised(model)
        assert relative(model(**batch)[0], base) > 1e-3
        layers = mixtures(model)
        assert len(layers) == 2
        layer = next(iter(layers.values()))
        own, x = layer.adapters["default"], torch.randn(1, 9, 32)
        activation = getattr(layer.base_layer, own.parts.activation)
        weights = own.expert_weights(layer.base_layer)
        wanted = run_experts(x[0], own.assign(x[0], None), weights, activation)
        assert relative(layer(x)[0], wanted) <= 2e-6


def test_attention_gets_its_lora_by_composition():
    model = tiny_llama()
    mixture = Adaptation(MixLoRA(experts=4, rank=2))
    inject_all(model, [mixture, Adaptation(LoRA(rank=2), ["query", "key", "value", "output"])])
    paths = list(adapter_layers(model))
    assert sum(path.endswith("mlp") for path in paths) == 2
    assert sum("self_attn." in path for path in paths) == 8
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_lora_inside_the_mlp_is_shared_by_the_experts():
    model = tiny_llama()
    inject(model, LoRA(rank=2), ["gate", "down"], name="shared")
    inject(model, MixLoRA(experts=4, rank=2), name="experts")
    set_active_adapters(model, ["shared", "experts"])
    randomised(model)
    both = logits(model)
    merge_adapters(model, "shared")
    assert relative(logits(model), both) <= 1e-5
    unmerge_adapters(model)
    set_active_adapters(model, "experts")
    assert relative(logits(model), both) > 0.01


def test_two_mixtures_at_one_mlp_add_what_each_changes():
    model = tiny_llama().double()
    for name in ("one", "two"):
        inject(model, MixLoRA(experts=3, rank=2), name=name)
        randomised(model, seed=len(name))
    layer, x = model.model.layers[0].mlp, torch.randn(5, 64, dtype=torch.float64)

    def act(*names):
        set_active_adapters(model, list(names))
        with torch.no_grad():
            return layer(x)

    with adapters_disabled(model), torch.no_grad():
        base = layer(x)
    changes = (act("one") - base) + (act("two") - base)
    torch.testing.assert_close(act("one", "two") - base, changes)


def test_the_number_of_trained_parameters_on_llama_3_8b():
    """226 million in the experts of rank 16 of all layers, and 1.05 million in the routers."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        inject(model, MixLoRA())
    experts = 32 * 8 * 16 * 3 * (4096 + 14336)
    assert trainable_summary(model).trainable == experts + 32 * 8 * 4096
    assert round(experts / 1e6) == 226


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, r"MixLoRA top_k=9 with experts=8: .* asks for more than the 8 experts there are"),
        ({"top_k": 1}, r"MixLoRA top_k=1 gives .* the router never learns; choose top_k=2$"),
        ({"experts_pattern": {"mlp": 1}}, r"top_k=2 with experts_pattern\['mlp'\]=1: .*more than the 1 experts"),
        ({"experts_pattern": 3}, "experts_pattern must map targets to numbers, got 3"),
        ({"experts": 0}, "experts must be a positive integer, got 0"),
        ({"rank": True}, "rank must be a positive integer, got True"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"balance_coef": -1.0}, "balance_coef must be a finite number of at least 0, got -1.0"),
        ({"implementation": "fast"}, "implementation must be one of auto, segments, wide, got 'fast'"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MixLoRA(**fields)


def test_what_is_no_mlp_is_refused():
    with pytest.raises(TargetError, match="a LlamaAttention, which MixLoRA cannot adapt"):
        inject(tiny_llama(), MixLoRA(), "layers.0.self_attn")
    model = tiny("OPTForCausalLM", "OPTConfig", **TOKENS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32)  # fmt: skip
    with pytest.raises(TargetError, match="'mlp' matches no module of OPTForCausalLM"):
        inject(model, MixLoRA())


def test_an_mlp_that_computes_something_else_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.ReLU()

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)) ** 2)

    model = nn.ModuleDict({"mlp": Odd()})
    assert MLPParts.of(model["mlp"]) is not None
    with pytest.raises(TargetError, match=r"'mlp' is a Odd .* but it computes something else than down\(act\(up\)\)"):
        inject(model, MixLoRA(), "mlp")
    assert not adapter_layers(model)


def test_merging_is_refused():
    model = tiny_llama()
    inject(model, MixLoRA(experts=2, rank=2))
    with pytest.raises(MergeError, match="a mixture, whose update differs from token to token"):
        merge_adapters(model)

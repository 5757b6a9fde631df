"""LoRAMixture: numbers against experts written out one by one, balance, experts per layer, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft import LoRA, LoRAMixture, adapter_layers, inject, trainable_summary
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.moe.balance import load_balancing_loss
from lightning_peft.moe.low_rank_mixtures import importance_loss
from lightning_peft.moe.routing import TopKRouter
from lightning_peft.moe.statistics import RouterStatistics
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

METHODS = pytest.mark.parametrize(
    "fields", [{}, {"top_k": 3}, {"routing": "soft"}, {"routing": "soft", "rslora": True}]
)


def adapted(fields, bias=True):
    """A linear layer from 12 to 7 features with five experts of rank 3, and random values in them."""
    model = nn.ModuleDict({"linear": nn.Linear(12, 7, bias=bias)})
    inject(model, LoRAMixture(experts=5, rank=3, alpha=6.0, **fields), "linear")
    layer = model["linear"]
    with torch.no_grad():
        for parameter in layer.adapters["default"].parameters():
            parameter.normal_()
    return layer


@METHODS
def test_the_output_is_that_of_experts_written_out_one_by_one(fields):
    layer, x = adapted(fields), torch.randn(2, 6, 12)
    own, W = layer.adapters["default"], layer.base_layer
    scale = 6.0 / (3**0.5 if "rslora" in fields else 3)
    rows = []
    for token in x.double().view(-1, 12):
        p = torch.softmax(own.router.double() @ token, 0)
        if "routing" not in fields:
            least = p.sort().values[-fields.get("top_k", 2)]
            p = torch.where(p >= least, p, 0.0)
            p = p / p.sum()
        y = W.weight.double() @ token + W.bias.double()
        for gate, A, B in zip(p, own.lora_A.double(), own.lora_B.double(), strict=True):
            y = y + scale * gate * (B.t() @ (A @ token))
        rows.append(y)
    wanted = torch.stack(rows).view(2, 6, 7)
    with torch.no_grad():
        assert (layer(x) - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_one_expert_that_gets_every_token_is_lora():
    model, lora = tiny_llama(), tiny_llama()
    inject(model, LoRAMixture(experts=1, rank=4, alpha=8.0, routing="soft"), "up_proj")
    inject(lora, LoRA(rank=4, alpha=8.0), "up_proj")
    with torch.no_grad():
        for path, other in adapter_layers(lora).items():
            own, plain = adapter_layers(model)[path].adapters["default"], other.adapters["default"]
            plain.lora_B.normal_()
            own.lora_A[0].copy_(plain.lora_A)
            own.lora_B[0].copy_(plain.lora_B)
        torch.testing.assert_close(model(**token_batch()).logits, lora(**token_batch()).logits)


@pytest.mark.parametrize("fields", [{}, {"routing": "soft"}])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_fresh_mixture_is_the_model(make, fields):
    model, plain = make(), make()
    inject(model, LoRAMixture(experts=4, rank=2, **fields))
    assert torch.equal(model(**token_batch()).logits, plain(**token_batch()).logits)


def test_experts_without_tokens_get_gradients_of_zero():
    layer = adapted({"balance_coef": 0.0})
    own = layer.adapters["default"]
    with torch.no_grad():
        own.router.copy_(torch.tensor([1.0, 2.0, -1.0, -1.0, -1.0])[:, None].expand(5, 12))
    layer(torch.rand(6, 12)).square().sum().backward()
    for tensor in (own.lora_A, own.lora_B):
        assert tensor.grad[:2].abs().sum() > 0
        assert torch.equal(tensor.grad[2:], torch.zeros_like(tensor.grad[2:]))


@pytest.mark.parametrize(("fields", "balance"), [({}, load_balancing_loss), ({"routing": "soft"}, None)])
def test_training_adds_the_balance_loss(fields, balance):
    x = torch.randn(20, 12)

    def gradient(coef, train=True):
        torch.manual_seed(0)
        layer = adapted({**fields, "balance_coef": coef, "dropout": 0.0}).train(train)
        layer(x).square().mean().backward()
        return layer.adapters["default"].router

    router = gradient(0.0)
    assert torch.equal(gradient(5.0, train=False).grad, router.grad)
    if balance is None:  # the squared coefficient of variation of the experts' summed probabilities
        importance = torch.softmax(F.linear(x, router), -1).sum(0)
        loss = 5.0 * importance.var(correction=0) / importance.mean() ** 2
    else:
        loss = 5.0 * balance(TopKRouter(top_k=2).route(F.linear(x, router)))
    (own,) = torch.autograd.grad(loss, router)
    torch.testing.assert_close(gradient(5.0).grad, router.grad + own, rtol=1e-4, atol=1e-4)
    assert own.abs().max() > 1e-3


def test_importance_is_zero_where_balanced_and_leaves_padding_out():
    logits = torch.eye(3) * 4
    balanced = TopKRouter(top_k=2).route(logits)
    assert float(importance_loss(balanced)) == pytest.approx(0.0, abs=1e-6)
    mask = torch.tensor([True, False, False])
    alone = TopKRouter(top_k=2).route(logits[:1])
    assert float(importance_loss(balanced, mask)) == pytest.approx(float(importance_loss(alone)))


@pytest.mark.parametrize(("fields", "total"), [({}, 2), ({"routing": "soft"}, 5)])
def test_a_monitor_can_listen(fields, total):
    layer = adapted(fields).train()
    own = layer.adapters["default"]
    own.statistics = RouterStatistics(own.num_experts)
    layer(torch.randn(30, 12))
    report = own.statistics.report()
    assert sum(report.load) == pytest.approx(1.0)
    assert float(own.statistics.totals[:5].sum()) == 30 * total


def test_experts_may_differ_from_layer_to_layer():
    model = tiny_llama()
    inject(model, LoRAMixture(experts=4, rank=2, experts_pattern={"layers.1.*": 6}), "up")
    counts = [getattr(layer.adapters["default"], "num_experts", None) for layer in adapter_layers(model).values()]
    assert [count for count in counts if count is not None] == [4, 6]
    assert trainable_summary(model).trainable == (4 + 6) * (2 * (64 + 128) + 64)
    deep = tiny_llama(num_hidden_layers=4)
    inject(deep, LoRAMixture.mola(4, rank=2), "down")
    downs = [layer.adapters["default"] for path, layer in adapter_layers(deep).items() if path.endswith("down_proj")]
    assert [one.num_experts for one in downs] == [2, 4, 6, 8]


@pytest.mark.parametrize("method", [LoRAMixture(experts=4), LoRAMixture.loramoe()])
def test_it_learns_on_a_real_model(trained_on_e2e, method):
    losses = trained_on_e2e(method)
    assert losses[-1] < 0.8 * losses[0]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match=r"LoRAMixture top_k=4 with experts=3: .*more than the 3 experts"):
        LoRAMixture(top_k=4, experts=3)
    assert LoRAMixture(top_k=4, experts=3, routing="soft").soft
    with pytest.raises(ConfigError, match="routing must be one of top_k, soft, got 'hard'"):
        LoRAMixture(routing="hard")
    with pytest.raises(ConfigError, match="mola depth must be a multiple of 4, got 6; give experts_pattern instead"):
        LoRAMixture.mola(6)
    with pytest.raises(TargetError, match=r"LoRAMixture was asked for query, a slice of 'transformer.h.0.attn.c_attn'"):
        inject(tiny_gpt2(), LoRAMixture(), "query")

"""Losses that balance the load, and how they get into any training step."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_peft import PEFTMixin, inject
from lightning_peft.interfaces import Adapter, Method
from lightning_peft.moe.balance import load_balancing_loss, loss_scale, with_auxiliary_loss, z_loss
from lightning_peft.moe.expert_weights import ExpertWeights
from lightning_peft.moe.experts import run_experts
from lightning_peft.moe.routing import ExpertChoiceRouter, TopKRouter
from lightning_peft.moe.statistics import Routed, RouterStatistics


def some_logits(n=12, experts=4):
    return torch.randn(n, experts, generator=torch.Generator().manual_seed(0))


# -- the losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_balanced_load_reads_k(k):
    # Token i wants experts i, i + 1, ...: every expert is chosen as often as every other.
    logits = torch.stack([torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]).roll(shift) for shift in range(8)])
    assignment = TopKRouter(top_k=k, combine="softmax").route(logits)
    assert torch.allclose(load_balancing_loss(assignment), torch.tensor(float(k)), atol=1e-6)


def test_a_collapsed_layer_reads_experts_over_k_times_a_balanced_one_whatever_other_layers_do():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = []
    for layer in range(4):  # each layer collapsed on two experts of its own
        logits = torch.full((64, 8), -9.0)
        logits[:, 2 * layer : 2 * layer + 2] = 0.0
        layers.append(logits)
    losses = [load_balancing_loss(TopKRouter().route(logits)) for logits in layers]
    assert all(float(loss) >= 3.9 * 2 for loss in losses)
    pooled = load_balancing_loss_func(tuple(layers), num_experts=8, top_k=2)  # transformers sees nothing here
    assert abs(float(pooled) - 2.0) < 0.01


def test_one_layer_has_the_loss_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = some_logits(20, 8)
    expected = load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    assert torch.allclose(load_balancing_loss(TopKRouter().route(logits)), expected, atol=1e-6)


def test_the_z_loss_is_the_mean_of_the_squared_log_of_the_sum():
    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.25, 0.25, 0.25, 0.25]]))
    expected = torch.log(torch.tensor(10.0)) ** 2 / 2
    assert torch.allclose(z_loss(TopKRouter().route(logits)), expected)


@pytest.mark.parametrize("router", [TopKRouter(), ExpertChoiceRouter()], ids=["top_k", "expert_choice"])
@pytest.mark.parametrize("loss", [load_balancing_loss, z_loss])
def test_padding_is_left_out_of_the_losses(loss, router):
    logits, mask = some_logits(12, 4), torch.tensor([True, False, True, True] * 3)
    logits[~mask] *= 100.0
    expected = loss(router.route(logits[mask]), None)
    assert torch.allclose(loss(router.route(logits, mask=mask), mask), expected, atol=1e-6)
    nothing = torch.zeros(12, dtype=torch.bool)
    assert loss(router.route(logits, mask=nothing), nothing) == 0.0


# -- in the backward of somebody else's loss ---------------------------------------------------------------------------------


class Mixture(Adapter, Routed):
    """Four experts behind a router, with a loss that is added to the model's (explicitly) or to its gradients."""

    def __init__(self, module, explicit, recompute):
        super().__init__()
        self.explicit, self.recompute, self.num_experts = explicit, recompute, 4
        width = module.out_features
        self.router = nn.Parameter(torch.empty(4, width))
        self.up = nn.Parameter(torch.empty(4, 2 * width, width))
        self.down = nn.Parameter(torch.empty(4, width, width))
        self.losses = []

    def reset_parameters(self, base_layer):
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def mix(self, x):
        assignment = TopKRouter(combine="softmax").route(x @ self.router.t())
        self.observe(assignment)
        loss = 0.3 * load_balancing_loss(assignment) + 0.1 * z_loss(assignment)
        if self.explicit:
            self.losses.append(loss)
        else:
            assignment = dataclasses.replace(assignment, weights=with_auxiliary_loss(assignment.weights, loss))
        return run_experts(x, assignment, ExpertWeights(self.up, self.down), F.silu)

    def forward(self, base, x):
        x = base(x)
        return checkpoint(self.mix, x, use_reentrant=self.recompute == "reentrant") if self.recompute else self.mix(x)


@dataclass(frozen=True, kw_only=True)
class Mixing(Method):
    """Put a mixture behind a linear layer."""

    name: ClassVar[str] = "mixing"
    identity_at_init: ClassVar[bool] = False
    explicit: bool = False
    recompute: str = ""

    def supports(self, module):
        return isinstance(module, nn.Linear)

    def adapter(self, module, target):
        return Mixture(module, self.explicit, self.recompute)


class Plain(PEFTMixin, LightningModule):
    """A training step that knows nothing of mixtures, but for the explicit kind, which is the oracle."""

    def __init__(self, method, twice):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(8, 8))
        inject(self.net, method)
        self.twice, self.gradients = twice, []

    def training_step(self, batch, batch_idx):
        y = self.net(batch.requires_grad_())  # as reentrant checkpoints need it
        y = self.net(y) if self.twice else y
        loss = y.square().mean()
        (mixture,) = mixtures(self)
        for auxiliary in mixture.losses:
            loss = loss + auxiliary
        mixture.losses.clear()
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([parameter.grad.clone() for parameter in self.parameters() if parameter.requires_grad])

    def configure_optimizers(self):
        return torch.optim.SGD([parameter for parameter in self.parameters() if parameter.requires_grad], lr=1e-3)


def mixtures(module):
    return [inner for inner in module.modules() if isinstance(inner, Mixture)]


def gradients_of(method, make_trainer, folder, *, twice=False, accumulate=1, scaler=None):
    data = DataLoader(torch.randn(8, 8, generator=torch.Generator().manual_seed(7)), batch_size=2)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaler else None
    module = Plain(method, twice)
    make_trainer(folder, max_epochs=1, accumulate_grad_batches=accumulate, plugins=plugins).fit(module, data)
    assert len(module.gradients) == 4 // accumulate
    return module.gradients


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_the_gradient_is_that_of_the_loss_and_the_auxiliary_loss(twice, accumulate, scaled, make_trainer, tmp_path):
    def gradients(explicit):
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0) if scaled else None
        method = Mixing(explicit=explicit)
        return gradients_of(method, make_trainer, tmp_path, twice=twice, accumulate=accumulate, scaler=scaler)

    for injected, expected in zip(gradients(False), gradients(True), strict=True):
        for found, wanted in zip(injected, expected, strict=True):
            assert float((found - wanted).abs().max()) <= 1e-7 * max(1.0, float(wanted.abs().max()))
            assert wanted.abs().sum() > 0


@pytest.mark.parametrize("recompute", ["reentrant", "saved"])
def test_recomputing_activations_counts_the_loss_once(recompute, make_trainer, tmp_path):
    injected = gradients_of(Mixing(recompute=recompute), make_trainer, tmp_path, accumulate=2)
    for found, wanted in zip(
        injected, gradients_of(Mixing(explicit=True), make_trainer, tmp_path, accumulate=2), strict=True
    ):
        assert all(torch.allclose(left, right, atol=1e-7, rtol=1e-6) for left, right in zip(found, wanted, strict=True))


def test_without_the_auxiliary_loss_the_gradient_is_another(make_trainer, tmp_path):
    with_it = gradients_of(Mixing(), make_trainer, tmp_path)
    without = Mixing(explicit=True)
    module = Plain(without, False)
    module.net(torch.randn(2, 8, generator=torch.Generator().manual_seed(7))).square().mean().backward()
    (mixture,) = mixtures(module)
    assert float((mixture.router.grad - with_it[0][0]).norm()) > 1e-3


def test_forward_is_the_same_bit_for_bit_and_the_scale_holds_only_inside():
    weights = torch.rand(5, requires_grad=True)
    scalar = torch.tensor(2.0, requires_grad=True)
    for scale in (1.0, 0.25, torch.tensor(64.0)):
        result = with_auxiliary_loss(weights, 3.0 * scalar)
        assert torch.equal(result, weights)
        with pytest.raises(RuntimeError, match="stop"), loss_scale(0.125), loss_scale(7.0):
            raise RuntimeError("stop")
        with loss_scale(scale):
            result.sum().backward()
        assert float(scalar.grad) == 3.0 * float(scale)
        assert torch.equal(weights.grad, torch.ones(5))
        weights.grad = scalar.grad = None


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch.compile's own, while it traces
def test_a_compiled_backward_reads_the_scale_when_it_runs():
    scalar = torch.tensor(2.0, requires_grad=True)
    compiled = torch.compile(lambda w, s: with_auxiliary_loss(w, 3.0 * s) * 2.0, backend="aot_eager", fullgraph=True)
    for scale in (1.0, 0.25, torch.tensor(64.0)):
        result = compiled(torch.rand(5), scalar)
        with loss_scale(scale):
            result.sum().backward()
        assert float(scalar.grad) == 3.0 * float(scale)
        scalar.grad = None


# -- statistics ------------------------------------------------------------------------------------------------------------


def test_statistics_are_means_over_all_tokens_that_are_not_padding():
    router, statistics = ExpertChoiceRouter(capacity=1.0), RouterStatistics(4)
    batches = [(some_logits(12), torch.arange(12) < 8), (some_logits(8) * 3, torch.arange(8) < 8)]
    loads, rows, uncovered = torch.zeros(4), [], []
    for logits, mask in batches:
        assignment = router.route(logits, mask=mask)
        statistics.update(assignment, mask)
        loads += assignment.expert_counts()
        rows.append(torch.softmax(logits[mask].double(), -1))
        uncovered.append((assignment.token_counts()[mask] == 0).double())
    p, report = torch.cat(rows), statistics.report()
    assert report.load == (0.25,) * 4
    assert report.max_over_mean == 1.0
    assert abs(report.entropy - float(torch.distributions.Categorical(p).entropy().mean())) < 1e-6
    assert abs(report.confidence - float(p.amax(-1).mean())) < 1e-6
    assert abs(report.uncovered - float(torch.cat(uncovered).mean())) < 1e-6
    assert report.uncovered > 0
    statistics.reset()
    assert statistics.report().load == (0.0,) * 4


def test_a_collapsed_router_shows():
    statistics = RouterStatistics(8)
    statistics.update(TopKRouter(top_k=1, combine="softmax").route(torch.tensor([[99.0] + [0.0] * 7] * 5)))
    report = statistics.report()
    assert report.max_over_mean == 8.0
    assert report.load[0] == 1.0
    assert report.confidence == 1.0
    assert report.uncovered == 0.0


def test_nothing_is_kept_while_nobody_listens():
    mixture = Mixture(nn.Linear(8, 8), False, "")
    mixture.reset_parameters(nn.Identity())
    before = set(mixture.__dict__), list(mixture.state_dict())
    mixture(nn.Identity(), torch.randn(3, 8))
    assert (set(mixture.__dict__), list(mixture.state_dict())) == before
    mixture.statistics = RouterStatistics(4)
    mixture(nn.Identity(), torch.randn(3, 8))
    assert list(mixture.state_dict()) == before[1]
    assert mixture.statistics.totals[4] == 3
    mixture.eval()(nn.Identity(), torch.randn(3, 8))
    assert mixture.statistics.totals[4] == 3

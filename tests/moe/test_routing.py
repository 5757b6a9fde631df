"""Which token goes where: rules written out with loops, and by hand."""

import math

import pytest
import torch

from lightning_peft.errors import ConfigError, UnknownNameError
from lightning_peft.moe.router_choice import router_named
from lightning_peft.moe.routing import ExpertChoiceRouter, NoisyTopKRouter, SigmoidRouter, TopKRouter


def some_logits(n, experts, seed=0):
    return torch.randn(n, experts, generator=torch.Generator().manual_seed(seed))


def dense(assignment):
    """Weights as a matrix (n, experts), zero where a token does not go."""
    table = torch.zeros_like(assignment.logits)
    for token, expert, weight in zip(assignment.tokens, assignment.experts, assignment.weights.detach(), strict=True):
        table[token, expert] += weight
    return table


# -- top-k ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["renorm", "softmax", "straight_through"])
def test_top_k_takes_the_likeliest_experts_of_all(combine):
    logits = torch.tensor([[math.log(4.0), math.log(3.0), math.log(2.0), math.log(1.0)]])
    assignment = TopKRouter(top_k=2, combine=combine).route(logits)
    assert assignment.experts.tolist() == [0, 1]
    assert assignment.tokens.tolist() == [0, 0]
    expected = [0.4, 0.3] if combine == "softmax" else [4 / 7, 3 / 7]
    assert torch.allclose(assignment.weights, torch.tensor(expected))
    assert torch.allclose(assignment.probabilities, torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    assert assignment.k == 2


def test_straight_through_has_the_value_of_renorm_and_the_gradient_of_softmax():
    logits = some_logits(3, 4).requires_grad_()
    ones = TopKRouter(top_k=1, combine="straight_through").route(logits).weights
    assert torch.equal(ones, torch.ones(3))
    (slope,) = torch.autograd.grad(ones.sum(), logits)
    (expected,) = torch.autograd.grad(torch.log_softmax(logits, -1).amax(-1).sum(), logits)  # d p / p
    assert torch.allclose(slope, expected, atol=1e-6)
    assert slope.abs().sum() > 0.1


@pytest.mark.parametrize("kind", [TopKRouter, NoisyTopKRouter, SigmoidRouter])
def test_one_expert_with_renorm_is_refused_and_the_way_out_named(kind):
    with pytest.raises(
        ConfigError, match=f"{kind.__name__} top_k=1 with combine='renorm' .* choose combine='straight_through'"
    ):
        kind(top_k=1)
    kind(top_k=1, combine="straight_through")


@pytest.mark.parametrize("kind", [TopKRouter, NoisyTopKRouter, SigmoidRouter])
def test_more_experts_a_token_than_there_are_is_refused(kind):
    kind(top_k=4).check(4)
    with pytest.raises(ConfigError, match=f"{kind.__name__} top_k=5 asks for more than the 4 experts there are"):
        kind(top_k=5).check(4)
    with pytest.raises(ConfigError, match="top_k=5 asks for more"):
        kind(top_k=5).route(some_logits(2, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKRouter(top_k=0), "TopKRouter top_k must be a positive integer, got 0"),
        (lambda: TopKRouter(top_k=True), "TopKRouter top_k must be a positive integer, got True"),
        (
            lambda: TopKRouter(combine="mean"),
            "combine must be one of 'renorm', 'softmax', 'straight_through', got 'mean'",
        ),
        (
            lambda: SigmoidRouter(combine="softmax"),
            "must be one of 'renorm', 'sigmoid', 'straight_through', got 'softmax'",
        ),
        (lambda: NoisyTopKRouter(noise=0.0), "NoisyTopKRouter noise must be positive and finite, got 0.0"),
        (lambda: ExpertChoiceRouter(capacity=0), "ExpertChoiceRouter capacity must be positive and finite, got 0"),
        (lambda: ExpertChoiceRouter(capacity=math.inf), "capacity must be positive and finite, got inf"),
        (lambda: ExpertChoiceRouter(capacity=9.0).check(8), "capacity=9.0 asks for more than the 8 experts there are"),
        (lambda: ExpertChoiceRouter(combine="sum"), "combine must be 'renorm' or 'softmax', got 'sum'"),
        (
            lambda: ExpertChoiceRouter(group="row"),
            "group must be 'batch', 'sequence' or a positive number of tokens, got 'row'",
        ),
        (lambda: ExpertChoiceRouter(group=0), "or a positive number of tokens, got 0"),
        (lambda: ExpertChoiceRouter(group="sequence").route(some_logits(4, 2)), "needs the (batch, sequence) shape"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize("router", [TopKRouter(), SigmoidRouter(), NoisyTopKRouter()])
def test_padding_gets_no_weight_and_changes_nothing_for_others(router):
    logits, mask = some_logits(6, 4), torch.tensor([True, True, False, True, False, True])
    table = dense(router.route(logits, mask=mask))
    assert (table[~mask] == 0).all()
    assert torch.equal(table[mask], dense(router.route(logits[mask])))
    assert router.route(logits, mask=mask).token_counts().tolist() == [2, 2, 0, 2, 0, 2]


def test_routing_is_in_float32_whatever_the_logits_are_in():
    assignment = TopKRouter().route(some_logits(3, 4).bfloat16())
    assert assignment.weights.dtype == assignment.logits.dtype == assignment.probabilities.dtype == torch.float32
    assert TopKRouter().route(some_logits(3, 4).double()).weights.dtype == torch.float64


def test_a_later_token_changes_nothing_for_an_earlier_one_where_the_router_is_causal():
    logits, other = some_logits(12, 4), some_logits(12, 4)
    other[6:] = some_logits(6, 4, seed=8)
    for router in (TopKRouter(), SigmoidRouter(), NoisyTopKRouter()):
        assert router.causal
        assert torch.equal(dense(router.route(logits))[:6], dense(router.route(other))[:6])
    router = ExpertChoiceRouter()
    assert not router.causal
    assert not torch.equal(dense(router.route(logits))[:6], dense(router.route(other))[:6])


# -- sigmoid and noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["renorm", "sigmoid"])
def test_the_sigmoid_router_weighs_by_sigmoids(combine):
    logits = torch.tensor([[0.0, math.log(3.0), math.log(1 / 3), -9.0]])  # sigmoids 1/2, 3/4, 1/4, about 0
    assignment = SigmoidRouter(combine=combine).route(logits)
    assert assignment.experts.tolist() == [1, 0]
    expected = [0.75, 0.5] if combine == "sigmoid" else [0.6, 0.4]
    assert torch.allclose(assignment.weights, torch.tensor(expected))
    assert torch.allclose(assignment.probabilities.sum(-1), torch.ones(1))


def test_noise_is_drawn_in_training_only_in_the_size_asked_for():
    router, logits = NoisyTopKRouter(top_k=1, combine="softmax", noise=2.0), torch.zeros(20000, 2)
    assert torch.equal(router.route(logits).weights, torch.full((20000,), 0.5))
    assignment = router.route(logits, training=True)
    # The log-odds of two experts differ by two draws of deviation 2/2: their size has the mean of a half-normal of variance 2.
    odds = torch.logit(assignment.weights)
    assert abs(float(odds.mean()) - math.sqrt(2) * math.sqrt(2 / math.pi)) < 0.03
    assert torch.equal(assignment.probabilities, torch.full((20000, 2), 0.5))
    assert torch.equal(assignment.logits, logits)


# -- expert choice ---------------------------------------------------------------------------------------------------------


def choice_written_out(logits, capacity, groups, combine):
    """Zhou et al., section 3.2, expert by expert, over groups of token numbers."""
    p, table = torch.softmax(logits.double(), -1), torch.zeros_like(logits, dtype=torch.float64)
    experts = logits.shape[1]
    for group in groups:
        for expert in range(experts):
            wanted = sorted(group, key=lambda token: -float(p[token, expert]))
            for token in wanted[: math.ceil(capacity * len(group) / experts)]:
                table[token, expert] = p[token, expert]
    total = table.sum(-1, keepdim=True)
    return (table / total.where(total > 0, torch.ones_like(total)) if combine == "renorm" else table).float()


@pytest.mark.parametrize("combine", ["renorm", "softmax"])
@pytest.mark.parametrize(
    ("group", "groups"),
    [
        ("batch", [range(24)]),
        ("sequence", [range(12), range(12, 24)]),
        (7, [range(7), range(7, 14), range(14, 21), range(21, 24)]),
        (100, [range(24)]),
    ],
)
@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0, 3.3, 8.0])
def test_expert_choice_is_what_the_paper_says(capacity, group, groups, combine):
    logits = some_logits(24, 8)
    router = ExpertChoiceRouter(capacity=capacity, group=group, combine=combine)
    assignment = router.route(logits, shape=(2, 12))
    assert torch.allclose(dense(assignment), choice_written_out(logits, capacity, groups, combine), atol=1e-6)
    # Exactly T tokens an expert, and the weights of a token that has an expert sum to one.
    taken = sum(math.ceil(capacity * len(tokens) / 8) for tokens in groups)
    assert assignment.expert_counts().tolist() == [taken] * 8
    covered = assignment.token_counts() > 0
    if combine == "renorm":
        assert torch.allclose(dense(assignment)[covered].sum(-1), torch.ones(int(covered.sum())))
    if capacity == 8.0:
        assert covered.all()
    if capacity == 0.5:
        assert not covered.all()


@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_padding_takes_no_capacity(group):
    logits, router = some_logits(2 * 9, 4), ExpertChoiceRouter(capacity=1.0, group=group)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = mask[1, 8:] = False
    mask = mask.flatten()
    groups = [mask.nonzero().flatten().tolist()]
    if group == "sequence":
        groups = [[token for token in groups[0] if token < 9], [token for token in groups[0] if token >= 9]]
    logits[~mask] = 30.0 * some_logits(4, 4, seed=3)  # padding that every expert would want
    assignment = router.route(logits, mask=mask, shape=(2, 9))
    expected = choice_written_out(logits, 1.0, groups, "renorm")
    assert torch.allclose(dense(assignment), expected, atol=1e-6)
    assert (assignment.token_counts()[~mask] == 0).all()
    alone = router.route(logits[mask][:6], shape=(1, 6))
    if group == "sequence":  # what is behind a sequence does not change what its tokens get
        assert torch.equal(dense(assignment)[:6], dense(alone))


def test_a_group_that_is_all_padding_gets_nothing():
    mask = torch.tensor([True] * 4 + [False] * 4)
    assignment = ExpertChoiceRouter(group=4).route(some_logits(8, 2), mask=mask)
    assert assignment.token_counts().tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    assert torch.isfinite(assignment.weights).all()


@pytest.mark.parametrize("combine", ["renorm", "softmax"])
def test_the_gradient_of_expert_choice_goes_through_the_weights(combine):
    logits = some_logits(6, 3).double().requires_grad_()
    router = ExpertChoiceRouter(capacity=1.5, combine=combine)
    assert torch.autograd.gradcheck(lambda values: router.route(values).weights, (logits,))


@pytest.mark.parametrize("kind", [TopKRouter, NoisyTopKRouter, SigmoidRouter, ExpertChoiceRouter])
def test_a_router_can_be_written_down_and_read_again(kind):
    router = kind()
    assert kind.from_config(router.to_config()) == router
    assert router_named(kind.name, router.to_config()) == router


def test_an_unknown_router_is_refused_with_the_nearest_name():
    with pytest.raises(
        UnknownNameError, match="unknown router 'top_k'; did you mean 'topk'.* Registered: expert_choice, noisy_topk"
    ):
        router_named("top_k")


def test_an_unknown_field_of_a_router_is_refused_with_the_nearest_name():
    with pytest.raises(
        ConfigError,
        match="the router 'topk' has no field 'topk'; did you mean 'top_k'.* Its fields are: top_k, combine",
    ):
        router_named("topk", {"topk": 3})


@pytest.mark.parametrize(
    ("name", "fields", "sums_to", "scale"),
    [
        ("topk", {}, 1.0, 1.0),
        ("topk", {"combine": "softmax"}, 2 / 8, 4.0),
        ("topk", {"combine": "straight_through"}, 1.0, 1.0),
        ("noisy_topk", {"combine": "softmax"}, 2 / 8, 4.0),
        ("sigmoid", {"combine": "softmax"}, 1.0, 1.0),
        ("sigmoid", {"combine": "softmax", "top_k": 3}, 1.5, 2 / 3),
        ("sigmoid", {}, 1.0, 1.0),
    ],
)
def test_what_a_router_says_of_its_weights_is_so(name, fields, sums_to, scale):
    router = router_named(name, {}, {"capacity": 1.0, **fields})
    logits = torch.zeros(5, 8, requires_grad=True)
    assignment = router.route(logits)
    assert assignment.weights.view(5, -1).sum(1).tolist() == pytest.approx([sums_to] * 5)
    assert router.undecided_scale(8) == pytest.approx(scale) == pytest.approx(1 / sums_to)
    assert assignment.k == router.experts_per_token
    assert router.uniform
    (gradient,) = torch.autograd.grad(assignment.weights.sum(), logits)
    assert router.normalized == (float(gradient.abs().max()) < 1e-7)


@pytest.mark.parametrize("combine", ["renorm", "straight_through"])
def test_sigmoids_that_are_all_zero_give_finite_weights(combine):
    logits = torch.tensor([[-105.0, -106.0, -107.0, -108.0], [1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    found = SigmoidRouter(combine=combine).route(logits)
    weights = found.weights.view(2, 2)
    assert torch.allclose(weights.sum(-1), torch.ones(2))
    wide = torch.sigmoid(logits.detach().double())
    top = wide.topk(2, dim=-1).values
    assert torch.allclose(weights.detach().double(), top / top.sum(-1, keepdim=True), rtol=1e-5)
    assert torch.allclose(found.probabilities.detach().double(), wide / wide.sum(-1, keepdim=True), rtol=1e-5)
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    assert torch.isfinite(gradient).all()

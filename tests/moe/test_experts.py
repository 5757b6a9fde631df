"""The experts against a loop over tokens and experts, written out from the formula."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from lightning_peft.errors import ConfigError
from lightning_peft.moe.expert_weights import ExpertWeights
from lightning_peft.moe.experts import SlotOrder, run_experts
from lightning_peft.moe.routing import Assignment, ExpertChoiceRouter, TopKRouter

# While torch.compile traces, it makes an instance of an autograd.Function and looks at .grad of inner tensors, and warns itself of that.
quiet_compiler = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning:torch")
IMPLEMENTATIONS = ["unbind", "grouped_mm"]


def make_weights(experts, d, ff, *, gated=True, biased=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def new(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return values.to(dtype).requires_grad_()

    width = 2 * ff if gated else ff
    biases = (new(experts, width), new(experts, d)) if biased else (None, None)
    return ExpertWeights(new(experts, width, d), new(experts, d, ff), *biases, gated=gated)


def tensors(weights):
    named = (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    return [tensor for tensor in named if tensor is not None]


def written_out(x, assignment, weights):
    """The formula in float64: one slot after the other, one parameter per expert."""
    wide = [None if t is None else t.double() for t in (weights.gate_up_bias, weights.down_bias)]
    ups, downs = weights.gate_up.double(), weights.down.double()
    rows = [torch.zeros_like(x[0], dtype=torch.float64) for _ in range(len(x))]
    for slot, (token, expert) in enumerate(zip(assignment.tokens.tolist(), assignment.experts.tolist(), strict=True)):
        hidden = ups[expert] @ x[token].double()
        hidden = hidden if wide[0] is None else hidden + wide[0][expert]
        if weights.gated:
            gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
            hidden = F.silu(gate) * up
        else:
            hidden = F.silu(hidden)
        output = downs[expert] @ hidden
        output = output if wide[1] is None else output + wide[1][expert]
        rows[token] = rows[token] + assignment.weights[slot].double() * output
    return torch.stack(rows)


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def routed(router, n, d, experts, *, shape=None):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, d, generator=generator).requires_grad_()
    gate = torch.randn(experts, d, generator=generator).requires_grad_()
    return x, gate, router.route(x @ gate.t(), shape=shape)


CASES = {
    "top 2 of 8": (TopKRouter(top_k=2), 24, 8),
    "every expert": (TopKRouter(top_k=4, combine="softmax"), 10, 4),
    "one token": (TopKRouter(top_k=2), 1, 8),
    "one expert a token": (TopKRouter(top_k=1, combine="straight_through"), 12, 4),
    "expert choice": (ExpertChoiceRouter(capacity=2.0), 24, 8),
    "expert choice in groups": (ExpertChoiceRouter(capacity=1.0, group=7), 24, 8),
    "expert choice of one token": (ExpertChoiceRouter(capacity=1.0), 1, 4),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_experts_do_what_the_formula_says_forward_and_backward(implementation, case, biased, gated):
    router, n, experts = CASES[case]
    weights = make_weights(experts, 16, 24, gated=gated, biased=biased)
    x, gate, assignment = routed(router, n, 16, experts)
    found, expected = (
        run_experts(x, assignment, weights, F.silu, implementation=implementation),
        written_out(x, assignment, weights),
    )
    assert found.dtype == x.dtype
    assert relative(found, expected) <= 1e-6
    inputs = [x, gate, *tensors(weights)]
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    kept = torch.autograd.grad((found * direction).sum(), inputs, retain_graph=True)
    oracle = torch.autograd.grad((expected * direction).sum(), inputs)
    scale = max(float(gradient.norm()) for gradient in oracle)
    for gradient, wanted in zip(kept, oracle, strict=True):
        assert float((gradient.double() - wanted.double()).norm()) <= 1e-5 * max(float(wanted.norm()), 1e-2 * scale)


@pytest.mark.parametrize("d", [250, 10])
def test_widths_that_are_not_aligned_run_by_unbind_and_are_refused_by_grouped_mm(d):
    weights = make_weights(4, d, 12)
    x, _, assignment = routed(TopKRouter(), 6, d, 4)
    assert relative(run_experts(x, assignment, weights, F.silu), written_out(x, assignment, weights)) <= 1e-5
    with pytest.raises(
        ConfigError, match=f"implementation='grouped_mm' was asked for, but it needs rows of .* and {d} numbers of"
    ):
        run_experts(x, assignment, weights, F.silu, implementation="grouped_mm")


def test_float64_runs_by_unbind_and_an_unknown_implementation_is_refused():
    weights = make_weights(4, 16, 16, dtype=torch.float64)
    x, _, assignment = routed(TopKRouter(), 6, 16, 4)
    run_experts(x.double(), assignment, weights, F.silu)
    with pytest.raises(ConfigError, match="it does not take torch.float64; choose 'auto' or 'unbind'"):
        run_experts(x.double(), assignment, weights, F.silu, implementation="grouped_mm")
    with pytest.raises(ConfigError, match="must be 'auto', 'unbind' or 'grouped_mm', got 'eager'"):
        run_experts(x, assignment, weights, F.silu, implementation="eager")


@pytest.mark.parametrize("router", [TopKRouter(), ExpertChoiceRouter(capacity=1.5)], ids=["top_k", "expert_choice"])
def test_first_and_second_derivatives_are_right_in_float64(router):
    weights = make_weights(3, 4, 3, biased=True, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    x, gate = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in [(5, 4), (3, 4)]
    )

    def run(x, gate, *values):
        return run_experts(x, router.route(x @ gate.t()), ExpertWeights(*values), F.silu)

    assert torch.autograd.gradcheck(run, (x, gate, *tensors(weights)))
    assert torch.autograd.gradgradcheck(run, (x, gate, *tensors(weights)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_drops_the_same_features_forward_and_backward(implementation, gated):
    """The activation runs again in backward; what was dropped must not be drawn again."""
    dtype = torch.float64 if implementation == "unbind" else torch.float32
    weights = make_weights(3, 4, 8, gated=gated, biased=True, dtype=dtype)
    x, _, assignment = routed(TopKRouter(), 6, 4, 3)

    def run(x, *values, p=0.4):
        torch.manual_seed(5)
        new = ExpertWeights(*values, gated=gated)
        return run_experts(x, assignment, new, F.silu, dropout=p, implementation=implementation)

    inputs = [x.detach().to(dtype).requires_grad_(), *(tensor.detach().requires_grad_() for tensor in tensors(weights))]
    assert not torch.allclose(run(*inputs), run(*inputs, p=0.0))
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)
    mean = torch.stack([run_experts(x, assignment, weights, F.silu, dropout=0.4) for _ in range(2000)]).mean(0)
    assert relative(mean, run_experts(x, assignment, weights, F.silu)) <= 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.SiLU, SiLUActivation])
def test_swiglu_by_its_formula_is_bit_equal_to_autograd_and_hooks_are_heard(kind, dtype):
    weights, (x, _, assignment) = make_weights(4, 16, 24, dtype=dtype), routed(TopKRouter(), 20, 16, 4)
    leaf = x.detach().to(dtype).requires_grad_()

    def gradients(activation):
        output = run_experts(leaf, assignment, weights, activation, implementation="unbind")
        return torch.autograd.grad(output.float().square().sum(), [leaf, *tensors(weights)])

    formula = gradients(kind())
    for mine, its in zip(formula, gradients(lambda hidden: F.silu(hidden)), strict=True):
        assert torch.equal(mine, its)
    halved = kind()
    halved.register_forward_hook(lambda module, args, output: output / 2)
    for mine, its in zip(gradients(halved), gradients(lambda hidden: F.silu(hidden) / 2), strict=True):
        assert torch.equal(mine, its)
        assert not torch.equal(mine, formula[0])


def test_the_gradient_can_be_taken_twice_from_one_graph():
    weights, (x, _, assignment) = make_weights(4, 16, 24), routed(TopKRouter(), 20, 16, 4)
    total = run_experts(x, assignment, weights, F.silu, implementation="unbind").square().sum()
    first = torch.autograd.grad(total, [x, *tensors(weights)], retain_graph=True)
    for mine, its in zip(first, torch.autograd.grad(total, [x, *tensors(weights)]), strict=True):
        assert torch.equal(mine, its)


class Slope(nn.Module):
    """An activation that is trained itself."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


@pytest.mark.parametrize("trained", [True, False])
def test_an_activation_with_parameters_gets_their_gradient(trained):
    weights, activation = make_weights(4, 16, 24, biased=True), Slope().requires_grad_(trained)
    x, _, assignment = routed(TopKRouter(), 20, 16, 4)
    found = run_experts(x, assignment, weights, activation, implementation="unbind").square().sum()
    wanted = run_experts(x, assignment, weights, activation, implementation="grouped_mm").square().sum()
    inputs = [x, *tensors(weights), *([activation.slope] if trained else [])]
    for mine, its in zip(
        torch.autograd.grad(found, inputs, retain_graph=True), torch.autograd.grad(wanted, inputs), strict=True
    ):
        assert relative(mine, its) <= 1e-5


@pytest.mark.parametrize("trained", ["gate_up", "down", "gate_up_bias", "down_bias", None])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(trained):
    x, _, assignment = routed(TopKRouter(), 20, 16, 4)

    def gradients(names):
        weights = make_weights(4, 16, 24, biased=True)
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            getattr(weights, name).requires_grad_(name in names)
        leaf = x.detach().clone().requires_grad_(not names or len(names) > 1)
        output = run_experts(leaf, assignment, weights, F.silu, implementation="unbind")
        output.square().sum().backward(inputs=[leaf] if not names else None, retain_graph=True)
        return {"x": leaf.grad, **{name: getattr(weights, name).grad for name in names}}

    every = gradients(("gate_up", "down", "gate_up_bias", "down_bias"))
    found = gradients((trained,) if trained else ())
    key = trained or "x"
    assert torch.equal(found[key], every[key])
    assert set(found) - {"x"} == ({trained} if trained else set())
    assert (found["x"] is None) == bool(trained)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_without_tokens_gets_a_gradient_of_zeros_and_never_none(implementation):
    weights = make_weights(4, 16, 16, biased=True)
    x = torch.randn(5, 16)
    assignment = TopKRouter(top_k=1, combine="softmax").route(torch.tensor([[0.0, 9.0, 0.0, 0.0]]).expand(5, 4))
    run_experts(x, assignment, weights, F.silu, implementation=implementation).square().sum().backward()
    for tensor in tensors(weights):
        assert tensor.grad is not None
        assert (tensor.grad[[0, 2, 3]] == 0).all()
        assert tensor.grad[1].abs().sum() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_token_at_all_gives_zeros_too(implementation):
    weights = make_weights(4, 16, 16)
    x, _, assignment = routed(TopKRouter(), 0, 16, 4)
    y = run_experts(x, assignment, weights, F.silu, implementation=implementation)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert all((tensor.grad == 0).all() for tensor in tensors(weights))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_of_a_plain_sum_can_be_taken(implementation):
    # Its gradient is an expanded tensor, which grouped_mm refuses.
    weights = make_weights(4, 16, 16)
    x, _, assignment = routed(TopKRouter(), 6, 16, 4)
    run_experts(x, assignment, weights, F.silu, implementation=implementation).sum().backward()
    expected = torch.autograd.grad(written_out(x, assignment, weights).sum(), weights.down)[0]
    assert relative(weights.down.grad, expected) <= 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_identical_experts_are_the_dense_mlp_and_their_gradients_sum_to_its(k, implementation):
    one = make_weights(1, 16, 32)
    dense_up, dense_down = one.gate_up[0].detach().requires_grad_(), one.down[0].detach().requires_grad_()
    copies = ExpertWeights(*(tensor.detach().repeat(8, 1, 1).requires_grad_() for tensor in (one.gate_up, one.down)))
    combine = "renorm" if k > 1 else "straight_through"
    x, gate, assignment = routed(TopKRouter(top_k=k, combine=combine), 40, 16, 8)
    mixed = run_experts(x, assignment, copies, F.silu, implementation=implementation)
    left, right = F.linear(x, dense_up).chunk(2, dim=-1)
    dense = F.linear(F.silu(left) * right, dense_down)
    assert float((mixed - dense).detach().abs().max()) <= 2e-6 * float(dense.detach().abs().max())
    mixed.square().sum().backward()
    slope = gate.grad
    dense.square().sum().backward()
    assert relative(copies.gate_up.grad.sum(0), dense_up.grad) <= 5e-6
    assert relative(copies.down.grad.sum(0), dense_down.grad) <= 5e-6
    if k > 1:  # the output does not depend on the router while the weights sum to one
        assert float(slope.norm()) <= 1e-6 * float(dense_up.grad.norm())
    else:
        assert float(slope.norm()) > 1e-2 * float(dense_up.grad.norm())


def alone(x, assignment, weights):
    """The dense MLP on the tokens of each expert alone (slots, d): a product of other sizes may round other sums."""
    slots = SlotOrder.of(assignment)
    sizes = torch.diff(slots.ends, prepend=torch.zeros(1)).int().tolist()
    parts = torch.split(x.index_select(0, slots.tokens), sizes)
    return torch.cat([dense(part, weights) for part in parts])[slots.by_token]


def dense(x, weights):
    left, right = F.linear(x, weights.gate_up[0]).chunk(2, dim=-1)
    return F.linear(F.silu(left) * right, weights.down[0])


@pytest.mark.parametrize(
    ("dtype", "k"), [(torch.bfloat16, 1), (torch.bfloat16, 2), (torch.bfloat16, 4), (torch.float32, 1)]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_identical_experts_are_the_dense_mlp_bit_for_bit(implementation, dtype, k):
    """In bfloat16, whose sums over the experts are in float32, and with one expert a token."""
    met = 0
    for n, d, ff, experts in [(33, 32, 32, 4), (80, 64, 176, 8), (512, 64, 128, 8), (512, 128, 256, 8)]:
        one = make_weights(1, d, ff, dtype=dtype)
        copies = ExpertWeights(one.gate_up.repeat(experts, 1, 1), one.down.repeat(experts, 1, 1))
        combine = "straight_through" if k == 1 else "renorm"
        x, _, assignment = routed(TopKRouter(top_k=k, combine=combine), n, d, experts)
        x = x.to(dtype)
        mixed = run_experts(x, assignment, copies, F.silu, implementation=implementation)
        assert mixed.dtype == dtype
        whole, parts = dense(x, one), alone(x, assignment, one).view(n, k, d)
        same = (parts == whole[:, None]).all(-1).all(-1)  # where the dense MLP rounds alike in products of either size
        assert torch.equal(mixed[same], whole[same])
        if k == 1 and implementation == "unbind":
            assert torch.equal(mixed, parts[:, 0])
        met += bool(same.all())
    assert met > 0, "at one of these sizes the whole batch is to be the same"


def test_autocast_decides_the_precision_of_the_products_and_not_of_the_sum():
    weights = make_weights(4, 16, 16)
    x, _, assignment = routed(TopKRouter(), 20, 16, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run_experts(x, assignment, weights, F.silu)
    assert y.dtype == torch.float32
    half = run_experts(x.bfloat16(), assignment, weights, F.silu)
    assert half.dtype == torch.bfloat16
    assert torch.equal(y.bfloat16(), half)
    y.sum().backward()
    assert weights.down.grad.dtype == torch.float32


@pytest.mark.parametrize("router", [TopKRouter(), ExpertChoiceRouter()], ids=["top_k", "expert_choice"])
def test_results_repeat_bit_for_bit(router):
    weights = make_weights(8, 16, 16)
    kept = []
    for _ in range(2):
        x, gate, assignment = routed(router, 300, 16, 8)
        y = run_experts(x, assignment, weights, F.silu)
        kept.append([y, *torch.autograd.grad(y.square().sum(), [x, gate, weights.gate_up])])
    assert all(torch.equal(first, second) for first, second in zip(*kept, strict=True))


@quiet_compiler
@pytest.mark.parametrize("router", [TopKRouter(), ExpertChoiceRouter()], ids=["top_k", "expert_choice"])
def test_grouped_mm_compiles_into_one_graph_in_bfloat16(router):
    weights = make_weights(4, 16, 16, biased=True, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    x, gate = (
        torch.randn(*shape, generator=generator, dtype=torch.bfloat16).requires_grad_() for shape in [(12, 16), (4, 16)]
    )

    def run(x, gate, *values):
        return run_experts(x, router.route(x @ gate.t()), ExpertWeights(*values), F.silu, implementation="grouped_mm")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    arguments = (x, gate, *tensors(weights))
    direction = torch.randn(12, 16, generator=generator)
    for found, expected in zip(
        *(torch.autograd.grad((f(*arguments).float() * direction).sum(), arguments) for f in (compiled, run)),
        strict=True,
    ):
        assert relative(found, expected) <= 1e-2


@quiet_compiler
def test_unbind_compiles_with_a_break_and_not_once_for_each_load():
    weights = make_weights(4, 16, 16)
    _, gate, _ = routed(TopKRouter(), 6, 16, 4)
    graphs = []

    def counter(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=counter)
    def run(x):
        return run_experts(x, TopKRouter().route(x @ gate.t()), weights, F.silu)

    compiled = []
    for seed in range(5):
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
        expected = run_experts(x, TopKRouter().route(x @ gate.t()), weights, F.silu)
        assert torch.allclose(run(x), expected, atol=1e-6)
        compiled.append(len(graphs))
    assert len(set(compiled)) == 1


def test_a_token_without_a_slot_gets_zeros():
    weights = make_weights(2, 8, 8)
    indices = torch.tensor([1, 1]), torch.tensor([0, 1])
    assignment = Assignment(*indices, torch.tensor([0.5, 0.5]), torch.zeros(3, 2), torch.full((3, 2), 0.5), None)
    y = run_experts(torch.randn(3, 8), assignment, weights, nn.GELU())
    assert (y[[0, 2]] == 0).all()
    assert y[1].abs().sum() > 0

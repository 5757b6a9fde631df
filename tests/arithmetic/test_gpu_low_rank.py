"""Kernels for low-rank updates, run by Triton's interpreter where there is no GPU: against float64, and beside the plain path."""

import importlib.util
import itertools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lightning_peft import AdaLoRA, LoRA, LoRAFA, QLoRA, adapter_rows, fuse_blocks, inject
from lightning_peft.arithmetic import gpu_low_rank
from lightning_peft.errors import ConfigError
from lightning_peft.testing import tiny_llama, token_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install 'lightning-peft[triton]'"
)
WIDTHS = [(40, 70, 150, 5), (17, 16, 33, 16), (130, 200, 48, 3)]  # tokens, in, out, rank: no multiples of tiles


@pytest.fixture
def kernels(monkeypatch):
    """Ask for kernels, on the CPU too, and count what is launched."""
    from lightning_peft.arithmetic import triton_low_rank

    if DEVICE == "cpu" and not triton_low_rank._interpreted():
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set, which tests/conftest.py does")
    launched = []

    def counted(name):
        kernel = getattr(triton_low_rank, name)
        return lambda *args, **kwargs: (launched.append(name), kernel(*args, **kwargs))[1]

    for name in ("add", "outer"):
        monkeypatch.setattr(triton_low_rank, name, counted(name))
    monkeypatch.setattr(gpu_low_rank, "DEVICES", (DEVICE,))
    monkeypatch.setattr(gpu_low_rank, "asked", True)
    return launched


def tensors(dtype, tokens, width_in, width_out, rank, index=None):
    shape = (rank,) if index is None else (max(index) + 1, rank)
    x = torch.randn(tokens, width_in).to(dtype)
    W, b = (torch.randn(width_out, width_in) / width_in**0.5).to(dtype), torch.randn(width_out).to(dtype)
    A, B = torch.randn(*shape, width_in) / width_in**0.5, torch.randn(*shape, width_out)
    direction = torch.randn(tokens, width_out).to(dtype)
    return [one.to(DEVICE) for one in (x, W, b, A, B, direction)]


def plainly(dtype, scale, index, x, W, b, A, B, direction):  # noqa: N803 - as in the formula
    """Return y, dx, dA and dB of torch's own operations in ``dtype``; in float64 the matrices are those that the dtype of x has room for."""
    masters = [one.to(x.dtype).double() if dtype == torch.float64 else one.clone() for one in (A, B)]
    x, W, b, direction = (one.to(dtype) for one in (x, W, b, direction))
    down, up = (one.requires_grad_().to(dtype) for one in masters)
    x = x.requires_grad_()
    y = F.linear(x, W, b)
    if index is None:
        y = torch.addmm(y, x @ down.t(), up, alpha=scale)
    else:
        updates = [
            torch.zeros_like(piece @ W.t()) if place < 0 else scale * (piece @ down[place].t()) @ up[place]
            for place, piece in zip(index, x.chunk(len(index)), strict=True)
        ]
        y = y + torch.cat(updates)
    y.backward(direction)
    return [y.detach(), x.grad, *(one.grad for one in masters)]


def by_kernels(form, scale, index, x, W, b, A, B, direction):  # noqa: N803 - as in the formula
    x, A, B = (one.detach().clone().requires_grad_() for one in (x, A, B))
    at = None if index is None else torch.tensor(index, device=DEVICE)
    if form == "layer":
        y = gpu_low_rank.linear_and_update(x, W, b, A, B, scale, at)
    else:
        y = gpu_low_rank.added(F.linear(x, W, b), x, A, B, scale, at, in_place=form == "in place")
    y.backward(direction)
    return [y.detach(), x.grad, A.grad, B.grad]


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@needs_triton
@pytest.mark.parametrize("form", ["layer", "beside", "in place"])
@pytest.mark.parametrize("index", [None, (0, 2, -1, 0, 1)], ids=["one", "rows"])
def test_kernels_in_float32_are_the_formula(kernels, form, index):
    given = tensors(torch.float32, *WIDTHS[0], index)
    found, wanted = by_kernels(form, 0.5, index, *given), plainly(torch.float64, 0.5, index, *given)
    assert [distance(one, other) < 1e-6 for one, other in zip(found, wanted, strict=True)] == [True] * 4
    assert {one.dtype for one in found} == {torch.float32}


@needs_triton
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("form", ["layer", "in place"])
def test_in_bfloat16_they_are_no_further_from_float64_than_the_plain_path(kernels, form, widths):
    given = tensors(torch.bfloat16, *widths)
    wanted = plainly(torch.float64, 2.0, None, *given)
    plain = plainly(torch.bfloat16, 2.0, None, *given)
    found = by_kernels(form, 2.0, None, *given)
    for name, mine, theirs, right in zip(["y", "dx", "dA", "dB"], found, plain, wanted, strict=True):
        assert distance(mine, right) <= 1.02 * distance(theirs, right), (
            name
        )  # of the same rounding of h and of the result
    assert distance(found[2], wanted[2]) < 0.9 * distance(plain[2], wanted[2])  # written in float32, not rounded before
    assert kernels == ["add", "add", "outer", "outer"]


@needs_triton
def test_rows_without_an_adapter_are_the_base_bit_for_bit(kernels):
    x, W, b, A, B, _ = tensors(torch.bfloat16, 40, 70, 150, 5, index := (0, -1, 1, -1))
    b = torch.full_like(b, -0.0)
    x[10:20] = 0  # so that the base is -0.0 there
    y = gpu_low_rank.linear_and_update(x, W, b, A, B, 0.5, torch.tensor(index, device=DEVICE)).view(4, 10, -1)
    base = F.linear(x, W, b).view(4, 10, -1)
    for row in (1, 3):
        assert torch.equal(y[row].view(torch.int16), base[row].view(torch.int16))
    assert not torch.equal(y[0], base[0])


@needs_triton
@pytest.mark.parametrize("needed", [needed for needed in itertools.product([False, True], repeat=3) if any(needed)])
def test_only_what_is_needed_is_computed(kernels, needed):
    x, W, b, A, B, direction = tensors(torch.bfloat16, *WIDTHS[1])
    wanted = by_kernels("layer", 0.5, None, x, W, b, A, B, direction)[1:]
    del kernels[:]
    leaves = [one.clone().requires_grad_(need) for one, need in zip((x, A, B), needed, strict=True)]
    x, A, B = leaves
    gpu_low_rank.linear_and_update(x, W, b, A, B, 0.5).backward(direction)
    for leaf, need, right in zip(leaves, needed, wanted, strict=True):
        assert torch.equal(leaf.grad, right) if need else leaf.grad is None
    assert kernels == ["add"] * (1 + (needed[0] or needed[1])) + ["outer"] * (needed[1] + needed[2])


@needs_triton
def test_no_tokens(kernels):
    x, W, b, A, B, direction = (
        one[:0] if number in (0, 5) else one for number, one in enumerate(tensors(torch.bfloat16, *WIDTHS[1]))
    )
    y, dx, dA, dB = by_kernels("layer", 0.5, None, x, W, b, A, B, direction)
    assert (y.shape, dx.shape) == (direction.shape, x.shape)
    assert not dA.any()
    assert not dB.any()


# -- in models ---------------------------------------------------------------------------------------------------------


def adapted(method, dtype=torch.bfloat16, names=("default",), targets="query"):
    model = tiny_llama(num_hidden_layers=2 if targets == "query" else 1).to(DEVICE, dtype)
    for number, name in enumerate(names):
        inject(model, method, targets, name=name)
        torch.manual_seed(number)
        for path, parameter in model.named_parameters():
            if f".{name}." in path and parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def step(model):
    model.zero_grad()
    batch = {name: one.to(DEVICE) for name, one in token_batch(rows=3, length=8).items()}
    loss = model(**batch).logits.float().square().mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_step(model, kernels, expected, around=None):
    around = around or torch.enable_grad
    with around():
        loss, gradients = step(model)
    gpu_low_rank.asked = False
    with around():
        plain_loss, plain = step(model)
    assert loss == pytest.approx(plain_loss, rel=5e-3)
    assert gradients.keys() == plain.keys()
    assert all(distance(gradients[name], plain[name]) < 0.05 for name in plain)
    assert (kernels.count("add"), kernels.count("outer")) == expected


@needs_triton
def test_a_step_of_lora_takes_them_at_every_layer(kernels):
    same_step(adapted(LoRA(rank=4), targets="all_linear"), kernels, (14, 14))  # seven linear layers


@needs_triton
def test_a_packed_base_takes_the_update_alone(kernels):
    same_step(adapted(QLoRA(rank=4, compute_dtype="bfloat16")), kernels, (4, 4))


@needs_triton
def test_what_keeps_less_for_backward_goes_before(kernels):
    model = adapted(LoRA(rank=4, dropout=0.5))
    step(model)  # with one byte an element of the mask
    step(fuse_blocks(adapted(LoRA(rank=4))))  # without what the norm before the layer can make again
    assert kernels.count("add") == 2  # in the first layer, whose norm has an input without a gradient
    del kernels[:]
    same_step(model.eval(), kernels, (4, 4))


@needs_triton
def test_autocast_takes_them_too(kernels):
    same_step(
        adapted(LoRA(rank=4), torch.float32),
        kernels,
        (4, 4),
        lambda: torch.autocast(DEVICE, torch.bfloat16),
    )


@needs_triton
def test_rows_take_them(kernels):
    model = adapted(LoRA(rank=4), names=("a", "b"))
    inject(model, AdaLoRA(init_rank=6, target_rank=2), "query", name="c")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.adapters["c"].lora_E)
    same_step(model, kernels, (4, 4), lambda: adapter_rows(model, ["b", "c", "a"]))


@needs_triton
def test_activation_checkpointing_takes_them_too(kernels):
    layer = adapted(LoRA(rank=4)).model.layers[0].self_attn.q_proj
    x = torch.randn(4, layer.base_layer.in_features, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    (found,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(found, wanted)
    assert kernels.count("add") == 2 + 3  # forward once more


@needs_triton
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (LoRA(rank=4), torch.float32),
        (LoRAFA(rank=4), torch.bfloat16),
        (LoRA(rank=130), torch.bfloat16),
        (AdaLoRA(init_rank=4, target_rank=2), torch.bfloat16),  # P diag(E) Q, an update of its own
    ],
)
def test_what_they_are_not_for_takes_the_plain_path(kernels, method, dtype):
    step(adapted(method, dtype))
    assert kernels == []


@needs_triton
def test_slices_and_trained_weights_take_the_plain_path(kernels):
    layer = torch.nn.Sequential(torch.nn.Linear(16, 24, device=DEVICE, dtype=torch.bfloat16))
    inject(layer, LoRA(rank=2), "0")
    x = torch.randn(4, 16, device=DEVICE, dtype=torch.bfloat16)
    layer[0].base_layer.requires_grad_(True)
    layer(x).sum().backward()
    assert kernels == ["add", "add", "outer", "outer"]  # beside the layer, which has gradients of its own
    assert layer[0].base_layer.weight.grad is not None


@needs_triton
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap on the plain path
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # what torch's forward mode begins with
def test_torch_func_and_forward_mode_take_the_plain_path(kernels):
    layer = torch.nn.Sequential(torch.nn.Linear(16, 24, device=DEVICE, dtype=torch.bfloat16))
    inject(layer, LoRA(rank=2), "0")
    x = torch.randn(4, 16, device=DEVICE, dtype=torch.bfloat16)
    wanted = torch.func.vmap(layer)(x)
    torch.func.grad(lambda one: layer(one).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
    assert kernels == []
    torch.testing.assert_close(layer(x), wanted)
    assert kernels == ["add"]


@needs_triton
@pytest.mark.parametrize("form", ["layer", "beside"])
@pytest.mark.parametrize("index", [None, (0, 1, -1, 0, 1)], ids=["one", "rows"])
def test_second_derivatives_are_those_of_the_formula(kernels, form, index):
    x, W, b, A, B, direction = tensors(torch.float32, 20, 12, 18, 3, index)
    at = None if index is None else torch.tensor(index, device=DEVICE)
    leaves = [one.requires_grad_() for one in (x, A, B)]

    def formula():
        if index is None:
            return F.linear(x, W, b) + 0.5 * (x @ A.t()) @ B
        pieces = [
            0 * (piece @ W.t()) if place < 0 else 0.5 * (piece @ A[place].t()) @ B[place]
            for place, piece in zip(index, x.chunk(5), strict=True)
        ]
        return F.linear(x, W, b) + torch.cat(pieces)

    def by_kernel():
        if form == "layer":
            return gpu_low_rank.linear_and_update(x, W, b, A, B, 0.5, at)
        return gpu_low_rank.added(F.linear(x, W, b), x, A, B, 0.5, at, in_place=False)

    found, wanted = [], []
    for into, y in ((found, by_kernel()), (wanted, formula())):
        first = torch.autograd.grad((y.square() * direction).sum(), leaves, create_graph=True)
        into += first + torch.autograd.grad(sum(one.square().sum() for one in first), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@needs_triton
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # what torch 2.13 compiles Functions with
def test_compiled_without_a_break_they_are_in_the_graph(kernels):
    layer = adapted(LoRA(rank=4)).model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, layer.base_layer.in_features, device=DEVICE, dtype=torch.bfloat16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def run(call):
        one = x.clone().requires_grad_()
        layer.zero_grad()
        y = call(one)
        y.float().square().sum().backward()
        return [y.detach(), one.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    torch._dynamo.reset()
    found = run(torch.compile(layer, fullgraph=True, backend=backend))
    torch._dynamo.reset()
    for one, other in zip(found, run(layer), strict=True):
        torch.testing.assert_close(one, other)
    (graph,) = graphs
    assert graph.print_readable(print_output=False).count("lightning_peft.low_rank_add") == 2  # forward and backward


@needs_triton
def test_the_operators_keep_their_promises_to_torch(kernels):
    from lightning_peft.arithmetic import triton_low_rank

    x, W, b, A, B, _ = tensors(torch.bfloat16, *WIDTHS[1])
    y = F.linear(x, W, b)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton_low_rank.add_operator, (y, x, A, B, 0.5, None, None, True), test_utils=tests)
    torch.library.opcheck(triton_low_rank.outer_operator, (x[:, :16], y, 0.5, torch.float32), test_utils=tests)


@needs_triton
def test_they_compile_for_gpus(tmp_path):
    """Without a GPU: Triton compiles for one that it is told of, and says what its assembler and shared memory refuse."""
    program = """
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile as build
        from lightning_peft.arithmetic import triton_low_rank as kernels

        t = kernels._tiles(4096, 1, 4096, 4096, 128, 100)
        add = dict.fromkeys(("x", "y", "out", "thin"), "*bf16") | dict.fromkeys(("down", "up"), "*fp32")
        add |= dict.fromkeys(("tokens", "width_in", "width_out", "rank", "part"), "i32")
        tiles = {"TOKENS": t.tokens, "INS": t.ins, "OUTS": t.outs, "READ": True}
        outer = {"thin": "*bf16", "wide": "*bf16", "grad": "*fp32"} | dict.fromkeys(("rows", "tokens", "width", "rank"), "i32")
        for kernel, types, constants in (
            (kernels._add_kernel, add, tiles),
            (kernels._outer_kernel, outer, {"TOKENS": 64, "COLUMNS": 32}),
        ):
            constants |= {"ROWS": True, "RANK": t.rank, "INTERPRETED": False}
            types |= {"index": "*i64", "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
            built = build(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 80, 32))
            print("mma" in built.asm["ptx"], built.metadata.shared < 64 * 1024, len(built.asm["cubin"]) > 0)
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == ["True True True"] * 2


# -- the switch --------------------------------------------------------------------------------------------------------


def test_nobody_who_did_not_ask_gets_them(monkeypatch):
    monkeypatch.setattr(gpu_low_rank, "DEVICES", ("cpu",))
    assert not gpu_low_rank.asked
    assert not gpu_low_rank.reached(torch.zeros(1))


def test_who_asks_without_triton_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(gpu_low_rank, "DEVICES", ("cpu",))
    monkeypatch.setattr(gpu_low_rank, "asked", True)
    monkeypatch.setattr(gpu_low_rank, "_installed", False)
    with pytest.raises(ConfigError, match=r"LIGHTNING_PEFT_TRITON=1 asks .* pip install 'lightning-peft\[triton\]'"):
        adapted(LoRA(rank=2))(**token_batch(rows=1, length=2))


@pytest.mark.parametrize(
    ("dtype", "rank", "message"),
    [
        (torch.float32, 4, "the output is torch.float32"),
        (torch.bfloat16, 129, "the rank is 129; the kernels go to 128"),
    ],
)
def test_refusals_say_why(dtype, rank, message):
    reason = gpu_low_rank.refusal(torch.zeros(2, 8), dtype, torch.zeros(rank, 8), torch.zeros(rank, 8))
    assert message in reason

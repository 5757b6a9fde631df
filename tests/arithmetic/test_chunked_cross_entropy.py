"""Cross-entropies in chunks are those of the whole: losses, gradients, precision, memory."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_peft.arithmetic.chunked_cross_entropy import CrossEntropy, chunked_cross_entropy
from lightning_peft.errors import ConfigError


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made in a ``with`` block and live at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in before:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def difference(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def problem(dtype=torch.float32, trained=False, rows=3, length=37, width=16, vocabulary=301, ignored=0.3):
    hidden = torch.randn(rows, length, width, dtype=dtype).requires_grad_()
    head = nn.Linear(width, vocabulary, bias=trained).to(dtype).requires_grad_(trained)
    labels = torch.randint(0, vocabulary, (rows, length))
    labels[torch.rand(rows, length) < ignored] = -100
    return hidden, head, labels


def whole(hidden, head, labels, **options):
    logits = head(hidden).flatten(0, -2)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten(), **options)


CASES = {
    "mean": {},
    "sum": {"mean": False},
    "smoothed": {"label_smoothing": 0.1},
    "other ignored label": {"ignore_index": 7},
}


@pytest.mark.parametrize("rows_apart", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_whole(case, trained, rows_apart):
    hidden, head, labels = problem(trained=trained)
    options = CASES[case]
    if "ignore_index" in options:
        labels[labels == -100] = options["ignore_index"]
    plain = {key: value for key, value in options.items() if key != "mean"}
    wanted = whole(hidden, head, labels, reduction="mean" if options.get("mean", True) else "sum", **plain)
    found, none = chunked_cross_entropy(hidden, head, labels, CrossEntropy(tokens=16, **options), rows_apart=rows_apart)
    assert none is None
    assert difference(found.detach(), wanted.detach()) <= 1e-6
    sources = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    for one, other in zip(torch.autograd.grad(found, sources), torch.autograd.grad(wanted, sources), strict=True):
        assert one.dtype == other.dtype
        assert difference(one, other) <= 1e-5


@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16_is_no_worse_than_the_whole(trained):
    errors = {"chunked": [], "whole": []}
    for seed in range(4):
        torch.manual_seed(seed)
        hidden, head, labels = problem(torch.bfloat16, trained, length=64, width=32, vocabulary=500)
        sources = [hidden, *(p for p in head.parameters() if p.requires_grad)]
        exact_hidden = hidden.detach().double().requires_grad_()
        exact_head = nn.Linear(32, 500, bias=trained).double()
        exact_head.load_state_dict({key: value.double() for key, value in head.state_dict().items()})
        exact = whole(exact_hidden, exact_head, labels)
        wanted = torch.autograd.grad(exact, [exact_hidden, *([*exact_head.parameters()] if trained else [])])
        losses = {
            "chunked": chunked_cross_entropy(hidden, head, labels, CrossEntropy(tokens=32))[0],
            "whole": whole(hidden, head, labels),
        }
        for name, loss in losses.items():
            assert difference(loss.detach(), exact.detach()) < 1e-3
            found = torch.autograd.grad(loss, sources)
            errors[name].append([difference(one, other) for one, other in zip(found, wanted, strict=True)])
    chunked, plain = (torch.tensor(errors[name]).mean(0) for name in ("chunked", "whole"))
    assert chunked[0] <= 1.02 * plain[0]  # the hidden states
    assert (chunked[1:] <= 1.5 * plain[1:]).all()  # a head in 16 bits: one rounding a chunk, and one of their sum


@pytest.mark.parametrize("rows_apart", [False, True])
def test_bfloat16_smoothed_and_summed(rows_apart):
    hidden, head, labels = problem(torch.bfloat16)
    settings = CrossEntropy(tokens=16, label_smoothing=0.3, mean=False)
    found, tokens = chunked_cross_entropy(hidden, head, labels, settings, rows_apart=rows_apart, predictions=True)
    wanted = whole(hidden, head, labels, label_smoothing=0.3, reduction="sum")
    assert difference(found.detach(), wanted.detach()) <= 1e-6
    assert difference(torch.autograd.grad(found, hidden)[0], torch.autograd.grad(wanted, hidden)[0]) <= 5e-3
    assert torch.equal(tokens, torch.where(labels == -100, -1, head(hidden).argmax(-1)))


def test_float16_keeps_what_the_scale_of_the_loss_keeps():
    hidden, head, labels = problem(torch.float16, length=200, vocabulary=500)
    exact = hidden.detach().double().requires_grad_()
    weight = head.weight.double()
    wanted = torch.autograd.grad(whole(exact, lambda x: F.linear(x, weight), labels), exact)[0]
    loss = chunked_cross_entropy(hidden, head, labels, CrossEntropy(tokens=64))[0]
    found = torch.autograd.grad(loss * 2.0**10, hidden)[0]
    plain = torch.autograd.grad(whole(hidden, head, labels) * 2.0**10, hidden)[0]
    assert difference(found, wanted * 2.0**10) <= 1.02 * difference(plain, wanted * 2.0**10)


@pytest.mark.parametrize("trained", [False, True])
def test_under_autocast(trained):
    hidden, head, labels = problem(trained=trained)
    sources = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    weight = head.weight
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            chunked_cross_entropy(hidden, head, labels, CrossEntropy(tokens=16))[0],
            chunked_cross_entropy(hidden, head, labels, CrossEntropy(tokens=16))[0],
            whole(hidden, head, labels),
        ]
    assert head.weight is weight
    found, again, wanted = (torch.autograd.grad(loss, sources) for loss in losses)
    for one, other, right in zip(found, again, wanted, strict=True):
        assert torch.equal(one, other)
        assert difference(one, right) < 5e-3
    assert difference(losses[0].detach(), losses[2].detach()) < 1e-6


def test_backward_runs_twice_scales_and_is_not_differentiated():
    hidden, head, labels = problem()
    loss = chunked_cross_entropy(hidden, head, labels, CrossEntropy(tokens=16))[0]
    once = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    (3 * loss).backward(retain_graph=True)
    (loss / 2).backward()
    assert difference(hidden.grad, 3.5 * once) <= 1e-6
    loss = chunked_cross_entropy(hidden, head, labels, CrossEntropy(tokens=16))[0]
    with pytest.raises(ConfigError, match="differentiated twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_inside_a_checkpoint():
    hidden, head, labels = problem(trained=True)
    found = checkpoint(
        lambda x: chunked_cross_entropy(2 * x, head, labels, CrossEntropy(tokens=16))[0], hidden, use_reentrant=False
    )
    wanted = whole(2 * hidden, head, labels)
    for one, other in zip(
        torch.autograd.grad(found, [hidden, head.weight]),
        torch.autograd.grad(wanted, [hidden, head.weight]),
        strict=True,
    ):
        assert difference(one, other) <= 1e-5


def test_nothing_to_predict_is_no_number_and_no_gradient_as_of_the_whole():
    hidden, head, labels = problem(trained=True)
    labels.fill_(-100)
    loss, _ = chunked_cross_entropy(hidden, head, labels, CrossEntropy(tokens=16))
    assert torch.isnan(loss)
    for gradient in torch.autograd.grad(loss, [hidden, head.weight]):
        assert not gradient.any()


def test_likeliest_tokens():
    hidden, head, labels = problem()
    with torch.no_grad():
        loss, tokens = chunked_cross_entropy(hidden, head, labels, CrossEntropy(tokens=16), predictions=True)
        assert not loss.requires_grad
        assert torch.equal(tokens, torch.where(labels == -100, -1, head(hidden).argmax(-1)))


def test_a_trained_tensor_that_is_not_in_the_head_gets_its_gradient():
    hidden, head, labels = problem()
    scale = torch.tensor(0.7, requires_grad=True)
    found = chunked_cross_entropy(hidden, lambda x: head(x) * scale, labels, CrossEntropy(tokens=16))[0]
    wanted = whole(hidden, lambda x: head(x) * scale, labels)
    assert difference(torch.autograd.grad(found, scale)[0], torch.autograd.grad(wanted, scale)[0]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_bytes(dtype):
    hidden, head, labels = problem(dtype, rows=1, length=512, vocabulary=8192, ignored=0.0)
    peaks = []
    for loss_of in (whole, lambda *a: chunked_cross_entropy(*a, CrossEntropy(tokens=32))[0]):
        with PeakBytes() as seen:
            torch.autograd.grad(loss_of(hidden, head, labels), hidden)
        peaks.append(seen.peak)
    logits = 512 * 8192 * dtype.itemsize
    assert peaks[0] >= 2.9 * logits
    assert peaks[1] <= 0.08 * peaks[0]

"""The cross-entropy of a head's logits, some tokens at a time, so that the logits of a whole batch never exist.

::

    hidden (n, d) ──┬── chunk ── head ── logits (c, vocabulary) ── loss ── gradients of the chunk ──┐
                    ├── chunk ── head ── ...                                                        ├── loss, gradients
                    └── ...                                                                         ┘

The gradient of a cross-entropy to its logits is p - y, known as soon as the logits are. So each chunk is taken through forward and backward
at once, and what stays is a gradient for each hidden state and for each trained tensor of the head. Backward multiplies these by what it is
given. The head may be anything that acts on each token by itself: adapters, packed weights and trained copies need no case of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.quantized_layers import is_packed, unpacked_once

_TOKENS = {"cpu": 256}
_TOKENS_ELSEWHERE = 1024


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Which cross-entropy is meant."""

    tokens: int | None = None
    """Tokens in a chunk; 256 on a CPU and 1024 elsewhere if None."""
    ignore_index: int = -100
    """Label of a token that is left out."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over the vocabulary."""
    mean: bool = True
    """Whether the loss is the mean over the tokens that count, or their sum."""


def chunked_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    settings: CrossEntropy,
    *,
    rows_apart: bool = False,
    predictions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return ``F.cross_entropy(head(hidden), labels)`` in float32 or more, and the likeliest tokens.

    All gradients are computed here, where they are wanted; backward can run as often as one likes, but not be differentiated itself.
    Those of tensors in 16 bits that the head trains are sums of one rounded gradient a chunk.

    Args:
        hidden: (..., d).
        head: makes logits (..., vocabulary) of hidden states (..., d), each by itself.
        labels: (...), the token that each position predicts.
        settings: which cross-entropy, in chunks of which size.
        rows_apart: give ``head`` all rows of ``hidden`` (rows, seq, d) in each call, as adapters by rows need.
        predictions: whether the likeliest tokens are asked for.

    Raises:
        ConfigError: in backward, which was asked to be differentiable.

    Returns:
        The loss, a scalar, and the likeliest tokens (...), with -1 where the label is left out; None where they were not asked for.
    """
    counted = labels != settings.ignore_index
    kept: Tensor | None = None
    if not rows_apart:
        hidden, labels, flat = hidden.flatten(0, -2), labels.flatten(), counted.flatten()
        if hidden.device.type == "cpu":  # elsewhere, to count them would be to wait for the device
            kept = flat.nonzero().squeeze(1)
            if not len(kept):
                kept = None  # a loss that is not a number, and gradients of zero, are made from tokens too
            elif len(kept) < len(labels):
                hidden, labels = hidden.index_select(0, kept), labels[kept]
    found = _in_chunks(hidden, head, labels, settings, all_count=kept is not None, predictions=predictions)
    loss = found.loss
    if found.gradients:
        sources, gradients = zip(*found.gradients, strict=True)
        loss = _Known.apply(loss, found.factor, gradients, *sources)  # type: ignore[no-untyped-call]
    if not predictions:
        return loss, None
    likeliest = torch.full(counted.shape, -1, device=counted.device)
    if kept is None:
        likeliest = torch.where(counted, found.predicted().view(counted.shape), likeliest)
    else:
        likeliest.view(-1)[kept] = found.predicted()
    return loss, likeliest


class _Known(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: Tensor, gradients: tuple[Tensor, ...], *sources: Tensor) -> Tensor:
        ctx.save_for_backward(factor, *gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ConfigError(
                "a loss in chunks was to be differentiated twice (create_graph=True), but its gradients are computed with it, once; leave "
                "chunked_loss out"
            )
        factor, *gradients = ctx.saved_tensors
        factor = grad * factor
        return (None, None, None, *(known * factor for known in gradients))


class _Found:
    """What the chunks have come to so far."""

    def __init__(self, hidden: Tensor, steps: int, settings: CrossEntropy, counted: Tensor) -> None:
        self.hidden, self.dim = hidden, hidden.dim() - 2
        self.losses: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.several = steps > 1
        self.of_hidden: Tensor | None = None
        self.of_leaves: dict[int, tuple[Tensor, Tensor]] = {}
        self.all = counted.sum().to(torch.float32) if settings.mean else None
        self.weight = self.factor = torch.ones((), device=hidden.device)

    def weigh(self, dtype: torch.dtype) -> None:
        """Choose how gradients are kept, for logits of ``dtype``: ``weight`` goes into each, ``factor`` in backward."""
        if self.all is None:
            return
        count = self.all.clamp(min=1)
        if dtype.itemsize >= 4:
            self.factor = 1 / count
            return
        # 1/count rounds as in one piece, and the power of two changes no digit but keeps small values.
        power = torch.exp2(torch.ceil(torch.log2(count)))
        self.weight, self.factor = power / count, 1 / power

    @property
    def loss(self) -> Tensor:
        total = torch.stack(self.losses).sum() if self.losses else self.hidden.new_zeros((), dtype=torch.float32)
        return total if self.all is None else total / self.all

    @property
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors that want a gradient, and theirs."""
        own = [] if self.of_hidden is None else [(self.hidden, self.of_hidden)]
        return own + [(leaf, gradient.to(leaf.dtype)) for leaf, gradient in self.of_leaves.values()]

    def predicted(self) -> Tensor:
        if not self.tokens:
            return torch.empty(0, dtype=torch.long, device=self.hidden.device)
        return torch.cat(self.tokens, dim=self.dim)

    def take_hidden(self, start: int, gradient: Tensor) -> None:
        if self.of_hidden is None:
            self.of_hidden = torch.zeros_like(self.hidden, requires_grad=False)
        self.of_hidden.narrow(self.dim, start, gradient.shape[self.dim]).copy_(gradient)

    def take_leaf(self, leaf: Tensor, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        if id(leaf) not in self.of_leaves:
            # Sums of many chunks lose digits in 16 bits.
            wide = torch.promote_types(gradient.dtype, torch.float32) if self.several else gradient.dtype
            self.of_leaves[id(leaf)] = (leaf, gradient.to(wide))
        else:
            self.of_leaves[id(leaf)][1].add_(gradient)


def _buffer(buffers: dict[str, Tensor], name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of the shape of ``like`` (c, vocabulary) that chunk after chunk is written into."""
    if name not in buffers or len(buffers[name]) < len(like):
        buffers[name] = torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)
    return buffers[name][: len(like)]


def _in_chunks(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    settings: CrossEntropy,
    *,
    all_count: bool,
    predictions: bool,
) -> _Found:
    length = hidden.shape[-2]
    beside = max(1, hidden.shape[:-2].numel())
    most = settings.tokens or _TOKENS.get(hidden.device.type, _TOKENS_ELSEWHERE)
    steps = max(1, -(-length // max(1, most // beside)))
    size = max(1, -(-length // steps))
    found = _Found(hidden, steps, settings, labels != settings.ignore_index)
    trains, buffers = torch.is_grad_enabled(), dict[str, Tensor]()
    with contextlib.ExitStack() as held:
        if steps > 1:
            held.enter_context(_cast_once(head, hidden))
            for module in getattr(head, "modules", list)():
                held.enter_context(unpacked_once(module) if is_packed(module) else contextlib.nullcontext())
        for start in range(0, length, size):
            x = hidden.detach().narrow(-2, start, min(size, length - start))
            wanted = labels.narrow(-1, start, x.shape[-2])
            with torch.set_grad_enabled(trains):
                x.requires_grad_(trains and hidden.requires_grad)
                logits = head(x)
            if predictions:
                found.tokens.append(logits.detach().argmax(-1))
            _one_chunk(found, start, x, logits, wanted.flatten(), settings, all_count, buffers)
            del logits
    return found


def _one_chunk(
    found: _Found,
    start: int,
    x: Tensor,
    logits: Tensor,
    labels: Tensor,
    settings: CrossEntropy,
    all_count: bool,
    buffers: dict[str, Tensor],
) -> None:
    """Add the loss and the gradients of one chunk; ``logits`` are what ``head`` made of ``x``."""
    values = logits.detach().flatten(0, -2)  # (c, vocabulary)
    if not found.losses:
        found.weigh(values.dtype)
    counts = None if all_count else labels != settings.ignore_index
    target = (labels if counts is None else torch.where(counts, labels, 0)).unsqueeze(1)  # (c, 1)
    smooth = settings.label_smoothing
    weights = found.weight if counts is None else found.weight * counts
    losses, slope = (_narrow if values.dtype.itemsize < 4 else _wide)(
        values, target, smooth, weights, buffers, sloped=logits.requires_grad
    )
    found.losses.append((losses if counts is None else losses.masked_fill(~counts, 0)).sum())
    if slope is None:
        return
    slope = slope.view(logits.shape)
    leaves = [leaf for leaf in trained_leaves(logits) if leaf is not x]
    asked = [x, *leaves] if x.requires_grad else leaves
    with torch.autocast(logits.device.type, enabled=False):  # backward runs outside of it as a rule
        gradients = torch.autograd.grad(logits, asked, slope, allow_unused=True)
    if x.requires_grad and gradients[0] is not None:
        found.take_hidden(start, gradients[0])
    for leaf, gradient in zip(leaves, gradients[len(asked) - len(leaves) :], strict=True):
        found.take_leaf(leaf, gradient)


@torch.no_grad()
def _wide(
    logits: Tensor, target: Tensor, smooth: float, weights: Tensor, buffers: dict[str, Tensor], *, sloped: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each row of ``logits`` (c, vocabulary), and the gradient to them times ``weights``, a scalar or (c,)."""
    log_p = _buffer(buffers, "log_p", logits)
    torch.log_softmax(logits, -1, out=log_p)
    losses = log_p.gather(1, target).squeeze(1) * (smooth - 1)
    if smooth:
        losses -= log_p.mean(1) * smooth
    if not sloped:
        return losses, None
    slope = log_p.exp_().scatter_add_(1, target, torch.full_like(target, smooth - 1, dtype=log_p.dtype))  # p - y
    if smooth:
        slope.sub_(smooth / slope.shape[1])
    if weights.dim():
        slope.mul_(weights.unsqueeze(1))
    return losses, slope


@torch.no_grad()
def _narrow(
    logits: Tensor, target: Tensor, smooth: float, weights: Tensor, buffers: dict[str, Tensor], *, sloped: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`_wide`, for logits of 16 bits: in one copy of 32 bits, and with the gradient in 16."""
    work = _buffer(buffers, "work", logits, torch.float32)
    vocabulary = work.shape[1]
    largest = logits.amax(1, keepdim=True)
    torch.sub(work.copy_(logits), largest, out=work)
    picked = work.gather(1, target).squeeze(1)
    mean = work.mean(1) if smooth else picked
    total = work.exp_().sum(1)
    losses = total.log() - picked * (1 - smooth) - mean * smooth
    if not sloped:
        return losses, None
    work.mul_((weights / total).unsqueeze(1))
    work.scatter_add_(1, target, (weights * (smooth - 1)).expand_as(total).unsqueeze(1))
    if smooth:
        work.sub_(weights.expand_as(total).unsqueeze(1) * (smooth / vocabulary))
    return losses, work.to(logits.dtype)


def trained_leaves(tensor: Tensor) -> list[Tensor]:
    """Return the leaves that a backward from ``tensor`` gives gradients to, wherever the modules that hold them are."""
    leaves: list[Tensor] = []
    waiting, seen = [tensor.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.append(variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


@contextlib.contextmanager
def _cast_once(head: Callable[..., Any], hidden: Tensor) -> Iterator[None]:
    """Under autocast, hold the frozen weights of linear layers in the lower precision for all chunks; it remembers trained ones only."""
    device = hidden.device.type
    modules = getattr(head, "modules", None)
    replaced: list[tuple[nn.Module, nn.Parameter]] = []
    if modules is not None and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        for module in modules():
            weight = module._parameters.get("weight")
            plain = type(module) is nn.Linear and weight is not None and not weight.requires_grad
            if plain and type(weight) is nn.Parameter and weight.dtype == torch.float32:
                replaced.append((module, weight))
                module._parameters["weight"] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in replaced:
            module._parameters["weight"] = weight

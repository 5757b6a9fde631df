"""Models of transformers that compute their loss some tokens at a time, with their own code.

::

    with chunked_loss(model):                            forward of the model, as it is
        loss = model(**batch).loss                           hidden ── head ── DeferredLogits ── / * tanh ── view ── F.cross_entropy
                                                                                                                        └── chunks

The head hands out logits that are not computed yet. What the model does to them (a softcap, a scale, a shift by one token) is
remembered, and done to each chunk when ``F.cross_entropy`` asks for them: so shifts, weights of losses, and what mixtures of experts add
are the model's own. What cannot be remembered is refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_peft.adapter_layer import AdapterLayer, parents_of
from lightning_peft.arithmetic.chunked_cross_entropy import CrossEntropy, chunked_cross_entropy
from lightning_peft.errors import ConfigError

PREDICTED = "predicted_tokens"
"""Attribute of what a model returns after a loss in chunks: its likeliest tokens (batch, seq) in evaluation, else None."""


@dataclass(frozen=True, kw_only=True)
class ChunkedLoss:
    """How a loss is computed in chunks.

    Example:
        >>> ChunkedLoss(tokens=512, label_smoothing=0.1).tokens
        512
    """

    tokens: int | None = None
    """Tokens whose logits exist at a time; 256 on a CPU and 1024 elsewhere if None."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over the vocabulary, while the model is in training mode."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"ChunkedLoss tokens must be at least 1, got {self.tokens!r}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"ChunkedLoss label_smoothing must be in [0, 1), got {self.label_smoothing!r}")


@contextlib.contextmanager
def chunked_loss(model: nn.Module, settings: ChunkedLoss | None = None) -> Iterator[nn.Module]:
    """Let ``model`` compute its own loss without the logits of the whole batch, for the time of a ``with`` block.

    Calls with ``labels`` return no ``logits``; in eval mode without gradients they return the likeliest tokens (batch, seq) as the
    attribute ``predicted_tokens``, -1 where nothing is predicted. Calls without ``labels`` are as always. Backward may run outside the block.

    Args:
        model: a model of transformers with an output head, adapted or not.
        settings: the size of a chunk, and label smoothing.

    Raises:
        ConfigError: the model has no output head, is compiled as a whole, has a head that is split over processes, or does something else
            with its logits than a cross-entropy.

    Example:
        >>> import torch
        >>> from lightning_peft.testing import tiny_llama
        >>> model, ids = tiny_llama(), torch.tensor([[5, 6, 7, 8]])
        >>> with chunked_loss(model):
        ...     chunked = model(input_ids=ids, labels=ids)
        >>> bool(torch.isclose(chunked.loss, model(input_ids=ids, labels=ids).loss)), chunked.logits is None
        (True, True)
    """
    head_of(model)
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise ConfigError(
            f"chunked_loss works on {type(model).__name__} before it is compiled as a whole; compile its blocks, or leave one of the two out"
        )
    hooks = _Hooks(settings or ChunkedLoss())
    handles = [
        model.register_forward_pre_hook(hooks.before, with_kwargs=True),
        model.register_forward_hook(hooks.after, always_call=True),
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def head_of(model: nn.Module) -> nn.Module:
    """Return what makes logits in a model of transformers, with its adapters.

    Raises:
        ConfigError: there is none.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module):
        raise ConfigError(
            f"a loss in chunks needs a model of transformers with an output head over a vocabulary, and {type(model).__name__} has none; "
            "leave chunked_loss out"
        )
    return head


@dataclass
class _Call:
    """One forward of the model."""

    settings: ChunkedLoss
    training: bool
    places: list[tuple[nn.Module, str]]
    head: nn.Module
    losses: int = 0
    predicted: Tensor | None = None


class _Hooks:
    """Stand around forward: the head is another one while it runs."""

    def __init__(self, settings: ChunkedLoss) -> None:
        self.settings, self.calls = settings, list[_Call | None]()

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
        if given.get("labels") is None:
            self.calls.append(None)
            return
        head = head_of(model)
        if any(isinstance(parameter, DTensor) for parameter in head.parameters()):
            raise ConfigError(
                f"the head of {type(model).__name__} is split over processes, and a loss in chunks needs it whole; leave chunked_loss out"
            )
        places = [(model, name) for name, child in model._modules.items() if child is head]
        call = _Call(self.settings, model.training, places or parents_of(model)[id(head)], head)
        stand_in = _DeferringHead(call)
        for parent, name in call.places:
            parent._modules[name] = stand_in
        self.calls.append(call)

    def after(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        call = self.calls.pop() if self.calls else None
        if call is None:
            return None
        for parent, name in call.places:
            parent._modules[name] = call.head
        if outputs is None:  # an error is on its way
            return None
        if not call.losses:
            raise ConfigError(
                f"{type(model).__name__} computed its loss without its output head, so not in chunks; leave chunked_loss out"
            )
        return _without_logits(outputs, call.predicted)


class _Outputs(dict[str, Any]):
    """A dict that can have an attribute."""


def _without_logits(outputs: Any, predicted: Tensor | None) -> Any:
    if isinstance(outputs, Mapping):
        left = {key: value for key, value in outputs.items() if not isinstance(value, DeferredLogits)}
        outputs = _Outputs(left) if type(outputs) is dict else type(outputs)(**left)
        object.__setattr__(outputs, PREDICTED, predicted)
        return outputs
    return tuple(None if isinstance(value, DeferredLogits) else value for value in outputs)


class _DeferringHead(nn.Module):
    """Stands where a head was while a forward runs."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.__dict__["call"] = call

    @override
    def forward(self, hidden: Tensor) -> DeferredLogits:
        return DeferredLogits(self.__dict__["call"], hidden, tuple(hidden.shape[:-1]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["call"].head, name)


class _NotDeferrableError(ConfigError, AttributeError):
    """What logits that are not computed yet do not have; an attribute error too, so that code may ask."""


def _refused(what: str) -> _NotDeferrableError:
    return _NotDeferrableError(
        f"the model asks its logits for {what}, which logits in chunks do not have: they can be scaled, capped by tanh, sliced by positions and "
        "given to F.cross_entropy with class labels; leave chunked_loss out for this model"
    )


class DeferredLogits:
    """Logits (..., vocabulary) that are computed when a cross-entropy asks for them, some tokens at a time."""

    def __init__(
        self,
        call: _Call,
        hidden: Tensor,
        leading: tuple[int, ...],
        steps: tuple[Callable[[Tensor], Tensor], ...] = (),
    ) -> None:
        self._call, self._hidden, self._leading, self._steps = call, hidden, leading, steps

    # -- what code asks of a tensor --------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """The shape that the logits would have."""
        head: Any = self._call.head
        # A packed weight has another shape than what it stands for.
        vocabulary = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
        return torch.Size([*self._leading, int(vocabulary)])

    @property
    def device(self) -> torch.device:
        """Where the logits would be."""
        return self._hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self._hidden.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self._leading) + 1

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or a part of it."""
        return self.shape if dim is None else self.shape[dim]

    # -- what models do to logits ----------------------------------------------------------------------------------

    def _then(self, step: Callable[[Tensor], Tensor]) -> DeferredLogits:
        return DeferredLogits(self._call, self._hidden, self._leading, (*self._steps, step))

    def __mul__(self, factor: Any) -> DeferredLogits:
        return self._then(lambda logits: logits * _scalar(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits:
        return self._then(lambda logits: logits / _scalar(divisor))

    def tanh(self) -> DeferredLogits:
        """Return the hyperbolic tangent."""
        return self._then(torch.tanh)

    def float(self) -> DeferredLogits:
        """Return logits of float32."""
        return self._then(_float)

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        """Return logits of float32, or on the device where they are."""
        for value in (*args, *kwargs.values()):
            if value not in (torch.float32, self.device):
                raise _refused(f"to({value!r})")
        return self.float() if torch.float32 in (*args, *kwargs.values()) else self

    def contiguous(self) -> DeferredLogits:
        """Return the same."""
        return self

    def view(self, *shape: Any) -> DeferredLogits:
        """Return the logits with all dimensions before the vocabulary as one."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        rows = self._hidden.shape[:-1].numel()
        if len(sizes) != 2 or sizes[1] not in (-1, self.shape[-1]) or sizes[0] not in (-1, rows):
            raise _refused(f"the shape {sizes}")
        return DeferredLogits(self._call, self._hidden, (rows,), self._steps)

    reshape = view

    def __getitem__(self, index: Any) -> DeferredLogits:
        parts = index if isinstance(index, tuple) else (index,)
        ends_whole = parts[-1] == slice(None) and (Ellipsis in parts or len(parts) == self.ndim)
        positions = all(part is Ellipsis or isinstance(part, slice) for part in parts)
        if not positions or not (ends_whole or (len(parts) < self.ndim and Ellipsis not in parts)):
            raise _refused(f"[{index}]")
        if len(self._leading) != self._hidden.dim() - 1:
            raise _refused(f"[{index}] after they were made flat")
        hidden = self._hidden[index]
        return DeferredLogits(self._call, hidden, tuple(hidden.shape[:-1]), self._steps)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _refused(f".{name}")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.cross_entropy and isinstance(args[0], DeferredLogits):
            return args[0]._cross_entropy(*args[1:], **(kwargs or {}))
        if function in (torch.tanh, torch.Tensor.tanh) and len(args) == 1 and not kwargs:
            return args[0].tanh()
        if function in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__) and len(args) == 2 and not kwargs:
            one, other = args
            return one * other if isinstance(one, DeferredLogits) else other * one
        raise _refused(getattr(function, "__name__", repr(function)))

    # -- the loss --------------------------------------------------------------------------------------------------

    def _cross_entropy(self, target: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        call = self._call
        reduction = kwargs.get("reduction", "mean")
        if args or weight is not None or reduction not in ("mean", "sum") or target.is_floating_point():
            raise _refused(
                "a cross-entropy with weights of classes, with probabilities for labels, or without a mean or sum"
            )
        call.losses += 1
        smoothing = float(kwargs.get("label_smoothing") or 0.0)
        if call.training and not smoothing:
            smoothing = call.settings.label_smoothing
        settings = CrossEntropy(
            tokens=call.settings.tokens,
            ignore_index=int(kwargs.get("ignore_index", -100)),
            label_smoothing=smoothing,
            mean=reduction == "mean",
        )
        by_rows = any(isinstance(one, AdapterLayer) and one._rows is not None for one in call.head.modules())
        steps = list(self._steps)
        while steps and steps[-1] is _float:  # the cross-entropy itself is computed in float32
            steps.pop()
        labels = target.view(self._hidden.shape[:-1])
        with_tokens = not torch.is_grad_enabled() and not call.training
        loss, predicted = chunked_cross_entropy(
            self._hidden, _Stepped(call.head, steps), labels, settings, rows_apart=by_rows, predictions=with_tokens
        )
        call.predicted = predicted
        return loss


class _Stepped:
    """A head and what the model does to its logits."""

    def __init__(self, head: nn.Module, steps: list[Callable[[Tensor], Tensor]]) -> None:
        self.head, self.steps = head, steps

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        for step in self.steps:
            logits = step(logits)
        return logits

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules of the head."""
        return self.head.modules()


def _float(logits: Tensor) -> Tensor:
    return logits.float()


def _scalar(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() > 1:
        raise _refused("a product with a tensor")
    return value


def with_settings(given: bool | ChunkedLoss, loss: object, task: object) -> ChunkedLoss | None:
    """Return the settings that an option of a LightningModule stands for; None where the loss is computed as always.

    Raises:
        ConfigError: the ``loss`` or the ``task`` of the module may need logits.
    """
    if not given:
        return None
    if loss is not None or not getattr(task, "predicts_tokens", True):
        raise ConfigError(
            f"chunked_loss has the model compute its own loss and return no logits, which loss={loss!r} and task={task!r} may need; leave it out"
        )
    return given if isinstance(given, ChunkedLoss) else ChunkedLoss()

"""A large adapter taught to a small one: the best approximation of lower rank, then trained to answer as the large one does.

The loss is the Kullback-Leibler divergence of the student's tokens from the teacher's, as in Hinton et al., "Distilling the
Knowledge in a Neural Network", 2015 (arXiv:1503.02531)::

    L = T^2 mean KL( softmax(teacher / T) || softmax(student / T) )

The truncation that it starts from is the best for the weights; training finds what is better for the data.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.activation import active_adapters, set_active_adapters
from lightning_peft.adapter_layer import adapter_layers, adapters_named
from lightning_peft.adapter_tools.conversion import to_lora
from lightning_peft.adapter_tools.report import LowRankReport
from lightning_peft.errors import ConfigError
from lightning_peft.rollback import unchanged_on_error


@dataclass(frozen=True)
class DistillationReport:
    """What distilling reached."""

    truncation: LowRankReport
    """What the truncation lost, in the weights."""
    before: float
    """The loss on the batches with the truncated adapter."""
    after: float
    """The loss on them after training."""


def distil_adapter(
    model: nn.Module,
    name: str = "default",
    *,
    rank: int,
    batches: Iterable[Any],
    steps: int = 100,
    learning_rate: float = 1e-3,
    loss: Literal["kl", "mse"] = "kl",
    temperature: float = 1.0,
    new_name: str = "distilled",
    drop_rest: bool = False,
) -> DistillationReport:
    """Make a LoRA adapter of rank ``rank`` that acts as the adapter ``name`` does on ``batches``, and make it the active one.

    It starts as the best approximation of the weights and is trained with AdamW, without weight decay, over the base in eval
    mode; nothing else is trained. ``model`` and its batches must be on one device.

    Args:
        model: the adapted model.
        name: the teacher: an adapter of any mergeable method.
        rank: the rank of the student.
        batches: mappings of keyword arguments, tuples of arguments, or tensors: gone through again and again. An ``attention_mask``
            among them says which positions count.
        steps: how many steps of the optimizer, one batch each; 0 leaves the truncation.
        learning_rate: the highest; it falls to zero in a cosine.
        loss: ``kl`` on logits (..., classes), or ``mse`` on the first output, for a model without logits.
        temperature: T of ``kl``.
        new_name: the name of the student.
        drop_rest: see :func:`~lightning_peft.adapter_tools.conversion.to_lora`.

    Returns:
        The losses before and after, and what the truncation lost.

    Raises:
        ConfigError: an argument is out of its range, there are no batches, or the loss is non-finite. The model is unchanged then.
        AdapterNotFoundError: the model has no adapter of that name.
        InjectionError: ``new_name`` is taken.
    """
    data = list(batches)
    _check(data, steps, learning_rate, loss, temperature)
    modes = [(module, module.training) for module in model.modules()]
    with unchanged_on_error(model), _modes_kept(modes):
        truncation = to_lora(model, name, rank=rank, new_name=new_name, drop_rest=drop_rest)
        _set_trainable(model, new_name, True)
        model.eval()

        def lost(batch: Any) -> Tensor:
            return _loss(model, (name, new_name), batch, loss, temperature)

        with torch.no_grad():
            before = sum(float(lost(batch)) for batch in data) / len(data)
        parameters = [p for adapter in adapters_named(model, new_name).values() for p in adapter.parameters()]
        _train(parameters, lost, itertools.islice(itertools.cycle(data), steps), steps, learning_rate)
        with torch.no_grad():
            after = sum(float(lost(batch)) for batch in data) / len(data)
        _set_trainable(model, new_name, False)
    return DistillationReport(truncation, before, after)


def _set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    for layer in adapter_layers(model).values():
        if name in layer.adapters:
            layer.set_trainable(name, trainable)


def _train(
    parameters: Sequence[nn.Parameter],
    lost: Callable[[Any], Tensor],
    batches: Iterable[Any],
    steps: int,
    learning_rate: float,
) -> None:
    """Take a step on each batch, at rates that fall to zero in a cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        value = lost(batch)
        if not torch.isfinite(value):
            raise ConfigError(
                f"the loss of step {step} is {value.item()}; take a smaller learning_rate than {learning_rate!r}"
            )
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _check(data: Sequence[Any], steps: int, learning_rate: float, loss: str, temperature: float) -> None:
    if not data:
        raise ConfigError("distil_adapter needs batches to teach on, and got none")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ConfigError(f"steps must be an integer of at least 0, got {steps!r}")
    for label, number in {"learning_rate": learning_rate, "temperature": temperature}.items():
        if not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ConfigError(f"{label} must be a positive number, got {number!r}")
    if loss not in ("kl", "mse"):
        raise ConfigError(f"loss must be 'kl' or 'mse', got {loss!r}")


@contextlib.contextmanager
def _modes_kept(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _loss(model: nn.Module, names: tuple[str, str], batch: Any, loss: str, temperature: float) -> Tensor:
    """Return how far the second adapter is from the first on a batch: a scalar."""
    teacher, student = names
    before = active_adapters(model)
    try:
        set_active_adapters(model, [teacher])
        with torch.no_grad():
            wanted = _output(model, batch, loss)
    finally:
        set_active_adapters(model, before)
    set_active_adapters(model, [student])
    found = _output(model, batch, loss)
    if loss == "mse":
        each = (found.float() - wanted.float()).square().mean(dim=-1)
    else:
        told, said = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (wanted, found))
        each = temperature**2 * (told.exp() * (told - said)).sum(dim=-1)  # (batch, length), or (batch,)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != each.shape:
        return each.mean()
    return (each * mask).sum() / mask.sum().clamp(min=1)


def _output(model: nn.Module, batch: Any, loss: str) -> Tensor:
    if isinstance(batch, Mapping):
        result = model(**batch)
    else:
        result = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    found = getattr(result, "logits", None)
    if found is None:
        found = result[0] if isinstance(result, (tuple, list)) else getattr(result, "last_hidden_state", result)
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"the model must return a tensor, or something with logits, for loss={loss!r}, got {type(result).__name__}"
        )
    return found

"""How strongly each adapter acts: a factor of its effect, and by that weighted sums of active adapters.

For an adapter that adds to what it wraps::

    y = base(x) + scale * (adapter(x) - base(x))

The factor is a number on the adapter and not in its tensors, so going back to 1 is exact. Which kinds of adapters have one is
said by :attr:`~lightning_peft.interfaces.Adapter.scalable`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

from torch import nn

from lightning_peft.adapter_layer import adapter_layers, adapters_named
from lightning_peft.errors import ConfigError, InjectionError, MergeError


def adapter_scale(model: nn.Module, name: str = "default") -> float:
    """Return the factor of the effect of the adapter ``name``, 1.0 unless it was scaled.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
    """
    first = next(iter(adapters_named(model, name).values()))
    return first.scale if first.scalable else 1.0  # where it is not declared, the word may mean something else


def scale_adapters(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Set the factors of the effects of adapters; with several of them active that is a weighted sum.

    A factor replaces the one before: 1.0 is the adapter as it was trained, 0.0 is the base. Merging folds the scaled effect in.
    Adapter folders hold the adapter without the factor; :func:`~lightning_peft.composition.save_adapters` keeps it beside them, and a
    ``.ckpt`` holds it too.

    Args:
        model: an adapted model.
        scales: adapter name to factor, a finite number.

    Raises:
        AdapterNotFoundError: the model has no adapter of one of the names.
        ConfigError: a factor is not a finite number.
        InjectionError: an adapter is of a kind whose effect cannot be scaled.
        MergeError: an adapter is merged into the base. The model is unchanged in all of these cases.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = inject(model, LoRA(rank=1))
        >>> scale_adapters(model, {"default": 0.5})
        >>> adapter_scale(model)
        0.5
    """
    if not isinstance(scales, Mapping):
        raise ConfigError(f"scale_adapters needs a mapping such as {{'a': 0.5}}, got {scales!r}")
    found = {name: adapters_named(model, name) for name in scales}
    for name, factor in scales.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not _finite(factor):
            raise ConfigError(f"the scale of adapter {name!r} must be a finite number, got {factor!r}")
        for path, adapter in found[name].items():
            if not adapter.scalable:
                raise InjectionError(
                    f"adapter {name!r} was to be scaled by {factor!r}, but at {path!r} it is a {type(adapter).__name__}, whose effect has no "
                    "factor (scalable = False); activate it as it is, or not"
                )
    for path, layer in adapter_layers(model).items():
        for name in layer.merged:
            if name in scales:
                raise MergeError(
                    f"adapter {name!r} is merged into the base at {path!r} and its scale cannot change there; call unmerge_adapters(model) first"
                )
    for name, factor in scales.items():
        for adapter in found[name].values():
            adapter.scale = float(factor)


def _finite(factor: float) -> bool:
    try:
        return math.isfinite(factor)
    except OverflowError:  # an integer that no float holds
        return False


@contextlib.contextmanager
def adapters_scaled(model: nn.Module, scales: Mapping[str, float] | None = None, **named: float) -> Iterator[nn.Module]:
    """Have other factors, as of :func:`scale_adapters`, for the time of a ``with`` block.

    Args:
        model: an adapted model.
        scales: adapter name to factor.
        named: the same, for names that can be written as keywords.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = inject(model, LoRA(rank=1), name="a")
        >>> with adapters_scaled(model, a=0.5):
        ...     adapter_scale(model, "a")
        0.5
        >>> adapter_scale(model, "a")
        1.0
    """
    wanted = {**(scales or {}), **named}
    adapters = [adapter for name in wanted for adapter in adapters_named(model, name).values()]
    before = [(adapter, adapter.scale) for adapter in adapters]
    scale_adapters(model, wanted)
    try:
        yield model
    finally:
        for adapter, scale in before:
            adapter.scale = scale

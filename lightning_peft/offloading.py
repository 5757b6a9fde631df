"""Inactive adapters elsewhere: in the memory of another device, or in files that are mapped into memory.

::

    set_active_adapters(model, "b")      a: device of the base ──> "cpu" or a file       (was active, now is not)
                                         b: device of the base <── "cpu" or a file       (acts now)

The tensors of an adapter stay the same objects and keep their values, so that saving, renaming and optimizers do not notice. A file
is written with safetensors, mapped and then unlinked: the system drops its pages under pressure and reads them again, nobody
can change it, and nothing is left behind when the process ends.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import adapter_layers, adapters_named
from lightning_peft.errors import ConfigError, InjectionError

_OFFLOADING = "_lightning_peft_offloading"
"""Attribute of an adapted model: its :class:`_Offloading`."""


@dataclass
class _Offloaded:
    """Where one adapter is while it is inactive."""

    to: torch.device | Path
    away: bool = False
    mapped: dict[str, Tensor] = field(default_factory=dict)  # the values as the file has them


@dataclass
class _Offloading:
    """What is offloaded of one model, and where to adapters go that come later."""

    later: torch.device | Path | None = None
    adapters: dict[str, _Offloaded] = field(default_factory=dict)


def offload_adapters(
    model: nn.Module, names: str | Sequence[str] | None = None, *, to: str | Path | torch.device = "cpu"
) -> None:
    """Keep adapters elsewhere while they are inactive; :func:`set_active_adapters` brings those back that it activates.

    Gradients of an adapter are dropped when it goes; state that an optimizer has for it stays where it is.

    Args:
        model: an adapted model.
        names: the adapters; all, and all that come later, if None.
        to: a device such as ``"cpu"``, or a folder (a ``Path``, or a string with a slash) whose disk holds them.

    Raises:
        AdapterNotFoundError: the model has no adapter of one of the names.
        ConfigError: ``to`` is the meta device, or no device.
        InjectionError: an adapter is sharded or has no values yet. The model is unchanged then.
        OSError: the folder cannot be written.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA, inject, list_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> for name in ("a", "b"):
        ...     _ = inject(model, LoRA(rank=1), name=name)
        >>> offload_adapters(model, to="cpu")
        >>> [info.device for info in list_adapters(model)]
        ['cpu', 'cpu']
    """
    where = _destination(to)
    chosen = _names(model, names)
    for name in chosen:
        for key, tensor in _tensors(model, name).items():
            if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
                kind = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
                raise InjectionError(
                    f"adapter {name!r} cannot be offloaded: {key!r} is {kind}; offload plain tensors with values"
                )
    if isinstance(where, Path):
        where.mkdir(parents=True, exist_ok=True)
    state = _state(model)
    if names is None:
        state.later = where
    acting = _acting(model)
    for name in chosen:
        held = state.adapters.get(name)
        if held is not None and held.to == where:
            continue
        if held is not None and held.away:
            _fetch(model, name, held)
        state.adapters[name] = _Offloaded(where)
        if name not in acting:
            _send(model, name, state.adapters[name])


def bring_back_adapters(model: nn.Module, names: str | Sequence[str] | None = None) -> None:
    """Undo :func:`offload_adapters`: the adapters live beside the base again, active or not.

    Args:
        model: an adapted model.
        names: the adapters; all, and all that come later, if None.

    Raises:
        AdapterNotFoundError: the model has no adapter of one of the names.
    """
    state = _state(model)
    if names is None:
        state.later = None
    for name in _names(model, names):
        held = state.adapters.pop(name, None)
        if held is not None and held.away:
            _fetch(model, name, held)


# -- for the verbs that change what acts, and what is called how ----------------------------------------------------------


def fetch_offloaded(model: nn.Module, names: Iterable[str]) -> None:
    """Have the adapters ``names`` beside the base, because they are about to act."""
    state = _state(model)
    for name in names if state.adapters else ():
        held = state.adapters.get(name)
        if held is not None and held.away:
            _fetch(model, name, held)


def reach_offloaded(model: nn.Module, names: Iterable[str]) -> None:
    """Have the adapters ``names`` on the device of the base, because rows of a batch use them; a mapped file is on the CPU's."""
    state = _state(model)
    layers = adapter_layers(model) if state.adapters else {}
    for name in names if state.adapters else ():
        held = state.adapters.get(name)
        if held is not None and held.away:
            pairs = ((layers[path].base_layer, adapter) for path, adapter in adapters_named(model, name).items())
            if any(tensor.device != _home(base) for base, adapter in pairs for tensor in adapter.parameters()):
                _fetch(model, name, held)


def send_inactive(model: nn.Module, before: Iterable[str]) -> None:
    """Offload what does not act any more; ``before`` are the adapters that may have acted until now."""
    state = _state(model)
    if not state.adapters and state.later is None:
        return
    acting = _acting(model)
    for name in dict.fromkeys((*before, *state.adapters)):
        if state.later is not None:
            state.adapters.setdefault(name, _Offloaded(state.later))
        held = state.adapters.get(name)
        if held is not None and not held.away and name not in acting:
            _send(model, name, held)


def offloaded_to(model: nn.Module, name: str) -> str | None:
    """Return the folder whose disk holds the adapter ``name`` at the moment, or None where a device does."""
    held = _state(model).adapters.get(name)
    return str(held.to) if held is not None and held.away and isinstance(held.to, Path) else None


def rename_offloaded(model: nn.Module, old: str, new: str) -> None:
    """Know the adapter ``old`` as ``new``."""
    adapters = _state(model).adapters
    if old in adapters:
        adapters[new] = adapters.pop(old)


def forget_offloaded(model: nn.Module, name: str | None = None) -> None:
    """Forget an adapter that is gone from the model, or all of them."""
    adapters = _state(model).adapters
    if name is None:
        adapters.clear()
    else:
        adapters.pop(name, None)


# -- details -----------------------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> _Offloading:
    while "_orig_mod" in model._modules:  # what torch.compile hides
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    state: _Offloading = model.__dict__.setdefault(_OFFLOADING, _Offloading())
    return state


def _names(model: nn.Module, names: str | Sequence[str] | None) -> list[str]:
    if names is None:
        layers = adapter_layers(model).values()
        return list(dict.fromkeys(name for layer in layers for name in layer.adapters))
    chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in chosen:
        adapters_named(model, name)
    return chosen


def _destination(to: str | Path | torch.device) -> torch.device | Path:
    if isinstance(to, Path) or (isinstance(to, str) and (os.sep in to or "/" in to)):
        return Path(to)
    try:
        device = torch.device(to)
    except RuntimeError as error:
        raise ConfigError(
            f"offload_adapters needs a device, a Path or a path with a slash as to=, got {to!r}: {error}"
        ) from error
    if device.type == "meta":
        raise ConfigError("offload_adapters cannot use the meta device, which holds no values; use 'cpu' or a folder")
    return device


def _acting(model: nn.Module) -> set[str]:
    layers = adapter_layers(model).values()
    return {name for layer in layers for name in (*layer.active, *layer.merged, *layer._in_rows)}


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return every tensor of an adapter once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, adapter in adapters_named(model, name).items():
        for key, tensor in (*adapter.named_parameters(), *adapter.named_buffers()):
            found.setdefault(id(tensor), (f"{path}.{key}", tensor))
    return dict(found.values())


@torch.no_grad()
def _send(model: nn.Module, name: str, held: _Offloaded) -> None:
    tensors = _tensors(model, name)
    if isinstance(held.to, Path):
        if held.mapped.keys() != tensors.keys() or not all(
            _same(tensor, held.mapped[key]) for key, tensor in tensors.items()
        ):
            held.mapped = _mapped({key: tensor.detach() for key, tensor in tensors.items()}, held.to)
        moved = held.mapped
    else:
        moved = {key: tensor.data.to(held.to) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        tensor.grad = None
        tensor.data = moved[key]
    held.away = True


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype and torch.equal(tensor.detach().cpu(), other)


def _mapped(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return ``tensors`` as maps of a file in ``folder`` that has no name any more."""
    handle, file = tempfile.mkstemp(dir=folder, prefix=".adapter-", suffix=".safetensors")
    os.close(handle)
    try:
        safetensors.torch.save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, file)
        return safetensors.torch.load_file(file)
    finally:
        with contextlib.suppress(OSError):  # where the system cannot unlink what is mapped, the file stays
            os.unlink(file)


def _home(base: nn.Module) -> torch.device:
    return next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu"))


@torch.no_grad()
def _fetch(model: nn.Module, name: str, held: _Offloaded) -> None:
    layers = adapter_layers(model)
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for path, adapter in adapters_named(model, name).items():
        home = _home(layers[path].base_layer)
        for tensor in (*adapter.parameters(), *adapter.buffers()):
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor, tensor.data.to(home, copy=isinstance(held.to, Path))
    for tensor, value in moved.values():
        tensor.data = value
    held.away = False

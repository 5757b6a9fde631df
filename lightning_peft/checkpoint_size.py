"""Less bytes for the same checkpoint: many small things that ``torch.save`` would write one by one are written once.

Every tensor with a memory of its own is a file inside a ``.ckpt``, of some 250 bytes at least, and every string that is another
object is written out again::

    steps of 70 parameters   70 files of 4 bytes       -> one file of 280 bytes, and 70 views of it
    names of 70 tensors      in the state, the manifest, the optimizer -> in the state, and references to it

What is read back is equal, so neither Lightning nor an older version can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def with_shared_scalars(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer in which the tensors without dimensions, such as its steps, share their memory.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> steps = [entry["step"] for entry in with_shared_scalars(optimizer.state_dict())["state"].values()]
        >>> steps, len({step.untyped_storage().data_ptr() for step in steps})
        ([tensor(1.), tensor(1.)], 1)
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[Any, str]]] = {}
    entries = {key: dict(entry) if isinstance(entry, Mapping) else entry for key, entry in state["state"].items()}
    for key, entry in entries.items():
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if type(value) is Tensor and value.dim() == 0:
                kinds.setdefault((value.dtype, value.device), []).append((key, name))
    for places in kinds.values():
        joined = torch.stack([entries[key][name].detach() for key, name in places])
        for (key, name), value in zip(places, joined.unbind(), strict=True):
            entries[key][name] = value
    return {**state, "state": entries}


def with_shared_names(value: Any, names: Mapping[str, str]) -> Any:
    """Return a plain ``value`` of dictionaries, lists and strings in which the strings are those of ``names``, where they are there."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, dict):
        return {with_shared_names(key, names): with_shared_names(held, names) for key, held in value.items()}
    if isinstance(value, list):
        return [with_shared_names(held, names) for held in value]
    return value

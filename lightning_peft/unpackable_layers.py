"""Layers that a model needs unpacked: its own code reads what a packed weight does not have.

transformers' T5 and its relatives cast what they hand to a layer to the dtype of its weight, which is an integer once the weight is packed::

    hidden = hidden.to(self.wo.weight.dtype)        fractions are cut off in eval, and gradients with them in training
    out = self.wo(hidden)

Most such models declare these layers, as those that keep their precision; where one does not, its code says so.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable

from torch import nn

from lightning_peft.adapter_layer import base_modules, unwrapped

_DECLARED = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Where a transformers model declares the modules that keep their precision."""
_CAST = re.compile(r"\.to\(\s*(?:dtype\s*=\s*)?self\.(\w+)\.weight\.dtype\b")


def unpackable_layers(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Return those of ``paths`` whose weights have to stay as they are, each with the reason."""
    modules = {path: unwrapped(module) for path, module in base_modules(model)}
    declared = {path: words for path, module in modules.items() if (words := _declared(module))}
    reasons: dict[str, str] = {}
    for path in paths:
        above, _, name = path.rpartition(".")
        owner = next((root for root, words in declared.items() if _names(root, words, path)), None)
        if owner is not None:
            kind = type(modules[owner]).__name__
            reasons[path] = f"{kind} declares that {path!r} keeps its precision"
        elif above in modules and name in _cast_to(type(modules[above])):  # type: ignore[arg-type]  # a class is hashable
            kind = type(modules[above]).__name__
            reasons[path] = f"{kind} casts what it hands to {path!r} to the dtype of its weight"
    return reasons


def _declared(module: nn.Module) -> list[str]:
    return [word for where in _DECLARED for word in getattr(module, where, None) or ()]


def _names(root: str, words: Iterable[str], path: str) -> bool:
    """Tell whether ``words`` of the module ``root`` name ``path`` or something above it: whole parts of a path, or of its weight's name."""
    if root and not path.startswith(f"{root}."):
        return False
    weight = f"{path}.weight"[len(root) + 1 if root else 0 :]
    return any(re.search(rf"(?:^|\.)(?:{word})(?:\.|$)", weight) for word in words)


@functools.cache
def _cast_to(kind: type[nn.Module]) -> frozenset[str]:
    """Return the children to whose weight's dtype the code of ``kind`` casts, packed or not."""
    found: set[str] = set()
    for function in {name: value for owner in reversed(kind.__mro__) for name, value in vars(owner).items()}.values():
        inner = inspect.unwrap(function) if inspect.isfunction(function) else None
        if inner is None or not {"to", "weight", "dtype"} <= set(inner.__code__.co_names):
            continue
        try:
            source = inspect.getsource(inner)
        except (OSError, TypeError):  # made without a file
            continue
        if "torch.uint8" not in source:  # it leaves packed weights out
            found.update(_CAST.findall(source))
    return frozenset(found)

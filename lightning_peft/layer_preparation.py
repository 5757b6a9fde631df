"""Changing a base layer by layer, so that no two layers are there both before and after at once.

::

    a loaded model       for each path: layer ── replacement(path, layer) ── put in its place; the old layer is freed
    a loader             the same for each layer as soon as its weights are read: what is not read yet takes no memory
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set

from torch import nn

from lightning_peft.adapter_layer import base_modules, unwrapped


class LayerPreparation(ABC):
    """What a method does to the layers of a base, one at a time and each on its own.

    Args:
        paths: where the layers are that :meth:`replacement` is to be called with, once each.
    """

    def __init__(self, paths: Set[str]) -> None:
        self.paths = frozenset(paths)

    @abstractmethod
    def replacement(self, path: str, layer: nn.Module) -> nn.Module:
        """Return what stands at ``path`` from now on instead of ``layer``, or ``layer`` itself. Nothing may keep ``layer``."""

    def finish(self) -> None:  # noqa: B027  # most have nothing to tell
        """Called when every layer was replaced or kept, to tell what could not be done."""


def prepare_layers(model: nn.Module, preparation: LayerPreparation, paths: Set[str] | None = None) -> None:
    """Put the replacements of ``preparation`` into ``model``; :meth:`LayerPreparation.finish` is left to the caller.

    Args:
        model: with its weights. A layer that stands at several places is replaced once, at all of them.
        preparation: what to do.
        paths: the layers that are still to be done; all of the preparation's if None.
    """
    for path, holders in _holders(model, preparation.paths if paths is None else paths).items():
        parent, child_name = holders[0]
        made = preparation.replacement(path, parent._modules[child_name])  # type: ignore[arg-type]
        # Nothing holds the layer that stood here any longer: it is freed before the next one is replaced.
        for parent, child_name in holders:
            parent._modules[child_name] = made


def _holders(model: nn.Module, paths: Set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return, by path, every module that holds the layer there and under which name: never the layers themselves."""
    wanted = {id(unwrapped(module)): path for path, module in base_modules(model) if path in paths}
    holders: dict[str, list[tuple[nn.Module, str]]] = {path: [] for path in wanted.values()}
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            if id(child) in wanted:
                holders[wanted[id(child)]].append((parent, child_name))
    return holders

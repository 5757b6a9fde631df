"""Top layers: the last blocks of a model are trained whole, with or without the head.

Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018 (arXiv:1801.06146) train from the top;
Lee, Tang, Lin, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", 2019 (arXiv:1911.03090) find that a
quarter of the layers gives nine tenths of the quality::

    tokens ── block 1 ── ... ── block n - k ── block n - k + 1 ── ... ── block n ── head
              frozen            frozen         W' (trained)              W'        W' if asked for

Every module with parameters gets copies of its own, so that the base stays; the arithmetic is in
:mod:`lightning_peft.arithmetic.parameter_copies`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.arithmetic.parameter_copies import ParameterCopies, parameter_places
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.field_checks import check_switches
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.targets import matches


@dataclass(frozen=True, kw_only=True)
class TopLayers(Method):
    """Train all parameters of the last blocks among the targets.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> _ = inject(model, TopLayers(num_blocks=1), ["0", "1", "2"])
        >>> trainable_summary(model).trainable
        36
    """

    name: ClassVar[str] = "top_layers"
    default_targets: ClassVar[tuple[str, ...]] = ("block",)
    mergeable: ClassVar[bool] = True
    composable: ClassVar[bool] = False

    num_blocks: int | Literal["all"] = 2
    """How many of the targets are trained, counted from the last, in each stack of layers, or ``all``."""
    head: bool = False
    """Whether the head is trained too: the modules between the last hidden state and the logits."""

    def __post_init__(self) -> None:
        number = isinstance(self.num_blocks, int) and not isinstance(self.num_blocks, bool)
        if self.num_blocks != "all" and not (number and int(self.num_blocks) > 0):
            raise ConfigError(f"TopLayers num_blocks must be a positive integer or 'all', got {self.num_blocks!r}")
        check_switches(self)

    @override
    def supports(self, module: nn.Module) -> bool:
        return next(module.parameters(), None) is not None

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        return ParameterCopies(module, target.rule.split())

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        for target in targets:
            if target.slices:
                raise TargetError(f"TopLayers cannot train a slice of {target.path!r} alone; name the whole module")
        roots = self._last([target.path for target in targets])
        if self.head:
            roots += _heads(model, family)
        # The rule of a place is what is trained there.
        places = parameter_places(model, roots)
        return [Target(path=path, rule=" ".join(names)) for path, names in places.items()]

    def _last(self, paths: list[str]) -> list[str]:
        """Return the last ``num_blocks`` of ``paths`` in each stack: encoders and decoders have one each."""
        if self.num_blocks == "all":
            return paths
        stacks: dict[str, list[str]] = {}
        for path in paths:
            stacks.setdefault(re.split(r"(?:^|\.)\d+(?:\.|$)", path, maxsplit=1)[0], []).append(path)
        for stack, members in stacks.items():
            if len(members) < self.num_blocks:
                raise TargetError(
                    f"TopLayers num_blocks={self.num_blocks} were asked for, but the targets name {len(members)} in {stack or 'the model'!r}; "
                    "ask for fewer, or num_blocks='all'"
                )
        return [path for members in stacks.values() for path in members[-self.num_blocks :]]


def _heads(model: nn.Module, family: ModelFamily) -> list[str]:
    """Return the paths of the head: of the family's role, or what transformers calls the output embedding."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    role = matches("head", model, family) if "head" in family.role_names else set()
    found = [
        path
        for path, module in base_modules(model)
        if path and (path in role or (output is not None and unwrapped(module) is unwrapped(output)))
    ]
    if not found:
        raise TargetError(
            f"TopLayers head=True was asked for, but no head is known of {type(model).__name__} (family {family.name!r}); name "
            "it among the targets, with num_blocks='all'"
        )
    return found


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register the training of top layers."""
    return [TopLayers]

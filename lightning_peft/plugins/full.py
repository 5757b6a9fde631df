"""Full fine-tuning: every parameter is trained, as a method like any other.

The yardstick of all that is parameter-efficient::

    y = f(x; W')       W' (trained) starts at W (frozen, kept)

The base stays where it is, so that forgetting can be measured and several results can live in one model; the price is a second
copy of the weights, in float32 at least. Tied weights stay tied. The arithmetic is in
:mod:`lightning_peft.arithmetic.parameter_copies`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from lightning_peft.adapter_layer import unwrapped
from lightning_peft.arithmetic.parameter_copies import ParameterCopies, parameter_places, train_tied_as_one
from lightning_peft.errors import TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Train every parameter of the model, or of the targets.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
        >>> _ = inject(model, FullFineTuning())
        >>> trainable_summary(model).percent
        50.0
    """

    name: ClassVar[str] = "full"
    default_targets: ClassVar[tuple[str, ...]] = ("re:[^.]*",)
    mergeable: ClassVar[bool] = True
    composable: ClassVar[bool] = False

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
                raise TargetError(
                    f"FullFineTuning cannot train a slice of {target.path!r} alone; name the whole module"
                )
        own = [name for name, _ in unwrapped(model).named_parameters(recurse=False)]
        if own:
            raise TargetError(
                f"FullFineTuning cannot train {own[:3]}, which {type(model).__name__} itself holds and nothing can stand around; put "
                "them, or the model, into a module of their own"
            )
        # The rule of a place is what is trained there.
        places = parameter_places(model, [target.path for target in targets])
        return [Target(path=path, rule=" ".join(names)) for path, names in places.items()]

    @override
    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Let tied weights be trained as one."""
        train_tied_as_one(model, adapters)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register full fine-tuning."""
    return [FullFineTuning]

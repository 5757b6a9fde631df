"""Low-rank adapters for the experts of a mixture that one module holds as three-dimensional parameters.

Transformers 5 keeps all experts of a layer in parameters (experts, out, in), or (experts, in, out) where the module says
``is_transposed``. Every expert e has a pair of its own in each of them::

    W'[e] = W[e] + s B[e] A[e]        A[e]: (rank, in) random        B[e]: (out, rank) zero

The module reads its parameters itself, and there are several ways to run it (``eager``, ``batched_mm``, ``grouped_mm``). So a
forward makes W' for all experts and runs the module with it: that takes memory of the size of the weights, kept for the
backward, and W' is rounded to the precision of the base, as merged weights are.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.low_rank import LowRankAdapter, LowRankSettings
from lightning_peft.errors import AdapterConfigError, InjectionError, TargetError
from lightning_peft.interfaces import Target
from lightning_peft.targets import fused_parameters


class LowRankExperts(LowRankAdapter):
    """LoRA on all three-dimensional parameters of a module of fused experts.

    A is held as (experts * rank, in), one expert after the other; B as (out, rank * experts), one rank after the other: as
    HF PEFT's files have them.

    Args:
        settings: the hyperparameters at this place.
        module: the experts.
        target: the place, for messages.

    Raises:
        TargetError: dropout was asked for, or the training of biases that the experts have.
    """

    scalable: ClassVar[bool] = True

    def __init__(self, settings: LowRankSettings, module: nn.Module, target: Target) -> None:
        names = fused_parameters(module)
        super().__init__(settings, module, names[0])
        self.names, self.transposed = tuple(names), bool(module.is_transposed)
        asked = [f"dropout={settings.dropout}"] if settings.dropout else []
        asked += ["the training of biases"] if settings.bias and module.has_bias else []
        if asked:
            raise TargetError(
                f"LoRA with {asked[0]} was asked for at {target.path!r}, the experts of a mixture, which read their parameters "
                "themselves: that is not possible there. Leave it out, or exclude the experts"
            )
        for name in names:
            experts, *sides = module.get_parameter(name).shape
            out_features, in_features = reversed(sides) if self.transposed else sides
            self.register_parameter(_down(name), self.new(experts * self.rank, in_features))
            self.register_parameter(_up(name), self.new(out_features, self.rank * experts))

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_down(*(self.get_parameter(_down(name)) for name in self.names))
        for name in self.names:
            nn.init.zeros_(self.get_parameter(_up(name)))

    def updated(self, name: str, weight: Tensor) -> Tensor:
        """Return ``weight``, the parameter ``name``, with the update of every expert added, in its dtype."""
        A, B = (self.get_parameter(key).to(weight.dtype) for key in (_down(name), _up(name)))
        A = A.view(len(weight), self.rank, -1)  # (experts, rank, in)
        B = B.view(-1, self.rank, len(weight)).permute(2, 0, 1)  # (experts, out, rank)
        left, right = (A.transpose(1, 2), B.transpose(1, 2)) if self.transposed else (B, A)
        mixed = torch.amp.is_autocast_available(weight.device.type)
        # The module must meet weights of the dtype it has.
        with torch.autocast(weight.device.type, enabled=False) if mixed else contextlib.nullcontext():
            return torch.baddbmm(weight, left, right, alpha=self.scaling)

    @override
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Arguments and results are those of the module of experts."""
        around: list[LowRankExperts] = [self]
        while isinstance(base, functools.partial):  # further adapters inside this one: their updates add up
            if not isinstance(base.func, LowRankExperts):
                raise InjectionError(
                    f"LoRA on fused experts acts on their weights and cannot stand around a {type(base.func).__name__}; activate one "
                    "of them at a time"
                )
            around.append(base.func)
            base = base.args[0]
        assert isinstance(base, nn.Module)
        weights: dict[str, Tensor] = {}
        for adapter in around:
            for name in adapter.names:
                weights[name] = adapter.updated(name, weights.get(name, base.get_parameter(name)))
        return torch.func.functional_call(base, weights, args, kwargs)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for depth, name in enumerate(reversed(self.names)):  # HF PEFT wraps one parameter after the other
            inside = "base_layer." * depth
            tensors[f"{inside}lora_A.weight"] = self.get_parameter(_down(name))
            tensors[f"{inside}lora_B.weight"] = self.get_parameter(_up(name))
        return tensors

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        deltas = {}
        for name in self.names:
            dtype = torch.promote_types(torch.float32, self.get_parameter(_up(name)).dtype)
            deltas[name] = self.updated(name, torch.zeros_like(base_layer.get_parameter(name), dtype=dtype)).detach()
        return self.merged_with(base_layer, **deltas)


def _down(name: str) -> str:
    return f"{name}_lora_A"


def _up(name: str) -> str:
    return f"{name}_lora_B"


def without_parameters(patterns: Mapping[str, Any], parameters: Sequence[str], default: Any) -> dict[str, Any]:
    """Turn HF PEFT's patterns for parameters into patterns for the modules that hold them.

    Args:
        patterns: plain names, or ``re:`` and a regular expression, to value.
        parameters: HF PEFT's ``target_parameters``.
        default: the value where no pattern matches.

    Raises:
        AdapterConfigError: parameters of one module get different values, or a regular expression matches parameters.

    Example:
        >>> without_parameters({"experts.up": 2, "experts.down": 2, "q_proj": 4}, ["experts.up", "experts.down"], 8)
        {'q_proj': 4, 'experts': 2}
    """
    kept: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for word, value in patterns.items():
        if word.startswith("re:"):
            hits = [name for name in parameters if re.fullmatch(word[3:], name)]
            if hits:
                raise AdapterConfigError(
                    f"the pattern {word[3:]!r} matches the parameter {hits[0]!r}; only names are read there"
                )
        else:
            hits = [name for name in parameters if _ends(name, word) or _ends(word, name)]
        for name in hits:
            longer = max(word, name, key=len)
            found.setdefault(longer.rpartition(".")[0], {})[name.rpartition(".")[2]] = value
        if not hits:
            kept[word] = value
    for module, values in found.items():
        holders = {name: name.rpartition(".")[0] for name in parameters}
        beside = {
            name.rpartition(".")[2] for name, held in holders.items() if _ends(held, module) or _ends(module, held)
        }
        values = {name: values.get(name, default) for name in sorted(beside)}
        if len(set(values.values())) > 1:
            raise AdapterConfigError(
                f"the parameters of {module!r} get different values, {values}; here all parameters of one module have the same"
            )
        kept[module] = next(iter(values.values()))
    return kept


def _ends(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")

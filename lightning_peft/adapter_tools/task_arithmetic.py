"""Task arithmetic on what adapters of any mergeable method add to the weights.

Ilharco et al., "Editing Models with Task Arithmetic", 2022 (arXiv:2212.04089): ``W + sum_i w_i (W_i - W)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import adapter_layers, adapters_named, base_modules, unwrapped
from lightning_peft.adapter_tools.changes import Factored, changes_in
from lightning_peft.adapter_tools.report import LowRankReport
from lightning_peft.adapter_tools.updates import put_in
from lightning_peft.arithmetic.parameter_copies import ParameterCopies
from lightning_peft.errors import ConfigError, MergeError
from lightning_peft.injection import record
from lightning_peft.rollback import unchanged_on_error
from lightning_peft.surgery import inject_at


def add_tasks(
    model: nn.Module, weights: Mapping[str, float], *, name: str, rank: int | None, drop_rest: bool
) -> LowRankReport:
    """Make the adapter ``name`` whose change of every parameter is the weighted sum of those of the adapters.

    Without a rank the adapters must all be copies of the same parameters, and so is the new one. With one it is a LoRA.

    Raises:
        ConfigError: as :func:`~lightning_peft.adapter_tools.combining.combine_adapters`.
        MergeError: a method cannot be merged, or an adapter is merged into the base.
    """
    if rank is None:
        return _add_copies(model, weights, name)
    modules = {path: unwrapped(module) for path, module in base_modules(model)}
    total: dict[str, dict[str, Tensor]] = {}
    for adapter, weight in weights.items():
        for path, changes in changes_in(model, adapter):
            sums = total.setdefault(path, {})
            for key, change in changes.items():
                sums[key] = sums[key] + weight * change if key in sums else weight * change
    factored = Factored(rank=rank)
    for path in list(total):
        factored.add(path, modules[path], total.pop(path))
    report = factored.report(f"the sum of {list(weights)}", drop_rest=drop_rest)
    tied = any("weight" in part.tied_parameters for one in weights for part in adapters_named(model, one).values())
    family = record(model, next(iter(weights))).family
    put_in(model, name, factored.pairs, family=family, tied=tied, biases=factored.biases)
    return report


def _add_copies(model: nn.Module, weights: Mapping[str, float], name: str) -> LowRankReport:
    """Make the sum of adapters that are copies of the same parameters, as such an adapter. Nothing is lost."""
    held = [record(model, adapter) for adapter in weights]
    found = [adapters_named(model, adapter) for adapter in weights]
    layers = adapter_layers(model)
    for injection, adapters in zip(held, found, strict=True):
        copies = all(isinstance(part, ParameterCopies) for part in adapters.values())
        same = (injection.method, set(injection.targets), set(injection.saved)) == (
            held[0].method,
            set(held[0].targets),
            set(held[0].saved),
        )
        if not copies or not same:
            raise ConfigError(
                f"task_arithmetic without a rank adds copies of the same parameters, but {list(weights)} are "
                f"{', '.join(sorted({one.method.name for one in held}))} adapters that are not alike; give the rank= of a LoRA that holds the sum"
            )
    for path, layer in layers.items():
        if layer.merged:
            raise MergeError(f"adapter {layer.merged[0]!r} is merged into {path!r}; call unmerge_adapters(model) first")
    values: dict[str, dict[str, Tensor]] = {}
    for path, first in found[0].items():
        assert isinstance(first, ParameterCopies)
        for key, stored in first.export_state().items():
            parameter = layers[path].base_layer.get_parameter(key.removeprefix(first.prefix)).detach().to(stored.dtype)
            value = parameter.clone()
            for weight, adapters in zip(weights.values(), found, strict=True):
                value += weight * (adapters[path].export_state()[key] - parameter)
            if not torch.isfinite(value).all():
                raise ConfigError(f"{path}.{key} of {name!r} would be non-finite; the model is unchanged")
            values.setdefault(path, {})[key] = value
    with unchanged_on_error(model), torch.random.fork_rng():
        inject_at(model, held[0], name=name, trainable=False)
        for path, adapter in adapters_named(model, name).items():
            adapter.import_state(values.get(path, {}))
    return LowRankReport(ranks={})

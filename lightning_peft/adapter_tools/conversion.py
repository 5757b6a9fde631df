"""Any change of weights as a LoRA: of an adapter of another method, or between two checkpoints.

The best approximation of rank r of a change of a weight is its largest r singular values (Eckart and Young, 1936); where the
change has no higher rank it is the change itself. Every weight is decomposed on its own and its error is reported.
"""

from __future__ import annotations

from torch import nn

from lightning_peft.adapter_layer import adapters_named, base_modules, unwrapped
from lightning_peft.adapter_tools.changes import Factored, changes_between, changes_in
from lightning_peft.adapter_tools.pruning import shortened
from lightning_peft.adapter_tools.report import LowRankReport
from lightning_peft.adapter_tools.updates import put_in
from lightning_peft.arithmetic.thin_products import check_rank_or_energy
from lightning_peft.errors import ConfigError
from lightning_peft.injection import record
from lightning_peft.low_rank_pairs import Updates, updates_in
from lightning_peft.surgery import check_name, resolve_family


def to_lora(
    model: nn.Module,
    name: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    new_name: str = "converted",
    drop_rest: bool = False,
) -> LowRankReport:
    """Make a LoRA adapter from an adapter of any mergeable method, beside it, and make that the active one.

    Each weight gets the best approximation, of the rank asked for, of what the adapter adds to it; changed biases of linear
    and convolution layers are kept as they are.

    Args:
        model: the adapted model.
        name: the adapter to convert: of DoRA, VeRA, AdaLoRA, full fine-tuning, LoRA itself.
        rank: the rank of the new adapter, smaller where a weight has no more.
        energy: instead of a rank, the share of the sum of squared singular values that each weight keeps.
        new_name: the name of the new adapter.
        drop_rest: whether to leave out parameters that a LoRA has no update for (norms), which are refused otherwise.

    Returns:
        The rank and the relative error of each weight, and what was left out.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        InjectionError: ``new_name`` is taken.
        MergeError: the method cannot be merged, or an adapter is merged into the base.
        ConfigError: ``rank`` and ``energy`` are out of range, or a LoRA cannot hold the change.

    Example:
        >>> import torch
        >>> from lightning_peft import DoRA, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = inject(model, DoRA(rank=2), "0")
        >>> model[0].adapters["default"].lora_B.data.normal_().shape
        torch.Size([2, 8])
        >>> to_lora(model, rank=8).error < 1e-6
        True
    """
    check_name(model, new_name)
    check_rank_or_energy(rank, energy)
    held = record(model, name)
    plain = _plain(model, name)
    if plain is not None:
        pairs, report = shortened(plain, rank=rank, energy=energy)
        put_in(model, new_name, pairs, family=held.family, tied=bool(plain.tied))
        return report
    modules = {path: unwrapped(module) for path, module in base_modules(model)}
    factored = Factored(rank=rank, energy=energy)
    for path, changes in changes_in(model, name):
        factored.add(path, modules[path], changes)
    report = factored.report(f"adapter {name!r}", drop_rest=drop_rest)
    tied = any("weight" in adapter.tied_parameters for adapter in adapters_named(model, name).values())
    put_in(model, new_name, factored.pairs, family=held.family, tied=tied, biases=factored.biases)
    return report


def _plain(model: nn.Module, name: str) -> Updates | None:
    """Return the updates of an adapter that is nothing but low-rank products, which need not be written out; else None."""
    try:
        return updates_in(model, name)
    except ConfigError:
        return None


def extract_lora(
    base: nn.Module,
    tuned: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    name: str = "default",
    drop_rest: bool = False,
) -> LowRankReport:
    """Put the difference of two checkpoints into ``base`` as a LoRA adapter, and make it the active one.

    Args:
        base: the model before training.
        tuned: the model after training in full, with the same parameters; left alone.
        rank: the rank of the adapter, smaller where a weight has no more.
        energy: instead of a rank, the share of the sum of squared singular values that each weight keeps.
        name: the name of the adapter.
        drop_rest: whether to leave out parameters that a LoRA has no update for (norms), which are refused otherwise.

    Returns:
        The rank and the relative error of each weight, and what was left out.

    Raises:
        ConfigError: the models do not have the same parameters, or a LoRA cannot hold their difference.
        InjectionError: the name is taken.

    Example:
        >>> import copy, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
        >>> tuned = copy.deepcopy(base)
        >>> _ = tuned[0].weight.data.addr_(torch.ones(8), torch.arange(8.0))
        >>> report = extract_lora(base, tuned, energy=0.999)
        >>> report.ranks, report.error < 1e-6
        ({'0': 1}, True)
    """
    check_name(base, name)
    check_rank_or_energy(rank, energy)
    modules = {path: unwrapped(module) for path, module in base_modules(base)}
    factored = Factored(rank=rank, energy=energy)
    for path, changes in changes_between(base, tuned):
        factored.add(path, modules[path], changes)
    report = factored.report(f"the tuned {type(tuned).__name__}", drop_rest=drop_rest)
    weights: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            weights.setdefault(id(weight), []).append(path)
    tied = any(len(paths) > 1 and set(paths) & factored.pairs.keys() for paths in weights.values())
    family = resolve_family(base, None).name
    put_in(base, name, factored.pairs, family=family, tied=tied, biases=factored.biases)
    return report

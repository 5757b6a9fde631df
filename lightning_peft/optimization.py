"""What an optimizer gets to train: groups of parameters, and the learning rate of each."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_peft.adapter_layer import adapter_layers, adapters_named
from lightning_peft.errors import ConfigError, LightningPEFTWarning
from lightning_peft.interfaces import Adapter

RATIO = "lr_ratio"
"""Key of a parameter group: the factor of its learning rate."""


def parameter_groups(module: nn.Module, adapter: str | None = None) -> list[dict[str, Any]]:
    """Return the trained parameters of ``module``, or those of one ``adapter`` in it, as optimizer groups.

    Matrices and vectors are in groups of their own, the vectors without weight decay; so are parameters whose adapter asks
    for a learning rate of its own, with the factor under ``"lr_ratio"`` for :func:`scale_learning_rates`.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        ConfigError: nothing is trained.
    """
    ratios = _ratios(module)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if adapter is not None:
        own = {id(p) for one in adapters_named(module, adapter).values() for p in one.parameters()}
        trained = [parameter for parameter in trained if id(parameter) in own]
    if not trained:
        raise ConfigError("no parameter is trained; is the adapter active and trainable?")
    # Matrices come before vectors, and the usual learning rate before others.
    for ratio, is_vector in sorted({(ratios.get(id(p), 1.0), p.dim() <= 1) for p in trained}, key=_usual_first):
        group: dict[str, Any] = {"params": []}
        groups[ratio, is_vector] = group | ({"weight_decay": 0.0} if is_vector else {})
        if ratio != 1.0:
            groups[ratio, is_vector][RATIO] = ratio
    for parameter in trained:
        groups[ratios.get(id(parameter), 1.0), parameter.dim() <= 1]["params"].append(parameter)
    return list(groups.values())


def scale_learning_rates(optimizer: Optimizer) -> None:
    """Multiply the learning rate of each group by its ratio: call it once, on a fresh optimizer, before a scheduler is made.

    Raises:
        ConfigError: a ratio is asked for of an optimizer that finds its learning rate by itself.
    """
    for group in optimizer.param_groups:
        if RATIO not in group:
            continue
        if group.get("lr") is None:
            raise ConfigError(
                f"an adapter asks for {group[RATIO]:g} times the learning rate, but {type(optimizer).__name__} has none to multiply: "
                "give it an lr, or use a method without ratios"
            )
        group["lr"] = group["lr"] * group[RATIO]


def refuse_paged_on_cpu(optimizer: Optimizer) -> None:
    """Refuse a paged optimizer of bitsandbytes over parameters on a CPU.

    Raises:
        ConfigError: it would not page: paging is between the memories of a GPU and its host.
    """
    devices = {parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}
    if getattr(optimizer, "is_paged", False) and "cpu" in devices:
        name = type(optimizer).__name__
        raise ConfigError(
            f"{name} pages its state between the memories of a GPU and its host, but the trained parameters are on the CPU; take "
            f"bitsandbytes.optim.{name.removeprefix('Paged')} or torch.optim.AdamW there"
        )


def warn_of_lost_ratios(optimizer: Optimizer, scheduler: object) -> None:
    """Warn if making ``scheduler`` gave the groups of ``optimizer`` learning rates of its own, other than their ratios ask for."""
    groups = optimizer.param_groups
    if not any(RATIO in group for group in groups):
        return
    usual = [float(group["lr"]) / group.get(RATIO, 1.0) for group in groups]
    if max(usual) - min(usual) > 1e-6 * max(usual):
        ratios = [group.get(RATIO, 1.0) for group in groups]
        warnings.warn(
            f"{type(scheduler).__name__} gives the {len(groups)} groups of parameters the learning rates "
            f"{[float(group['lr']) for group in groups]}, which are not in the ratios {ratios} that adapters ask for; give it a list with "
            "a value for each group, or take a scheduler that multiplies",
            LightningPEFTWarning,
            stacklevel=3,
        )


def _usual_first(key: tuple[float, bool]) -> tuple[bool, float, bool]:
    ratio, is_vector = key
    return ratio != 1.0, ratio, is_vector


def _ratios(module: nn.Module) -> dict[int, float]:
    """Return the factors of learning rates by the id of the parameter."""
    ratios: dict[int, float] = {}
    for layer in adapter_layers(module).values():
        for adapter in layer.adapters.values():
            assert isinstance(adapter, Adapter)
            for name, ratio in adapter.learning_rate_ratios().items():
                ratios[id(adapter.get_parameter(name))] = ratio
    return ratios

"""States of optimizers by the names of their parameters.

PyTorch stores the state of an optimizer by position. Where adapters come in another order when a run resumes, positions
mean other parameters, often of the same shape, so that nothing would fail::

    saved       group 0: a.lora_A a.lora_B b.lora_A b.lora_B        state 0 1 2 3
    resumed     group 0: b.lora_A b.lora_B a.lora_A a.lora_B        state 2 3 0 1
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_peft.errors import CheckpointMismatchError

Groups = Sequence[Sequence[str]]
"""The names of the parameters of an optimizer, group by group."""


def group_names(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[list[list[str]] | None]:
    """Return the names of the parameters of each optimizer, group by group; None where one is no parameter of ``module``.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> group_names(net, [torch.optim.SGD([net.bias, net.weight])])
        [[['bias', 'weight']]]
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: list[list[list[str]] | None] = []
    for optimizer in optimizers:
        # Lightning may wrap an optimizer, and strategies that shard replace parameters.
        groups = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
        found.append(groups if all(name for group in groups for name in group) else None)
    return found


def order_of_groups(stored: Groups, here: Groups, optimizer: str) -> list[int]:
    """Return for every group here the number of the stored group of the same parameters, in whatever order.

    Raises:
        CheckpointMismatchError: the groups do not hold the same parameters; the message has both lists.
    """
    numbers = {frozenset(group): number for number, group in enumerate(stored)}
    if numbers.keys() == {frozenset(group) for group in here} and len(stored) == len(here) == len(numbers):
        return [numbers[frozenset(group)] for group in here]
    before = {name: number for number, group in enumerate(stored) for name in group}
    now = {name: number for number, group in enumerate(here) for name in group}
    moved = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    raise CheckpointMismatchError(
        f"{optimizer} does not train the parameters of the checkpoint in the same groups: {len(moved)} differ, first {moved[:3]}. The "
        f"checkpoint has {_in_words(stored)}; this run has {_in_words(here)}. Resume with the parameter groups of the checkpoint, or start a "
        "new run from the adapter folder"
    )


def bound_by_name(state: Mapping[str, Any], stored: Groups, here: Groups, order: Sequence[int]) -> dict[str, Any]:
    """Return the state of an optimizer, as ``Optimizer.state_dict`` gives it, with its entries at the positions they have here.

    Args:
        state: the stored state, whose groups hold the names ``stored``.
        stored: the names when it was saved.
        here: the names now.
        order: what :func:`order_of_groups` returned for them.
    """
    old = {
        name: position
        for names, group in zip(stored, state["param_groups"], strict=True)
        for name, position in zip(names, group["params"], strict=True)
    }
    entries, groups, position = {}, [], 0
    for names, number in zip(here, order, strict=True):
        group = dict(state["param_groups"][number])
        group["params"] = list(range(position, position + len(names)))
        if "param_names" in group:
            given = dict(zip(stored[number], group["param_names"], strict=True))
            group["param_names"] = [given[name] for name in names]
        for new, name in zip(group["params"], names, strict=True):
            if old[name] in state["state"]:
                entries[new] = state["state"][old[name]]
        position += len(names)
        groups.append(group)
    return {**state, "state": entries, "param_groups": groups}


def is_by_position(state: Mapping[str, Any]) -> bool:
    """Tell whether a stored state numbers its parameters; strategies that shard store names themselves."""
    groups = state.get("param_groups", ())
    return all(type(position) is int for group in groups for position in group["params"])


def _in_words(groups: Groups) -> str:
    shown = [f"{list(group[:4])}{f' and {len(group) - 4} more' if len(group) > 4 else ''}" for group in groups]
    return f"{len(groups)} groups: {'; '.join(shown)}"

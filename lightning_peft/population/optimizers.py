"""The optimizers of all members as the one that Lightning steps, and the schedule of each.

::

    PopulationOptimizer.step(closure)      forward and backward of all, then      a.step()   b.step()   (c has stopped)
                       .param_groups       groups of a | groups of b | groups of c, the same dicts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_peft.errors import CheckpointMismatchError, ConfigError
from lightning_peft.optimization import parameter_groups, refuse_paged_on_cpu, scale_learning_rates, warn_of_lost_ratios
from lightning_peft.population.members import Member

MEMBER, KIND = "member", "optimizer_class"
"""Keys of a parameter group: whose it is, and the class of its optimizer."""


class PopulationOptimizer(Optimizer):
    """Steps the optimizers of the members that have not stopped.

    Args:
        of: member to its optimizer.
    """

    def __init__(self, of: Mapping[str, Optimizer]) -> None:
        for name, optimizer in of.items():
            if isinstance(optimizer, LBFGS):
                raise ConfigError(
                    f"member {name!r}: LBFGS runs the model several times in a step, which is the same for all members; take another optimizer"
                )
            for group in optimizer.param_groups:
                group |= {MEMBER: name, KIND: type(optimizer).__name__}
        self.of = dict(of)
        self.living = set(of)
        super().__init__([group for optimizer in of.values() for group in optimizer.param_groups], {})
        self.state: Any = _States(self.of)
        self._join()

    def _join(self) -> None:
        self.param_groups = [group for optimizer in self.of.values() for group in optimizer.param_groups]

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run ``closure``, which makes the gradients, and step each member that has not stopped."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for name, optimizer in self.of.items():
            if name in self.living:
                optimizer.step()
        return result

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the states of all members with the numbers that the parameters have in the whole."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        start = 0
        for name, optimizer in self.of.items():
            one = optimizer.state_dict()
            for number, value in one["state"].items():
                if not isinstance(number, int):
                    raise ConfigError(
                        f"member {name!r}: {type(optimizer).__name__} keeps a state {number!r} that is not of a parameter, which the checkpoint of a "
                        "population cannot hold; take another optimizer"
                    )
                state[start + number] = value
            groups += [
                {**group, "params": [start + number for number in group["params"]]} for group in one["param_groups"]
            ]
            start += sum(len(group["params"]) for group in optimizer.param_groups)
        return {"state": state, "param_groups": groups}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give each member its part of what :meth:`state_dict` returned.

        Raises:
            CheckpointMismatchError: it is the state of other members.
        """
        groups = list(state_dict["param_groups"])
        here = [group[MEMBER] for group in self.param_groups]
        if [group.get(MEMBER) for group in groups] != here:
            raise CheckpointMismatchError(
                f"the checkpoint has groups of parameters of {[group.get(MEMBER) for group in groups]}, this population of {here}; resume with the "
                "members of the checkpoint"
            )
        start, first = 0, 0
        for optimizer in self.of.values():
            own = groups[first : first + len(optimizer.param_groups)]
            count = sum(len(group["params"]) for group in own)
            optimizer.load_state_dict(
                {
                    "state": {n - start: v for n, v in state_dict["state"].items() if start <= n < start + count},
                    "param_groups": [{**group, "params": [n - start for n in group["params"]]} for group in own],
                }
            )
            first, start = first + len(own), start + count
        self._join()


class _States(MutableMapping[Tensor, Any]):
    """The states of the parameters of all members, each in the optimizer that it belongs to."""

    def __init__(self, of: Mapping[str, Optimizer]) -> None:
        self._of = of

    def _owner(self, parameter: Tensor) -> Optimizer:
        for optimizer in self._of.values():
            if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
                return optimizer
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._owner(parameter).state[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._owner(parameter).state[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owner(parameter).state[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in optimizer.state for optimizer in self._of.values())

    def __iter__(self) -> Iterator[Tensor]:
        for optimizer in self._of.values():
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._of.values())


class MemberSchedule:
    """The scheduler of one member, as one of the :class:`PopulationOptimizer`.

    Args:
        member: whose it is.
        scheduler: the scheduler of its optimizer.
        optimizer: the optimizer of all.
    """

    def __init__(self, member: str, scheduler: Any, optimizer: PopulationOptimizer) -> None:
        self.member, self.scheduler, self.optimizer = member, scheduler, optimizer

    def step(self, metric: Any = None) -> None:
        """Advance, unless the member has stopped."""
        if self.member in self.optimizer.living:
            self.scheduler.step() if metric is None else self.scheduler.step(metric)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scheduler, with whose it is and its class."""
        return {**self.scheduler.state_dict(), MEMBER: self.member, KIND: type(self.scheduler).__name__}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        self.scheduler.load_state_dict({k: v for k, v in state_dict.items() if k not in (MEMBER, KIND)})


class MadeOptimizer(NamedTuple):
    """The optimizer of one member, fresh."""

    optimizer: Optimizer
    """Over the parameters of the member."""
    scheduler: Any
    """Of its learning rate, or None."""
    rate: float
    """Learning rate before any schedule."""


def member_optimizer(
    module: nn.Module, member: Member, make: OptimizerCallable, schedule: LRSchedulerCallable | None
) -> MadeOptimizer:
    """Return optimizer and schedule of a member over its parameters in ``module``, as a run of it alone would make them."""
    groups = parameter_groups(module, str(member.name))
    if member.lr is not None:
        groups = [{**group, "lr": member.lr} for group in groups]
    optimizer = make(groups)
    refuse_paged_on_cpu(optimizer)
    rate = float(optimizer.param_groups[0].get("lr") or 0.0)
    scale_learning_rates(optimizer)
    scheduler = None if schedule is None else schedule(optimizer)
    if scheduler is not None:
        warn_of_lost_ratios(optimizer, scheduler)
    return MadeOptimizer(optimizer, scheduler, rate)


def schedule_config(name: str, scheduler: Any, interval: str, optimizer: PopulationOptimizer) -> dict[str, Any]:
    """Return what Lightning is told of the schedule of a member."""
    config: dict[str, Any] = {"scheduler": MemberSchedule(name, scheduler, optimizer), "interval": interval}
    if isinstance(scheduler, ReduceLROnPlateau):  # advances with a measurement of the member
        config |= {"interval": "epoch", "monitor": f"{scheduler.monitor}/{name}", "reduce_on_plateau": True}
    return config


def refuse_shared(trainer: Trainer) -> None:
    """Refuse what members would share, so that one could hold up another.

    Raises:
        ConfigError: there are several processes, or one scale of all losses.
    """
    if trainer.world_size > 1:
        raise ConfigError(
            f"a population is trained by one process, as members that stop change what is trained; got {trainer.world_size}. Give each process "
            "members of its own"
        )
    if trainer.precision == "16-mixed":
        raise ConfigError(
            "precision='16-mixed' scales the losses of all members together, so that one which overflows would hold up the others; use "
            "'bf16-mixed' or 32"
        )

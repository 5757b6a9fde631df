"""What a population is made of: one adaptation each, with the settings of its own run."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lightning_peft.composition import Adaptation, named
from lightning_peft.errors import ConfigError
from lightning_peft.field_checks import is_number, is_whole
from lightning_peft.interfaces import Method
from lightning_peft.targets import Targets


@dataclass(frozen=True)
class Member(Adaptation):
    """One adapter of a population, with the settings of the run it would have alone.

    What is None is that of the :class:`PopulationModule`.

    Example:
        >>> from lightning_peft import LoRA
        >>> Member(LoRA(rank=4), name="small", lr=1e-3).lr
        0.001
    """

    lr: float | None = None
    """Learning rate, in place of that of the optimizer."""
    optimizer: OptimizerCallable | None = None
    """Makes its optimizer from its parameter groups."""
    lr_scheduler: LRSchedulerCallable | None = None
    """Makes the scheduler of its learning rate from its optimizer."""
    lr_interval: str | None = None
    """Whether its scheduler advances every ``step`` or every ``epoch``."""
    seed: int | None = None
    """Seed of its initial values; if None, the random numbers that the run starts with, the same for each such member."""
    patience: int | None = None
    """Validations in a row without an improvement after which it stops; None for never."""
    min_delta: float = 0.0
    """What must be gained at least to count as an improvement for ``patience``."""
    gradient_clip_val: float | None = None
    """What its gradients are clipped to, in place of the Trainer's ``gradient_clip_val``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        who = f"member {self.name or self.method.name!r}"
        if self.lr is not None and not (is_number(self.lr) and 0 < self.lr < math.inf):
            raise ConfigError(f"{who}: lr must be a positive number, got {self.lr!r}")
        if self.lr_interval not in (None, "step", "epoch"):
            raise ConfigError(f"{who}: lr_interval must be 'step' or 'epoch', got {self.lr_interval!r}")
        if self.seed is not None and not (is_whole(self.seed, 0) and self.seed < 2**32):
            raise ConfigError(f"{who}: seed must be a whole number from 0 to 2**32 - 1, got {self.seed!r}")
        if self.patience is not None and not is_whole(self.patience, 1):
            raise ConfigError(
                f"{who}: patience must be a whole number of at least 1, or None for never, got {self.patience!r}"
            )
        if not (is_number(self.min_delta) and 0 <= self.min_delta < math.inf):
            raise ConfigError(f"{who}: min_delta must be a number of at least 0, got {self.min_delta!r}")
        clip = self.gradient_clip_val
        if clip is not None and not (is_number(clip) and clip > 0):
            raise ConfigError(f"{who}: gradient_clip_val must be a positive number, got {clip!r}")


@dataclass(frozen=True)
class MemberGrid:
    """Members from lists: one for each combination of methods, values of their fields, targets, learning rates and seeds.

    Example:
        >>> from lightning_peft import LoRA
        >>> grid = MemberGrid(LoRA(), fields={"rank": [2, 8]}, lr=[1e-3, 0.01])
        >>> [member.name for member in grid.members()]
        ['lora-rank2-lr1e-3', 'lora-rank2-lr1e-2', 'lora-rank8-lr1e-3', 'lora-rank8-lr1e-2']
    """

    method: Method | list[Method]
    """The method, or several."""
    fields: dict[str, list[Any]] = field(default_factory=dict)
    """Fields of the method to the values that are tried, such as ``{"rank": [2, 8]}``."""
    targets: list[str | list[str] | Targets | None] = field(default_factory=lambda: [None])
    """What is adapted: for each combination one element."""
    lr: list[float] | None = None
    """Learning rates; that of the optimizer if None."""
    seed: list[int] | None = None
    """Seeds of the initial values."""
    optimizer: OptimizerCallable | None = None
    """As in :class:`Member`, for all."""
    lr_scheduler: LRSchedulerCallable | None = None
    """As in :class:`Member`, for all."""
    patience: int | None = None
    """As in :class:`Member`, for all."""
    min_delta: float = 0.0
    """As in :class:`Member`, for all."""

    def members(self) -> list[Member]:
        """Return the members, named after what differs between them.

        Raises:
            ConfigError: a list is empty, or a field is none of the method or refused by it.
        """
        methods = list(self.method) if isinstance(self.method, (list, tuple)) else [self.method]
        axes: dict[str, Any] = {"method": methods, **self.fields, "targets": self.targets}
        axes |= {"lr": [None] if self.lr is None else self.lr, "seed": [None] if self.seed is None else self.seed}
        for key, values in axes.items():
            if not isinstance(values, (list, tuple)) or not values:
                raise ConfigError(f"MemberGrid {key} must be a list of the values to try, got {values!r}")
        found = []
        for point in itertools.product(*axes.values()):
            chosen = dict(zip(axes, point, strict=True))
            words = [_word(key, chosen[key]) for key in axes if key != "method" and len(axes[key]) > 1]
            found.append(self._member("-".join([getattr(chosen["method"], "name", "member"), *words])[:64], chosen))
        return found

    def _member(self, name: str, values: Mapping[str, Any]) -> Member:
        method = values["method"]
        if not isinstance(method, Method):
            raise ConfigError(f"MemberGrid method must be a Method such as LoRA(), or a list of them, got {method!r}")
        known = [one.name for one in dataclasses.fields(method)]  # type: ignore[arg-type]
        for key in self.fields:
            if key not in known:
                raise ConfigError(
                    f"MemberGrid fields names {key!r}, which {type(method).__name__} does not have; it has {', '.join(known)}"
                )
        return Member(
            method=dataclasses.replace(method, **{key: values[key] for key in self.fields}),  # type: ignore[type-var]
            targets=values["targets"],
            name=name,
            lr=values["lr"],
            seed=values["seed"],
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            patience=self.patience,
            min_delta=self.min_delta,
        )


def _word(key: str, value: Any) -> str:
    """Return a part of a name, of the characters that names of adapters may have."""
    if isinstance(value, float):
        sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        text = f"{'-' * sign}{''.join(map(str, digits))}" + (f"e{exponent}" if exponent else "")
    elif key == "targets":
        value = value.include if isinstance(value, Targets) else value
        return _plain_word("_".join([value] if isinstance(value, str) else value or ["default"]))
    else:
        text = str(value)
    return _plain_word(f"{key}{text}")


def _plain_word(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "any"


def checked_members(members: MemberGrid | Sequence[Member | Adaptation | Method]) -> list[Member]:
    """Return the members of a population, with a name each.

    Raises:
        ConfigError: there is none, a name is given twice, or a method is none that members can have on one base.
    """
    given = members.members() if isinstance(members, MemberGrid) else members
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"members must be a list of Member(method, ...), or a MemberGrid, got {members!r}")
    if not given:
        raise ConfigError("a population needs at least one member, got none")
    chosen = [_as_member(one) for one in named(given)]
    for one in chosen:
        if not one.method.row_routable:
            raise ConfigError(
                f"member {one.name!r}: {one.method.name!r} does not act on each row on its own (row_routable = False), so its rows cannot be kept "
                "apart from those of other members; train it in a run of its own"
            )
        if one.method.exact_packed_base and len(chosen) > 1:
            raise ConfigError(
                f"member {one.name!r}: {one.method.name!r} makes packed weights that belong to its adapter alone, and all members share the base; "
                "train it in a run of its own"
            )
    _refuse_other_bases(chosen)
    return chosen


def _as_member(one: Adaptation) -> Member:
    if isinstance(one, Member):
        return one
    return Member(**{part.name: getattr(one, part.name) for part in dataclasses.fields(one)})


def _refuse_other_bases(members: Sequence[Member]) -> None:
    """Refuse members that would train over different bases when each is alone."""
    first = members[0]
    for one in members[1:]:
        if _base_of(one) != _base_of(first):
            raise ConfigError(
                f"members {first.name!r} and {one.name!r} share one base, but alone each would train over another: {first.method.name!r} makes it "
                f"with {_base_of(first) or 'no change'} and {one.method.name!r} with {_base_of(one) or 'no change'}. Train them in populations of "
                "their own"
            )


def _base_of(member: Member) -> dict[str, Any]:
    """Return what a member's method makes of the base: its class, and the fields that are not those of a method that changes nothing."""
    kind = type(member.method)
    if kind.prepare is Method.prepare:
        return {}
    plain = {
        part.name
        for one in kind.__mro__
        if dataclasses.is_dataclass(one) and getattr(one, "prepare", None) is Method.prepare
        for part in dataclasses.fields(one)
    }
    fields = {key: value for key, value in member.method.to_config().items() if key not in plain}
    return {"method": kind.name, **fields, "modules_to_save": member.modules_to_save}

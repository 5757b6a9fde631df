"""Training in phases: which adapters act and which are trained, by epoch or by step.

::

    epoch      0          1          2          3
    active     prompt     prompt     prompt     prompt, lora, bitfit
    trained    prompt     lora at the top       all

Gradual unfreezing (Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018, arXiv:1801.06146) is
the case of one adapter whose places are trained from the top downward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import LBFGS
from typing_extensions import override

from lightning_peft.activation import set_active_adapters
from lightning_peft.adapter_layer import AdapterLayer, adapter_layers, adapter_names
from lightning_peft.errors import CheckpointMismatchError, ConfigError, InjectionError
from lightning_peft.families import GENERIC
from lightning_peft.injection import adapted_roots, records
from lightning_peft.registry import get_registry
from lightning_peft.saved_modules import inside
from lightning_peft.targets import matches


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a training.

    Example:
        >>> Phase(start=1, active=["lora"], trained=["lora:*.layers.3"])
        Phase(start=1, unit='epoch', active=['lora'], trained=['lora:*.layers.3'])
    """

    start: int
    """The epoch or step with which it begins; it ends where the next one begins."""
    unit: Literal["epoch", "step"] = "epoch"
    """Whether ``start`` counts epochs or steps of the optimizer; the same in all phases."""
    active: list[str] | None = None
    """Names of the adapters that act, innermost first; all of the model, in the order they went in, if None."""
    trained: list[str] | None = None
    """What is trained: ``name`` for a whole adapter, ``name:target`` for its places in the modules that a role, glob or ``re:``
    expression names; all that is active if None."""

    def __post_init__(self) -> None:
        if not isinstance(self.start, int) or isinstance(self.start, bool) or self.start < 0:
            raise ConfigError(f"Phase start must be an epoch or a step, 0 or more, got {self.start!r}")
        if self.unit not in ("epoch", "step"):
            raise ConfigError(f"Phase unit must be 'epoch' or 'step', got {self.unit!r}")
        for field in ("active", "trained"):
            names = getattr(self, field)
            right = isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names)
            if names is not None and not right:
                raise ConfigError(f"Phase {field} must be a list of names, got {names!r}")
        for name in (entry.partition(":")[0] for entry in self.trained or ()):
            if self.active is not None and name not in self.active:
                raise ConfigError(f"Phase trained names {name!r}, which is not among its active {self.active}")


class PhaseSchedule(Callback):
    """Activates and trains adapters by epoch or step.

    The optimizer holds all parameters from the start. Those that a phase does not train get no gradient, so optimizers of torch
    leave them, and what they remember of them, as they are. Which phase it is depends on the epoch or the step alone, so that a
    run resumes in the midst of one. All names and targets are checked before training starts. ``phase`` is logged at
    every step.

    Every adapter that a phase trains must be active when the optimizer is made, as they are after
    :func:`~lightning_peft.inject_all` and with a list of methods in :class:`~lightning_peft.PEFTModule`.

    Args:
        phases: the phases in their order; the first begins with 0.

    Raises:
        ConfigError: the phases have no order, or the Trainer uses several processes, which would not exchange the gradients of
            parameters that are trained later.

    Example:
        >>> schedule = PhaseSchedule([Phase(start=0, trained=["lora:*.1.*"]), Phase(start=2)])
        >>> [schedule.phase_at(epoch, 0) for epoch in range(4)]
        [0, 0, 1, 1]
    """

    schedules_adapters: ClassVar[bool] = True
    """Says to checkpoints that the active adapters change in training."""

    def __init__(self, phases: list[Phase]) -> None:
        if not phases or not all(isinstance(phase, Phase) for phase in phases):
            raise ConfigError(f"PhaseSchedule needs a list of Phase(start=...), got {phases!r}")
        starts = [phase.start for phase in phases]
        if starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ConfigError(f"the phases must start with 0 and each later than the one before, got {starts}")
        if len({phase.unit for phase in phases}) > 1:
            raise ConfigError(
                f"all phases must count in one unit, got {[phase.unit for phase in phases]}; give them all in steps"
            )
        self.phases = tuple(phases)
        self._applied: int | None = None

    def phase_at(self, epoch: int, step: int) -> int:
        """Return the number of the phase at an epoch and a step of the optimizer."""
        now = epoch if self.phases[0].unit == "epoch" else step
        return max(number for number, phase in enumerate(self.phases) if phase.start <= now)

    # -- hooks -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies of several processes; open a model that was trained before for the optimizer to come."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ParallelStrategy):
            raise ConfigError(
                f"PhaseSchedule runs in one process on one device, but the strategy is {type(trainer.strategy).__name__}: its processes would "
                "not exchange the gradients of parameters that are trained later. Use Trainer(devices=1, strategy='auto')"
            )
        self._applied = None
        for root in adapted_roots(pl_module):  # otherwise configure_model will make it
            names = _names(root)
            for phase in self.phases:
                for layer, name in _trained(root, phase, names):
                    layer.adapters[name].requires_grad_(True)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try every phase: its names, its targets, and whether the optimizer has what it trains."""
        self._applied = None
        roots = adapted_roots(pl_module)
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ConfigError(
                "PhaseSchedule needs an optimizer that leaves parameters without a gradient alone; LBFGS moves them too"
            )
        if not roots:
            raise ConfigError(
                f"PhaseSchedule found no adapter in {type(pl_module).__name__}; inject them in configure_model"
            )
        known = list(dict.fromkeys(name for root in roots for name in _names(root)))
        optimized = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        for number, phase in enumerate(self.phases):
            for name in [*(phase.active or ()), *(entry.partition(":")[0] for entry in phase.trained or ())]:
                if name not in known:
                    raise ConfigError(f"phase {number} names the adapter {name!r}, but there are: {', '.join(known)}")
            for entry in phase.trained or ():
                _check_entry(roots, entry, number)
            try:
                self._apply(roots, phase)
            except InjectionError as error:
                raise ConfigError(f"phase {number} cannot be: {error}") from error
            if not any(parameter.requires_grad for parameter in pl_module.parameters()):
                raise ConfigError(f"phase {number} trains nothing: trained={phase.trained}, active={phase.active}")
            for root in roots:
                for layer, name in _trained(root, phase, _names(root)):
                    if any(id(parameter) not in optimized for parameter in layer.adapters[name].parameters()):
                        raise ConfigError(
                            f"phase {number} trains the adapter {name!r}, but the optimizer does not have all of its parameters: it must be "
                            "active and trainable when the optimizer is made; inject_all makes all adapters active"
                        )

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure with the adapters of the phase."""
        self._follow(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the phase that the epoch or step is in, also in a run that resumes."""
        self._follow(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the phase of this epoch."""
        self._follow(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the phase of this step, and log it."""
        self._follow(trainer, pl_module)
        pl_module.log("phase", float(self._applied or 0), on_step=True, on_epoch=False, batch_size=1)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the phases, for the comparison when a run resumes."""
        return {"phases": [asdict(phase) for phase in self.phases]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the phases of a run that resumes.

        Raises:
            CheckpointMismatchError: they are others.
        """
        if state_dict != self.state_dict():
            raise CheckpointMismatchError(
                f"the checkpoint is of a run with the phases {state_dict.get('phases')}, this one has {self.state_dict()['phases']}"
            )

    # -- what it does ----------------------------------------------------------------------------------------------

    def _follow(self, trainer: Trainer, module: LightningModule) -> None:
        number = self.phase_at(trainer.current_epoch, trainer.global_step)
        if number == self._applied:
            return
        self._apply(adapted_roots(module), self.phases[number])
        self._applied = number
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        rank_zero_info(
            f"phase {number} of {len(self.phases)} begins: {self.phases[number]}, {trained:,} parameters are trained"
        )

    def _apply(self, roots: Sequence[nn.Module], phase: Phase) -> None:
        for root in roots:
            names = _names(root) if phase.active is None else [n for n in phase.active if n in _names(root)]
            set_active_adapters(root, names)
            trained = [(id(layer), name) for layer, name in _trained(root, phase, names)]
            for layer in adapter_layers(root).values():
                for name in layer.adapters:
                    layer.set_trainable(name, (id(layer), name) in trained)
            for layer, name in _trained(root, phase, names):  # what places share is trained if it is at one of them
                layer.adapters[name].requires_grad_(True)
            for layer in adapter_layers(root).values():
                for parameter in layer.adapters.parameters():
                    if not parameter.requires_grad:
                        parameter.grad = None


def _names(root: nn.Module) -> list[str]:
    """Return the names of the adapters in the order in which they were injected."""
    return list(dict.fromkeys([*records(root), *adapter_names(root)]))


def _trained(root: nn.Module, phase: Phase, active: Sequence[str]) -> Iterator[tuple[AdapterLayer, str]]:
    """Yield the layers where an adapter is trained in a phase, with its name."""
    layers = adapter_layers(root)
    for entry in active if phase.trained is None else phase.trained:
        name = entry.partition(":")[0]
        if name in active:
            yield from ((layers[path], name) for path in _places(root, layers, entry))


def _places(root: nn.Module, layers: Mapping[str, AdapterLayer], entry: str) -> list[str]:
    """Return the places of an adapter that an entry of ``trained`` names."""
    name, colon, word = entry.partition(":")
    places = [path for path, layer in layers.items() if name in layer.adapters]
    if not colon:
        return places
    held = records(root).get(name)
    family = get_registry().model_families.get(held.family, GENERIC) if held else GENERIC
    hits = matches(word, root, family)
    return [path for path in places if inside(path, hits)]


def _check_entry(roots: Sequence[nn.Module], entry: str, number: int) -> None:
    name, _, word = entry.partition(":")
    held = [(root, adapter_layers(root)) for root in roots]
    places = [path for root, layers in held for path in _places(root, layers, entry)]
    if not places:
        there = [path for root, layers in held for path in _places(root, layers, name)]
        raise ConfigError(
            f"phase {number} trains {name!r} at {word!r}, which names none of its {len(there)} places: {', '.join(there[:8])}"
            + (", ..." if len(there) > 8 else "")
        )
    if not any(
        True
        for _, layers in held
        for path in places
        if path in layers
        for _ in layers[path].adapters[name].parameters()
    ):
        raise ConfigError(
            f"phase {number} trains {name!r} at {word!r}, where it has no parameters of its own: tied weights are trained where the first of "
            "them is"
        )

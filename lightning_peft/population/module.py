"""The LightningModule that trains a population: one base, one forward, and a run of its own for each member."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.activation import set_active_adapters
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.batch_parts import IGNORED, field_of, rows_of, target_of, tokens_of
from lightning_peft.composition import Adaptation, inject_all
from lightning_peft.errors import ConfigError
from lightning_peft.interfaces import Method
from lightning_peft.loaders import ModelLoader
from lightning_peft.module import Loss, PEFTModule
from lightning_peft.population.checkpoint import PopulationCheckpoint
from lightning_peft.population.member_batches import OwnLosses, losses_of, names_of_rows, parts_of, repeated
from lightning_peft.population.members import Member, MemberGrid, checked_members
from lightning_peft.population.optimizers import PopulationOptimizer, member_optimizer, refuse_shared, schedule_config
from lightning_peft.population.results import MemberResult, results_of
from lightning_peft.population.resuming import store_standings, take_standings
from lightning_peft.population.standings import Halving, Standings
from lightning_peft.random_state import random_state, set_random_state
from lightning_peft.rows import set_row_adapters


class PopulationModule(PEFTModule):
    """Trains many adapters at once on one frozen base, each as it would be trained in a run of its own.

    Every batch is repeated for every member that has not stopped, the base runs once on all rows, and each member has its loss, its
    optimizer, its schedule, its clipping, its early stop and its adapter folders. Batches are those of :class:`PEFTModule`, without the
    column ``adapter``.

    Args:
        base: the model to adapt, or a loader for it.
        members: the members, or a grid of them. A method or an :class:`Adaptation` is a member with the settings of the module.
        optimizer: makes the optimizer of a member that names none.
        lr_scheduler: makes the learning-rate scheduler of a member that names none.
        lr_interval: whether it advances every ``step`` or every ``epoch``.
        loss: as in :class:`PEFTModule`; called for each member with the outputs for its rows and the target of the batch.
        monitor: what is compared: ``val_loss``, or another measurement such as ``val_token_accuracy`` or ``val_loss/<data set>``.
        mode: whether that is to be small (``min``) or large (``max``).
        halving: when to leave out all but the best members.
        fingerprint: as in :class:`PEFTModule`.
        check_base: as in :class:`PEFTModule`.

    Raises:
        ConfigError: there is no member, a name is given twice, or a method cannot be a member.

    Example:
        >>> from lightning_peft import LoRA
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> members = [Member(LoRA(rank=1), name="small"), Member(LoRA(rank=2), name="large", lr=1e-3)]
        >>> module = PopulationModule(net, members, loss=torch.nn.functional.cross_entropy)
        >>> module.configure_model()
        >>> module.living
        ['small', 'large']
    """

    def __init__(
        self,
        base: ModelLoader | nn.Module,
        members: list[Member] | MemberGrid,
        *,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "step",
        loss: Loss | None = None,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        halving: Halving | None = None,
        fingerprint: Literal["sampled", "complete"] = "sampled",
        check_base: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"mode must be 'min' or 'max', got {mode!r}")
        chosen = checked_members(members)
        given: list[Adaptation | Method] = [*chosen]
        super().__init__(
            base,
            given,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            loss=loss,
            fingerprint=fingerprint,
            check_base=check_base,
            by_rows=True,
        )
        self.members = {str(one.name): one for one in chosen}
        self.monitor, self.mode, self.halving = monitor, mode, halving
        self.standings = Standings(chosen, mode, halving)
        self._after_injection: dict[str, dict[str, Any]] = {}
        self._learning_rates: dict[str, float] = {}
        self._measured: dict[str, dict[str, float]] = {}
        self._not_finite: set[str] = set()
        self._started: float | None = None

    @property
    def living(self) -> list[str]:
        """Names of the members that are trained."""
        return self.standings.living

    # -- the model -------------------------------------------------------------------------------------------------

    @override
    def _inject(self, model: nn.Module) -> None:
        before = random_state()
        given: list[Adaptation | Method] = [*self.adaptations]  # the members, with heads that are new
        try:
            inject_all(model, given, by_rows=True, around=lambda name: self._seeded(name, before))
        finally:
            set_random_state(before)  # the batches do not depend on who the members are

    @contextlib.contextmanager
    def _seeded(self, name: str, start: dict[str, Any]) -> Iterator[None]:
        """Draw the initial values of a member from the random numbers that its run alone would begin with."""
        seed = self.members[name].seed
        set_random_state(start)
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        yield
        self._after_injection[name] = random_state()

    @override
    def _initialize_one(self, name: str, trainer: Trainer) -> None:
        assert self.model is not None
        before = random_state()
        set_random_state(self._after_injection[name])
        set_active_adapters(self.model, [name])
        try:
            super()._initialize_one(name, trainer)
        finally:
            set_active_adapters(self.model, [])
            set_random_state(before)

    # -- steps -----------------------------------------------------------------------------------------------------

    def member_losses(self, batch: Any, names: Sequence[str]) -> tuple[dict[str, Tensor], list[Any]]:
        """Run the model once for the members ``names``, each on every row of ``batch``.

        Returns:
            The loss of each, and the outputs for the rows of each.
        """
        rows, count = rows_of(batch), len(names)
        whole = repeated(batch, count)
        own = None if self.loss is not None or self.model is None else OwnLosses(self.model, count, rows)
        of_rows = names_of_rows(names, rows)
        self.__dict__["_row_names"] = of_rows  # for the backward behind it
        with self._rows(of_rows), contextlib.nullcontext() if own is None else own.in_place():
            outputs = self._outputs(whole)
        if own is not None:
            found = own.losses(outputs, batch)
            outputs = {"logits": field_of(outputs, "logits")}
        else:
            assert self.loss is not None
            found = losses_of(self.loss, outputs, target_of(batch), count, rows)
        return dict(zip(names, found, strict=True)), parts_of(outputs, count, rows)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses of the living members; log each as ``train_loss/<member>`` and their mean as ``train_loss``."""
        losses, _ = self.member_losses(batch, self.living)
        total = torch.stack(list(losses.values())).sum()
        rows = rows_of(batch)
        self.log("train_loss", total.detach() / len(losses), prog_bar=True, batch_size=rows)
        self.log_dict({f"train_loss/{name}": loss.detach() for name, loss in losses.items()}, batch_size=rows)
        for name, optimizer in self._population_optimizer().of.items():
            if name in losses and optimizer.param_groups[0].get("lr") is not None:
                self.log(f"lr/{name}", float(optimizer.param_groups[0]["lr"]), batch_size=rows)
        return total

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return by member what :meth:`PEFTModule.predict_step` returns for its adapter."""
        names, rows = list(self.members), rows_of(batch)
        with self._rows(names_of_rows(names, rows)):
            outputs = self._outputs(repeated(batch, len(names)))
        logits = field_of(outputs, "logits")
        return dict(zip(names, parts_of(outputs if logits is None else logits, len(names), rows), strict=True))

    @override
    def _measure(self, stage: str, batch: Any, dataloader_idx: int) -> None:
        fitting = self.trainer.state.fn == "fit"
        names = self.living if fitting else list(self.members)
        if not names:
            return
        losses, parts = self.member_losses(batch, names)
        self.__dict__.pop("_row_names", None)
        finite = torch.stack(list(losses.values())).isfinite().tolist()
        for (name, loss), outputs, usable in zip(losses.items(), parts, finite, strict=True):
            tokens = None if usable or self.loss is not None else tokens_of(self.model, outputs, batch)
            if usable or (tokens is not None and bool((tokens[1] == IGNORED).all())):  # no label: the mean of nothing
                self._record(f"{stage}-{dataloader_idx}-{name}", outputs, loss.detach(), batch)
            else:
                self._not_finite.add(name)

    @override
    def _log_metrics(self, stage: str) -> None:
        """Log what was measured as ``<stage>_<metric>/<member>``, and with the name of the data set where there are several."""
        labels = list(getattr(getattr(self.trainer, "datamodule", None), f"{stage}_names", ()))
        kept = [key for key in self.metrics if key.startswith(f"{stage}-")]
        several = len({key.split("-")[1] for key in kept}) > 1
        self._measured = {}
        lost, self._not_finite = self._not_finite, set()
        for key in kept:
            _, number, name = key.split("-", 2)
            label = labels[int(number)] if int(number) < len(labels) else number
            own = self._measured.setdefault(name, {})
            for metric, value in self.metrics[key].compute().items():  # type: ignore[operator]
                own |= {f"{stage}_{metric}": float(value)} if number == "0" else {}
                own |= {f"{stage}_{metric}/{label}": float(value)}
            for metric, value in own.items() if name not in lost else ():
                if several or "/" not in metric:
                    self.log(f"{metric}/{name}", value, sync_dist=True)
            del self.metrics[key]  # a member that stops is not measured again
        for name in lost:
            self._measured[name] = {f"{stage}_loss": float("nan"), self.monitor: float("nan")}
            self.log(f"{stage}_loss/{name}", float("nan"), sync_dist=True)
        losses = [own[f"{stage}_loss"] for name, own in self._measured.items() if name not in lost]
        if losses:
            self.log(f"{stage}_loss", min(losses), prog_bar=True, sync_dist=True)

    # -- who goes on -----------------------------------------------------------------------------------------------

    @override
    def on_validation_epoch_end(self) -> None:
        """Log what was measured, and say who stops."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        values = {}
        for name in self.living:
            own = self._measured.get(name, {})
            if self.monitor not in own:
                raise ConfigError(f"monitor={self.monitor!r} was asked for, but validation measures {sorted(own)}")
            values[name] = own[self.monitor]
        whole = bool(self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
        self.standings.judge(values, self.trainer.global_step, self.trainer.current_epoch + whole)
        self._let_stopped_rest()

    def _let_stopped_rest(self) -> None:
        """Leave the members that have stopped out of training; their parameters stay as they are."""
        living = self.living
        assert self.model is not None
        for name in self.members:
            for adapter in adapters_named(self.model, name).values() if name not in living else ():
                adapter.zero_grad(set_to_none=True)
        for config in self.trainer.lr_scheduler_configs if self.trainer.validating else ():
            name = config.scheduler.member  # type: ignore[union-attr]
            # After a resume Lightning would miss what the schedule of a member that has stopped goes by; it rests all the same.
            if name not in living and config.monitor and config.monitor not in self.trainer.callback_metrics:
                self.log(config.monitor, self.standings.of[name].last or 0.0, logger=False)
        set_row_adapters(self.model, living)
        self._population_optimizer().living = set(living)
        if not living:
            self.trainer.should_stop = True

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Note the time; end the epoch where all have stopped."""
        result = super().on_train_batch_start(batch, batch_idx)
        self._started = time.perf_counter()
        if not self.living:
            self.trainer.should_stop = True
            return -1
        return result

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step all, and count the step."""
        super().optimizer_step(*args, **kwargs)
        self.standings.stepped()

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Share the time of the step among those that took part."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self._started is not None:
            self.standings.spent(time.perf_counter() - self._started)
        self._started = None

    @override
    def on_train_end(self) -> None:
        """Say of the members that are left that they were trained to the end."""
        super().on_train_end()
        self.standings.finish()

    @override
    def on_fit_end(self) -> None:
        """Say it of a fit that had no step to do as well."""
        super().on_fit_end()
        self.standings.finish()

    # -- optimisation ----------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make an optimizer and a schedule for each member over its own parameters."""
        assert self.model is not None
        set_row_adapters(self.model, list(self.members))
        made = {
            name: member_optimizer(
                self, member, member.optimizer or self.optimizer, member.lr_scheduler or self.lr_scheduler
            )
            for name, member in self.members.items()
        }
        self._learning_rates = {name: one.rate for name, one in made.items()}
        whole = PopulationOptimizer({name: one.optimizer for name, one in made.items()})
        schedules = [
            schedule_config(name, one.scheduler, self.members[name].lr_interval or self.lr_interval, whole)
            for name, one in made.items()
            if one.scheduler is not None
        ]
        return [whole], schedules  # type: ignore[return-value]

    def _population_optimizer(self) -> PopulationOptimizer:
        optimizer = self.trainer.optimizers[0]
        assert isinstance(optimizer, PopulationOptimizer)
        return optimizer

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance the schedule of a member that has not stopped."""
        scheduler.step(metric)

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of each member by themselves."""
        for name, own in self._population_optimizer().of.items():
            value = self.members[name].gradient_clip_val or gradient_clip_val
            if name in self.living and value is not None:
                kind: Any = gradient_clip_algorithm or "norm"
                self.trainer.precision_plugin.clip_gradients(own, value, gradient_clip_algorithm=kind)

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Add a :class:`PopulationCheckpoint`, unless the Trainer has one or keeps no checkpoints."""
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        wanted = self.trainer.checkpoint_callbacks and not any(isinstance(one, PopulationCheckpoint) for one in present)
        return [*super().configure_callbacks(), *([PopulationCheckpoint()] if wanted else [])]

    # -- the run ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        """Begin anew with all members, if a fit begins."""
        super().setup(stage)
        self._not_finite.clear()
        if stage == "fit":
            self.standings = Standings(list(self.members.values()), self.mode, self.halving)
            refuse_shared(self.trainer)

    @override
    def on_fit_start(self) -> None:
        """Leave out who had stopped when the checkpoint was saved."""
        super().on_fit_start()
        asks = [name for name, member in self.members.items() if member.patience is not None]
        if (asks or self.halving is not None) and not self.trainer.enable_validation:
            raise ConfigError(
                f"patience of {asks} and halving={self.halving!r} go by validation, but this fit has none; give it a val_dataloader"
            )
        self._let_stopped_rest()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how the members stand."""
        super().on_save_checkpoint(checkpoint)
        store_standings(checkpoint, self.standings, self._trainer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take how the members stood.

        Raises:
            CheckpointMismatchError: the checkpoint is of no population, or of another one.
        """
        super().on_load_checkpoint(checkpoint)
        take_standings(checkpoint, self.standings, self._trainer)

    # -- results ---------------------------------------------------------------------------------------------------

    def ranking(self) -> list[MemberResult]:
        """Return what became of the members, the best first."""
        return results_of(self.standings, self.model, self._learning_rates)

"""What a run learns and what it forgets, while it trains.

::

    step 0            every n steps                     end
    base, tuned       tuned                             tuned (and at other scales)
    forgetting = 0    forgetting/<task>, learning/<task>, anchor/kl  ->  loggers, forgetting.json, forgetting.png

The base is the model itself with its adapters disabled: there is no second model and no copy of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_peft.activation import active_adapters
from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.callbacks.figures import figure_class, log_figure
from lightning_peft.callbacks.forgetting_curve import curve_figure, write_curve
from lightning_peft.errors import ConfigError, LightningPEFTWarning
from lightning_peft.evaluation.anchors import AnchorText
from lightning_peft.evaluation.base_figures import BaseFigures, digest_of_base
from lightning_peft.evaluation.budget import ForgettingBudget, ScaledPoint, best_scale, largest_scale
from lightning_peft.evaluation.forgetting import KINDS, KL, MEAN, ForgettingMeasure
from lightning_peft.field_checks import is_whole
from lightning_peft.injection import adapted_roots
from lightning_peft.interfaces import EvalTask
from lightning_peft.scaling import adapter_scale, adapters_scaled, scale_adapters


class ForgettingEvaluation(Callback):
    """Measures what the model could do before and what it is trained for: at the start, every so many steps and at the end.

    ::

        forgetting/<task>, forgetting/mean     how much worse than the base at a source task
        learning/<task>, learning/mean         how much better than the base at a target task
        source|target|watched/<task>/<figure>  what the tasks return
        anchor/kl, anchor/agreement            KL(base || tuned) in nats a token; share of equal likeliest tokens

    Figures of the base come from the model with its adapters disabled, once. Where that does not lead back to the base (full
    fine-tuning without an adapter, trained parameters of the base), they are taken before the first step; where it was merged away, from
    ``cache``. A run with this callback trains bit for bit as one without: modes, random numbers and gradients are left as they were,
    and no batch of the data loader is touched.

    All processes take part in every measurement, each on all of the examples, and use the figures of the first; none waits for another
    but in the exchanges of the strategy, which have a time limit.

    Args:
        sources: label to task: what should be kept.
        targets: label to task: what is to be learned.
        watched: label to task: what is logged beside, such as the diversity of samples.
        anchor: text on which the predictions of base and tuned model are compared.
        every_n_steps: optimizer steps between two measurements; only start and end if None.
        budget: a limit for forgetting and what to do about it.
        plot: draw the learning-forgetting curve, for loggers that take figures and as ``forgetting.png``; this needs matplotlib
            (``pip install lightning-peft[plot]``).
        output: folder for ``forgetting.json`` and ``forgetting.png``; that of the logger, or else of the Trainer, if None.
        cache: folder of figures of bases, by their fingerprint, that are read instead of measured, and written.
        base_fingerprint: which base in ``cache``; that of the model if None.

    Raises:
        ConfigError: an argument is out of its range, or matplotlib is not there.
    """

    def __init__(
        self,
        sources: dict[str, EvalTask],
        targets: dict[str, EvalTask] | None = None,
        *,
        watched: dict[str, EvalTask] | None = None,
        anchor: AnchorText | None = None,
        every_n_steps: int | None = None,
        budget: ForgettingBudget | None = None,
        plot: bool = False,
        output: str | None = None,
        cache: str | None = None,
        base_fingerprint: str | None = None,
    ) -> None:
        tasks = dict(zip(KINDS, (sources, targets or {}, watched or {}), strict=True))
        _check_tasks(tasks)
        if every_n_steps is not None and not is_whole(every_n_steps, 1):
            raise ConfigError(f"ForgettingEvaluation every_n_steps must be positive, got {every_n_steps!r}")
        if base_fingerprint is not None and cache is None:
            raise ConfigError(
                f"base_fingerprint={base_fingerprint!r} names figures in a cache; give cache=FOLDER as well"
            )
        if budget is not None:
            _check_budget(budget, tasks, anchor)
        if plot:
            figure_class("ForgettingEvaluation plot=True", "plot")
        self.every_n_steps, self.budget, self.plot, self.output = every_n_steps, budget, plot, output
        self.cache, self.base_fingerprint = cache, base_fingerprint
        self.points: list[dict[str, Any]] = []
        self.scaled: list[dict[str, float]] = []
        self._digest: str | None = None
        self._measure = ForgettingMeasure(tasks, anchor)

    @property
    def base(self) -> Mapping[str, Mapping[str, float]]:
        """Figures of the base by ``<kind>/<label>``."""
        return self._measure.base

    # -- hooks -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new curve, unless the Trainer goes on; that of a checkpoint is loaded after this."""
        if stage == "fit" and trainer.global_step == 0:
            self.points, self.scaled, self._digest, self._measure.base = [], [], None, {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse models and budgets that do not go together."""
        model = measured_model(pl_module)
        layers = adapter_layers(model)
        if layers and not active_adapters(model) and not any(layer.permanent for layer in layers.values()):
            raise ConfigError(
                f"ForgettingEvaluation measures the active adapters of {type(model).__name__}, and none is: adapters that act on rows of their "
                "own are measured one at a time, after set_active_adapters"
            )
        if self.budget is not None and self.budget.action != "stop":
            if not layers:
                raise ConfigError(
                    f"ForgettingBudget action={self.budget.action!r} scales adapters, and {type(model).__name__} has none; use action='stop'"
                )
            scale_adapters(model, _scales(model))  # raises where the kind of adapter has no scale

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the figures of the base, and measure the start."""
        model, strategy = measured_model(pl_module), trainer.strategy
        if self.cache and self._digest is None:  # where weights of the base are trained it is another one later
            self._digest = self.base_fingerprint or digest_of_base(model)
        cache = BaseFigures(self.cache, str(self._digest)) if self.cache else None
        with trainer.precision_plugin.forward_context():
            self._measure.take_base(
                model,
                fresh=trainer.global_step == 0,
                cache=cache,
                write=trainer.is_global_zero,
                share=strategy.broadcast,
            )
        if self._measure_at(trainer, pl_module):
            self._write(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after an optimizer step, where it is time."""
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if due and self._measure_at(trainer, pl_module):
            self._write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end, and choose the scale of a budget that picks one."""
        measured = self._measure_at(trainer, pl_module)
        picks = self.budget is not None and self.budget.action == "pick"
        if self.budget is not None and picks:
            self._pick(trainer, pl_module, self.budget)
        if measured or picks:
            self._write(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the curve so far and the figures of the base."""
        return {
            "points": self.points,
            "base": self._measure.base,
            "signature": self._measure.signature(),
            "digest": self._digest,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curve of a run that resumes, where the tasks are those it was measured with."""
        here = self._measure.signature()
        self._digest = self.base_fingerprint or state_dict.get("digest")
        other = sorted(name for name, key in here.items() if state_dict["signature"].get(name) != key)
        self._measure.base = {
            name: figures for name, figures in state_dict["base"].items() if name in here.keys() - other
        }
        if other:
            rank_zero_warn(
                f"ForgettingEvaluation measures {', '.join(other)} with other settings or files than the run that resumes did; its curve starts "
                "anew here",
                category=LightningPEFTWarning,
            )
            return
        self.points = list(state_dict["points"])

    # -- what it does ----------------------------------------------------------------------------------------------

    def _measure_at(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Measure, log, and keep to the budget; once a step. Tell whether it was done."""
        if self.points and self.points[-1]["step"] == trainer.global_step:
            return False
        model = measured_model(pl_module)
        scales = _scales(model)
        with trainer.precision_plugin.forward_context():
            found = self._measure.compare(model)
        point = trainer.strategy.broadcast({"step": trainer.global_step, **found, "scales": scales})
        self.points.append(point)
        self._log(trainer, point)
        if self.budget is not None and self.budget.action != "pick":
            self._keep_to(trainer, model, self.budget, point)
        return True

    def _keep_to(self, trainer: Trainer, model: nn.Module, budget: ForgettingBudget, point: Mapping[str, Any]) -> None:
        found = _forgetting(point, budget)
        if found <= budget.limit:
            return
        said = f"forgetting ({budget.measure}) is {found:.4g} at step {trainer.global_step}, above the budget of {budget.limit:.4g}"
        if budget.action == "stop":
            rank_zero_info(f"{said}; training stops")
            trainer.should_stop = True
            return
        factor = largest_scale(
            lambda one: self._at(trainer, model, budget, one).forgetting, budget.limit, budget.halvings
        )
        if factor == 0.0:
            rank_zero_warn(
                f"{said}, and still at {0.5**budget.halvings:.2g} of the scale; the adapters are left as they are and training stops",
                category=LightningPEFTWarning,
            )
            trainer.should_stop = True
            return
        scale_adapters(model, {name: factor * scale for name, scale in _scales(model).items()})
        rank_zero_info(f"{said}; the scale of the adapters is multiplied by {factor:.4g}")

    def _pick(self, trainer: Trainer, pl_module: LightningModule, budget: ForgettingBudget) -> None:
        model = measured_model(pl_module)
        points = [self._at(trainer, model, budget, factor) for factor in sorted(set(budget.scales))]
        best = best_scale(points, budget.limit)
        self.scaled = [{**point._asdict(), "picked": float(point == best)} for point in points]
        if best is None:
            rank_zero_warn(
                f"forgetting ({budget.measure}) is above the budget of {budget.limit:.4g} at each of the scales {sorted(set(budget.scales))}; the "
                "adapters are left as they are",
                category=LightningPEFTWarning,
            )
        else:
            scale_adapters(model, {name: best.scale * scale for name, scale in _scales(model).items()})
            rank_zero_info(
                f"of {len(points)} scales {best.scale:.4g} learned most ({best.learning:.4g}) with forgetting ({budget.measure}) of "
                f"{best.forgetting:.4g}, within the budget of {budget.limit:.4g}"
            )

    def _at(self, trainer: Trainer, model: nn.Module, budget: ForgettingBudget, factor: float) -> ScaledPoint:
        """Measure the adapters at a factor of their scales: the target tasks too where one of several is picked."""
        kinds = ("source", "target") if budget.action == "pick" else () if budget.measure == KL else ("source",)
        scales = {name: factor * scale for name, scale in _scales(model).items()}
        with adapters_scaled(model, scales), trainer.precision_plugin.forward_context():
            found = self._measure.compare(model, kinds, anchor=budget.measure == KL)
        point = ScaledPoint(factor, found["learning"].get(MEAN, 0.0), _forgetting(found, budget))
        return ScaledPoint(*trainer.strategy.broadcast(tuple(point)))

    def _log(self, trainer: Trainer, point: Mapping[str, Any]) -> None:
        metrics = {f"{side}/{name}": v for side in ("forgetting", "learning") for name, v in point[side].items()}
        metrics |= {f"{label}/{name}": v for label, found in point["figures"].items() for name, v in found.items()}
        metrics |= {f"anchor/{name}": value for name, value in (point["anchor"] or {}).items() if name != "tokens"}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def _write(self, trainer: Trainer) -> None:
        """Write the curve, and draw it where that is asked for."""
        folder = Path(self.output or trainer.log_dir or trainer.default_root_dir)  # all processes ask for log_dir
        if not trainer.is_global_zero:
            return
        tasks = {name: list(task.compared_by()) for name, task in self._measure.tasks.items()}
        write_curve(folder, self._measure.base, tasks, self.points, self.scaled)
        if self.plot and len(self.points) > 1:
            figure = curve_figure(self.points, self.scaled)
            figure.savefig(folder / "forgetting.png")
            for logger in trainer.loggers:
                log_figure(logger, "forgetting", "forgetting", lambda: figure, trainer.global_step)


def measured_model(pl_module: LightningModule) -> nn.Module:
    """Return the model that tasks are run on: the adapted model inside a module, or else its attribute ``model``.

    Raises:
        ConfigError: there are several, or none.
    """
    roots = adapted_roots(pl_module)
    model = roots[0] if len(roots) == 1 else getattr(pl_module, "model", None)
    if len(roots) > 1 or not isinstance(model, nn.Module):
        raise ConfigError(
            f"{type(pl_module).__name__} holds {len(roots)} adapted models, and ForgettingEvaluation measures one: the one that is adapted, or the "
            "attribute `model`"
        )
    return model


def _scales(model: nn.Module) -> dict[str, float]:
    return {name: adapter_scale(model, name) for name in active_adapters(model)}


def _forgetting(found: Mapping[str, Any], budget: ForgettingBudget) -> float:
    return float(found["anchor"][KL] if budget.measure == KL else found["forgetting"][budget.measure])


def _check_tasks(tasks: Mapping[str, Mapping[str, EvalTask]]) -> None:
    if not tasks["source"]:
        raise ConfigError("ForgettingEvaluation needs sources such as {'stories': Perplexity(...)}, got none")
    for kind, named in tasks.items():
        for label, task in named.items():
            if not isinstance(task, EvalTask):
                raise ConfigError(f"ForgettingEvaluation {kind} {label!r} must be an EvalTask, got {task!r}")
            if not label or "/" in label or label in (MEAN, KL):
                raise ConfigError(f"{label!r} cannot be the label of a task; choose another one, without '/'")


def _check_budget(budget: ForgettingBudget, tasks: Mapping[str, Mapping[str, EvalTask]], anchor: object) -> None:
    known = [MEAN, *tasks["source"], *([KL] if anchor is not None else [])]
    if budget.measure not in known:
        raise ConfigError(
            f"ForgettingBudget measure={budget.measure!r} is none of: {', '.join(known)}; kl needs an anchor text"
        )
    if budget.action == "pick" and not tasks["target"]:
        raise ConfigError("ForgettingBudget action='pick' weighs forgetting against learning; give targets as well")

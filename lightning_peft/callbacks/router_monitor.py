"""What the routers of mixtures of experts do while they train."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.callbacks.figures import figure_class, log_figure
from lightning_peft.errors import ConfigError, LightningPEFTWarning
from lightning_peft.injection import adapted_roots
from lightning_peft.moe.statistics import Routed, RouterReport, RouterStatistics


class RouterMonitor(Callback):
    """Logs the load of experts, layer by layer, over the training tokens since it logged last.

    ::

        moe/<layer>/load/<expert>     share of the slots at that expert
        moe/<layer>/max_over_mean     the busiest expert over the mean: 1 balanced, the number of experts collapsed
        moe/<layer>/entropy           of a token's distribution over the experts, mean, in nats
        moe/<layer>/confidence        probability of a token's likeliest expert, mean
        moe/<layer>/uncovered         share of the tokens that no expert took

    With ``heat_map`` the loads are drawn too, layers by experts: the figure ``moe/load`` for the loggers of TensorBoard and W&B,
    ``router_load/step=<step>.png`` for those of MLflow and CSV; other loggers get numbers only.

    Args:
        every_n_steps: optimizer steps between two entries; None for as often as the Trainer logs.
        heat_map: draw the loads; this needs matplotlib (``pip install lightning-peft[plot]``).
        per_expert: log the load of every expert, and not only the figures of the layer.

    Raises:
        ConfigError: ``every_n_steps`` is not positive, or matplotlib is not there.
    """

    def __init__(self, every_n_steps: int | None = None, *, heat_map: bool = False, per_expert: bool = True) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"RouterMonitor every_n_steps must be positive, got {every_n_steps!r}")
        if heat_map:
            _figure_class()
        self.every_n_steps, self.heat_map, self.per_expert = every_n_steps, heat_map, per_expert
        self._logged_at = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start listening."""
        self._logged_at = trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to routers that are new."""
        routers = _routers(pl_module).values()
        if not routers and batch_idx == 0 and trainer.global_step == 0:
            rank_zero_warn(
                f"RouterMonitor found no mixture of experts in {type(pl_module).__name__} and logs nothing until there is one",
                category=LightningPEFTWarning,
            )
        for router in routers:
            if router.statistics is None:
                router.statistics = RouterStatistics(router.num_experts)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after an optimizer step, where it is time."""
        if trainer.global_step == self._logged_at or not self._due(trainer):
            return
        self._logged_at = trainer.global_step
        reports = self._reports(trainer, pl_module)
        if not reports:
            return
        metrics = {
            f"moe/{path}/{name}": value for path, report in reports.items() for name, value in self._figures(report)
        }
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        if not trainer.is_global_zero:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step under which self.log logs
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            if self.heat_map:
                _draw(logger, {path: report.load for path, report in reports.items()}, step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        _release(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        _release(pl_module)

    def _due(self, trainer: Trainer) -> bool:
        if self.every_n_steps is None:
            return bool(trainer._logger_connector.should_update_logs)
        return trainer.global_step % self.every_n_steps == 0

    def _reports(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, RouterReport]:
        """Return the report of each router, over the tokens of all processes, and start anew."""
        found = {path: router.statistics for path, router in _routers(pl_module).items() if router.statistics}
        if not found:
            return {}
        # One exchange for all layers, and one wait for the device.
        totals = torch.cat([statistics.totals.to(pl_module.device) for statistics in found.values()])
        totals = trainer.strategy.reduce(totals, reduce_op="sum")
        parts = totals.cpu().split([len(statistics.totals) for statistics in found.values()])
        reports = {}
        for (path, statistics), part in zip(found.items(), parts, strict=True):
            reports[path] = statistics.report(part)
            statistics.reset()
        return reports

    def _figures(self, report: RouterReport) -> list[tuple[str, float]]:
        loads = [(f"load/{expert}", load) for expert, load in enumerate(report.load)] if self.per_expert else []
        return [
            *loads,
            *((name, getattr(report, name)) for name in ("max_over_mean", "entropy", "confidence", "uncovered")),
        ]


def _routers(module: nn.Module) -> dict[str, Routed]:
    """Return the routers of active adapters by the path of their place; with the adapter's name where a place has several."""
    found: dict[str, Routed] = {}
    roots = list(adapted_roots(module))
    for index, root in enumerate(roots):
        prefix = f"{index}." if len(roots) > 1 else ""
        for path, layer in adapter_layers(root).items():
            active = {name: layer.adapters[name] for name in layer.active}
            routed = {name: adapter for name, adapter in active.items() if isinstance(adapter, Routed)}
            for name, adapter in routed.items():
                found[prefix + path + (f".{name}" if len(routed) > 1 else "")] = adapter
    return found


def _release(module: nn.Module) -> None:
    for inner in module.modules():
        if isinstance(inner, Routed):
            inner.statistics = None


def _draw(logger: Logger, loads: dict[str, tuple[float, ...]], step: int) -> None:
    """Hand a logger the heat map of ``loads``, in the way it takes figures, if it does."""
    log_figure(logger, "moe/load", "router_load", lambda: load_figure(loads), step)


def load_figure(loads: dict[str, tuple[float, ...]]) -> Any:
    """Return a matplotlib figure of ``loads`` (layer to the share of each expert): one row a layer, one column an expert.

    The scale of a row is its load times its number of experts: 1 where balanced.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    experts = max(len(load) for load in loads.values())
    rows = [[share * len(load) for share in load] + [float("nan")] * (experts - len(load)) for load in loads.values()]
    figure = _figure_class()(figsize=(2 + 0.35 * experts, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", vmin=0.0, cmap="viridis")
    axes.set_xlabel("expert")
    axes.set_yticks(range(len(rows)), list(loads))
    figure.colorbar(image, label="load over mean")
    return figure


def _figure_class() -> Any:
    return figure_class("RouterMonitor heat_map=True", "heat_map")

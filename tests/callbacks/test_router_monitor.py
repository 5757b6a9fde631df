"""What RouterMonitor logs, against the assignments it was shown."""

import csv
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTModule, RouterMonitor
from lightning_peft.callbacks.router_monitor import _draw, load_figure
from lightning_peft.errors import ConfigError, LightningPEFTWarning
from lightning_peft.interfaces import Adapter, Method
from lightning_peft.moe.expert_weights import ExpertWeights
from lightning_peft.moe.experts import run_experts
from lightning_peft.moe.routing import TopKRouter
from lightning_peft.moe.statistics import Routed


class Collapsed(Adapter, Routed):
    """A mixture whose router wants experts 0 and 1, whatever comes."""

    def __init__(self, width):
        super().__init__()
        self.num_experts = 4
        self.up, self.down = (nn.Parameter(torch.empty(4, width, width)) for _ in range(2))

    def reset_parameters(self, base_layer):
        nn.init.ones_(self.up)
        nn.init.ones_(self.down)

    def forward(self, base, x):
        logits = torch.log(torch.tensor([[0.6, 0.3, 0.05, 0.05]])).expand(len(x), 4)
        assignment = TopKRouter().route(logits)
        self.observe(assignment)
        return base(x) + 1e-3 * run_experts(x, assignment, ExpertWeights(self.up, self.down, gated=False), torch.tanh)


@dataclass(frozen=True, kw_only=True)
class Collapse(Method):
    """Put one beside a linear layer."""

    name: ClassVar[str] = "collapse"
    identity_at_init: ClassVar[bool] = False

    def supports(self, module):
        return isinstance(module, nn.Linear)

    def adapter(self, module, target):
        return Collapsed(module.in_features)


def fit(make_trainer, folder, callback, *, steps=4, log_every=2, **options):
    module = PEFTModule(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Collapse(), loss=lambda y, _: y.square().mean()
    )
    logger = CSVLogger(folder, name="", version="")
    trainer = make_trainer(
        folder, max_steps=steps, logger=logger, log_every_n_steps=log_every, callbacks=[callback],
        enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader([(torch.ones(4), 0.0)] * 64, batch_size=2))
    with open(f"{folder}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("moe/0/max_over_mean")]
    return module, trainer, rows


def test_every_layer_is_logged_as_often_as_the_trainer_logs(make_trainer, tmp_path):
    module, trainer, rows = fit(make_trainer, tmp_path, RouterMonitor())
    assert [row["step"] for row in rows] == ["1", "3"]
    for layer in ("0", "1"):
        figures = {
            name.removeprefix(f"moe/{layer}/"): float(value)
            for name, value in rows[-1].items()
            if f"moe/{layer}/" in name
        }
        entropy = -sum(p * torch.tensor(p).log().item() for p in (0.6, 0.3, 0.05, 0.05))
        expected = {"load/0": 0.5, "load/1": 0.5, "load/2": 0.0, "load/3": 0.0, "max_over_mean": 2.0, "uncovered": 0.0}
        assert figures == pytest.approx({**expected, "entropy": entropy, "confidence": 0.6})
    assert float(trainer.callback_metrics["moe/0/max_over_mean"]) == 2.0
    assert not any(inner.statistics for inner in module.modules() if isinstance(inner, Routed))


def test_steps_of_its_own_are_optimizer_steps_and_experts_can_be_left_out(make_trainer, tmp_path):
    monitor = RouterMonitor(every_n_steps=3, per_expert=False)
    _, _, rows = fit(make_trainer, tmp_path, monitor, steps=6, log_every=20, accumulate_grad_batches=2)
    assert [row["step"] for row in rows] == ["2", "5"]
    assert not any("load" in name for name in rows[0])


def test_nobody_listens_any_more_after_an_error(make_trainer, tmp_path):
    class Stops(RouterMonitor):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.module = pl_module
            assert all(inner.statistics for inner in pl_module.modules() if isinstance(inner, Routed))
            raise ValueError("stop")

    monitor = Stops()
    with pytest.raises(ValueError, match="stop"):
        fit(make_trainer, tmp_path, monitor)
    assert not any(inner.statistics for inner in monitor.module.modules() if isinstance(inner, Routed))


def test_a_module_without_routers_logs_nothing_but_a_warning(make_trainer, tmp_path):
    module = PEFTModule(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=1), loss=lambda y, _: y.square().mean())
    trainer = make_trainer(
        tmp_path, max_steps=2, callbacks=[RouterMonitor(every_n_steps=1)], enable_checkpointing=False
    )
    with pytest.warns(LightningPEFTWarning, match="RouterMonitor found no mixture of experts in PEFTModule"):
        trainer.fit(module, DataLoader([(torch.ones(4), 0.0)] * 4))
    assert not [name for name in trainer.callback_metrics if name.startswith("moe/")]


def test_the_heat_map_needs_matplotlib_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ConfigError, match=r"draws with matplotlib, which is not installed: pip install 'lightning-peft\[plot\]'"
    ):
        RouterMonitor(heat_map=True)
    with pytest.raises(ConfigError, match="every_n_steps must be positive, got 0"):
        RouterMonitor(every_n_steps=0)


def test_the_heat_map_is_a_file_beside_the_csv_and_a_figure_for_tensorboard(make_trainer, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'plot'")
    fit(make_trainer, tmp_path, RouterMonitor(heat_map=True))
    files = sorted(file.name for file in (tmp_path / "router_load").iterdir())
    assert files == ["step=1.png", "step=3.png"]
    seen = []
    experiment = SimpleNamespace(add_figure=lambda name, figure, global_step: seen.append((name, global_step)))
    _draw(SimpleNamespace(experiment=experiment), {"a": (0.5, 0.5)}, 7)
    assert seen == [("moe/load", 7)]
    figure = load_figure({"a": (0.5, 0.5), "b": (1.0, 0.0, 0.0)})
    values = figure.axes[0].images[0].get_array()
    assert values[0].tolist()[:2] == [1.0, 1.0]
    assert values[1].tolist() == [3.0, 0.0, 0.0]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]

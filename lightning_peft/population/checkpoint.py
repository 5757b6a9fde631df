"""The folders of a population: the best and the last adapter of each member, and what all have come to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_peft.adapter_files import to_json_bytes, write_file
from lightning_peft.errors import ConfigError
from lightning_peft.model_card import CardFacts
from lightning_peft.population.results import print_ranking
from lightning_peft.state import save_adapter

if TYPE_CHECKING:
    from lightning_peft.population.module import PopulationModule

RESULTS = "results.json"
"""File with the ranking."""


class PopulationCheckpoint(Callback):
    """Saves the best and the last adapter of each member, and says at the end who is best.

    ::

        <dirpath>/<member>/best/     adapter folder, whenever a validation is better than all before
        <dirpath>/<member>/last/     adapter folder, when the member stops or the fit ends
        <dirpath>/results.json       the ranking, after each validation and at the end

    To resume the population a ``.ckpt`` is needed as well, which
    ``ModelCheckpoint`` or :class:`~lightning_peft.AdapterCheckpoint` saves.

    Args:
        dirpath: the folder; ``members`` in the folder of the logger if None.
        table: whether to print the ranking at the end.
    """

    def __init__(self, dirpath: str | Path | None = None, table: bool = True) -> None:
        self.dirpath, self.table = dirpath, table
        self.folder: Path | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and refuse a module that has no members."""
        _population(pl_module)
        self.folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "members")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save who got better, and who has stopped."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        module = _population(pl_module)
        for name in module.standings.improved:
            self._save(trainer, module, name, "best")
        for name in module.standings.ended:
            self._save(trainer, module, name, "last")
        self._write_results(module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the members that were trained to the end."""
        module = _population(pl_module)
        for name in module.living:
            self._save(trainer, module, name, "last")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the ranking, and print it."""
        module = _population(pl_module)
        self.on_train_end(
            trainer, pl_module
        )  # a fit that has no step to do, as one that resumes at its end, never comes to it
        module.standings.finish()
        self._write_results(module)
        if self.table:
            print_ranking(module.ranking(), module.monitor)

    def _save(self, trainer: Trainer, module: PopulationModule, name: str, kind: str) -> None:
        one = module.standings.of[name]
        if one.status == "diverged" and kind == "last":
            return  # values that are not finite are not saved
        assert self.folder is not None
        assert module.model is not None
        data = getattr(trainer, "datamodule", None)
        label = None if data is None else str(getattr(data, "name", None) or type(data).__name__)
        measured = {module.monitor: one.last} if one.last is not None and math.isfinite(one.last) else {}
        facts = CardFacts(data=label, metrics=measured, step=one.steps)
        save_adapter(
            module.model, self.folder / name / kind, name=name, facts=facts, fingerprint=module.base_fingerprint
        )

    def _write_results(self, module: PopulationModule) -> None:
        assert self.folder is not None
        results = [_finite(one.to_dict()) for one in module.ranking()]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / RESULTS, to_json_bytes({"monitor": module.monitor, "members": results}))


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _population(module: LightningModule) -> PopulationModule:
    from lightning_peft.population.module import PopulationModule

    if not isinstance(module, PopulationModule):
        raise ConfigError(
            f"PopulationCheckpoint needs a PopulationModule, got {type(module).__name__}; use AdapterCheckpoint"
        )
    return module

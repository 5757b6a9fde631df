"""What training does to singular values, while it does."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_peft.adapter_tools.comparing import WeightSpectrum, spectrum
from lightning_peft.adapter_tools.spectra import WeightAnalysis, analyze_weights, change_spectrum
from lightning_peft.errors import ConfigError, MergeError
from lightning_peft.injection import adapted_roots, records


class SpectrumMonitor(Callback):
    """Logs the singular values of what each adapter learns, weight by weight.

    ::

        spectrum/<weight>/norm               Frobenius norm of the update
        spectrum/<weight>/effective_rank     exponential of the entropy of its singular values
        spectrum/<weight>/stable_rank        sum of squared singular values over the largest square

    and with ``weights``, which decomposes the weights of the base too (seconds for one of 1000 features, a minute for one of 4000)::

        spectrum/<weight>/relative_norm      norm of the update over that of the weight
        spectrum/<weight>/intruders          leading directions of the tuned weight that the base has not
        spectrum/<weight>/amplification      norm of the update over that of the base between the same directions
        spectrum/<weight>/tuned_effective_rank

    The means over all weights are ``spectrum/effective_rank`` and so on. Where a model has several adapters, their names come before the weights. Nothing
    of the training changes: no random number is drawn and no gradient is made. Definitions: :mod:`lightning_peft.adapter_tools.spectra`.

    Low-rank updates are read from their factors, and what is trained in full beside them (``modules_to_save``) is left out; of other methods that can be merged the whole change of a weight is decomposed, so ``weights`` costs
    them little more.

    Entries stand at the number of optimizer steps done.

    Args:
        every_n_steps: optimizer steps between two entries; there is one at the start and one at the end besides.
        weights: compare with the weights of the base.
        per_weight: log the figures of every weight, and not only the means.
        top: how many leading directions of a tuned weight may be intruders.
        threshold: cosine below which one is.

    Raises:
        ConfigError: a number is not positive; at the start of a fit: an adapter changes no weights, or its tensors are sharded.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        weights: bool = False,
        per_weight: bool = True,
        top: int = 10,
        threshold: float = 0.5,
    ) -> None:
        if every_n_steps < 1 or top < 1 or not 0 < threshold <= 1:
            raise ConfigError(
                f"SpectrumMonitor needs every_n_steps and top of 1 or more and a threshold in (0, 1], got {every_n_steps!r}, {top!r} and {threshold!r}"
            )
        self.every_n_steps, self.weights, self.per_weight = every_n_steps, weights, per_weight
        self.top, self.threshold = top, threshold
        self._logged_at = -1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be read, and log where training starts."""
        sharded = [name for name, parameter in pl_module.named_parameters() if isinstance(parameter, DTensor)]
        if sharded:
            raise ConfigError(
                f"SpectrumMonitor reads whole tensors, and {type(trainer.strategy).__name__} shards {len(sharded)} of them, such as {sharded[0]!r}; leave "
                "it out, and look at the adapter afterwards: lightning-peft inspect FOLDER"
            )
        self._logged_at = -1
        self._log(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after an optimizer step, where it is time."""
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where training ends."""
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._logged_at:
            return
        self._logged_at = trainer.global_step
        figures = self.figures(pl_module)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def figures(self, module: nn.Module) -> dict[str, float]:
        """Return what would be logged of the adapters in ``module``, by name.

        Raises:
            ConfigError: there is no adapter, or one changes no weights.
        """
        found: dict[str, WeightSpectrum | WeightAnalysis] = {}
        named = [(root, name) for root in adapted_roots(module) for name in records(root)]
        for root, name in named:
            prefix = f"{name}/" if len(named) > 1 else ""
            found |= {prefix + label: one for label, one in self._of(root, name).items()}
        if not found:
            raise ConfigError(f"SpectrumMonitor found no adapter that changes a matrix in {type(module).__name__}")
        kinds = ["norm", "effective_rank", "stable_rank"]
        if self.weights:
            kinds = [
                "effective_rank",
                "stable_rank",
                "relative_norm",
                "intruders",
                "amplification",
                "tuned_effective_rank",
            ]
        each = {kind: {label: float(getattr(one, kind)) for label, one in found.items()} for kind in kinds}
        means = {f"spectrum/{kind}": sum(values.values()) / len(values) for kind, values in each.items()}
        if not self.per_weight:
            return means
        single = {f"spectrum/{label}/{kind}": value for kind, values in each.items() for label, value in values.items()}
        return means | single

    def _of(self, root: nn.Module, name: str) -> dict[str, Any]:
        try:
            if self.weights:
                return dict(analyze_weights(root, name, top=self.top, threshold=self.threshold))
            try:
                return dict(spectrum((root, name), without_saved=True))
            except ConfigError:  # not in low-rank factors
                return dict(change_spectrum(root, name))
        except MergeError as error:
            raise ConfigError(f"SpectrumMonitor looks at changes of weights: {error}") from error
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ConfigError(f"adapter {name!r} has values that are not finite: its training has diverged") from error

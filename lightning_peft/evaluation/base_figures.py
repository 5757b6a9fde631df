"""Figures of a base that stay after it is gone: files named for its fingerprint.

::

    cache/<fingerprint>.json                    figures by task, where a task is its name, its settings and the files it reads
    cache/<fingerprint>-<anchor>/0.safetensors  what the base predicts on an anchor text, batch by batch

They serve models that have no way back: full fine-tuning without an adapter, adapters merged for good, parameters of the base that
are trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from lightning_peft.adapter_files import write_file
from lightning_peft.adapter_layer import adapter_layers, base_parameters
from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.anchors import AnchorText, log_probabilities
from lightning_peft.evaluation.live_models import measuring
from lightning_peft.fingerprint import fingerprint
from lightning_peft.interfaces import EvalTask

_DONE = "complete"
"""Name of the file that says that a folder of predictions is whole."""


def can_disable(model: nn.Module) -> bool:
    """Tell whether ``model`` is its base when its adapters are disabled: it has some, and no weight of the base is trained or gone."""
    layers = adapter_layers(model)
    gone = any(layer.permanent for layer in layers.values())
    return bool(layers) and not gone and not any(parameter.requires_grad for _, parameter in base_parameters(model))


def digest_of_base(model: nn.Module) -> str:
    """Return the fingerprint of the base under which its figures are kept, as ``lightning-peft fingerprint`` prints it.

    All processes must call this where weights are sharded.

    Raises:
        ConfigError: the model has no weights to take it of.
    """
    found = fingerprint(model)
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no floating-point weights in memory to take a fingerprint of")
    return found.digest


def key_of(name: str, settings: Mapping[str, Any]) -> str:
    """Return a short hash of a task: its name and its settings, where a file counts by what it holds, wherever it is."""
    told = {}
    for key, value in settings.items():
        place = Path(value) if isinstance(value, str) else None
        if place is not None and place.is_file():
            told[key] = hashlib.sha256(place.read_bytes()).hexdigest()
        else:
            told[key] = str(place.resolve()) if place is not None and value and place.is_dir() else value
    return hashlib.sha256(json.dumps([name, told], sort_keys=True).encode()).hexdigest()[:16]


def key_of_task(task: EvalTask) -> str:
    """Return :func:`key_of` a task."""
    return key_of(task.name, task.to_config())


class BaseFigures:
    """The figures of one base in a folder.

    Args:
        folder: where they are kept; made if it is not there.
        digest: which base.
    """

    def __init__(self, folder: str | Path, digest: str) -> None:
        self.folder, self.digest = Path(folder), digest
        self.file = self.folder / f"{digest}.json"

    def get(self, task: EvalTask) -> dict[str, float] | None:
        """Return the figures of a task, or None where they were never taken."""
        entry = self._read().get(key_of_task(task))
        return None if entry is None else dict(entry["figures"])

    def put(self, task: EvalTask, figures: Mapping[str, float]) -> None:
        """Keep the figures of a task. Only one process may call this."""
        held = self._read() | {
            key_of_task(task): {"task": task.name, "settings": task.to_config(), "figures": dict(figures)}
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.file, json.dumps({"fingerprint": self.digest, "tasks": held}, indent=2).encode())

    def has_predictions(self, anchor: AnchorText) -> bool:
        """Tell whether the predictions on an anchor text are there, whole."""
        return (self._place(anchor) / _DONE).is_file()

    def keep_predictions(self, model: nn.Module, anchor: AnchorText, *, write: bool = True) -> None:
        """Write what ``model``, which is the base now, predicts on a text: four bytes for each token of the text and of the vocabulary.

        All processes must call this where weights are sharded; one of them with ``write``.
        """
        place = self._place(anchor)
        with measuring(model):
            for number, ids in enumerate(anchor.batches()):
                found = log_probabilities(model, ids)
                if write:
                    place.mkdir(parents=True, exist_ok=True)
                    write_file(place / f"{number}.safetensors", save({"log_probabilities": found.cpu().contiguous()}))
        if write:
            write_file(place / _DONE, b"")

    def prediction(self, anchor: AnchorText, number: int) -> Tensor:
        """Return what the base predicts for the batch of a number: (batch, block, vocabulary)."""
        return load_file(self._place(anchor) / f"{number}.safetensors")["log_probabilities"]

    def _place(self, anchor: AnchorText) -> Path:
        return self.folder / f"{self.digest}-{key_of('anchor', asdict(anchor))}"

    def _read(self) -> dict[str, Any]:
        if not self.file.is_file():
            return {}
        try:
            found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))["tasks"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{str(self.file)!r} does not hold figures of a base; delete it: {error}") from error
        return found

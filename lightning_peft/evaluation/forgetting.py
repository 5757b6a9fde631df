"""What a model learned and what it forgot, against its base.

Biderman et al., "LoRA Learns Less and Forgets Less", 2024 (arXiv:2405.09673)::

    forgetting(task) = how much worse than the base the model is at a source task: what it could do before
    learning(task)   = how much better it is at a target task: what it is trained for

Both are differences of the figure that a task is compared by, so that more forgetting is worse and more learning is better whatever
the figure. The mean over tasks is meant for tasks of one figure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_peft.activation import adapters_disabled
from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.anchors import AnchorText, divergence
from lightning_peft.evaluation.base_figures import BaseFigures, can_disable, key_of_task
from lightning_peft.interfaces import EvalTask

KINDS = ("source", "target", "watched")
"""What a task is to a run: known before, to be learned, or looked at."""
MEAN, KL = "mean", "kl"
"""What forgetting may be measured by beside a source task: their mean, or the divergence on the anchor text."""


def improvement(task: EvalTask, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return how much better ``after`` is than ``before`` in the figure that the task is compared by.

    Raises:
        ConfigError: the task did not return that figure.
    """
    name, higher = task.compared_by()
    for figures in (before, after):
        if name not in figures:
            raise ConfigError(
                f"{type(task).__name__} is compared by {name!r}, which is not among its figures: {', '.join(figures)}; override compared_by, "
                "or set its metric"
            )
    return after[name] - before[name] if higher else before[name] - after[name]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of those ``(learning, forgetting)`` points that no other is better than, by learning.

    Of equal points the first counts.

    Example:
        >>> pareto_front([(0.0, 0.0), (0.2, 0.1), (0.1, 0.3), (0.5, 0.4)])
        [0, 1, 3]
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0], i))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][0] > points[kept[-1]][0]:
            kept.append(i)
    return kept


class ForgettingMeasure:
    """Measures a model at a set of tasks and compares it with its base.

    Args:
        tasks: of each kind, label to task.
        anchor: text on which predictions are compared.
        base: figures of the base by ``<kind>/<label>``, as far as they are known.
    """

    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, EvalTask]],
        anchor: AnchorText | None = None,
        base: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.tasks = {f"{kind}/{label}": task for kind in KINDS for label, task in tasks.get(kind, {}).items()}
        self.anchor = anchor
        self.base: dict[str, dict[str, float]] = {label: dict(figures) for label, figures in (base or {}).items()}
        self._predictions: BaseFigures | None = None

    def signature(self) -> dict[str, str]:
        """Return what is measured: label to a hash of the task, its settings and its files."""
        return {label: key_of_task(task) for label, task in self.tasks.items()}

    def take_base(
        self,
        model: nn.Module,
        *,
        fresh: bool,
        cache: BaseFigures | None = None,
        write: bool = True,
        share: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        """Get to know the base: from what is known, from the cache, or by measuring.

        Args:
            model: the model, adapted or not.
            fresh: nothing has been trained yet, so that a model whose adapters cannot be disabled is the base now.
            cache: figures that were taken before; new ones go there.
            write: whether this process writes to the cache.
            share: returns on every process what the first one gave it, when that one has come so far.

        Raises:
            ConfigError: the base cannot be reached any more, and its figures are not in the cache.
        """
        known = (
            {label: cache.get(task) for label, task in self.tasks.items() if label not in self.base} if cache else {}
        )
        stored = cache is not None and self.anchor is not None and cache.has_predictions(self.anchor)
        self.base, known, stored = share((self.base, known, stored))
        self.base |= {label: found for label, found in known.items() if found is not None}
        missing = [label for label in self.tasks if label not in self.base]
        switchable = can_disable(model)
        predicts = self.anchor is not None and not switchable and not stored
        if missing or predicts:
            _refuse_unreachable(model, fresh, [*missing, *(["anchor"] if predicts else [])])
        if predicts and cache is None:
            raise ConfigError(
                f"the anchor text needs the predictions of the base, which {type(model).__name__} is no more once it is trained; name a folder "
                "to keep them in: cache=FOLDER"
            )
        with _as_base(model):
            for label in missing:
                self.base[label] = self.tasks[label].evaluate(model)
                if cache is not None and write:
                    cache.put(self.tasks[label], self.base[label])
            if predicts and cache is not None and self.anchor is not None:
                cache.keep_predictions(model, self.anchor, write=write)
        self.base = share(self.base)
        self._predictions = None if switchable else cache

    def figures(self, model: nn.Module, kinds: Sequence[str] = KINDS) -> dict[str, dict[str, float]]:
        """Return the figures of ``model`` as it is now, by ``<kind>/<label>``."""
        return {label: task.evaluate(model) for label, task in self.tasks.items() if label.partition("/")[0] in kinds}

    def compare(self, model: nn.Module, kinds: Sequence[str] = KINDS, *, anchor: bool = True) -> dict[str, Any]:
        """Measure ``model`` and compare it with the base; :meth:`take_base` comes first.

        Returns:
            ``figures`` by label; ``forgetting`` and ``learning`` by task, each with its ``mean``; ``anchor`` with ``kl``, or None. Plain
            values, ready for JSON.
        """
        found = self.figures(model, kinds)
        return {
            "figures": found,
            "forgetting": self._changes(found, "source", -1.0),
            "learning": self._changes(found, "target", 1.0),
            "anchor": self._divergence(model) if anchor and self.anchor is not None else None,
        }

    def _changes(self, found: Mapping[str, Mapping[str, float]], kind: str, sign: float) -> dict[str, float]:
        changes = {
            label.partition("/")[2]: sign * improvement(self.tasks[label], self.base[label], figures) + 0.0
            for label, figures in found.items()
            if label.startswith(f"{kind}/")
        }
        return changes | ({MEAN: sum(changes.values()) / len(changes)} if changes else {})

    def _divergence(self, model: nn.Module) -> dict[str, float]:
        assert self.anchor is not None
        anchor, kept = self.anchor, self._predictions
        return divergence(model, anchor, None if kept is None else lambda number: kept.prediction(anchor, number))


@contextlib.contextmanager
def _as_base(model: nn.Module) -> Iterator[None]:
    layers = adapter_layers(model).values()
    if not layers or any(layer.permanent for layer in layers):
        yield
        return
    with adapters_disabled(model):
        yield


def _refuse_unreachable(model: nn.Module, fresh: bool, missing: Sequence[str]) -> None:
    layers = adapter_layers(model)
    merged = any(layer.permanent for layer in layers.values())
    if can_disable(model) or (fresh and not merged):
        return
    cause = "adapters are merged for good" if merged else "its base is trained, and training has begun"
    raise ConfigError(
        f"the figures of the base are missing for {', '.join(missing)}, and {type(model).__name__} does not lead back to its base: {cause}. Take "
        "them beforehand with `lightning-peft eval --base ... --cache FOLDER`, and give cache=FOLDER and base_fingerprint= as it prints it"
    )


def measure_forgetting(
    model: nn.Module,
    sources: Mapping[str, EvalTask],
    targets: Mapping[str, EvalTask] | None = None,
    *,
    anchor: AnchorText | None = None,
) -> dict[str, Any]:
    """Return what an adapted ``model`` forgot and learned against its base, which is the model with its adapters disabled.

    Args:
        model: an adapted model; it is left as it was, and no copy is made.
        sources: label to task: what the base could do.
        targets: label to task: what the model was trained for.
        anchor: text on which the predictions of both are compared.

    Returns:
        ``base`` and ``figures`` by label, ``forgetting`` and ``learning`` by task with their ``mean``, and ``anchor``: ``kl`` and ``agreement``.

    Raises:
        ConfigError: disabling the adapters does not lead back to the base.
    """
    measure = ForgettingMeasure({"source": sources, "target": targets or {}}, anchor)
    measure.take_base(model, fresh=False)
    return {"base": measure.base, **measure.compare(model)}

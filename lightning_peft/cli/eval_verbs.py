"""What a model can do, with its adapter and without: figures as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from lightning_peft.cli.model_verbs import Dtype, _base_of, _load, _load_base
from lightning_peft.errors import ConfigError

_HARNESS = "lm_eval"
"""Registry name of the task that runs those of lm-evaluation-harness."""


def evaluate(
    tasks: list[str],
    base: str | None = None,
    adapter: str | None = None,
    adapters: Literal["on", "off", "both"] = "on",
    output: str | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: PositiveInt | None = None,
    batch_size: PositiveInt | None = None,
    cache: str | None = None,
    dtype: Dtype = "auto",
    check_base: bool = True,
) -> None:
    """Measure a base, with an adapter or without, and print the figures as JSON.

    Args:
        tasks: names of tasks of lm-evaluation-harness, and YAML files that map labels to registered tasks.
        base: local folder or hub id of the base; what the adapter was trained on if not given.
        adapter: adapter folder, ours or HF PEFT's; the base alone if not given.
        adapters: measure with the adapter on, off, or both, for which forgetting is told too.
        output: file to write the JSON to; it is printed if not given.
        include_path: folder of task files of your own for the harness.
        num_fewshot: examples in the prompt, for tasks given by name.
        limit: use only so many examples, for tasks given by name.
        batch_size: requests in a batch, for tasks given by name.
        cache: folder to keep the figures of the base in, by its fingerprint, for ForgettingEvaluation.
        dtype: precision of the weights; auto is that of the base.
        check_base: whether to refuse a base other than the one the adapter was trained on.

    Raises:
        ConfigError: no base can be loaded, a task is not known, or there is no adapter to switch.
        AdapterFileError: the adapter cannot be read or does not fit the base.
    """
    if base is None and adapter is None:
        raise ConfigError("eval needs a model: give --base FOLDER_OR_ID, --adapter FOLDER, or both")
    if adapter is None and adapters != "on":
        raise ConfigError(f"--adapters {adapters} needs an adapter to switch off; give --adapter FOLDER")
    base = base or _base_of(str(adapter))
    own = {"include_path": include_path, "num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
    chosen = _tasks(tasks, base, {name: value for name, value in own.items() if value is not None})
    model = _model(base, adapter, dtype, check_base)
    found = {"base": base, "adapter": adapter, **_figures(model, chosen, adapters if adapter else "off", cache)}
    text = json.dumps(found, indent=2)
    if output is None:
        print(text)
    else:
        Path(output).write_text(text + "\n", encoding="utf-8")
        print(output)


def _model(base: str, adapter: str | None, dtype: str, check_base: bool) -> Any:
    import torch

    model = _load_base(base, dtype)
    if adapter is not None:
        _load(model, adapter, check_base)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _figures(model: Any, tasks: Mapping[str, Any], adapters: str, cache: str | None) -> dict[str, Any]:
    """Measure, keep the figures of the base where they were taken, and return what is told of the model."""
    from lightning_peft.evaluation.base_figures import BaseFigures, digest_of_base

    digest = digest_of_base(model)
    with contextlib.redirect_stdout(sys.stderr):  # libraries that talk must not talk into the JSON
        measured = _measure(model, tasks, adapters)
    if cache is not None and adapters != "on":
        kept = BaseFigures(cache, digest)
        for label, task in tasks.items():
            kept.put(task, measured[label]["off"])
    told = {label: _told(tasks[label], sides) for label, sides in measured.items()}
    return {"fingerprint": digest, "tasks": told}


def _measure(model: Any, tasks: Mapping[str, Any], adapters: str) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures by label and side: ``on`` with adapters, ``off`` without."""
    from lightning_peft.activation import adapters_disabled

    found: dict[str, dict[str, dict[str, float]]] = {label: {} for label in tasks}
    for side in ("off", "on"):
        if adapters not in (side, "both"):
            continue
        with adapters_disabled(model) if side == "off" else contextlib.nullcontext():
            for label, task in tasks.items():
                found[label][side] = task.evaluate(model)
    return found


def _told(task: Any, sides: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """Return what is said of a task: its name, its figures, and with both sides how much was forgotten."""
    from lightning_peft.evaluation.forgetting import improvement

    figure, higher = task.compared_by()
    found: dict[str, Any] = {"task": task.name, "compared_by": figure, "higher_is_better": higher, **sides}
    if len(sides) == 2:
        found["forgetting"] = 0.0 - improvement(task, sides["off"], sides["on"])
    return found


def _tasks(words: list[str], base: str, own: dict[str, Any]) -> dict[str, Any]:
    """Return the tasks by label. A task in a file that names no tokenizer has that of the base."""
    import dataclasses

    from lightning_peft.registry import get_registry

    registry = get_registry()
    found: dict[str, Any] = {}
    for word in words:
        if word.endswith((".yaml", ".yml")):
            named = _read_tasks(word)
        else:
            named = {word: {"task": _HARNESS, "settings": {"task": word, **own}}}
        for label, entry in named.items():
            if label in found:
                raise ConfigError(f"two tasks are called {label!r}; give each a label of its own")
            kind = registry.get("evaluation task", entry["task"])
            settings = dict(entry["settings"])
            if any(field.name == "tokenizer" for field in dataclasses.fields(kind)):
                settings.setdefault("tokenizer", base)
            try:
                found[label] = kind.from_config(settings)
            except TypeError as error:
                raise ConfigError(f"task {label!r} cannot be made: {error}") from error
    return found


def _read_tasks(path: str) -> dict[str, dict[str, Any]]:
    """Return the tasks of a YAML file: label to ``kind``, the registry name, beside the fields of the task."""
    import yaml

    from lightning_peft.cli.yaml_config import load

    if not Path(path).is_file():
        raise ConfigError(f"there is no file of tasks {path!r}; relative paths start at {str(Path.cwd())!r}")
    try:
        content = load(Path(path).read_text(encoding="utf-8"), path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path!r} cannot be read: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path!r} must map labels to tasks, got {type(content).__name__}")
    found = {}
    for label, entry in content.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
            raise ConfigError(
                f"{path!r}: {label!r} must say which task it is, such as `kind: perplexity`, beside the fields of the task"
            )
        found[str(label)] = {"task": entry["kind"], "settings": {k: v for k, v in entry.items() if k != "kind"}}
    return found

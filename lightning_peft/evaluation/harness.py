"""Tasks of lm-evaluation-harness on a model that is in memory.

Gao et al., "The Language Model Evaluation Harness", 2024 (doi:10.5281/zenodo.12608602).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.errors import ConfigError, did_you_mean
from lightning_peft.evaluation.live_models import load_tokenizer, measuring

SEED = 1234
"""What the harness seeds numpy, torch and the choice of few-shot examples with, where nothing else is asked for."""


def run_harness(
    model: nn.Module,
    task: str,
    tokenizer: str,
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    chat_template: bool = False,
    seed: int = SEED,
) -> dict[str, Any]:
    """Run one task, or group of tasks, on ``model`` as it stands and return what the harness returns.

    Args:
        model: a causal language model, adapters on or off. It is left as it was.
        task: name of a task or group.
        tokenizer: folder or hub id of the tokenizer.
        include_path: folder of task files of your own, looked into first.
        num_fewshot: examples in the prompt; what the task says if None.
        limit: use only so many examples of each task; all if None.
        batch_size: requests in a batch.
        max_length: tokens that the model takes; what it says itself if None.
        chat_template: put prompts into the chat template of the tokenizer.
        seed: for few-shot examples and sampling.

    Raises:
        ConfigError: lm-eval is not installed, or there is no such task.
    """
    _check_installed()
    from lm_eval.evaluator import evaluate

    from lightning_peft.evaluation.live_lm import LiveLM

    with measuring(model, seed):
        loaded = _manager_for(task, include_path).load([task])
        for one in loaded["tasks"].values():
            own = one.get_config("num_fewshot")
            if num_fewshot is not None and own != 0:
                one.set_config(key="num_fewshot", value=num_fewshot)
            elif own is None:
                one.set_config(key="num_fewshot", value=0)
            one.set_fewshot_seed(seed=seed)
        found: dict[str, Any] = evaluate(
            lm=LiveLM(model, load_tokenizer(tokenizer), batch_size=batch_size, max_length=max_length),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=chat_template,
        )
    return found


def figures_of(results: dict[str, Any], task: str) -> dict[str, float]:
    """Return the figures of a run by name: those of ``task`` as ``acc``, those of tasks in a group as ``name/acc``.

    A figure that passed a filter of another name than ``none`` is called ``exact_match,strict-match``, as the harness calls it.
    """
    found: dict[str, float] = {}
    for name, figures in results["results"].items():
        for key, value in figures.items():
            figure, _, chosen = key.partition(",")
            if figure.endswith("_stderr") or not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            label = figure if chosen in ("", "none") else key
            if figure not in ("sample_len", "alias"):
                found[label if name == task else f"{name}/{label}"] = float(value)
    return found


def directions_of(results: dict[str, Any], task: str) -> dict[str, bool]:
    """Return whether higher is better for the figures of ``task``, where the harness says so."""
    return {
        name: value for name, value in results.get("higher_is_better", {}).get(task, {}).items() if value is not None
    }


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "tasks of lm-evaluation-harness run with the library lm-eval, which is not installed: pip install 'lightning-peft[eval]'"
        ) from error


def _manager_for(task: str, include_path: str | None) -> Any:
    """Return an index of tasks that has ``task``: that of the folder alone where it has it, as the other takes seconds."""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ConfigError(f"include_path={include_path!r} is not a folder of task files")
        own = _manager(include_path, False)
        if task in own.all_tasks:
            return own
    manager = _manager(include_path, True)
    if task not in manager.all_tasks:
        raise ConfigError(
            f"lm-evaluation-harness has no task {task!r}{did_you_mean(task, manager.all_tasks) or ';'} "
            "`lm-eval ls tasks` lists them; include_path names a folder of your own"
        )
    return manager


@functools.lru_cache(maxsize=4)
def _manager(include_path: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)

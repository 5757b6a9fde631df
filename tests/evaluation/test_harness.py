"""Our results against lm-evaluation-harness's own: its wrapper of transformers' models, on the same model."""

import sys

import pytest
import torch

from lightning_peft import LMEvalHarness, MinimalPairs, MultipleChoice, adapters_disabled
from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.harness import figures_of, run_harness
from lightning_peft.evaluation.live_lm import LiveLM
from lightning_peft.random_state import random_state

LIMIT = 8
ROWS = 6


@pytest.fixture(scope="session")
def of_the_harness(task_files):
    """Run a task with the harness's own model class and its own entry point: ``of_the_harness(model, folder, task, limit)``."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    manager = TaskManager(include_path=task_files, include_defaults=False)
    patch = pytest.MonkeyPatch()
    patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # seconds, for what nobody reads here

    def run(model, folder, task, limit, **options):
        theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)
        found = simple_evaluate(
            theirs, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True, **options
        )
        return figures_of(found, task), [sample["resps"] for sample in found["samples"][task]]

    yield run
    patch.undo()


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_multiple_choice_is_what_the_harness_finds(on, adapted, stories, data_dir, task_files, of_the_harness):
    path = str(data_dir / "mc" / "arc_challenge_dev.jsonl")
    live = LMEvalHarness(task="local_arc", tokenizer=stories, include_path=task_files, limit=LIMIT)
    ours = MultipleChoice(path=path, tokenizer=stories, max_examples=LIMIT)

    def compare():
        expected, responses = of_the_harness(adapted, stories, "local_arc", LIMIT)
        assert live.evaluate(adapted) == pytest.approx(expected, abs=1e-6)
        own = ours.evaluate(adapted)
        assert {name: own[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        assert len(responses) == LIMIT
        return own

    if on:
        compare()
        return
    with adapters_disabled(adapted):
        off = compare()
    assert off["log_likelihood"] != ours.evaluate(adapted)["log_likelihood"]


def test_likelihoods_one_by_one_are_those_of_the_harness(adapted, stories, task_files, of_the_harness):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    pairs = [("Once upon a time", " there was"), ("The cat ", "sat"), ("", "A dog ran."), ("x " * 700, "end of it")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    expected = HFLM(pretrained=adapted, tokenizer=tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    with torch.no_grad():
        found = LiveLM(adapted, tokenizer, batch_size=2).loglikelihood(requests)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_minimal_pairs_text_and_generation_are_what_the_harness_finds(
    adapted, stories, data_dir, task_files, of_the_harness
):
    expected, _ = of_the_harness(adapted, stories, "local_blimp", 24)
    pairs = MinimalPairs(path=str(data_dir / "mc" / "blimp_dev.jsonl"), tokenizer=stories, max_examples=24)
    assert pairs.evaluate(adapted)["acc"] == pytest.approx(expected["acc"], abs=1e-6)
    assert run(adapted, stories, task_files, "local_blimp", 24) == pytest.approx(expected, abs=1e-6)

    expected, _ = of_the_harness(adapted, stories, "local_stories", 3)  # stories are longer than the context
    assert run(adapted, stories, task_files, "local_stories", 3) == pytest.approx(expected, rel=1e-6)

    expected, texts = of_the_harness(adapted, stories, "local_svamp", ROWS)
    assert run(adapted, stories, task_files, "local_svamp", ROWS) == expected
    assert any(text[0][0] if isinstance(text[0], list) else text[0] for text in texts)


def run(model, folder, files, task, limit):
    return figures_of(run_harness(model, task, folder, include_path=files, limit=limit, batch_size=4), task)


def test_few_shot_examples_are_those_the_harness_draws(adapted, stories, task_files, of_the_harness):
    expected, responses = of_the_harness(adapted, stories, "local_blimp", ROWS, num_fewshot=2)
    task = LMEvalHarness(task="local_blimp", tokenizer=stories, include_path=task_files, limit=ROWS, num_fewshot=2)
    assert task.evaluate(adapted) == pytest.approx(expected, abs=1e-6)
    assert len(responses) == ROWS


def test_the_model_and_the_random_numbers_are_left_as_they_were(adapted, stories, task_files):
    adapted.train()
    adapted.lm_head.eval()
    before = random_state()
    LMEvalHarness(task="local_blimp", tokenizer=stories, include_path=task_files, limit=2).evaluate(adapted)
    after = random_state()
    assert adapted.training
    assert not adapted.lm_head.training
    assert after["python"] == before["python"]
    assert torch.equal(after["torch"], before["torch"])
    assert torch.equal(after["numpy"][1], before["numpy"][1])
    assert after["numpy"][2:] == before["numpy"][2:]


def test_what_is_wrong_is_said(adapted, stories, task_files, monkeypatch):
    with pytest.raises(ConfigError, match="include_path='nowhere' is not a folder of task files"):
        LMEvalHarness(task="local_arc", tokenizer=stories, include_path="nowhere").evaluate(adapted)
    with pytest.raises(ConfigError, match="LMEvalHarness limit must be at least 1, got 0"):
        LMEvalHarness(task="local_arc", tokenizer=stories, limit=0)
    backwards = LMEvalHarness(
        task="local_blimp", tokenizer=stories, include_path=task_files, limit=1, higher_is_better=False
    )
    with pytest.raises(ConfigError, match="higher_is_better=False for 'acc', of which 'local_blimp' says True"):
        backwards.evaluate(adapted)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'lightning-peft\[eval\]'"):
        LMEvalHarness(task="local_arc", tokenizer=stories).evaluate(adapted)


def test_a_task_that_nobody_has_is_refused_with_one_that_is_like_it(adapted, stories, monkeypatch):
    from types import SimpleNamespace

    from lightning_peft.evaluation import harness

    monkeypatch.setattr(harness, "_manager", lambda path, defaults: SimpleNamespace(all_tasks=["hellaswag", "piqa"]))
    with pytest.raises(ConfigError, match="has no task 'helaswag'; did you mean 'hellaswag'"):
        LMEvalHarness(task="helaswag", tokenizer=stories).evaluate(adapted)

"""ForgettingEvaluation in real runs: what it logs, that it changes nothing, resuming, budgets, several processes."""

import csv
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_peft import (
    AdapterCheckpoint,
    AnchorText,
    CausalLMLoader,
    EvalTask,
    ForgettingBudget,
    ForgettingEvaluation,
    FullFineTuning,
    LoRA,
    PEFTDDPStrategy,
    PEFTFSDPStrategy,
    PEFTModule,
    Perplexity,
    PrefixTuning,
    TokenDiversity,
    adapter_scale,
    measure_forgetting,
)
from lightning_peft.callbacks.figures import log_figure
from lightning_peft.callbacks.forgetting_curve import curve_figure
from lightning_peft.errors import ConfigError, InjectionError, LightningPEFTWarning
from lightning_peft.random_state import random_state

SOURCE = "the cat sat on the mat. a dog ran to the red house and sat down. " * 12
TARGET = "0 1 1 2 3 5 8 13 21 34 55 89 144 233 377 610 987 1597 2584 4181 6765. " * 12


@pytest.fixture(scope="session")
def folder(llama_dir, tmp_path_factory):
    """A model that has learned the source text a little, and both texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)  # it has dropout; what other tests drew before must not matter
    (place / "source.txt").write_text(SOURCE)
    (place / "target.txt").write_text(TARGET)
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    model = AutoModelForCausalLM.from_pretrained(llama_dir).train()
    ids = torch.tensor(tokenizer(SOURCE)["input_ids"][:512]).view(-1, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def tasks(folder):
    return {
        name: Perplexity(path=str(folder / f"{name}.txt"), tokenizer=str(folder), block_size=32, max_tokens=128)
        for name in ("source", "target")
    }


@pytest.fixture
def anchor(folder):
    return AnchorText(path=str(folder / "source.txt"), tokenizer=str(folder), block_size=32, max_tokens=64)


@pytest.fixture
def evaluation(tasks, anchor, tmp_path):
    """Make a callback: sources, targets and an anchor, every two steps."""

    def make(**options):
        settings = {"every_n_steps": 2, "anchor": anchor, "output": str(tmp_path / "out"), **options}
        return ForgettingEvaluation({"stories": tasks["source"]}, {"numbers": tasks["target"]}, **settings)

    return make


def rows(folder):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TARGET)["input_ids"]
    return [torch.tensor(ids[i : i + 24]) for i in range(0, 24 * 16, 24)]


def module_of(folder, method=None, lr=3e-2):
    return PEFTModule(
        CausalLMLoader(path=str(folder)),
        method or LoRA(rank=4, dropout=0.1),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
    )


def fit(folder, callbacks, *, method=None, steps=4, lr=3e-2, resume=None, module=None, **options):
    seed_everything(7, verbose=False)
    module = module or module_of(folder, method, lr)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saving = {"enable_checkpointing": any(isinstance(one, AdapterCheckpoint) for one in callbacks)}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        **{"devices": 1, **quiet, **saving, "default_root_dir": folder / "runs", **options},
    )
    trainer.fit(module, DataLoader(rows(folder), batch_size=4, shuffle=True), ckpt_path=resume)
    return module, trainer


class Trace:
    """Keeps the loss of every step."""

    def __new__(cls, losses):
        from lightning.pytorch import Callback

        class Kept(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                losses.append((outputs["loss"].item(), batch.sum().item()))

        return Kept()


def test_it_logs_the_start_the_steps_between_and_the_end(folder, evaluation, tmp_path):
    callback = evaluation(plot=True, watched={"samples": TokenDiversity(
        tokenizer=str(folder), prompts=["the "], samples=3, max_new_tokens=4
    )})  # fmt: skip
    loggers = [CSVLogger(tmp_path, name="", version=""), TensorBoardLogger(tmp_path, name="board", version="")]
    module, trainer = fit(folder, [callback], logger=loggers, log_every_n_steps=1, steps=3)
    assert [point["step"] for point in callback.points] == [0, 2, 3]
    first, last = callback.points[0], callback.points[-1]
    assert first["forgetting"] == {"stories": 0.0, "mean": 0.0}
    assert first["learning"] == {"numbers": 0.0, "mean": 0.0}
    assert first["anchor"]["kl"] == 0.0
    assert last["forgetting"]["stories"] > 0.1
    assert last["learning"]["numbers"] > 0.1
    assert last["anchor"]["kl"] > 0.01

    tasks = {name.partition("/")[2]: task for name, task in callback._measure.tasks.items()}
    again = measure_forgetting(module.model, {"stories": tasks["stories"]}, {"numbers": tasks["numbers"]})
    assert again["forgetting"] == last["forgetting"]
    assert again["learning"] == last["learning"]
    assert again["base"]["source/stories"] == callback.base["source/stories"]

    with (tmp_path / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["forgetting/stories"]]
    assert [int(row["step"]) for row in logged] == [0, 2, 3]
    assert float(logged[-1]["forgetting/stories"]) == last["forgetting"]["stories"]
    assert float(logged[-1]["anchor/kl"]) == last["anchor"]["kl"]
    assert float(logged[-1]["watched/samples/unique"]) in (1 / 3, 2 / 3, 1.0)
    assert trainer.callback_metrics["learning/mean"] == pytest.approx(last["learning"]["mean"])

    told = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert told["points"] == callback.points
    assert told["compared_by"]["source/stories"] == {"figure": "loss", "higher_is_better": False}
    assert told["pareto_front"][0] == 0
    assert (tmp_path / "out" / "forgetting.png").read_bytes()[1:4] == b"PNG"
    assert sorted(file.name for file in (tmp_path / "forgetting").iterdir()) == [f"step={n}.png" for n in (2, 3)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert events.Tags()["images"] == ["forgetting"]
    assert [one.step for one in events.Images("forgetting")] == [2, 3]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_it_is_the_run_without_it_bit_for_bit(folder, evaluation, accumulate):
    runs = []
    for watched in (False, True):
        losses: list[Any] = []
        diversity = TokenDiversity(tokenizer=str(folder), prompts=["the "], samples=2, max_new_tokens=3)
        callbacks = [evaluation(every_n_steps=1, watched={"samples": diversity})] if watched else []
        module, _ = fit(folder, [*callbacks, Trace(losses)], accumulate_grad_batches=accumulate)
        runs.append((losses, module.state_dict(), random_state(), [m.training for m in module.modules()]))
    (losses, state, numbers, modes), (others, other_state, other_numbers, other_modes) = runs
    assert losses == others
    assert all(torch.equal(state[key], other_state[key]) for key in state)
    assert torch.equal(numbers["torch"], other_numbers["torch"])
    assert numbers["python"] == other_numbers["python"]
    assert torch.equal(numbers["numpy"][1], other_numbers["numpy"][1])
    assert modes == other_modes


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_run_that_resumes_goes_on_with_the_curve(folder, evaluation, tmp_path):
    whole = evaluation()
    fit(folder, [whole], steps=6)
    saving = AdapterCheckpoint(dirpath=tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(folder, [evaluation(), saving], steps=4)
    resumed = evaluation()
    fit(folder, [resumed], steps=6, resume=tmp_path / "ckpt" / "step=4.ckpt")
    assert resumed.points == whole.points
    assert resumed.base == whole.base

    other = evaluation(watched={"again": whole._measure.tasks["source/stories"]})
    with pytest.warns(LightningPEFTWarning, match="measures watched/again with other settings or files"):
        fit(folder, [other], steps=6, resume=tmp_path / "ckpt" / "step=4.ckpt")
    assert [point["step"] for point in other.points] == [4, 6]
    assert other.points[-1]["forgetting"] == whole.points[-1]["forgetting"]


def test_a_second_run_begins_a_new_curve(folder, evaluation):
    callback = evaluation()
    fit(folder, [callback], steps=2)
    first = callback.points
    fit(folder, [callback], steps=2)
    assert [point["step"] for point in callback.points] == [0, 2]
    assert callback.points == first
    assert callback.points is not first


# -- bases that cannot be reached --------------------------------------------------------------------------------------


class Plain(LightningModule):
    """Full fine-tuning without an adapter."""

    def __init__(self, folder):
        super().__init__()
        self.model = CausalLMLoader(path=str(folder)).load()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


CALLS = []


@dataclass(frozen=True, kw_only=True)
class Norm(EvalTask):
    """Counts how often it is asked."""

    name: ClassVar[str] = "norm"

    def evaluate(self, model):
        CALLS.append(1)
        return {"loss": sum(float(parameter.detach().norm()) for parameter in model.parameters())}


def test_full_fine_tuning_without_an_adapter_is_compared_with_its_start(folder, anchor, tmp_path):
    CALLS.clear()
    options = {"anchor": anchor, "cache": str(tmp_path / "cache"), "output": str(tmp_path)}
    first = ForgettingEvaluation({"norm": Norm()}, **options)
    module, _ = fit(folder, [first], module=Plain(folder), steps=2)
    assert len(CALLS) == 3  # base, start, end
    assert first.points[0]["forgetting"]["norm"] == 0.0
    assert first.points[0]["anchor"]["kl"] == 0.0
    assert first.points[-1]["forgetting"]["norm"] == (
        first.points[-1]["figures"]["source/norm"]["loss"] - first.points[0]["figures"]["source/norm"]["loss"]
    )
    assert first.points[-1]["anchor"]["kl"] > 1e-4

    again = ForgettingEvaluation({"norm": Norm()}, **options)
    fit(folder, [again], module=Plain(folder), steps=2)
    assert len(CALLS) == 5  # the base was in the cache
    assert again.points == first.points

    (digest,) = (file.stem for file in (tmp_path / "cache").glob("*.json"))
    late = ForgettingEvaluation({"norm": Norm()}, **options, base_fingerprint=digest)
    fit(folder, [late], module=module, steps=1)
    assert late.points[0]["forgetting"] == first.points[-1]["forgetting"]


def test_a_trained_base_is_found_in_its_cache_when_the_run_resumes(folder, anchor, tmp_path):
    options = {"anchor": anchor, "cache": str(tmp_path / "cache"), "output": str(tmp_path)}
    first = ForgettingEvaluation({"norm": Norm()}, **options)
    _, trainer = fit(folder, [first], module=Plain(folder), steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = ForgettingEvaluation({"norm": Norm()}, **options)
    fit(folder, [rest], module=Plain(folder), steps=5, resume=str(tmp_path / "half.ckpt"))
    assert rest.points[:2] == first.points
    assert [point["step"] for point in rest.points] == [0, 4, 5]
    assert rest.points[-1]["anchor"]["kl"] > 1e-4
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1


def test_full_fine_tuning_as_a_method_needs_no_cache(folder, evaluation):
    callback = evaluation()
    fit(folder, [callback], method=FullFineTuning(), steps=2, lr=1e-2)
    assert callback.points[0]["forgetting"]["stories"] == 0.0
    assert callback.points[-1]["anchor"]["kl"] > 0.0


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_a_budget_stops_training(folder, evaluation):
    callback = evaluation(budget=ForgettingBudget(limit=0.05), every_n_steps=1)
    _, trainer = fit(folder, [callback], steps=8)
    assert trainer.global_step < 8
    assert callback.points[-1]["forgetting"]["mean"] > 0.05
    assert callback.points[-2]["forgetting"]["mean"] <= 0.05


def test_a_budget_shrinks_the_scale_and_training_goes_on(folder, evaluation, tasks):
    callback = evaluation(budget=ForgettingBudget(limit=0.2, action="shrink"), every_n_steps=4)
    module, trainer = fit(folder, [callback], steps=8)
    assert trainer.global_step == 8
    assert callback.points[1]["forgetting"]["mean"] > 0.2
    assert 0.0 < adapter_scale(module.model) < 1.0
    assert measure_forgetting(module.model, {"stories": tasks["source"]})["forgetting"]["stories"] <= 0.2
    assert callback.points[2]["scales"]["default"] in [n / 16 for n in range(1, 16)]


def test_a_budget_that_no_scale_keeps_stops(folder, evaluation):
    callback = evaluation(budget=ForgettingBudget(limit=0.0, action="shrink", measure="kl", halvings=1))
    with pytest.warns(LightningPEFTWarning, match=r"above the budget of 0, and still at 0.5 of the scale"):
        module, trainer = fit(folder, [callback], steps=8)
    assert trainer.global_step == 2
    assert adapter_scale(module.model) == 1.0


def test_a_budget_picks_the_scale_that_learned_most_within_it(folder, evaluation, tasks, tmp_path):
    scales = [0.0, 0.05, 0.1, 0.25, 1.0]
    callback = evaluation(budget=ForgettingBudget(limit=0.25, action="pick", measure="stories", scales=scales))
    module, _ = fit(folder, [callback], steps=6)
    picked = adapter_scale(module.model)
    found = {one["scale"]: one for one in callback.scaled}
    assert list(found) == scales
    assert found[0.0]["forgetting"] == found[0.0]["learning"] == 0.0
    assert found[1.0]["forgetting"] == callback.points[-1]["forgetting"]["stories"] > 0.25
    within = [one for one in callback.scaled if one["forgetting"] <= 0.25]
    assert found[picked]["learning"] == max(one["learning"] for one in within) > 0.0
    assert measure_forgetting(module.model, {"stories": tasks["source"]})["forgetting"]["stories"] <= 0.25
    told = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert [one["scale"] for one in told["scales"] if one["picked"]] == [picked]
    assert curve_figure(callback.points, callback.scaled).axes[0].get_xlabel() == "learning (mean over targets)"


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [PEFTDDPStrategy, PEFTFSDPStrategy])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*os.fork.*")
def test_two_processes_measure_what_one_does(strategy, folder, evaluation, tmp_path):
    def run(strategy, devices, place):
        callback = evaluation(output=str(tmp_path / place), budget=ForgettingBudget(limit=0.2, action="pick"))
        fit(folder, [callback], method=LoRA(rank=4), steps=3, strategy=strategy, devices=devices)
        return json.loads((tmp_path / place / "forgetting.json").read_text())

    two = run(strategy(start_method="fork"), 2, "two")
    assert [point["step"] for point in two["points"]] == [0, 2, 3]
    assert two["points"][0]["forgetting"]["stories"] == 0.0
    assert two["points"][0]["anchor"]["kl"] == 0.0
    assert two["points"][-1]["learning"]["numbers"] > 0.0
    assert len(two["scales"]) == 5
    one = run("auto", 1, "one")
    assert one["base"]["source/stories"]["loss"] == pytest.approx(two["base"]["source/stories"]["loss"], rel=1e-6)


# -- loggers and refusals ----------------------------------------------------------------------------------------------


def test_loggers_get_the_figure_in_the_way_they_take_it():
    points = [
        {"step": n, "forgetting": {"mean": 0.1 * n}, "learning": {"mean": 0.2 * n}} for n in range(3)
    ]  # fmt: skip
    seen = []

    class WandB:
        experiment = SimpleNamespace()

        def log_image(self, key, images, step):
            with open(images[0], "rb") as file:
                seen.append((key, file.read(4)[1:], step))

    mlflow = SimpleNamespace(
        run_id="run", experiment=SimpleNamespace(log_figure=lambda run, figure, name: seen.append((run, name)))
    )

    def draw():
        return curve_figure(points)

    assert log_figure(WandB(), "forgetting", "forgetting", draw, 2)
    assert log_figure(mlflow, "forgetting", "forgetting", draw, 2)
    assert seen == [("forgetting", b"PNG", 2), ("run", "forgetting/step=2.png")]
    assert not log_figure(SimpleNamespace(experiment=None), "forgetting", "forgetting", draw, 2)
    without = [{**point, "learning": {}} for point in points]
    assert curve_figure(without).axes[0].get_xlabel() == "step"


def test_what_does_not_go_together_is_refused(folder, evaluation, tasks):
    source, target = tasks["source"], tasks["target"]
    for wrong, message in (
        (lambda: ForgettingEvaluation({}), "needs sources such as"),
        (lambda: ForgettingEvaluation({"mean": source}), "'mean' cannot be the label of a task"),
        (lambda: ForgettingEvaluation({"a": "b"}), "source 'a' must be an EvalTask, got 'b'"),
        (lambda: evaluation(every_n_steps=0), "every_n_steps must be positive, got 0"),
        (lambda: evaluation(base_fingerprint="x"), "give cache=FOLDER as well"),
        (
            lambda: ForgettingEvaluation({"a": source}, {"b": target}, budget=ForgettingBudget(limit=1, measure="kl")),
            "measure='kl' is none of: mean, a; kl needs an anchor text",
        ),
        (
            lambda: ForgettingEvaluation({"a": source}, budget=ForgettingBudget(limit=1, action="pick")),
            "give targets as well",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong()
    shrinking = evaluation(budget=ForgettingBudget(limit=0.1, action="shrink"))
    with pytest.raises(InjectionError, match="whose effect has no factor"):
        fit(folder, [shrinking], method=PrefixTuning(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="action='shrink' scales adapters, and LlamaForCausalLM has none"):
        fit(folder, [shrinking], module=Plain(folder))
    by_rows = PEFTModule(CausalLMLoader(path=str(folder)), LoRA(rank=2), by_rows=True)
    with pytest.raises(ConfigError, match="measures the active adapters of LlamaForCausalLM, and none is"):
        fit(folder, [evaluation()], module=by_rows)

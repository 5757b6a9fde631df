"""Members that stop, runs that resume, folders, halving and the ranking."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import (
    AdapterCheckpoint,
    Bottleneck,
    Halving,
    LightningPEFTWarning,
    LoRA,
    Member,
    NormTuning,
    PopulationCheckpoint,
    PopulationModule,
    load_adapter,
    set_active_adapters,
)
from lightning_peft.errors import CheckpointMismatchError, ConfigError
from lightning_peft.population.resuming import STATE
from lightning_peft.population.standings import Standings
from lightning_peft.testing.subject import distance
from lightning_peft.testing.toys import tiny_llama, token_batch


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)


def plateau(optimizer: Any) -> Any:
    from lightning.pytorch.cli import ReduceLROnPlateau

    return ReduceLROnPlateau(optimizer, monitor="val_loss", patience=0, threshold=1.0)


def members(patience: int | None = 1) -> list[Member]:
    return [
        Member(LoRA(rank=2), ["query", "value"], "good", lr=1e-2, seed=1),
        # It gains less than min_delta, so it stops at the second validation.
        Member(LoRA(rank=8), None, "slow", lr=1e-6, seed=2, patience=patience, min_delta=0.1, lr_scheduler=plateau),
        Member(Bottleneck(reduction_factor=8.0), None, "bottleneck", lr=1e-2, seed=3),
        Member(NormTuning(), None, "norms", lr=1e-3, seed=4),
    ]


def module(chosen: list[Member] | None = None, **options: Any) -> PopulationModule:
    settings = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3), "lr_scheduler": cosine, **options}
    return PopulationModule(tiny_llama(), chosen or members(), **settings)


class Watch(ModelCheckpoint):
    """Notes the tensors of a member when it stops."""

    def __init__(self, tensors: Any, **options: Any) -> None:
        super().__init__(**options)
        self.tensors, self.at_stop = tensors, {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        for name in pl_module.standings.ended:
            self.at_stop[name] = (trainer.global_step, self.tensors(pl_module, name))


def test_a_member_that_stops_stays_as_it_is_and_the_others_go_on(make_trainer, make_loaders, adapter_tensors, tmp_path):
    watch = Watch(adapter_tensors, dirpath=tmp_path / "a", save_top_k=0)
    stopping, going = module(), module(members(patience=None))
    make_trainer(tmp_path, max_epochs=3, callbacks=[watch, PopulationCheckpoint(tmp_path / "m", table=False)]).fit(
        stopping, *make_loaders()
    )
    make_trainer(tmp_path, max_epochs=3).fit(going, *make_loaders())

    step, then = watch.at_stop["slow"]
    assert step == 16
    now = adapter_tensors(stopping, "slow")
    assert all(torch.equal(now[key], value) for key, value in then.items())
    assert any(not torch.equal(now[key], value) for key, value in adapter_tensors(going, "slow").items())
    for name in ("good", "bottleneck", "norms"):
        found, wanted = adapter_tensors(stopping, name), adapter_tensors(going, name)
        assert all(distance(found[key], value) <= 1e-5 for key, value in wanted.items())
    standing = {one.name: one for one in stopping.ranking()}
    assert standing["slow"].status == "stopped"
    assert standing["slow"].steps == 16
    assert standing["good"].status == "finished"
    assert standing["good"].steps == 24
    assert standing["slow"].share < standing["good"].share
    assert sum(one.share for one in standing.values()) == pytest.approx(1.0)


def test_training_ends_when_all_have_stopped(make_trainer, make_loaders, tmp_path):
    lazy = [Member(LoRA(rank=2), None, name, lr=1e-7, patience=2, min_delta=0.1) for name in ("a", "b")]
    one = module(lazy)
    trainer = make_trainer(tmp_path, max_epochs=20)
    trainer.fit(one, *make_loaders())
    assert trainer.current_epoch == 3
    assert trainer.global_step == 24
    assert [result.status for result in one.ranking()] == ["stopped", "stopped"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("at", "options"),
    [
        (10, {}),
        (20, {}),
        (2, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
        (7, {"accumulate_grad_batches": 3}),
    ],
)
def test_a_run_that_resumes_is_the_uninterrupted_one_bit_for_bit(
    make_trainer, make_loaders, adapter_tensors, tmp_path, at, options
):
    """The first checkpoint comes before, the second after "slow" has stopped."""

    def run(folder: Any, ckpt: Any = None) -> tuple[PopulationModule, Any]:
        # Resumed within a window of accumulated batches, Lightning leaves out the next update of a plateau schedule, of any module.
        one = module([replace(member, lr_scheduler=None) for member in members()] if options else members())
        every = ModelCheckpoint(dirpath=folder, every_n_train_steps=at, save_top_k=-1)
        trainer = make_trainer(
            tmp_path, max_epochs=3, callbacks=[every, PopulationCheckpoint(folder / "members", table=False)], **options
        )
        trainer.fit(one, *make_loaders(), ckpt_path=ckpt)
        return one, trainer

    whole, trainer = run(tmp_path / "whole")
    checkpoint = next((tmp_path / "whole").glob(f"*step={at}.ckpt"))
    assert trainer.global_step > at
    again, resumed = run(tmp_path / "again", checkpoint)
    assert resumed.global_step == trainer.global_step
    for key, value in adapter_tensors(whole).items():
        assert torch.equal(adapter_tensors(again)[key], value), key

    def plain(one: PopulationModule) -> Any:
        of = one.standings.state()["of"]
        return {name: {key: value for key, value in state.items() if key != "seconds"} for name, state in of.items()}

    assert plain(again) == plain(whole)
    assert plain(whole)["slow"]["status"] == "stopped"
    first, second = (one.optimizers[0].state_dict() for one in (trainer, resumed))
    assert str(first) == str(second)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({}, {8, 16}),
        ({"val_check_interval": 4}, {4, 8, 12, 16}),
        ({"val_check_interval": 4, "accumulate_grad_batches": 2}, {2, 4, 6, 8}),
        ({"val_check_interval": 6, "check_val_every_n_epoch": None}, {6, 12}),
        ({"check_val_every_n_epoch": 2}, {16}),
    ],
    ids=["epoch", "interval", "accumulation", "across epochs", "every second epoch"],
)
def test_a_checkpoint_between_a_batch_and_its_validation_is_told(options, due, make_trainer, make_loaders, tmp_path):
    every = ModelCheckpoint(dirpath=tmp_path / "e", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    callbacks = [every, PopulationCheckpoint(table=False)]
    chosen = [replace(one, lr_scheduler=None) for one in members(None)]
    first = make_trainer(tmp_path, max_epochs=2, callbacks=callbacks, **options)
    first.fit(module(chosen), *make_loaders())
    files = {step: tmp_path / "e" / f"step={step}.ckpt" for step in range(1, first.global_step + 1)}
    stored = {step: torch.load(file, weights_only=False)[STATE] for step, file in files.items()}
    assert {step for step, state in stored.items() if state["validation_due"]} == due
    every = ModelCheckpoint(dirpath=tmp_path / "f", every_n_train_steps=1)
    again = make_trainer(tmp_path, max_steps=min(due), callbacks=[every], **options)
    with pytest.warns(LightningPEFTWarning, match="before the validation that follows"):
        again.fit(module(chosen), *make_loaders(), ckpt_path=files[min(due)])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumes_only_as_the_population_it_was(make_trainer, make_loaders, tmp_path):
    saving = AdapterCheckpoint(dirpath=tmp_path / "c", save_last=True)
    make_trainer(tmp_path, max_steps=4, callbacks=[saving, PopulationCheckpoint()]).fit(module(), *make_loaders())
    path = tmp_path / "c" / "last.ckpt"
    again = PopulationModule.load_from_checkpoint(path, base=tiny_llama(), members=members(), weights_only=True)
    assert again.ranking()[0].steps == 4

    def resumed() -> Any:
        return make_trainer(
            tmp_path,
            max_steps=8,
            callbacks=[AdapterCheckpoint(dirpath=tmp_path / "d", save_last=True), PopulationCheckpoint()],
        )

    others = members()
    others[0] = Member(LoRA(rank=2), ["query", "value"], "good", lr=2e-2, seed=1)
    with pytest.raises(CheckpointMismatchError, match="lr was 0.01"):
        resumed().fit(module(others), *make_loaders(), ckpt_path=path)
    others[0] = Member(
        LoRA(rank=2),
        ["query", "value"],
        "good",
        lr=1e-2,
        seed=1,
        optimizer=lambda p: torch.optim.SGD(p, weight_decay=0.01),
    )
    with pytest.raises(CheckpointMismatchError, match="optimizer_class was 'AdamW'"):
        resumed().fit(module(others), *make_loaders(), ckpt_path=path)
    with pytest.raises(CheckpointMismatchError, match="holds the adapters"):
        resumed().fit(module(members()[:3]), *make_loaders(), ckpt_path=path)


def test_folders_of_members_load_alone_and_give_the_same_logits(make_trainer, make_loaders, tmp_path):
    peft = pytest.importorskip("peft")
    folder = tmp_path / "members"
    trained = module()
    trainer = make_trainer(
        tmp_path, max_epochs=3, callbacks=[PopulationCheckpoint(folder, table=False)], enable_checkpointing=False
    )
    trainer.fit(trained, *make_loaders())
    ids = token_batch(seed=5)["input_ids"]
    for name in trained.members:
        set_active_adapters(trained.model, [name])
        with torch.no_grad():
            wanted = trained.model.eval()(ids).logits
        alone = tiny_llama()
        load_adapter(alone, folder / name / "last")
        with torch.no_grad():
            assert distance(alone(ids).logits, wanted) <= 1e-6
        assert (folder / name / "best" / "adapter_model.safetensors").is_file()
        if name == "good":
            theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(folder / name / "last")).eval()
            with torch.no_grad():
                assert distance(theirs(ids).logits, wanted) <= 1e-5
    results = json.loads((folder / "results.json").read_text())
    assert [one["name"] for one in results["members"]] == [one.name for one in trained.ranking()]
    assert results["members"][0]["best"] == min(one["best"] for one in results["members"])
    assert results["members"][0]["settings"]["method"]


def test_the_best_adapter_is_that_of_the_best_validation(make_trainer, make_loaders, adapter_tensors, tmp_path):
    folder = tmp_path / "members"

    def uphill(optimizer: Any) -> Any:  # after the first epoch
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 8 else -1.0)

    wild = [
        Member(LoRA(rank=4), None, "wild", lr=1e-2, seed=1, lr_scheduler=uphill),
        Member(LoRA(rank=4), None, "calm", lr=1e-3, seed=1),
    ]
    one = module(wild, lr_scheduler=None)
    trainer = make_trainer(
        tmp_path, max_epochs=3, callbacks=[PopulationCheckpoint(folder, table=False)], enable_checkpointing=False
    )
    trainer.fit(one, *make_loaders())
    standing = one.standings.of["wild"]
    assert standing.best < standing.last  # it went past its best
    values = []
    for kind in ("best", "last"):
        alone = tiny_llama()
        load_adapter(alone, folder / "wild" / kind)
        total = count = 0.0
        for batch in make_loaders()[1]:
            with torch.no_grad():
                tokens = int((batch["labels"][:, 1:] != -100).sum())
                total += float(alone(**batch).loss) * tokens
                count += tokens
        values.append(total / count)
    assert values[0] == pytest.approx(standing.best, rel=1e-4)
    assert values[1] == pytest.approx(standing.last, rel=1e-4)
    assert one.ranking()[0].name == min(("wild", "calm"), key=lambda name: one.standings.of[name].best)


def test_halving_keeps_the_best(make_trainer, make_loaders, tmp_path, capsys):
    rates = {"a": 1e-6, "b": 1e-2, "c": 1e-5, "d": 3e-3}
    chosen = [Member(LoRA(rank=2), None, name, lr=lr, seed=0) for name, lr in rates.items()]
    one = module(chosen, halving=Halving(at=[6, 16]))
    trainer = make_trainer(
        tmp_path, max_epochs=3, callbacks=[PopulationCheckpoint(tmp_path / "m")], enable_checkpointing=False
    )
    trainer.fit(one, *make_loaders())
    steps = {result.name: (result.steps, result.status) for result in one.ranking()}
    assert steps["a"] == steps["c"] == (8, "halved")
    assert sorted(steps[name] for name in "bd") == [(16, "halved"), (24, "finished")]
    printed = capsys.readouterr().out
    assert "halved" in printed
    assert "finished" in printed


def test_a_member_that_diverges_stops_and_spoils_nothing(make_trainer, make_loaders, adapter_tensors, tmp_path):
    calm = Member(LoRA(rank=2), None, "calm", lr=1e-3, seed=1)
    wild = Member(LoRA(rank=4), None, "wild", lr=1e30, seed=1, optimizer=lambda p: torch.optim.SGD(p))
    both, one = module([wild, calm]), module([calm])
    callbacks = [PopulationCheckpoint(tmp_path / "m", table=False)]
    make_trainer(tmp_path, max_epochs=2, callbacks=callbacks, enable_checkpointing=False).fit(both, *make_loaders())
    make_trainer(tmp_path, max_epochs=2).fit(one, *make_loaders())
    assert both.standings.of["wild"].status == "diverged"
    for key, value in adapter_tensors(one, "calm").items():
        assert distance(adapter_tensors(both, "calm")[key], value) <= 1e-5
    assert not (tmp_path / "m" / "wild" / "last").exists()
    assert json.loads((tmp_path / "m" / "results.json").read_text())["members"][-1]["status"] == "diverged"


def test_what_is_measured_may_be_maximised(make_trainer, make_loaders, tmp_path):
    one = module(monitor="val_token_accuracy", mode="max")
    make_trainer(tmp_path, max_epochs=2).fit(one, *make_loaders())
    values = [result.best for result in one.ranking()]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    with pytest.raises(ConfigError, match="monitor='val_los' was asked for, but validation measures"):
        make_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(module(monitor="val_los"), *make_loaders())


def test_nobody_is_trained_after_all_have_stopped_while_the_trainer_goes_on(
    make_trainer, make_loaders, adapter_tensors, tmp_path
):
    lazy = [Member(LoRA(rank=2), None, "a", lr=1e-3, seed=1, patience=1, min_delta=1.0, lr_scheduler=plateau)]
    one, short = module(lazy), module(lazy)
    make_trainer(tmp_path, min_epochs=4, max_epochs=6).fit(one, *make_loaders())
    make_trainer(tmp_path, max_epochs=2).fit(short, *make_loaders())
    assert one.trainer.current_epoch == 4
    assert one.trainer.global_step == 16
    assert all(torch.equal(value, adapter_tensors(short)[key]) for key, value in adapter_tensors(one).items())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("resumed", [True, False])
def test_a_fit_without_a_step_to_do_ends_as_any(resumed, make_trainer, make_loaders, adapter_tensors, tmp_path):
    saving, ckpt = AdapterCheckpoint(dirpath=tmp_path / "c", save_last=True), None
    chosen = [Member(LoRA(rank=2), None, name, lr=1e-2, seed=1) for name in "ab"]
    if resumed:
        make_trainer(tmp_path, max_epochs=1, callbacks=[saving]).fit(module(chosen), *make_loaders())
        ckpt = tmp_path / "c" / "last.ckpt"
    one, callbacks = module(chosen), [AdapterCheckpoint(dirpath=tmp_path / "d"), PopulationCheckpoint(tmp_path / "m")]
    make_trainer(tmp_path, max_epochs=int(resumed), callbacks=callbacks).fit(one, *make_loaders(), ckpt_path=ckpt)
    assert [(result.status, result.steps) for result in one.ranking()] == [("finished", 8 * resumed)] * 2
    stored = json.loads((tmp_path / "m" / "results.json").read_text())["members"]
    assert [result["status"] for result in stored] == ["finished"] * 2
    again = tiny_llama()
    load_adapter(again, tmp_path / "m" / "a" / "last", name="a")
    wanted = adapter_tensors(one, "a")
    for path, value in again.state_dict().items():
        if ".adapters.a." in path:
            key = f"model.{path}".replace(".base_layer", "").replace(".adapters.a.", ".adapters.X.")
            assert torch.equal(value, wanted[key]), path


def test_halving_by_epochs_keeps_so_many():
    four = [Member(LoRA(), name=name) for name in "abcd"]
    standings = Standings(four, "max", Halving(at=[1, 2], unit="epoch", eta=4, keep=2))
    values = {"a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}
    standings.judge(values, step=100, epochs=0)
    assert standings.living == list("abcd")
    standings.judge(values, step=101, epochs=1)
    assert standings.living == ["b", "c"]
    assert standings.ended == ["a", "d"]
    standings.judge(values, step=102, epochs=2)
    assert standings.living == ["b", "c"]
    again = Standings(four, "max", standings.halving)
    again.load(standings.state())
    assert again.living == ["b", "c"]
    assert again.rungs == 2


@pytest.mark.parametrize(
    "options",
    [
        {"at": []},
        {"at": [3, 2]},
        {"at": [0]},
        {"at": 5},
        {"at": [1.5]},
        {"at": ["3"]},
        {"at": [1], "eta": 2.5},
        {"at": [1], "keep": "2"},
        {"at": [1], "eta": 1},
        {"at": [1], "keep": 0},
        {"at": [1], "unit": "day"},
    ],
)
def test_halving_checks_its_fields(options):
    with pytest.raises(ConfigError, match="Halving"):
        Halving(**options)


def test_patience_counts_validations_without_a_gain():
    two = [Member(LoRA(), name="a", patience=2, min_delta=0.1), Member(LoRA(), name="b")]
    standings = Standings(two, "min", None)
    for step, (a, b) in enumerate([(1.0, 1.0), (0.95, 2.0), (0.85, 3.0), (0.84, 4.0), (0.83, 5.0)]):
        standings.judge({"a": a, "b": b}, step, 0)
    assert standings.of["a"].status == "stopped"
    assert (standings.of["a"].best, standings.of["a"].best_step) == (0.83, 4)
    assert standings.improved == ["a"]
    assert standings.ended == ["a"]
    assert standings.living == ["b"]
    assert standings.ranked() == ["a", "b"]

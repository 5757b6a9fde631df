import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_peft import (
    FullFineTuning,
    LoRA,
    PEFTModule,
    PrefixTuning,
    QLoRA,
    SpectrumMonitor,
    analyze_weights,
    inject,
    spectrum,
)
from lightning_peft.adapter_tools.spectra import change_spectrum
from lightning_peft.errors import ConfigError
from lightning_peft.testing.toys import tiny_llama

IDS = torch.randint(3, 60, (12, 8), generator=torch.Generator().manual_seed(5))


def fitted(make_trainer, tmp_path, method, *callbacks, steps=5, dropout=0.0):
    torch.manual_seed(0)
    module = PEFTModule(tiny_llama(), method, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    logger = CSVLogger(tmp_path, name="log")
    options = {"max_steps": steps, "logger": logger, "log_every_n_steps": 1, "enable_checkpointing": False}
    trainer = make_trainer(tmp_path, callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(IDS, 2))
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        return module, trainer, list(csv.DictReader(file))


def test_the_spectrum_of_a_run_is_logged_from_start_to_end(make_trainer, tmp_path):
    module, trainer, rows = fitted(make_trainer, tmp_path, LoRA(rank=3), SpectrumMonitor(every_n_steps=2))
    logged = [row for row in rows if row.get("spectrum/norm")]
    assert [int(row["step"]) for row in logged] == [0, 2, 4, 5]
    assert float(logged[0]["spectrum/norm"]) == 0
    assert float(logged[0]["spectrum/effective_rank"]) == 0
    found = spectrum((module.model, "default"))
    for label, one in found.items():
        assert float(logged[-1][f"spectrum/{label}/effective_rank"]) == pytest.approx(one.effective_rank, rel=1e-6)
        assert float(logged[-1][f"spectrum/{label}/norm"]) == pytest.approx(one.norm, rel=1e-6)
    mean = sum(one.stable_rank for one in found.values()) / len(found)
    assert float(trainer.callback_metrics["spectrum/stable_rank"]) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("method", [LoRA(rank=3), QLoRA(rank=3, compute_dtype="float32")], ids=lambda one: one.name)
def test_the_weights_of_the_base_are_compared_where_asked_for(method, make_trainer, tmp_path):
    monitor = SpectrumMonitor(every_n_steps=50, weights=True, per_weight=False, top=4, threshold=0.95)
    module, trainer, _ = fitted(make_trainer, tmp_path, method, monitor)
    found = analyze_weights(module.model, top=4, threshold=0.95).values()
    metrics = trainer.callback_metrics
    assert float(metrics["spectrum/intruders"]) == pytest.approx(sum(one.intruders for one in found) / len(found))
    assert float(metrics["spectrum/relative_norm"]) == pytest.approx(
        sum(one.relative_norm for one in found) / len(found), rel=1e-5
    )
    assert not [name for name in metrics if name.count("/") > 1]


def test_full_fine_tuning_has_a_spectrum_too(make_trainer, tmp_path):
    _, trainer, _ = fitted(make_trainer, tmp_path, FullFineTuning(), SpectrumMonitor(every_n_steps=50), steps=1)
    assert float(trainer.callback_metrics["spectrum/norm"]) > 0
    assert "spectrum/model.layers.0.self_attn.q_proj/effective_rank" in trainer.callback_metrics


def test_a_run_is_what_it_is_without(make_trainer, tmp_path):
    method = LoRA(rank=3, dropout=0.3)
    plain, _, _ = fitted(make_trainer, tmp_path / "a", method)
    watched, _, _ = fitted(make_trainer, tmp_path / "b", method, SpectrumMonitor(every_n_steps=1, weights=True))
    torch.testing.assert_close(watched.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_an_adapter_that_changes_no_weights_is_refused(make_trainer, tmp_path):
    with pytest.raises(ConfigError, match="looks at changes of weights"):
        fitted(make_trainer, tmp_path, PrefixTuning(num_virtual_tokens=2), SpectrumMonitor())


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"top": 0}, {"threshold": 0.0}])
def test_wrong_numbers_are_refused(options):
    with pytest.raises(ConfigError, match="SpectrumMonitor needs"):
        SpectrumMonitor(**options)


def test_a_head_beside_low_rank_updates_leaves_them_read_from_their_factors(monkeypatch):
    model = tiny_llama()
    inject(model, LoRA(rank=3), ["query"], modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    whole = change_spectrum(model)
    monkeypatch.setattr("lightning_peft.callbacks.spectrum_monitor.change_spectrum", None)
    found = SpectrumMonitor().figures(model)
    labels = [label for label in whole if label != "lm_head"]
    for label in labels:
        assert found[f"spectrum/{label}/norm"] == pytest.approx(whole[label].norm, rel=1e-5)
    assert found["spectrum/norm"] == pytest.approx(sum(whole[label].norm for label in labels) / len(labels), rel=1e-5)
    assert not [name for name in found if "lm_head" in name]


def test_a_run_that_has_diverged_is_told_so():
    model = tiny_llama()
    inject(model, LoRA(rank=3), ["query"])
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(ConfigError, match="has diverged"):
        SpectrumMonitor().figures(model)

import time

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTModule, ResourceMonitor
from lightning_peft.callbacks.resources import _size, peak_memory_mb

ROWS = torch.randint(3, 61, (8, 6), generator=torch.Generator().manual_seed(5))


class Watch(Callback):
    """Takes its time in each step and validation, and keeps what was logged before each step."""

    def __init__(self, step=0.0, validation=0.0):
        self.step, self.validation, self.seen = step, validation, []

    def on_train_batch_start(self, trainer, *args):
        time.sleep(self.step)
        self.seen.append(dict(trainer.callback_metrics))

    def on_validation_start(self, *args):
        time.sleep(self.validation)


def language_module(llama):
    return PEFTModule(llama, LoRA(rank=2), ["query"])


def test_tokens_a_second_and_memory_are_logged_and_agree_with_the_clock(llama, make_trainer, tmp_path):
    watch = Watch(step=0.02)
    started = time.perf_counter()
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[watch], log_every_n_steps=8, enable_checkpointing=False)
    trainer.fit(language_module(llama), DataLoader(ROWS, batch_size=2))
    wall = time.perf_counter() - started
    assert "tokens_per_second" not in watch.seen[-1]  # logged as often as the Trainer logs: with step 8, the last
    logged = trainer.callback_metrics
    tokens = 8 * 2 * 6
    assert tokens / wall < logged["tokens_per_second"] < tokens / (8 * 0.02)
    assert logged["peak_memory_mb"] == pytest.approx(peak_memory_mb(torch.device("cpu")), rel=0.5)
    assert logged["peak_memory_mb"] > 50


def test_validation_does_not_count(llama, make_trainer, tmp_path):
    watch = Watch(validation=0.5)
    options = {"callbacks": [watch], "log_every_n_steps": 4, "val_check_interval": 2, "enable_checkpointing": False}
    trainer = make_trainer(tmp_path, max_epochs=1, **options)
    trainer.fit(language_module(llama), DataLoader(ROWS, batch_size=2), DataLoader(ROWS, batch_size=4))
    assert trainer.callback_metrics["tokens_per_second"] > ROWS.numel() / 0.5


def test_rows_are_counted_where_there_are_no_tokens(make_trainer, tmp_path):
    data = list(zip(torch.randn(8, 6), torch.arange(8) % 3, strict=True))
    module = PEFTModule(nn.Sequential(nn.Linear(6, 3)), LoRA(rank=1), ["0"], loss=nn.CrossEntropyLoss())
    trainer = make_trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    trainer.fit(module, DataLoader(data, batch_size=4))
    assert trainer.callback_metrics["rows_per_second"] > 0
    assert "tokens_per_second" not in trainer.callback_metrics


def test_a_module_brings_one_monitor_and_no_second(llama, make_trainer, tmp_path):
    class Mine(ResourceMonitor):
        pass

    module, mine = language_module(llama), Mine()
    for given, expected in (([], ResourceMonitor), ([mine], Mine)):
        trainer = make_trainer(tmp_path, max_steps=1, callbacks=[Watch(), *given], enable_checkpointing=False)
        trainer.fit(module, DataLoader(ROWS, batch_size=2))
        trainer.validate(module, DataLoader(ROWS, batch_size=2), verbose=False)
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, ResourceMonitor)]
        assert [type(monitor) for monitor in monitors] == [expected]
    assert monitors == [mine]


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.ones(2)}, ("tokens", 10)),
        (torch.ones(3, 4, dtype=torch.long), ("tokens", 12)),
        (torch.ones(3, 4), ("rows", 3)),
        ((torch.ones(3, 4), torch.ones(3)), ("rows", 3)),
        ({"pixels": torch.ones(7, 1)}, ("rows", 7)),
        ("text", ("rows", 1)),
    ],
)
def test_what_is_counted_in_a_batch(batch, size):
    assert _size(batch) == size

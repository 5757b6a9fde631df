"""Tokens count the same wherever they are: in the loss, in what is measured, and in the balance of experts."""

import re

import pytest
import torch
from lightning.pytorch import Callback

from lightning_peft import LoRA, LoRAMixture, MoEUpcycling, PEFTFSDPStrategy, PEFTModule, RouterMonitor
from lightning_peft.errors import ConfigError
from lightning_peft.testing import tiny_llama, token_batch

ROWS, STEPS = 8, 3


def ragged(empty=()):
    """Return rows in which very different numbers of tokens are predicted, none in those of ``empty``."""
    made = []
    for number, row in enumerate(token_batch(seed=3, rows=ROWS * STEPS)["input_ids"]):
        labels = row.clone()
        # Even rows, which go to the first process, have few tokens.
        labels[: (len(row) - 2 if number % 2 == 0 else number % 5)] = -100
        labels[:] = -100 if number % ROWS in empty else labels
        made.append({"input_ids": row, "labels": labels})
    return made


def module(weighting="tokens", method=None, lr=0.5):
    return PEFTModule(
        tiny_llama(),
        method or LoRA(rank=4, init="gaussian"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        loss_weighting=weighting,
    )


def close(one, other, rtol=1e-5, atol=1e-6):
    assert one.state.keys() == other.state.keys()
    for key, value in other.state.items():
        torch.testing.assert_close(one.state[key], value, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


LAYOUTS = {
    "one process, two batches": ("single", 1, 2),
    "one process, four batches": ("single", 1, 4),
    "ddp": ("ddp", 2, 1),
    "ddp, two batches": ("ddp", 2, 2),
    "fsdp": ("fsdp", 2, 1),
    "fsdp, four batches": ("fsdp", 2, 4),
}


@pytest.mark.parametrize("empty", [(), (0, 2), (1, 3, 5, 7)], ids=["all", "two rows without", "a process without"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_one_process_with_all_tokens_in_one_batch(run, layout, empty):
    kind, devices, every = LAYOUTS[layout]
    fields = {"steps": STEPS, "data": ragged(empty), "gradient_clip_val": 0.5}
    whole = run("single", module=module("batches"), rows=ROWS, **fields)
    parts = run(kind, module=module(), devices=devices, rows=ROWS // every, accumulate_grad_batches=every, **fields)
    close(parts, whole)
    if not empty:
        by_batches = run(
            kind, module=module("batches"), devices=devices, rows=ROWS // every, accumulate_grad_batches=every, **fields
        )
        with pytest.raises(AssertionError, match="lora_"):
            close(by_batches, whole, rtol=1e-3)


def test_a_run_resumes_in_the_midst_of_a_window(run, tmp_path):
    fields = {"steps": STEPS, "data": ragged(), "rows": 2, "accumulate_grad_batches": 4}
    alone = run("single", module=module(), **fields)
    saving = Midst(tmp_path / "midst.ckpt")
    run("single", module=module(), callbacks=[saving], **fields)
    resumed = run("single", module=module(), resume=str(tmp_path / "midst.ckpt"), **fields)
    assert torch.load(tmp_path / "midst.ckpt")["lightning_peft_window_tokens"] > 0
    close(resumed, alone, rtol=0, atol=0)


class Midst(Callback):
    """Saves after two batches of the second window."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 5:
            trainer.save_checkpoint(self.path)


def test_what_has_no_tokens_is_refused(run):
    with pytest.raises(
        ConfigError, match="loss_weighting must be 'batches', or 'tokens' with the model's own loss, got 'rows'"
    ):
        module("rows")
    with pytest.raises(ConfigError, match="got 'tokens' and loss=<function"):
        PEFTModule(tiny_llama(), LoRA(rank=4), loss=torch.nn.functional.cross_entropy, loss_weighting="tokens")
    with pytest.raises(ConfigError, match=re.escape("the batch has no labels (batch, seq)")):
        module().weigh(torch.tensor(1.0), None)


# -- routers -----------------------------------------------------------------------------------------------------------

MIXTURES = {
    "upcycling": MoEUpcycling(experts=4, top_k=2, balance_coef=0.5, z_coef=0.1),
    "low rank": LoRAMixture(experts=4, rank=2, top_k=2, balance_coef=0.5, z_coef=0.1),
    "soft": LoRAMixture(experts=4, rank=2, routing="soft", balance_coef=0.5),
}


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "checkpointed"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_balance_of_two_processes_is_that_of_one(run, name, kind):
    method = MIXTURES[name]
    strategy = PEFTFSDPStrategy(start_method="fork", activation_checkpointing=True) if kind == "checkpointed" else kind
    one = run("single", module=module("batches", method, 0.05), steps=STEPS)
    two = run(strategy, module=module("batches", method, 0.05), steps=STEPS)
    close(two, one, rtol=1e-4, atol=1e-6)


def test_the_balance_is_that_of_one_process_with_tokens_weighed_too(run):
    fields = {"steps": STEPS, "data": ragged()}
    one = run("single", module=module("batches", MIXTURES["upcycling"], 0.05), **fields)
    two = run("ddp", module=module("tokens", MIXTURES["upcycling"], 0.05), **fields)
    close(two, one, rtol=1e-4, atol=1e-6)


class Figures(Callback):
    """Writes what the monitor logged."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(
                {key: float(v) for key, v in trainer.callback_metrics.items() if key.startswith("moe/")}, self.path
            )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_monitor_counts_the_tokens_of_all_processes(run, tmp_path, kind):
    found = []
    for which in ("single", kind):
        watch = [RouterMonitor(every_n_steps=1), Figures(tmp_path / which)]
        run(which, module=module("batches", MIXTURES["upcycling"], 0.05), steps=1, callbacks=watch)
        found.append(torch.load(tmp_path / which))
    assert len(found[0]) > 8
    assert found[1] == pytest.approx(found[0], rel=1e-5)

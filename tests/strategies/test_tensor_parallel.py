"""Layers that are split over a group of processes, with adapters split as they are, train what one process trains."""

import pytest
import torch

from lightning_peft import LoRA, PEFTFSDPStrategy
from lightning_peft.testing import tiny_llama


def relative(one, other):
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


SETTINGS = {
    "plain": {},
    "clipped": {"gradient_clip_val": 1e-2},
    "accumulated": {"accumulate_grad_batches": 2, "batches": 12},
    "bf16": {"precision": "bf16-mixed"},
    "dropout": {"method": LoRA(rank=4, dropout=0.3, init="gaussian")},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_that_share_a_model_train_what_one_trains(run, setting):
    fields = {"method": LoRA(rank=4, init="gaussian"), "lr": 1e-3, "steps": 6, **SETTINGS[setting]}
    one, two = run("single", **fields), run("tensor", **fields)
    print(setting, relative(two.losses, one.losses), one.losses)
    assert relative(two.losses, one.losses) <= (5e-5 if setting == "bf16" else 1e-6)
    assert len(set(one.losses)) >= 6
    assert two.state.keys() == one.state.keys()
    for key, value in one.state.items():
        print(key, (two.state[key] - value).abs().max())

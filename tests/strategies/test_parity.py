"""Two processes train what one trains: DDP and FSDP2 agree bit for bit, and with one process within rounding."""

import pytest
import torch
from torch import nn

from lightning_peft import BitFit, Bottleneck, LoRA, MoEUpcycling, PrefixTuning
from lightning_peft.testing import tiny_gpt2


def gpt2():
    """A model with biases, and without dropout, whose masks are those of a process."""
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


METHODS = {
    "lora": (LoRA(rank=4, init="gaussian"), None),
    "bottleneck": (Bottleneck(), None),
    "prefix": (PrefixTuning(num_virtual_tokens=4), None),
    "bitfit": (BitFit(), gpt2),
    "moe": (MoEUpcycling(experts=4, top_k=2, balance_coef=0.0), None),
}


def relative(one, other):
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_trains(run, name, precision):
    method, model = METHODS[name]
    fields = {"method": method, "precision": precision, "lr": 1e-3} | ({"model": model} if model else {})
    one, ddp, fsdp = (run(strategy, **fields) for strategy in ("single", "ddp", "fsdp"))
    assert ddp.losses == fsdp.losses
    assert relative(ddp.losses, one.losses) <= (1e-6 if precision == "32-true" else 5e-5)
    assert len(set(one.losses)) == 4
    for key, value in ddp.state.items():
        assert torch.equal(fsdp.state[key], value), key

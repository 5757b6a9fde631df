"""Layers that are split over a group of processes, with adapters split as they are, train what one process trains."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from lightning_peft import (
    BitFit,
    Bottleneck,
    DoRA,
    FullFineTuning,
    LoRA,
    LoRAPlus,
    MergeAdapters,
    MoEUpcycling,
    NormTuning,
    PEFTFSDPStrategy,
    PEFTModule,
    PiSSA,
    QLoRA,
    load_adapter,
)
from lightning_peft.errors import ConfigError
from lightning_peft.strategies.tensor_parallel import plan_of, split_regions
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

LORA = LoRA(rank=4, init="gaussian")


def tensor(**fields):
    return PEFTFSDPStrategy(start_method="fork", tensor_parallel=2, **fields)


def relative(one, other):
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def close(one, other, rtol=1e-4, atol=1e-6):
    assert one.state.keys() == other.state.keys()
    assert one.state
    for key, value in other.state.items():
        torch.testing.assert_close(one.state[key], value, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def biased():
    return with_biases(tiny_llama(attention_bias=True, mlp_bias=True))


def with_biases(model):
    numbers = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1, generator=numbers)
    return model


SETTINGS = {
    "plain": {},
    "clipped": {"gradient_clip_val": 1e-2},
    "accumulated": {"accumulate_grad_batches": 2, "batches": 12, "steps": 6},
    "dropout": {"method": LoRA(rank=4, dropout=0.3, init="gaussian")},
    "plus": {"method": LoRAPlus(rank=4, init="gaussian", lr_ratio=4.0)},
    "biases": {"model": biased},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_that_share_a_model_train_what_one_trains(run, setting):
    fields = {"method": LORA, "lr": 1e-3, "steps": 6, "optimizer": "sgd", **SETTINGS[setting]}
    fields.pop("optimizer")
    one, two = run("single", **fields), run("tensor", **fields)
    print(setting, relative(two.losses, one.losses))
    assert relative(two.losses, one.losses) <= (5e-5 if setting == "bf16" else 1e-6)
    assert len(set(one.losses)) >= 6


class Gradients(Callback):
    """Writes the gradients of the first step, whole, and how big the parts of this process are."""

    def __init__(self, path):
        self.path = path

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step:
            return
        found, parts = {}, {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                parts[name] = list(getattr(gradient, "_local_tensor", gradient).shape)
                found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()
        weight = module.model.get_submodule("model.layers.0.self_attn.k_proj").weight
        parts["k_proj"] = list(weight.to_local().shape) if isinstance(weight, DTensor) else list(weight.shape)
        if trainer.is_global_zero:
            torch.save((found, parts), self.path)


LAYOUTS = {
    "2 together": (2, {}),
    "2 x 2": (4, {}),
    "2 x 2, one unit": (4, {"units": []}),
    "2 x 2, each layer": (4, {"units": ["re:.*_proj"]}),
    "2 x 2, kept": (4, {"reshard_after_forward": False}),
    "2 x 2, checkpointed": (4, {"activation_checkpointing": True}),
    "2 replicas x 2": (4, {"replicate": 2}),
}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(run, tmp_path, layout):
    devices, options = LAYOUTS[layout]
    fields = {"steps": 2, "method": LORA, "lr": 1e-3, "gradient_clip_val": 0.05}
    one = run("single", callbacks=[Gradients(tmp_path / "one.pt")], **fields)
    strategy = tensor(**options)
    two = run(strategy, devices=devices, callbacks=[Gradients(tmp_path / "two.pt")], **fields)
    assert relative(two.losses, one.losses) <= 1e-6
    (expected, whole), (found, parts) = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert found.keys() == expected.keys()
    assert len(found) == 28
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    data = 2 if devices == 4 and "replicas" not in layout else 1
    assert parts["k_proj"] == [whole["k_proj"][0] // 2 // data, 64]
    for name, shape in parts.items():
        if "lora" in name:
            rank, width = whole[name]
            split = ("lora_B" in name) != ("o_proj" in name or "down_proj" in name)
            assert shape == [rank // data, width // 2 if split else width], name

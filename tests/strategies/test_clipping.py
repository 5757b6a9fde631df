"""Norms of gradients: torch's to rounding, and the same bits however gradients are spread over processes."""

import json
import math

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_peft import LoRA, PEFTFSDPStrategy, PEFTModule, clip_gradients_by_norm, gradient_norm
from lightning_peft.errors import ConfigError
from lightning_peft.testing import tiny_llama

POWERS = [1, 2, 3, math.inf]


def with_gradients(*gradients):
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return [*parameters, nn.Parameter(torch.ones(3))]  # one has none


@pytest.mark.parametrize("power", POWERS)
def test_it_is_torchs_norm_and_clips_as_torch_does(power):
    torch.manual_seed(0)
    values = torch.randn(40, 30), torch.randn(7).to(torch.bfloat16), torch.zeros(0, 4)
    ours, theirs = with_gradients(*values), with_gradients(*values[:-1])  # torch fails at the largest of none
    expected = torch.cat([value.flatten().double() for value in values]).norm(power)
    assert gradient_norm(ours, power) == expected.float()
    assert clip_gradients_by_norm(ours, 0.5, power) == expected.float()
    torch.nn.utils.clip_grad_norm_(theirs, 0.5, power)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert ours[-1].grad is None
    before = [one.grad.clone() for one in ours[:-1]]
    clip_gradients_by_norm(ours, 100.0, power)  # small gradients are left as they are
    assert all(torch.equal(one.grad, kept) for one, kept in zip(ours, before, strict=False))


def test_a_square_beyond_float32_counts_and_what_is_no_number_stays_none():
    assert gradient_norm(with_gradients(torch.full((4,), 1e30))) == pytest.approx(2e30)
    assert gradient_norm(with_gradients(torch.tensor([1.0, math.nan]))).isnan()
    assert gradient_norm([]) == 0


@pytest.mark.parametrize("power", [0, -1, math.nan])
def test_a_power_that_makes_no_norm_is_refused(power):
    with pytest.raises(ConfigError, match=f"norm_type must be positive or inf, got {power}"):
        gradient_norm([], power)


class Clips(PEFTModule):
    """Clips by hand, by one norm after another, and writes what they were."""

    path = None

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norms = [float(clip_gradients_by_norm(self.parameters(), 0.01, power)) for power in POWERS]
        if self.trainer.is_global_zero:
            with open(self.path, "a") as file:
                file.write(f"{norms}\n")


@pytest.mark.parametrize("replicate", [1, 2])
def test_norms_are_the_same_bits_in_every_layout(run, tmp_path, replicate):
    devices, found = 2 * replicate, {}
    for name in ("ddp", PEFTFSDPStrategy(start_method="fork", replicate=replicate)):
        module = Clips(tiny_llama(), LoRA(rank=3, init="gaussian"))
        module.path = tmp_path / str(len(found))
        done = run(name, module=module, devices=devices, steps=2)
        found[len(found)] = module.path.read_text(), done.losses
    # Of more than two processes DDP and FSDP2 sum gradients in another order themselves.
    if replicate == 1:
        assert found[0] == found[1]
    else:
        ours, theirs = (torch.tensor([json.loads(line) for line in text.splitlines()]) for text, _ in found.values())
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert len(found[0][0].splitlines()) == 2


class Plugin(Callback):
    """Asks the plugin of the Trainer to clip, as modules with manual optimization do."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        trainer.precision_plugin.clip_gradients(optimizer, 1e-4)
        assert float(gradient_norm(module.parameters())) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_plugin_clips_by_it(run, kind):
    run(kind, steps=1, callbacks=[Plugin()])

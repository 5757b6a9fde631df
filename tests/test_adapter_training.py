"""What the host does for adapters in training: losses of their own, steps, learning rates, values from data, shapes."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTModule, inject
from lightning_peft.calibration import initialize_from_data
from lightning_peft.interfaces import Adapter, Method
from lightning_peft.optimization import parameter_groups, scale_learning_rates


class Shift(Adapter):
    """Adds a vector, and asks for it to stay small."""

    def __init__(self, module, penalty):
        super().__init__()
        self.penalty = penalty
        self.vector = nn.Parameter(torch.empty(module.out_features))
        self.register_buffer("steps", torch.empty(2))

    def reset_parameters(self, base_layer):
        nn.init.ones_(self.vector)
        nn.init.zeros_(self.steps)

    def forward(self, base, x):
        return base(x) + self.vector

    def learning_rate_ratios(self):
        return {"vector": 4.0}

    def auxiliary_loss(self):
        return self.penalty * self.vector.sum()

    def fit_to(self, shapes):
        if "vector" in shapes:
            self.vector = nn.Parameter(torch.zeros(tuple(shapes["vector"])))


@dataclass(frozen=True, kw_only=True)
class Shifting(Method):
    """A method that uses everything the host offers in training."""

    name: ClassVar[str] = "shifting"
    identity_at_init: ClassVar[bool] = False
    auxiliary_losses: ClassVar[bool] = True
    data_driven: ClassVar[bool] = True

    penalty: float = 0.5
    """Weight of the penalty."""

    def supports(self, module):
        return isinstance(module, nn.Linear)

    def adapter(self, module, target):
        return Shift(module, self.penalty)

    def initialize(self, model, adapters, batches, loss):
        assert not model.training
        x, _ = batch = next(iter(batches))
        loss(batch).backward()
        torch.rand(3)
        for adapter in adapters.values():
            adapter.vector.data.fill_(float(x.sum()))

    def after_optimizer_step(self, adapters, optimizer, step, total_steps):
        for adapter in adapters.values():
            assert adapter.vector.grad is not None
            assert adapter.vector in optimizer.state or isinstance(optimizer, torch.optim.SGD)
            adapter.steps.copy_(torch.tensor([step + 1.0, total_steps]))


def net():
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(4, 3))


def rows(n=4):
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(4, generator=generator), torch.zeros(3)) for _ in range(n)]


def no_gradient(outputs, target):
    return (outputs * 0).sum()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_auxiliary_loss_reaches_the_parameters_in_the_scale_of_the_loss(accumulate, make_trainer, tmp_path):
    module = PEFTModule(net(), Shifting(), loss=no_gradient, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    loader = DataLoader(rows(), batch_size=2)
    make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate).fit(module, loader)
    (adapter,) = [m for m in module.modules() if isinstance(m, Shift)]
    steps = 2 // accumulate
    start = float(next(iter(loader))[0].sum())
    # Each step of SGD takes 0.1 * 4 (its ratio) * 0.5 (the penalty), however many batches are accumulated.
    assert torch.allclose(adapter.vector, torch.full((3,), start - steps * 0.2))
    assert adapter.steps.tolist() == [steps, steps]


def test_values_from_data_leave_random_states_and_modes_alone():
    model = net().train()
    inject(model, Shifting())
    before = torch.get_rng_state()
    initialize_from_data(model, [(torch.ones(1, 4), None)], lambda batch: model(batch[0]).sum())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    (adapter,) = [m for m in model.modules() if isinstance(m, Shift)]
    assert adapter.vector.tolist() == [4.0] * 3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_fit_with_values_from_data_sees_the_same_batches_as_without(make_trainer, tmp_path):
    seen = []

    def loss(outputs, target):
        return outputs.sum()

    class Watched(PEFTModule):
        def training_step(self, batch, batch_idx):
            seen[-1].append(batch[0])
            return super().training_step(batch, batch_idx)

    for method in (LoRA(rank=1), Shifting()):
        seen.append([])
        torch.manual_seed(3)
        module = Watched(net(), method, ["0"], loss=loss)
        torch.manual_seed(4)
        make_trainer(tmp_path, max_epochs=1).fit(module, DataLoader(rows(), batch_size=1, shuffle=True))
    # LoRA draws its own initial values before; the order depends on nothing but the seed in both.
    assert len(seen[0]) == len(seen[1]) == 4
    assert {tuple(x.flatten().tolist()) for x in seen[0]} == {tuple(x.flatten().tolist()) for x in seen[1]}


def test_learning_rates_follow_ratios_through_a_scheduler():
    model = net()
    inject(model, Shifting())
    groups = parameter_groups(model)
    assert [group.get("lr_ratio", 1.0) for group in groups] == [4.0]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    scale_learning_rates(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert optimizer.param_groups[0]["lr"] == 2.0
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_shapes_decided_by_training_survive_a_checkpoint(make_trainer, tmp_path):
    def fit(module, ckpt=None, epochs=1):
        trainer = make_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(module, DataLoader(rows(), batch_size=2), ckpt_path=ckpt)
        return trainer

    def make():
        return PEFTModule(net(), Shifting(), loss=lambda outputs, target: outputs.square().sum())

    first = make()
    trainer = fit(first)
    (adapter,) = [m for m in first.modules() if isinstance(m, Shift)]
    adapter.vector = nn.Parameter(torch.full((1,), 7.0))  # training made it narrower; it broadcasts
    trainer.strategy.connect(first)
    trainer.optimizers = [torch.optim.AdamW(parameter_groups(first), lr=1e-3)]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = make()
    second.configure_model()
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    second.on_load_checkpoint(checkpoint)
    second.load_state_dict(checkpoint["state_dict"])
    (again,) = [m for m in second.modules() if isinstance(m, Shift)]
    assert again.vector.tolist() == [7.0]

"""A state of an optimizer goes to the parameter it belongs to, by name, or the run is refused."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PEFTMixin, inject, set_active_adapters
from lightning_peft.errors import CheckpointMismatchError


class Own(PEFTMixin, LightningModule):
    """Two adapters of the same shapes in one place, injected and grouped as asked."""

    def __init__(self, order=("a", "b"), groups=None, scheduler=None):
        super().__init__()
        self.order, self.groups, self.scheduler, self.model = order, groups or (lambda names: [names]), scheduler, None

    def configure_model(self):
        if self.model is not None:
            return
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        for name in self.order:
            torch.manual_seed(ord(name))
            inject(self.model, LoRA(rank=2), "0", name=name)
        set_active_adapters(self.model, ["a", "b"])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [trained[name] for name in names],
                    "lr": 1e-2 * (1 + all(name.endswith("lora_A") for name in names)),
                }
                for names in self.groups(list(trained))
            ]
        )
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])


def rows():
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(8, 6, generator=generator), torch.arange(8) % 3), batch_size=2)


def by_kind(names, ends=("lora_A", "lora_B")):
    return [[name for name in names if name.endswith(end)] for end in ends]


def states(module, trainer):
    (optimizer,) = trainer.optimizers
    return {name: optimizer.state[p] for name, p in module.named_parameters() if p in optimizer.state}


@pytest.fixture
def resume(make_trainer, tmp_path):
    """Train ``before`` for two steps and go on with ``after``; return that module and its trainer."""

    def run(before, after):
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.fit(before, rows())
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        trainer = make_trainer(tmp_path, max_steps=4)
        trainer.fit(after, rows(), ckpt_path=tmp_path / "x.ckpt")
        return after, trainer

    return run


CHANGES = {
    "injected in another order": ({}, {"order": ("b", "a")}),
    "listed in another order": ({}, {"groups": lambda names: [names[::-1]]}),
    "in groups in another order": (
        {"groups": by_kind},
        {"groups": lambda names: by_kind(names, ("lora_B", "lora_A")), "order": ("b", "a")},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_states_are_bound_by_name(change, resume):
    before, after = CHANGES[change]
    module, trainer = resume(Own(**before), Own(**after))
    same, same_trainer = resume(Own(**before), Own(**before))
    torch.testing.assert_close(states(module, trainer), states(same, same_trainer), rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict(), same.state_dict(), rtol=0, atol=0)
    names = list(states(module, trainer))
    assert len(names) == 4  # and the states of the two adapters differ, so that a swap would be seen
    assert not torch.equal(*(states(module, trainer)[n]["exp_avg"] for n in sorted(names) if n.endswith("lora_B")))


def test_other_groups_of_the_same_parameters_are_refused_with_both(resume):
    def one_moved(names):
        first, second = by_kind(names)
        return [first[1:], [*second, first[0]]]

    with pytest.raises(
        CheckpointMismatchError,
        match=r"1 differ, first .*a.lora_A.*checkpoint has 2 groups: \[.*this run has 2 groups: \[",
    ):
        resume(Own(groups=by_kind), Own(groups=one_moved))


def test_groups_in_another_order_under_a_scheduler_are_refused(resume):
    scheduler = partial(StepLR, step_size=1)
    after = Own(groups=lambda names: by_kind(names, ("lora_B", "lora_A")), scheduler=scheduler)
    with pytest.raises(CheckpointMismatchError, match="come in another order than in the checkpoint"):
        resume(Own(groups=by_kind, scheduler=scheduler), after)

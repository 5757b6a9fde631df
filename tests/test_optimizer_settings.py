"""A run resumes with the settings of its optimizer and scheduler, or is refused; they are never dropped in silence."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PEFTMixin, PEFTModule, inject
from lightning_peft.errors import CheckpointMismatchError
from lightning_peft.optimizer_settings import OPTIMIZERS, optimizer_settings

ADAMW = partial(torch.optim.AdamW, lr=1e-3)
STEPPED = partial(StepLR, step_size=2, gamma=0.5)


class LateRestore(SingleDeviceStrategy):
    """Restores the module after the optimizers are made, as strategies that shard do."""

    restore_checkpoint_after_setup = True


class Own(PEFTMixin, LightningModule):
    """A module that makes its optimizer itself."""

    def __init__(self, optimizer=ADAMW, lr_scheduler=None):
        super().__init__()
        self.optimizer, self.model = optimizer, None

    def configure_model(self):
        if self.model is None:
            self.model = net()
            inject(self.model, LoRA(rank=2), "0")

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))


def ours(optimizer=ADAMW, lr_scheduler=None):
    loss = nn.functional.cross_entropy
    return PEFTModule(net(), LoRA(rank=2), "0", optimizer=optimizer, lr_scheduler=lr_scheduler, loss=loss)


def rows():
    return DataLoader(TensorDataset(torch.randn(4, 6), torch.arange(4) % 3), batch_size=2)  # 2 steps an epoch


@pytest.fixture
def resumed(make_trainer, tmp_path):
    """Fit a module, then resume another one from its checkpoint; return the optimizer the second one trains with."""

    def run(before, after, edit=None, **options):
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.fit(before, rows())
        file = tmp_path / "last.ckpt"
        trainer.save_checkpoint(file)
        if edit:
            content = torch.load(file, weights_only=True)
            edit(content)
            torch.save(content, file)
        trainer = make_trainer(tmp_path, max_steps=4, **options)
        trainer.fit(after, rows(), ckpt_path=file)
        assert trainer.global_step == 4
        return trainer.optimizers[0]

    return run


@pytest.mark.parametrize("make", [ours, Own])
@pytest.mark.parametrize("late", [False, True])
def test_another_learning_rate_is_refused(make, late, resumed):
    options = {"strategy": LateRestore("cpu")} if late else {}
    with pytest.raises(
        CheckpointMismatchError, match=r"AdamW, parameter group 0: lr was 0\.001 .* is 0\.5 now.*adapter="
    ):
        resumed(make(), make(partial(torch.optim.AdamW, lr=0.5)), **options)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "message"),
    [
        (partial(ADAMW, weight_decay=0.5), STEPPED, r"AdamW, parameter group 0: weight_decay was 0\.01 .* 0\.5"),
        (partial(ADAMW, betas=(0.5, 0.9)), STEPPED, r"betas was \[0\.9, 0\.999\] .* \[0\.5, 0\.9\]"),
        (partial(torch.optim.SGD, lr=1e-3), STEPPED, r"class of the optimizers was \['AdamW'\] .* \['SGD'\]"),
        (ADAMW, None, r"class of the schedulers was \['StepLR'\] .* is \[\]"),
        (ADAMW, partial(LambdaLR, lr_lambda=lambda step: 1.0), r"\['StepLR'\] .* \['LambdaLR'\]"),
        (ADAMW, partial(STEPPED, gamma=0.25), r"StepLR: gamma was 0\.5 .* is 0\.25"),
    ],
)
def test_other_settings_are_refused(optimizer, scheduler, message, resumed):
    with pytest.raises(CheckpointMismatchError, match=message):
        resumed(ours(ADAMW, STEPPED), ours(optimizer, scheduler))


def test_what_a_scheduler_writes_into_the_groups_is_compared_as_it_was_at_the_start(resumed):
    cycle = partial(OneCycleLR, total_steps=10)
    resumed(ours(ADAMW, partial(cycle, max_lr=0.1)), ours(ADAMW, partial(cycle, max_lr=0.1)))
    with pytest.raises(CheckpointMismatchError, match=r"max_lr was 0\.1 .* is 0\.2|lr was "):
        resumed(ours(ADAMW, partial(cycle, max_lr=0.1)), ours(ADAMW, partial(cycle, max_lr=0.2)))


@pytest.mark.parametrize("scheduler", [None, STEPPED, partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))])
@pytest.mark.parametrize("late", [False, True])
def test_the_same_settings_resume(scheduler, late, resumed):
    options = {"strategy": LateRestore("cpu")} if late else {}
    optimizer = resumed(ours(ADAMW, scheduler), ours(ADAMW, scheduler), **options)
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}  # it went on counting


def test_a_checkpoint_without_settings_resumes_as_before(resumed):
    optimizer = resumed(ours(), ours(partial(torch.optim.AdamW, lr=0.5)), edit=lambda content: content.pop(OPTIMIZERS))
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_setting_that_another_release_of_torch_lacks_is_not_compared(resumed):
    def without_fused(content):
        for group in content[OPTIMIZERS]["optimizers"][0]["groups"]:
            del group["fused"]

    resumed(ours(), ours(), edit=without_fused)


def test_a_resumed_run_saves_the_settings_it_began_with(make_trainer, tmp_path):
    file = tmp_path / "last.ckpt"
    for steps in (2, 4, 6):
        trainer = make_trainer(tmp_path, max_steps=steps)
        trainer.fit(ours(ADAMW, STEPPED), rows(), ckpt_path=file if file.exists() else None)
        trainer.save_checkpoint(file)
    content = torch.load(file, weights_only=True)
    assert content[OPTIMIZERS]["optimizers"][0]["groups"][0]["lr"] == 1e-3
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-3 / 8)


def test_testing_a_checkpoint_and_a_new_fit_compare_nothing(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(ours(), rows())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = ours(partial(torch.optim.AdamW, lr=0.5))
    make_trainer(tmp_path).test(other, rows(), ckpt_path=tmp_path / "last.ckpt")
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(other, rows())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_settings_are_plain_values():
    parameter = torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=torch.tensor(0.25), betas=(0.5, 0.75))
    settings = optimizer_settings([adam], [LambdaLR(adam, lambda step: 1.0)])
    group = settings["optimizers"][0]["groups"][0]
    assert (group["lr"], group["betas"]) == (0.25, [0.5, 0.75])
    assert "params" not in group
    assert settings["schedulers"][0]["settings"]["base_lrs"] == [0.25]

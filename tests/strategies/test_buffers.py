"""Buffers: what training may change is the same on all processes, and what it does not is not sent."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_peft import PEFTCLI, LoRA, PEFTDDPStrategy, PEFTMixin, VeRA, inject
from lightning_peft.strategies.buffers import moving_buffers
from lightning_peft.strategies.ddp import _SENDS_BUFFERS
from lightning_peft.testing import tiny_llama


class WithStatistics(PEFTMixin, LightningModule):
    """An adapted model with batch normalisation in its frozen base, and a head with one that is trained."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = tiny_llama().train()
            self.model.model.norm = nn.Sequential(self.model.model.norm, Over(64))
            inject(self.model, LoRA(rank=4, init="gaussian"))
            inject(self.model, VeRA(rank=4), name="vera")
            self.head = nn.Sequential(nn.BatchNorm1d(128), nn.Linear(128, 3))

    def training_step(self, batch, batch_idx):
        scores = self.head(self.model(input_ids=batch["input_ids"]).logits.mean(1))
        return nn.functional.cross_entropy(scores, batch["input_ids"][:, 0] % 3)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Over(nn.BatchNorm1d):
    """Batch normalisation of the last dimension."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Statistics(Callback):
    """Writes what each process holds of buffers as it begins a forward, and the bytes that are broadcast within it."""

    def __init__(self, folder):
        self.folder, self.seen, self.sent = folder, [], []

    def on_train_start(self, trainer, module):
        module.model.register_forward_pre_hook(lambda *_: self.seen.append(self.statistics(module)))
        original = dist.broadcast

        def counted(tensor, *args, **kwargs):
            self.sent.append(tensor.nbytes)
            return original(tensor, *args, **kwargs)

        dist.broadcast = counted

    @staticmethod
    def statistics(module):
        return {name: buffer.clone() for name, buffer in module.named_buffers() if "running_" in name}

    def on_train_end(self, trainer, module):
        torch.save((self.seen, self.statistics(module), self.sent), self.folder / str(trainer.global_rank))


def test_statistics_are_those_of_the_first_process_under_both_strategies(run, tmp_path):
    every, found, losses = 2, {}, {}
    for kind in ("ddp", "fsdp", "torch"):
        (tmp_path / kind).mkdir()
        chosen = PEFTDDPStrategy(start_method="fork", **{_SENDS_BUFFERS: True}) if kind == "torch" else kind
        done = run(
            chosen, module=WithStatistics(), callbacks=[Statistics(tmp_path / kind)], accumulate_grad_batches=every,
            steps=4 // every,
        )  # fmt: skip
        losses[kind] = done.losses
        found[kind] = [torch.load(tmp_path / kind / str(rank)) for rank in range(2)]
    assert losses["ddp"] == losses["fsdp"] == losses["torch"]  # what DDP does if it is asked to send all
    for kind in ("ddp", "fsdp"):
        (first, last, sent), (second, _, _) = found[kind]
        head, base = "head.0.running_mean", "model.model.norm.1.running_mean"
        assert len(first) == 4
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            if (number + 1) % every == 0:  # sent with the gradients
                assert torch.equal(one[head], other[head])
            assert torch.equal(one[base], torch.zeros(64))
        assert all(torch.equal(last[name], found["torch"][0][1][name]) for name in last)
        assert not torch.equal(last[head], torch.zeros(128))
        assert [size for size in sent if size != 8] == [(128 + 128) * 4] * (
            4 // every
        )  # of 8 bytes are counts of batches


def test_what_moves_is_what_is_counted_or_the_users_own():
    module = WithStatistics()
    module.configure_model()
    named = {id(buffer): name for name, buffer in module.named_buffers()}
    own = ["head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked"]
    module.train()  # which leaves what is frozen in eval mode
    assert [named[id(buffer)] for buffer in moving_buffers(module)] == own
    module.model.model.norm[1].train()
    assert len(moving_buffers(module)) == 6
    assert sum("inv_freq" in name or "vera" in name for name in named.values()) > 0
    plain = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    assert len(moving_buffers(plain)) == 3


@pytest.mark.parametrize(
    ("asked", "shares", "sends"),
    [([], True, False), ([f"{_SENDS_BUFFERS}=true"], False, True), ([f"{_SENDS_BUFFERS}=false"], False, False)],
)
def test_a_configuration_file_that_asks_for_nothing_changes_nothing(monkeypatch, asked, shares, sends):
    monkeypatch.setenv("LIGHTNING_PEFT_DATA", "some/folder")
    config = Path(__file__).parents[2] / "examples" / "configs" / "quickstart.yaml"
    arguments = ["timeout=0:05:00", *asked]
    strategy = PEFTCLI(
        args=[
            "--config", str(config), "--trainer.accelerator=cpu", "--trainer.devices=2",
            "--trainer.strategy.class_path=lightning_peft.PEFTDDPStrategy",
            *(f"--trainer.strategy.init_args.{one}" for one in arguments),
        ],
        run=False,
    ).trainer.strategy  # fmt: skip
    assert strategy._timeout == timedelta(minutes=5)
    assert (strategy.shares_buffers, strategy._ddp_kwargs[_SENDS_BUFFERS]) == (shares, sends)

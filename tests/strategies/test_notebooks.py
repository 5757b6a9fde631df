"""Forked processes, as in notebooks: what they trained is there afterwards, in the process that started them."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_peft import AdapterCheckpoint, FullFineTuning, LightningPEFTWarning, LoRA, PEFTMixin, PEFTModule, inject
from lightning_peft.testing import tiny_llama, token_batch

ROWS = [{"input_ids": row, "labels": row} for row in token_batch(rows=16)["input_ids"]]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def loader():
    return DataLoader(ROWS, batch_size=4)


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("kind", "method"), [("ddp", LoRA(rank=4, init="gaussian")), ("fsdp", FullFineTuning())])
def test_a_fit_is_followed_by_others_in_the_same_process(forked, tmp_path, kind, method):
    def trainer(epochs):
        saving = AdapterCheckpoint(dirpath=tmp_path, save_last=True, filename="{step}", enable_version_counter=False)
        return forked(
            kind, max_epochs=epochs, callbacks=[saving], enable_checkpointing=True, default_root_dir=str(tmp_path)
        )

    module = PEFTModule(tiny_llama(), method, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    first = trainer(2)
    first.fit(module, loader())
    assert (first.global_step, first.current_epoch) == (4, 2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert module.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    (here,) = first.validate(module, loader(), verbose=False)
    (loaded,) = first.validate(module, loader(), ckpt_path="last", verbose=False)
    assert here == loaded
    (tested,) = first.test(module, loader(), verbose=False)
    assert tested["test_loss"] == here["val_loss"]
    (untrained,) = forked(kind).validate(PEFTModule(tiny_llama(), method), loader(), verbose=False)
    assert untrained["val_loss"] > here["val_loss"]
    second = trainer(3)
    second.fit(module, loader(), ckpt_path="last")
    assert second.global_step == 6
    (after,) = second.validate(module, loader(), verbose=False)
    assert after["val_loss"] < here["val_loss"]


class Ordered(DataLoader):
    """A loader whose state is larger than a pipe."""

    def state_dict(self):
        return {"order": list(range(100_000)), "seed": torch.tensor(3)}

    def load_state_dict(self, state):
        assert len(state["order"]) == 100_000
        assert int(state["seed"]) == 3
        self.loaded = True


@pytest.mark.timeout(60)
def test_the_state_of_a_loader_comes_back_whatever_its_size(forked):
    trainer = forked("ddp", max_steps=1, use_distributed_sampler=False)
    trainer.fit(PEFTModule(tiny_llama(), LoRA(rank=1)), Ordered(ROWS, batch_size=4))
    (state,) = trainer.fit_loop._combined_loader_states_to_load
    assert len(state["order"]) == 100_000
    assert trainer.global_step == 1


class Asks(PEFTMixin, LightningModule):
    """A module whose model cannot be made outside of a run."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            assert dist.is_initialized()
            self.model = tiny_llama().train()
            inject(self.model, LoRA(rank=4))

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def test_what_cannot_be_brought_back_is_warned_of(forked):
    with pytest.warns(LightningPEFTWarning, match="is not brought back into it; load it from a checkpoint"):
        forked("ddp", max_steps=1).fit(Asks(), loader())

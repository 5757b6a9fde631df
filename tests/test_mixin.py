"""The mixin on a LightningModule of the user's own."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import NF4, LoRA, PEFTMixin, inject, merge_adapters, unmerge_adapters
from lightning_peft.errors import CheckpointMismatchError, MergeError

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))


class Mine(PEFTMixin, LightningModule):
    """Adapts a model in ``configure_model`` and has a head of its own."""

    def __init__(self, change=None):
        super().__init__()
        self.model, self.change = None, change
        self.head = nn.Linear(64, 2)
        self.register_buffer("seen", torch.zeros(()))

    def configure_model(self):
        if self.model is None:
            self.model = net()
            if self.change:
                self.change(self.model)
            inject(self.model, LoRA(rank=2), ["0"])

    def training_step(self, batch, batch_idx):
        self.seen += len(batch)
        return self.head(self.model(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


ADAPTER = ["model.0.adapters.default.lora_A", "model.0.adapters.default.lora_B"]
OWN = ["head.bias", "head.weight", *ADAPTER, "seen"]


@pytest.fixture
def configured():
    module = Mine()
    module.configure_model()
    return module


def test_the_state_is_the_adapter_and_what_the_module_has_itself(configured):
    assert sorted(configured.state_dict()) == OWN
    assert all(not tensor.requires_grad for tensor in configured.state_dict().values())
    assert all(key.startswith("x.") for key in configured.state_dict(prefix="x."))
    kept = configured.state_dict(keep_vars=True)
    assert kept["head.weight"] is configured.head.weight


def test_the_full_state_has_the_base_too(configured):
    assert set(configured.full_state_dict()) > set(OWN)
    assert "model.0.base_layer.weight" in configured.full_state_dict()
    assert "model.1.running_mean" in configured.full_state_dict()


def test_inside_another_module_the_state_is_whole(configured):
    outer = nn.ModuleDict({"inner": configured})
    assert set(outer.state_dict()) == {f"inner.{key}" for key in configured.full_state_dict()}


def test_without_adapters_nothing_is_left_out():
    assert sorted(Mine().state_dict()) == ["head.bias", "head.weight", "seen"]


def test_unfrozen_parameters_of_the_base_are_saved_too(configured):
    for parameter in configured.model[1].parameters():
        parameter.requires_grad_(True)
    extra = {f"model.1.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(configured.state_dict()) == {*OWN, *extra}


def test_the_scales_of_a_quantised_base_are_left_out():
    def quantize(model):
        for place in (0, 2):  # one is adapted, one is not
            model[place] = NF4(compute_dtype="float32").quantize(model[place])

    module = Mine(quantize)
    module.configure_model()
    assert any("absmax" in key for key in module.full_state_dict())
    assert sorted(module.state_dict()) == OWN


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch.compile itself
def test_compiled_and_checkpointed_blocks_are_left_out(configured):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    configured.model[2] = checkpoint_wrapper(configured.model[2])
    configured.model[1] = torch.compile(configured.model[1])
    assert sorted(configured.state_dict()) == OWN


def test_head_and_adapter_are_restored_and_training_goes_on(make_trainer, tmp_path):
    def data():
        return DataLoader(X, batch_size=4)

    def fresh(seed):
        torch.manual_seed(seed)
        module = Mine()
        module.configure_model()
        return module

    straight, first, resumed = fresh(1), fresh(1), fresh(2)
    make_trainer(tmp_path, max_epochs=2).fit(straight, data())
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    before = {key: value.clone() for key, value in first.state_dict().items()}
    make_trainer(tmp_path, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "x.ckpt")
    assert resumed.seen == 16
    assert not torch.equal(before["head.weight"], resumed.head.weight)
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert sorted(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == OWN


def test_a_checkpoint_is_not_loaded_where_the_base_would_keep_what_is_merged(configured, make_trainer, tmp_path):
    data = DataLoader(X, batch_size=4)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(configured, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    merge_adapters(configured.model)
    with pytest.raises(MergeError, match="'default' is merged into the base, which would keep the values it has now"):
        make_trainer(tmp_path, max_epochs=2).fit(configured, data, ckpt_path=tmp_path / "x.ckpt")
    unmerge_adapters(configured.model)
    configured.on_load_checkpoint(torch.load(tmp_path / "x.ckpt", weights_only=True))


def test_what_is_merged_is_not_trained_and_a_fit_of_nothing_else_is_refused(configured, make_trainer, tmp_path):
    merge_adapters(configured.model)
    head = configured.head.weight.clone()
    make_trainer(tmp_path, max_epochs=1).fit(configured, DataLoader(X, batch_size=4))
    assert not torch.equal(configured.head.weight, head)
    configured.head.requires_grad_(False)
    with pytest.raises(
        MergeError, match="'default' is merged into the base and would not be trained, and nothing else"
    ):
        make_trainer(tmp_path, max_epochs=1).fit(configured, DataLoader(X, batch_size=4))


def test_the_statistics_of_frozen_batch_normalisation_do_not_move(configured, make_trainer, tmp_path):
    assert configured.model[1].training
    make_trainer(tmp_path, max_epochs=1).fit(configured, DataLoader(X + 3, batch_size=4))
    assert configured.head.training
    assert not configured.train().model[1].training
    torch.testing.assert_close(configured.model[1].state_dict(), net()[1].state_dict(), rtol=0, atol=0)


def test_trained_parameters_of_the_base_do_not_make_it_another_base(make_trainer, tmp_path):
    class Unfrozen(Mine):
        def configure_model(self):
            super().configure_model()
            self.model[2].weight.requires_grad_(True)

    trainer = make_trainer(tmp_path, max_epochs=1)
    first, resumed = Unfrozen(), Unfrozen()
    trainer.fit(first, DataLoader(X, batch_size=4))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert not torch.equal(first.model[2].weight, net()[2].weight)
    make_trainer(tmp_path, max_epochs=1).fit(resumed, DataLoader(X, batch_size=4), ckpt_path=tmp_path / "x.ckpt")
    torch.testing.assert_close(resumed.model[2].weight, first.model[2].weight, rtol=0, atol=0)


def test_strict_loading_is_refused(configured):
    assert configured.strict_loading is False
    configured.strict_loading = False
    with pytest.raises(
        CheckpointMismatchError, match="strict_loading=True was asked for, but an adapter checkpoint does not"
    ):
        configured.strict_loading = True


def test_a_state_loads_into_another_module_strictly(configured):
    other = Mine()
    other.configure_model()
    found = other.load_state_dict(configured.state_dict())
    assert found.missing_keys == found.unexpected_keys == []
    torch.testing.assert_close(other.state_dict(), configured.state_dict(), rtol=0, atol=0)
    assert other.load_state_dict(configured.full_state_dict()).missing_keys == []


def test_a_state_with_a_missing_or_unknown_key_is_refused(configured):
    state = copy.copy(configured.state_dict())
    state["model.0.lora_A"] = state.pop(ADAPTER[0])
    with pytest.raises(
        CheckpointMismatchError,
        match=rf"does not fit this Mine. Missing: \['{ADAPTER[0]}'\] \(1\); not expected: \['model.0.lora_A'\]",
    ):
        configured.load_state_dict(state)
    found = configured.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([ADAPTER[0]], ["model.0.lora_A"])


def test_the_mixin_after_lightning_module_is_refused_because_it_would_have_no_effect():
    from lightning.pytorch import LightningModule

    from lightning_peft import PEFTMixin

    with pytest.raises(
        TypeError, match=r"names LightningModule before PEFTMixin.*write class Wrong\(PEFTMixin, LightningModule\)"
    ):

        class Wrong(LightningModule, PEFTMixin):
            pass

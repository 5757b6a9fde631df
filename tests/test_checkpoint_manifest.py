"""A checkpoint that is not of this module is refused with both sides named, before anything of it is loaded."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTModule, adapter_scale, save_adapter, scale_adapters
from lightning_peft.checkpoint_manifest import MANIFEST
from lightning_peft.errors import CheckpointMismatchError, ConfigError
from lightning_peft.injection import record

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3
A = "model.0.adapters.default.lora_A"


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def module(method=None, targets=("0",), base=None, **options):
    return PEFTModule(base or net(), method or LoRA(rank=2), list(targets), loss=nn.CrossEntropyLoss(), **options)


def loader():
    return DataLoader(list(zip(X, Y, strict=True)), batch_size=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_trainer):
    """The content of a checkpoint after one epoch."""
    folder = tmp_path_factory.mktemp("manifest")
    trainer = make_trainer(folder, max_epochs=1)
    trainer.fit(module(), loader())
    trainer.save_checkpoint(folder / "x.ckpt")
    return torch.load(folder / "x.ckpt", weights_only=True)


@pytest.fixture
def refused(checkpoint, make_trainer, tmp_path):
    """Resume ``other`` from the checkpoint after ``change``; check that it is refused and nothing was loaded."""

    def check(match, other=None, change=None):
        content = copy.deepcopy(checkpoint)
        if change:
            change(content)
        torch.save(content, tmp_path / "changed.ckpt")
        other = other or module()
        other.configure_model()
        before = copy.deepcopy(other.full_state_dict())
        with pytest.raises(CheckpointMismatchError, match=match):
            make_trainer(tmp_path, max_epochs=2).fit(other, loader(), ckpt_path=tmp_path / "changed.ckpt")
        torch.testing.assert_close(other.full_state_dict(), before, rtol=0, atol=0)

    return check


def test_the_unchanged_checkpoint_is_accepted(checkpoint, make_trainer, tmp_path):
    torch.save(checkpoint, tmp_path / "x.ckpt")
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module(), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == 4


def test_a_missing_key_is_refused(refused):
    refused(
        rf"checkpoint's own state_dict are not the same. Only listed: \['{A}'\] \(1\); .*: \[\] \(0\); other",
        change=lambda content: content["state_dict"].pop(A),
    )


def test_a_renamed_key_is_refused(refused):
    def rename(content):
        content["state_dict"]["model.0.lora_A"] = content["state_dict"].pop(A)

    refused(
        rf"Only listed: \['{A}'\] \(1\); only in the checkpoint's own state_dict: \['model.0.lora_A'\]", change=rename
    )


def test_an_extra_key_is_refused(refused):
    refused(
        r"Only listed: \[\] \(0\); only in the checkpoint's own state_dict: \['model.2.weight'\]",
        change=lambda content: content["state_dict"].update({"model.2.weight": torch.zeros(3, 6)}),
    )


def test_a_tensor_of_another_shape_is_refused(refused):
    refused(
        rf"other shapes: \['{A} \[2, 6\] and \[2, 5\]'\]",
        change=lambda content: content["state_dict"].update({A: torch.zeros(2, 5)}),
    )


def test_another_rank_is_refused(refused):
    refused("fields of the checkpoint and of the module differ: rank was 2 and is 3", module(LoRA(rank=3)))


def test_another_alpha_is_refused_though_all_shapes_agree(refused):
    refused("fields .* differ: alpha was 16.0 and is 4", module(LoRA(rank=2, alpha=4)))


def test_other_targets_are_refused(refused):
    refused(r"places .* differ: was \['0'\] and is \['0', '2'\]", module(targets=("0", "2")))


def test_another_name_of_the_adapter_is_refused(refused):
    refused(r"holds the adapters \['model:default'\], the module holds \['model:mine'\]", module(name="mine"))


def test_another_base_model_is_refused(refused):
    refused(
        r"base with fingerprint \w{16}, this base has \w{16}: 4 parameters differ, first '0.bias'", module(base=net(1))
    )


def test_a_tensor_of_the_module_that_the_checkpoint_does_not_list_is_refused(refused):
    other = module()
    other.head = nn.Linear(2, 2)
    refused(r"only in the module: \['head.bias', 'head.weight'\] \(2\)", other)


def test_a_checkpoint_of_another_kind_of_module_is_refused(refused):
    refused(r"has no 'lightning_peft' entry.* it holds \['callbacks', ", change=lambda content: content.pop(MANIFEST))


def test_a_manifest_of_another_version_is_refused(refused):
    refused("manifest version 7; this version reads 1", change=lambda content: content[MANIFEST].update(version=7))


def test_a_damaged_manifest_is_refused(refused):
    refused("has no 'tensors': it is damaged", change=lambda content: content[MANIFEST].pop("tensors"))


def test_load_from_checkpoint_takes_base_and_method(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "x.ckpt")
    loaded = PEFTModule.load_from_checkpoint(
        tmp_path / "x.ckpt", base=net(), method=LoRA(rank=2), targets=["0"], loss=nn.CrossEntropyLoss()
    )
    torch.testing.assert_close(dict(loaded.state_dict()), dict(checkpoint["state_dict"]), rtol=0, atol=0)
    assert loaded._resume_from is None


def test_load_from_checkpoint_is_as_strict(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointMismatchError, match="rank was 2 and is 5"):
        PEFTModule.load_from_checkpoint(tmp_path / "x.ckpt", base=net(), method=LoRA(rank=5), targets=["0"])


def test_of_long_lists_of_places_the_difference_is_named(make_trainer, tmp_path):
    def deep(*targets):
        return module(targets=targets, base=nn.Sequential(*(nn.Linear(6, 6) for _ in range(9))), check_base=False)

    first = deep(*"0123456")
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(
        CheckpointMismatchError, match=r"only the checkpoint has \['0'\] \(1\), only the module \['8'\] \(1\)"
    ):
        make_trainer(tmp_path, max_epochs=2).fit(deep(*"1234568"), loader(), ckpt_path=tmp_path / "x.ckpt")


def test_the_order_in_which_places_are_listed_does_not_matter(make_trainer, tmp_path):
    def base():
        return nn.Sequential(OrderedDict(zip(("z", "tanh", "a"), net(), strict=True)))

    torch.manual_seed(3)
    first = module(targets=["z", "a"], base=base())
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    folder = str(save_adapter(first.model, tmp_path / "x.adapter"))
    again = PEFTModule(base(), adapter=folder, loss=nn.CrossEntropyLoss())
    again.configure_model()
    assert (record(first.model, "default").paths, record(again.model, "default").paths) == (["z", "a"], ["a", "z"])
    torch.manual_seed(3)
    straight = module(targets=["z", "a"], base=base())
    make_trainer(tmp_path, max_epochs=2).fit(straight, loader())
    make_trainer(tmp_path, max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "x.ckpt")
    torch.testing.assert_close(again.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_how_strongly_an_adapter_acts_is_in_the_checkpoint(make_trainer, tmp_path):
    first = module()
    first.configure_model()
    scale_adapters(first.model, {"default": 0.25})
    make_trainer(tmp_path, max_epochs=1).fit(first, loader())
    first.trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    again = module()
    make_trainer(tmp_path, max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert adapter_scale(again.model) == 0.25
    del content[MANIFEST]["adapters"]["model:default"]["scale"]  # as checkpoints of before
    torch.save(content, tmp_path / "older.ckpt")
    scale_adapters(again.model, {"default": 0.5})
    again.on_load_checkpoint(content)
    assert adapter_scale(again.model) == 0.5


def test_another_choice_of_active_adapters_is_refused(refused):
    refused(
        "active of the checkpoint and of the module differ: was False and is True",
        change=lambda content: content["lightning_peft"]["adapters"]["model:default"].update(active=False),
    )


@pytest.fixture
def full(make_trainer, tmp_path):
    """A checkpoint with a full fingerprint, and what its base becomes when one element that is not sampled is changed."""
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module(fingerprint="complete"), loader())
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    changed = net()
    with torch.no_grad():
        changed[0].weight[0, 1] += 1e-3
    return tmp_path / "full.ckpt", changed


def test_a_full_fingerprint_sees_an_element_that_is_not_sampled(full, make_trainer, tmp_path):
    file, changed = full
    with pytest.raises(
        CheckpointMismatchError,
        match="full fingerprint [0-9a-f]{16}, this base has [0-9a-f]{16}: 1 parameters .* '0.weight'",
    ):
        make_trainer(tmp_path, max_epochs=2).fit(module(base=changed), loader(), ckpt_path=file)


def test_another_base_is_taken_where_that_is_asked_for(full, make_trainer, tmp_path):
    file, changed = full
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module(base=changed, check_base=False), loader(), ckpt_path=file)
    assert trainer.global_step == 4


def test_the_same_base_passes_its_full_fingerprint(full, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module(), loader(), ckpt_path=full[0])
    assert trainer.global_step == 4


def test_a_kind_of_fingerprint_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="one of sampled, complete, got 'whole'"):
        module(fingerprint="whole")

"""A checkpoint of any strategy is resumed by any other, on another number of processes too."""

import itertools

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from lightning_peft import LoRA, PEFTModule
from lightning_peft.errors import CheckpointMismatchError, LightningPEFTWarning
from lightning_peft.sharded_folders import read_folder
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy
from lightning_peft.testing import tiny_llama

KINDS = ["single", "ddp", "fsdp", "fsdp folder"]
SPLIT = [  # over a group that shares each layer
    ("single", "tensor"), ("tensor", "fsdp"), ("fsdp folder", "tensor folder"), ("tensor", "tensor folder")
]  # fmt: skip
STEPS = 6


def relative(one, other):
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that gives the checkpoint of half a run with a strategy, made once."""
    made = {}

    def of(run, kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("saved")
            run(kind, steps=STEPS // 2, save=folder, lr=1e-3)
            made[kind] = folder / f"step={STEPS // 2}.ckpt"
        return made[kind]

    return of


@pytest.fixture(scope="module")
def whole():
    """Return a function that gives an uninterrupted run with a strategy, made once."""
    made = {}

    def of(run, kind):
        if kind not in made:
            made[kind] = run(kind, steps=STEPS, lr=1e-3)
        return made[kind]

    return of


@pytest.mark.parametrize(("before", "after"), [*itertools.product(KINDS, KINDS), *SPLIT])
def test_any_strategy_goes_on_from_any_other(run, saved, whole, before, after):
    path = saved(run, before)
    assert path.is_dir() == before.endswith("folder")
    resumed = run(after, steps=STEPS, resume=str(path), lr=1e-3)
    alone = whole(run, after)
    losses = alone.losses[STEPS // 2 :]
    if any(
        {before, after} <= alike for alike in ({"single"}, {"fsdp", "fsdp folder", "ddp"}, {"tensor", "tensor folder"})
    ):
        assert resumed.losses == losses
        assert resumed.state
        assert resumed.state.keys() == alone.state.keys()
        for key, value in alone.state.items():
            assert torch.equal(resumed.state[key], value), key
    else:
        assert relative(resumed.losses, losses) <= 1e-6


def test_two_processes_then_one_then_two(run, tmp_path):
    alone = run("fsdp", steps=6, lr=1e-3)
    run("fsdp", steps=2, save=tmp_path / "a", lr=1e-3)
    first = tmp_path / "a" / "step=2.ckpt"
    one = PEFTFSDPStrategy(start_method="fork")
    middle = run(one, devices=1, steps=4, resume=str(first), save=tmp_path / "b", lr=1e-3)
    second = tmp_path / "b" / "step=4.ckpt"
    last = run("fsdp", steps=6, resume=str(second), lr=1e-3)
    assert relative([*middle.losses, *last.losses], alone.losses[2:]) <= 1e-6


@pytest.mark.parametrize(("kind", "at"), [*itertools.product(["ddp", "fsdp", "fsdp folder"], [2, 3]), ("tensor", 2)])
def test_a_shuffled_run_with_dropout_goes_on_bit_for_bit(run, tmp_path, kind, at):
    """Within an epoch of three batches, and at its end; each process has random numbers and rows of its own."""
    fields = {"method": LoRA(rank=4, dropout=0.2), "shuffle": True, "lr": 1e-3, "batches": 3}
    alone = run(kind, steps=5, **fields)
    run(kind, steps=at, save=tmp_path / "half", **fields)
    resumed = run(kind, steps=5, resume=str(tmp_path / "half" / f"step={at}.ckpt"), **fields)
    assert resumed.losses == alone.losses[at:]
    assert alone.state
    for key, value in alone.state.items():
        assert torch.equal(resumed.state[key], value), key


class Gathered(Callback):
    """Counts the elements of sharded tensors that are made whole while a checkpoint is saved."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, module):
        elements, original = [], DTensor.full_tensor

        def counted(tensor, *args, **kwargs):
            elements.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        DTensor.full_tensor = counted
        try:
            state = trainer.strategy.lightning_module_state_dict()
        finally:
            DTensor.full_tensor = original
        whole = sum(value.numel() for value in state.values())
        sharded = sum(isinstance(parameter, DTensor) for parameter in module.parameters())
        if trainer.is_global_zero:
            torch.save({"elements": sum(elements), "whole": whole, "sharded": sharded}, self.path)
        else:
            assert state == {}
        dist.barrier()


def test_what_is_gathered_is_the_adapter_and_no_more(run, tmp_path):
    method = LoRA(rank=4)
    module = PEFTModule(tiny_llama(), method)
    module.configure_model()
    own = sum(value.numel() for value in module.state_dict().values())
    base = sum(parameter.numel() for parameter in module.parameters()) - own
    run("fsdp", method=method, steps=1, callbacks=[Gathered(tmp_path / "count.pt")])
    counted = torch.load(tmp_path / "count.pt")
    assert counted["elements"] == counted["whole"] == own
    assert base > 10 * own
    assert counted["sharded"] > 2


def test_a_folder_holds_adapters_alone_and_is_read_whole(run, saved):
    checkpoint = read_folder(saved(run, "fsdp folder"))
    module = PEFTModule(tiny_llama(), LoRA(rank=4))
    module.configure_model()
    assert {key: value.shape for key, value in checkpoint["state_dict"].items()} == {
        key: value.shape for key, value in module.state_dict().items()
    }
    (state,) = checkpoint["optimizer_states"]
    assert sorted(state["state"]) == list(range(len(checkpoint["state_dict"])))


def test_a_broken_folder_is_named(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointMismatchError, match=r"no whole sharded checkpoint: it has no meta\.pt"):
        read_folder(tmp_path)


def test_another_adapter_is_refused_by_name(run, saved):
    with pytest.raises(
        Exception, match="CheckpointMismatchError: adapter 'model:default'.* differ: rank was 4 and is 2"
    ):
        run("fsdp", method=LoRA(rank=2, init="gaussian"), resume=str(saved(run, "single")), lr=1e-3)


class Midst(Callback):
    """Saves after one batch of the second window of three."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 4:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(("before", "after"), [("fsdp folder", "ddp"), ("ddp", "fsdp"), ("half", "half")])
def test_a_window_goes_on_in_its_midst(run, tmp_path, before, after):
    fields = {"lr": 1e-3, "accumulate_grad_batches": 3, "steps": 3, "batches": 9, "method": LoRA(rank=4, dropout=0.2)}

    def chosen(kind):
        return PEFTFSDPStrategy(start_method="fork", gather_dtype="bf16") if kind == "half" else kind

    alone = run(chosen(before), callbacks=[Midst(tmp_path / "midst.ckpt")], **fields)
    resumed = run(chosen(after), resume=str(tmp_path / "midst.ckpt"), **fields)
    assert resumed.losses == alone.losses[5:]
    for key, value in alone.state.items():
        assert torch.equal(resumed.state[key], value), key


def test_a_window_of_another_number_of_processes_starts_anew_with_a_warning(run, tmp_path):
    fields = {"lr": 1e-3, "accumulate_grad_batches": 3, "steps": 3, "batches": 9}
    run("fsdp", callbacks=[Midst(tmp_path / "midst.ckpt")], **fields)
    with pytest.warns(LightningPEFTWarning, match="gathered gradients of 2 processes and this run has 1"):
        run("single", resume=str(tmp_path / "midst.ckpt"), **fields)


class Placed(Callback):
    """Writes by which dimension each trained tensor is cut, and the elements that this process has."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, module):
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        found = {name: (p.placements[-1].dim, p.to_local().numel() / p.numel()) for name, p in trained.items()}
        if trainer.global_rank == trainer.world_size - 1:
            torch.save(found, self.path)


def test_few_rows_are_cut_by_columns_and_go_on_in_other_layouts(run, tmp_path):
    """Of rank 2 among four processes: by rows, half of them would have nothing."""
    fields = {"method": LoRA(rank=2, init="gaussian"), "lr": 1e-3}
    alone = run("ddp", steps=4, **fields)
    run("fsdp folder", devices=4, steps=2, save=tmp_path / "few", callbacks=[Placed(tmp_path / "placed")], **fields)
    placed = torch.load(tmp_path / "placed")
    assert {name.rpartition(".")[2]: dim for name, (dim, _) in placed.items()} == {"lora_A": 1, "lora_B": 1}
    assert {part for _, part in placed.values()} == {0.25}
    path = tmp_path / "few" / "step=2.ckpt"
    for after in ("ddp", PEFTFSDPStrategy(start_method="fork", replicate=2)):
        devices = 4 if isinstance(after, PEFTFSDPStrategy) else None
        resumed = run(after, devices=devices, steps=4, resume=str(path), **fields)
        assert relative(resumed.losses, alone.losses[2:]) <= 1e-6

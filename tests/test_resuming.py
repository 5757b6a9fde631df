"""A run that is cut off and resumed ends where the uninterrupted run ends, bit for bit, with dropout."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoModelForCausalLM

from lightning_peft import AdapterCheckpoint, LoRA, PEFTModule
from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler
from lightning_peft.errors import CheckpointMismatchError, LightningPEFTWarning
from lightning_peft.gathered_gradients import GRADIENTS, restore_gradients
from lightning_peft.random_state import random_state, set_random_state
from lightning_peft.resuming import RANDOM_STATES

ROWS = torch.randint(3, 61, (12, 8), generator=torch.Generator().manual_seed(5))
BATCHES = 6  # an epoch


class StatefulLoader(DataLoader):
    """Skips what was handed out before; it starts, and draws a random number, with its first batch."""

    start = position = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for self.position, batch in enumerate(super().__iter__(), 1):
            if self.position > start:
                yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.start = state["position"] % len(self)


class CutError(RuntimeError):
    pass


class CutAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise CutError


@pytest.fixture(scope="module")
def fit(llama_dir, make_trainer):
    llama = AutoModelForCausalLM.from_pretrained(llama_dir)

    def run(root, loader, *, seed, cut=None, ckpt_path=None, callbacks=(), shuffle=False, **options):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        module = PEFTModule(
            copy.deepcopy(llama),
            LoRA(rank=2, dropout=0.3),
            ["query", "value"],
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        )
        # Adapters that are the same whatever the seed: the runs differ in nothing but the random state.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module.configure_model()
        callbacks = [*callbacks, *([CutAt(cut)] if cut else [])]
        trainer = make_trainer(root, callbacks=callbacks, **{"limit_val_batches": 0, "max_epochs": 3, **options})
        data = {
            "train_dataloaders": loader(ROWS, batch_size=2, shuffle=shuffle),
            "val_dataloaders": DataLoader(ROWS[:3], batch_size=2),
        }
        if cut:
            with pytest.raises(CutError):
                trainer.fit(module, **data)
        else:
            trainer.fit(module, **data, ckpt_path=ckpt_path)
        return module, trainer

    return run


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    """The ends of uninterrupted runs without validation and checkpoints, which change nothing."""
    return {
        name: fit(tmp_path_factory.mktemp("straight"), DataLoader, seed=1, **options)
        for name, options in {"in order": {}, "shuffled": {"shuffle": True}, "accumulated": ACCUMULATE}.items()
    }


def last_checkpoint(folder):
    return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def assert_same_end(one, other):
    (module, trainer), (other_module, other_trainer) = one, other
    assert trainer.global_step == other_trainer.global_step > 0
    torch.testing.assert_close(module.state_dict(), other_module.state_dict(), rtol=0, atol=0)
    states = [t.optimizers[0].state_dict() for t in (trainer, other_trainer)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    schedulers = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (trainer, other_trainer)]
    assert schedulers[0] == schedulers[1]


ACCUMULATE = {"max_epochs": 4, "accumulate_grad_batches": 2}
VALIDATE = {"limit_val_batches": 1.0}
HALF = {**VALIDATE, "val_check_interval": 0.5}
STEPS = {"max_epochs": -1, "max_steps": 3 * BATCHES}
EACH_EPOCH, EACH_VALIDATION = {}, {"monitor": "val_loss"}
SAVES_AND_RUNS = {
    # name: (how it is saved, the loader, cut at step, further options)
    "epoch end": (EACH_EPOCH, DataLoader, 9, {}),
    "epoch end, shuffled": (EACH_EPOCH, DataLoader, 9, {"shuffle": True, **VALIDATE}),
    "epoch end, max_steps": (EACH_EPOCH, DataLoader, 9, STEPS),
    "within an epoch": ({"every_n_train_steps": 4}, StatefulLoader, 11, {}),
    "within an epoch, max_steps": ({"every_n_train_steps": 4}, StatefulLoader, 11, STEPS),
    "just before validation": (
        {"every_n_train_steps": 4},
        StatefulLoader,
        10,
        {**VALIDATE, "val_check_interval": 4, "check_val_every_n_epoch": None},
    ),
    "in validation within an epoch": (EACH_VALIDATION, StatefulLoader, 10, HALF),
    "in validation at the end of an epoch": (EACH_VALIDATION, DataLoader, 13, {"shuffle": True, **HALF}),
    "in validation at the end, max_steps": (EACH_VALIDATION, DataLoader, 13, {**HALF, **STEPS}),
    "last batch": ({"every_n_train_steps": BATCHES}, DataLoader, 9, {"shuffle": True, **VALIDATE}),
    "last batch, max_steps": ({"every_n_train_steps": BATCHES}, StatefulLoader, 9, STEPS),
    "accumulated gradients": (
        {"every_n_train_steps": 2},
        StatefulLoader,
        5,
        ACCUMULATE,
    ),
    "in validation within a window": (
        {"monitor": "val_loss"},
        StatefulLoader,
        5,
        {**VALIDATE, **ACCUMULATE, "val_check_interval": 3},
    ),
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the one to resume from
@pytest.mark.parametrize("case", SAVES_AND_RUNS)
def test_a_run_that_was_cut_off_resumes_bit_for_bit(case, fit, straight, tmp_path):
    how, loader, cut, options = SAVES_AND_RUNS[case]
    kind = (
        "shuffled" if options.get("shuffle") else "accumulated" if "accumulate_grad_batches" in options else "in order"
    )
    fit(tmp_path, loader, seed=1, cut=cut, callbacks=[ModelCheckpoint(tmp_path, save_top_k=-1, **how)], **options)
    again = ModelCheckpoint(tmp_path, save_top_k=-1, **how)
    resumed = fit(tmp_path, loader, seed=99, ckpt_path=last_checkpoint(tmp_path), callbacks=[again], **options)
    assert_same_end(straight[kind], resumed)


def resumable_loader(rows, batch_size, shuffle):
    return ResumableDataLoader(rows, sampler=ResumableSampler(rows, seed=3, shuffle=shuffle), batch_size=batch_size)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("every", [4, BATCHES])
@pytest.mark.parametrize("options", [{}, STEPS])
def test_with_the_loader_of_this_library_a_shuffled_run_resumes_anywhere(every, options, fit, tmp_path):
    options = {**options, "shuffle": True}
    uninterrupted = fit(tmp_path / "a", resumable_loader, seed=1, **options)
    saving = [[AdapterCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=every)] for _ in range(2)]
    fit(tmp_path, resumable_loader, seed=1, cut=11, callbacks=saving[0], **options)
    resumed = fit(
        tmp_path, resumable_loader, seed=99, ckpt_path=last_checkpoint(tmp_path), callbacks=saving[1], **options
    )
    assert_same_end(uninterrupted, resumed)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 calls it
@pytest.mark.parametrize(
    ("how", "cut", "options"),
    [
        (EACH_EPOCH, 9, {}),
        (EACH_EPOCH, 9, STEPS),
        ({"every_n_train_steps": BATCHES}, 9, VALIDATE),
        ({"every_n_train_steps": BATCHES}, 9, STEPS),
        (EACH_VALIDATION, 13, HALF),
    ],
    ids=["epoch end", "epoch end, max_steps", "last batch", "last batch, max_steps", "in validation at the end"],
)
def test_at_the_end_of_an_epoch_a_loader_of_torchdata_goes_on_with_its_order(how, cut, options, fit, tmp_path):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    uninterrupted = fit(tmp_path / "a", loader, seed=1, shuffle=True, **options)
    saving = [ModelCheckpoint(tmp_path, save_top_k=-1, **how) for _ in range(2)]
    fit(tmp_path, loader, seed=1, shuffle=True, cut=cut, callbacks=saving[:1], **options)
    checkpoint = last_checkpoint(tmp_path)
    assert int(checkpoint.stem.rpartition("=")[2]) % BATCHES == 0
    resumed = fit(tmp_path, loader, seed=99, shuffle=True, ckpt_path=checkpoint, callbacks=saving[1:], **options)
    assert_same_end(uninterrupted, resumed)


class EpochEnds(Callback):
    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(trainer.current_epoch)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_an_epoch_that_was_cut_off_in_its_last_validation_is_ended_after_resuming(fit, tmp_path):
    def saving():
        return ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss")

    ends = EpochEnds()
    fit(tmp_path, DataLoader, seed=1, cut=13, callbacks=[saving()], **HALF)
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint.name == "epoch=1-step=12.ckpt"
    fit(tmp_path, DataLoader, seed=1, ckpt_path=checkpoint, callbacks=[saving(), ends], **HALF)
    assert ends.epochs == [1, 2]


def test_another_random_state_gives_another_end(fit, straight, tmp_path):
    """The tests above could not fail if nothing were random."""
    one, other = straight["in order"][0].state_dict(), fit(tmp_path, DataLoader, seed=2)[0].state_dict()
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_validation_does_not_change_training(fit, straight, tmp_path):
    assert_same_end(straight["shuffled"], fit(tmp_path, DataLoader, seed=1, shuffle=True, **HALF))


def test_validating_a_checkpoint_leaves_the_random_state_of_a_later_fit(fit, make_trainer, tmp_path):
    module, trainer = fit(tmp_path, DataLoader, seed=1, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    make_trainer(tmp_path).validate(
        module, DataLoader(ROWS, batch_size=2), ckpt_path=tmp_path / "x.ckpt", verbose=False
    )
    assert module._resume_from is None


def test_a_checkpoint_without_random_states_is_refused(fit, tmp_path):
    _, trainer = fit(tmp_path, DataLoader, seed=1, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del checkpoint[RANDOM_STATES]
    torch.save(checkpoint, tmp_path / "y.ckpt")
    with pytest.raises(CheckpointMismatchError, match="has no 'lightning_peft_random_states' entry to resume from"):
        fit(tmp_path, DataLoader, seed=1, ckpt_path=tmp_path / "y.ckpt")


def test_a_checkpoint_of_another_number_of_processes_resumes_without_their_random_states(fit, tmp_path):
    _, trainer = fit(tmp_path, DataLoader, seed=1, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint[RANDOM_STATES] *= 2
    torch.save(checkpoint, tmp_path / "y.ckpt")
    _, resumed = fit(tmp_path, DataLoader, seed=1, ckpt_path=tmp_path / "y.ckpt")
    assert resumed.global_step == 3 * BATCHES


def test_the_random_state_covers_python_numpy_and_torch_and_survives_a_weights_only_load(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()

    draw()
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    assert draw() != expected
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


def test_the_random_state_of_older_checkpoints_is_read():
    np.random.seed(3)
    state = random_state()
    kind, keys, *rest = state["numpy"]
    older = {**state, "numpy": [kind, torch.from_numpy(keys.numpy().view(np.uint32).astype(np.int64)), *rest]}
    expected = np.random.rand(4).tolist()
    set_random_state(older)
    assert np.random.rand(4).tolist() == expected


TURNS = itertools.count()


class OwnOrder:
    """Gives batches in an order of its own that nobody can bring back."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return BATCHES

    def __iter__(self):
        for _ in range(BATCHES):
            turn = next(TURNS)
            yield self.rows[[turn % len(self.rows), (turn + 5) % len(self.rows)]]


class Unsized(IterableDataset):
    def __iter__(self):
        order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(3))
        yield from ROWS[order]


class StatefulUnsized(Unsized):
    """Knows its position, but not its length, so that Lightning fetches a batch ahead."""

    start = position = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for self.position, two in enumerate(DataLoader(Unsized(), batch_size=2), 1):
            if self.position > start:
                yield two

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.start = state["position"] % BATCHES


def given(dataset):
    return lambda rows, **_: dataset(rows) if dataset is OwnOrder else dataset()


def cut_and_resumed(fit, root, loader, **options):
    saving = [ModelCheckpoint(root, save_top_k=-1, every_n_train_steps=4) for _ in range(2)]
    fit(root, loader, seed=1, cut=11, callbacks=saving[:1], **options)
    return fit(root, loader, seed=99, ckpt_path=last_checkpoint(root), callbacks=saving[1:], **options)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "loader",
    [
        DataLoader,
        lambda rows, **_: DataLoader(Unsized(), batch_size=2),
        lambda rows, **_: StatefulUnsized(),
        lambda rows, **_: [DataLoader(rows, batch_size=2, shuffle=True), DataLoader(rows, batch_size=2, shuffle=True)],
    ],
    ids=["shuffled", "without a length", "with a state and without a length", "several"],
)
def test_within_an_epoch_a_loader_without_a_state_gives_the_same_batches(loader, fit, tmp_path, monkeypatch):
    monkeypatch.setattr(PEFTModule, "training_step", first_of_several(PEFTModule.training_step))
    uninterrupted = fit(tmp_path / "a", loader, seed=1, shuffle=True)
    assert_same_end(uninterrupted, cut_and_resumed(fit, tmp_path, loader, shuffle=True))


def first_of_several(step):
    def training_step(self, batch, batch_idx):
        return step(self, batch if torch.is_tensor(batch) else torch.cat(batch), batch_idx)

    return training_step


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_loader_that_gives_other_batches_is_named_once(fit, tmp_path):
    with pytest.warns(LightningPEFTWarning, match="OwnOrder did not give the batches again") as warned:
        cut_and_resumed(fit, tmp_path, given(OwnOrder))
    assert len([one for one in warned if "resum" in str(one.message)]) == 1


class Noisy(Dataset):
    """Rows in which workers change a token at random."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        row = ROWS[index].clone()
        row[torch.randint(8, (1,))] = 3
        return row


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("every", "match"), [(4, "DataLoader did not give .* are persistent and"), (6, "in workers, this run")]
)
def test_workers_that_outlive_their_epoch_are_named_once(every, match, fit, tmp_path):
    def loader(rows, **_):
        return DataLoader(Noisy(), batch_size=2, num_workers=1, persistent_workers=True)

    saving = [ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=every) for _ in range(2)]
    fit(tmp_path, loader, seed=1, cut=11, callbacks=saving[:1])
    with pytest.warns(LightningPEFTWarning, match=match) as warned:
        fit(tmp_path, loader, seed=99, ckpt_path=last_checkpoint(tmp_path), callbacks=saving[1:])
    found = [str(one.message) for one in warned if "resum" in str(one.message)]
    assert len(found) == 1
    assert "Set persistent_workers=False" in found[0]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_loaders_with_and_without_a_state_together_are_named_once(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(PEFTModule, "training_step", first_of_several(PEFTModule.training_step))

    def both(rows, batch_size, shuffle):
        return [DataLoader(rows, batch_size=batch_size), StatefulLoader(rows, batch_size=batch_size)]

    with pytest.warns(
        LightningPEFTWarning, match=r"keep their position \(StatefulLoader\) and others that do not \(DataLoader\)"
    ):
        cut_and_resumed(fit, tmp_path, both)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_validation_within_a_window_keeps_its_gradients(fit, straight, tmp_path):
    options = {**VALIDATE, **ACCUMULATE, "val_check_interval": 3}
    assert_same_end(straight["accumulated"], fit(tmp_path, DataLoader, seed=1, **options))


def test_gathered_gradients_of_what_is_not_trained_are_refused(fit, tmp_path):
    module, _ = fit(tmp_path, DataLoader, seed=1, max_epochs=1)
    with pytest.raises(
        CheckpointMismatchError, match="gathered gradient .2. of 'elsewhere', here it is no trained parameter"
    ):
        restore_gradients(module, {"elsewhere": torch.ones(2)})


def test_a_checkpoint_after_a_step_holds_no_gradients(fit, tmp_path):
    _, trainer = fit(tmp_path, DataLoader, seed=1, **ACCUMULATE)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert GRADIENTS not in torch.load(tmp_path / "x.ckpt", weights_only=True)

"""The training order is a function of seed and epoch, and a resumed run sees the batches of an uninterrupted one."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.data import ResumableDataLoader, ResumableSampler
from lightning_peft.errors import ConfigError

ROWS = range(11)


def make_loader(num_workers=0, seed=3, rows=ROWS, **sampling):
    sampler = ResumableSampler(rows, seed=seed, **sampling)
    return ResumableDataLoader(rows, batch_size=2, sampler=sampler, num_workers=num_workers)


def read(loader):
    return [batch.tolist() for batch in loader]


# -- by itself ---------------------------------------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_and_epoch():
    loader, same, other = make_loader(), make_loader(), make_loader(seed=4)
    first, second = read(loader), read(loader)
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(ROWS)
    assert [read(same), read(same)] == [first, second]
    assert read(other) not in (first, second)  # seed 4 at epoch 0 is not seed 3 at epoch 1


def test_without_shuffling_the_order_is_that_of_the_dataset():
    loader = make_loader(shuffle=False)
    assert read(loader) == read(loader) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 3, 5, 6, 7, 12, 14])
def test_a_loaded_state_goes_on_with_the_next_batch(num_workers, taken):
    whole = make_loader()
    expected = read(whole) + read(whole) + read(whole)
    loader, got = make_loader(num_workers), []
    while len(got) < taken:
        for batch in loader:
            got.append(batch.tolist())
            if len(got) == taken:
                state = loader.state_dict()
                break
    again = make_loader(num_workers)
    again.load_state_dict(state)
    rest = []
    while len(rest) < 18 - taken:
        rest += read(again)
    assert got + rest == expected


def test_a_position_counts_what_was_handed_out_not_what_workers_fetched():
    loader = make_loader(num_workers=2)
    batches = iter(loader)
    next(batches)
    assert loader.state_dict()["position"] == 2
    next(batches)
    assert loader.state_dict()["position"] == 4


def test_an_iteration_that_was_given_up_is_followed_by_the_next_epoch():
    whole = make_loader()
    read(whole)
    loader = make_loader()
    next(iter(loader))
    assert read(loader) == read(whole)


def test_set_epoch_gives_the_order_of_that_epoch():
    whole = make_loader()
    orders = [read(whole) for _ in range(4)]
    loader = make_loader()
    for epoch in (2, 0, 3):
        loader.sampler.set_epoch(epoch)
        assert read(loader) == orders[epoch]


def test_processes_share_the_rows_without_overlap():
    parts = [list(ResumableSampler(ROWS, seed=1, num_replicas=3, rank=rank)) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert len(set(chain(*parts))) == 9


def test_reading_draws_nothing_from_the_global_generator_if_given_its_own():
    rows = torch.arange(6)
    loader = ResumableDataLoader(rows, sampler=ResumableSampler(rows), generator=torch.Generator())
    before = torch.get_rng_state()
    read(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": range(12)}, "rows=11, here it is 12"),
        ({"seed": 5}, "seed=3, here it is 5"),
        ({"shuffle": False}, "shuffle=1, here it is 0"),
        ({"num_replicas": 2}, "processes=1, here it is 2"),
    ],
)
def test_a_position_in_other_data_is_refused(changed, message):
    state = make_loader().state_dict()
    with pytest.raises(ConfigError, match=message):
        make_loader(**changed).load_state_dict(state)


def test_a_position_at_another_batch_size_is_refused():
    state = make_loader().state_dict()
    other = ResumableDataLoader(ROWS, batch_size=4, sampler=ResumableSampler(ROWS, seed=3))
    with pytest.raises(ConfigError, match="batch_size=2, here it is 4; resume with the data settings of the first run"):
        other.load_state_dict(state)


def test_with_another_sampler_it_is_a_plain_loader():
    loader = ResumableDataLoader(ROWS, batch_size=4)
    assert read(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert loader.state_dict() == {}
    loader.load_state_dict({})


# -- in Trainer.fit ----------------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Notes every training batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return self.layer(batch.float()[:, None]).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-5)


class SaveEverywhere(Callback):
    """Saves a checkpoint in every hook where callbacks save, and notes how many batches were seen by then."""

    def __init__(self, folder):
        self.folder, self.seen_at = folder, {}

    def save(self, hook, trainer, module):
        path = self.folder / f"{hook}-epoch{trainer.current_epoch}-step{trainer.global_step}.ckpt"
        if not trainer.sanity_checking and path not in self.seen_at:
            trainer.save_checkpoint(path)
            self.seen_at[path] = len(module.seen)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.save("batch_end", trainer, module)

    def on_validation_end(self, trainer, module):
        self.save("validation_end", trainer, module)

    def on_train_epoch_end(self, trainer, module):
        self.save("epoch_end", trainer, module)

    def on_train_end(self, trainer, module):
        self.save("train_end", trainer, module)


def fit(num_workers=0, ckpt_path=None, callbacks=(), **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    module = Recorder()
    limit = 2 * options["limit_train_batches"] if "limit_train_batches" in options else None
    trainer.fit(
        module, make_loader(num_workers, limit=limit), torch.utils.data.DataLoader(range(2)), ckpt_path=ckpt_path
    )
    return module.seen


@pytest.mark.parametrize(
    ("num_workers", "options"),
    [
        (0, {"max_epochs": 3}),
        (0, {"max_epochs": 3, "limit_train_batches": 4}),
        (0, {"max_steps": 15}),
        (0, {"max_epochs": 2, "val_check_interval": 2}),
        (0, {"max_epochs": 2, "accumulate_grad_batches": 2}),
        (2, {"max_epochs": 2, "val_check_interval": 4}),
    ],
    ids=str,
)
def test_a_resumed_fit_sees_the_batches_of_an_uninterrupted_one(tmp_path: Path, num_workers, options):
    saving = SaveEverywhere(tmp_path)
    whole = fit(num_workers, callbacks=[saving], **options)
    assert len(saving.seen_at) >= 9
    for path, seen in saving.seen_at.items():
        assert fit(num_workers, ckpt_path=path, **options) == whole[seen:], path.name


def test_a_run_may_be_resumed_again_and_again(tmp_path: Path):
    whole = fit(max_steps=18)
    seen, path = [], None
    for stop in (4, 6, 11, 12, 18):
        saving = SaveEverywhere(tmp_path / str(stop))
        seen += fit(ckpt_path=path, callbacks=[saving], max_steps=stop)
        path = list(saving.seen_at)[-1]
    assert seen == whole


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_overfitting_on_a_few_batches_works(tmp_path: Path):
    assert fit(max_epochs=2, overfit_batches=2) == [[0, 1], [2, 3]] * 2

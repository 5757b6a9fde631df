"""Units that are asked for ahead of time."""

import pytest

from lightning_peft.errors import ConfigError
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy
from lightning_peft.testing import tiny_llama


def test_units_gathered_ahead_give_the_same_run(run):
    fields = {"model": lambda: tiny_llama(num_hidden_layers=4), "lr": 1e-3}
    plain = run("fsdp", **fields)
    ahead = run(PEFTFSDPStrategy(start_method="fork", prefetch=2), **fields)
    assert ahead.losses == plain.losses


@pytest.mark.parametrize("fields", [{"prefetch": -1}, {"replicate": 0}, {"units": "layers.*"}])
def test_settings_that_mean_nothing_are_refused(fields):
    with pytest.raises(
        ConfigError, match="units must be a list, replicate and tensor_parallel at least 1 and prefetch no less than 0"
    ):
        PEFTFSDPStrategy(**fields)

"""What is said of the allocator when training starts on a CPU."""

import pytest
import torch

from lightning_peft import allocator_hint as room
from lightning_peft.allocator_hint import VARIABLES, allocator_hint

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _glibc_as_it_comes(monkeypatch):
    for name in (*VARIABLES, "LD_PRELOAD", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(room, "_told", False)
    monkeypatch.setattr(room.platform, "libc_ver", lambda: ("glibc", "2.36"))


def test_it_names_the_variables_once_in_a_process():
    hint = allocator_hint(CPU)
    assert all(f"{name}={value}" in hint for name, value in VARIABLES.items())
    assert allocator_hint(CPU) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "1073741824"),
        ("MALLOC_TRIM_THRESHOLD_", "0"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1073741824"),
    ],
)
def test_who_has_set_something_is_not_told(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert allocator_hint(CPU) is None


def test_it_is_for_cpus_and_glibc(monkeypatch):
    assert allocator_hint(torch.device("cuda", 0)) is None
    monkeypatch.setattr(room.platform, "libc_ver", lambda: ("", ""))
    assert allocator_hint(CPU) is None
    monkeypatch.setattr(room.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert allocator_hint(CPU) is not None


def test_a_fit_says_it_as_information_and_only_once(make_trainer, monkeypatch, tmp_path):
    from lightning_peft import LoRA, PEFTModule, mixin

    said = []
    monkeypatch.setattr(mixin, "rank_zero_info", said.append)

    def fit():
        net = torch.nn.Sequential(torch.nn.Linear(4, 2))
        module = PEFTModule(net, LoRA(rank=1), ["0"], loss=torch.nn.functional.cross_entropy)
        data = [(torch.randn(2, 4), torch.tensor([0, 1]))]
        make_trainer(tmp_path, max_steps=1).fit(module, torch.utils.data.DataLoader(data, batch_size=None))

    fit()  # warnings are errors here, so this is none
    fit()
    assert len(said) == 1
    assert "MALLOC_MMAP_THRESHOLD_" in said[0]

"""Which format reads what: the hook ``register_adapter_formats``, and what happens where none, several or a broken one answers."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_peft import AdapterFormat, ForeignAdapter, LoRA, PEFTModule, hookimpl, load_adapter
from lightning_peft import foreign_files as home
from lightning_peft.errors import AdapterFileError, AdapterMismatchError, ConfigError, PluginError, UnknownNameError
from lightning_peft.plugins.loralib_format import LoralibFile
from lightning_peft.registry import Registry
from lightning_peft.testing import tiny_llama


@dataclass(frozen=True, kw_only=True)
class Dots(AdapterFormat):
    """A file of tensors whose parts are joined by slashes."""

    name: ClassVar[str] = "dots"

    alpha: float = 2.0

    def reads(self, path):
        return path.suffix == ".dots"

    def read(self, path, model):
        tensors = {key.replace("/", "."): value for key, value in torch.load(path, weights_only=True).items()}
        return ForeignAdapter(file=path, method=LoRA(rank=2, alpha=self.alpha), tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class Greedy(Dots):
    name: ClassVar[str] = "greedy"


@dataclass(frozen=True, kw_only=True)
class Broken(Dots):
    name: ClassVar[str] = "broken"

    def reads(self, path):
        return 1 / 0


@pytest.fixture
def registry(monkeypatch):
    """A registry of this test, with the built-ins."""
    made = Registry(entry_points=False)
    monkeypatch.setattr(home, "get_registry", lambda: made)
    return made


def plugin(*kinds):
    class Plugin:
        @hookimpl
        def register_adapter_formats(self):
            return list(kinds)

    return Plugin()


@pytest.fixture
def file(tmp_path):
    torch.save({"0/lora_A/weight": torch.ones(2, 4), "0/lora_B/weight": torch.ones(3, 2)}, tmp_path / "x.dots")
    return tmp_path / "x.dots"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


def test_a_registered_format_is_found_from_the_file_and_takes_its_fields(registry, file):
    registry.register(plugin(Dots))
    assert {"peft", "transformers", "loralib", "litgpt", "torchtune", "dots"} <= set(registry.adapter_formats)
    x = torch.eye(4)
    for format, scale in ((None, 1.0), ("dots", 1.0), (Dots(alpha=6.0), 3.0)):
        model = net()
        load_adapter(model, file, format=format)
        assert torch.allclose(model(x) - net()(x), torch.full((4, 3), 2 * scale), atol=1e-5)


def test_several_that_claim_a_file_are_named(registry, file):
    registry.register(plugin(Dots, Greedy))
    with pytest.raises(
        AdapterFileError, match=r"is read by several formats, \['dots', 'greedy'\]; say which with format="
    ):
        load_adapter(net(), file)
    load_adapter(net(), file, format="greedy")


def test_one_that_breaks_is_named(registry, file):
    registry.register(plugin(Broken))
    with pytest.raises(PluginError, match=r"broken.reads\('.*x.dots'\) raised ZeroDivisionError"):
        load_adapter(net(), file)


def test_what_a_format_returns_is_checked_as_everything_is(registry, file):
    registry.register(plugin(Dots))
    torch.save({"0/lora_A/weight": torch.ones(2, 4), "0/bias": torch.ones(3)}, file)
    with pytest.raises(
        AdapterMismatchError, match=r"x.dots'.*Missing: \['0.lora_B.weight'\].*some would overwrite the base.*0.bias"
    ):
        load_adapter(net(), file)


def test_an_unknown_format_is_refused(file):
    with pytest.raises(UnknownNameError, match="unknown adapter format 'torchtunes'; did you mean 'torchtune'"):
        load_adapter(net(), file, format="torchtunes")
    with pytest.raises(ConfigError, match="format must be the name of an adapter format or one with its fields, got 3"):
        load_adapter(net(), file, format=3)


def test_a_module_starts_from_an_adapter_of_other_software(tmp_path):
    place = "model.layers.0.self_attn.q_proj"
    torch.save({f"{place}.lora_A": torch.ones(4, 64), f"{place}.lora_B": torch.ones(64, 4)}, tmp_path / "lora.bin")
    module = PEFTModule(tiny_llama(), adapter=str(tmp_path / "lora.bin"), adapter_format=LoralibFile(alpha=8))
    module.configure_model()
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert all(place in name for name in trained)
    with pytest.raises(ConfigError, match="adapter_format='loralib' is for an adapter to start from"):
        PEFTModule(tiny_llama(), LoRA(), adapter_format="loralib")

"""A router of a third party, in the three methods that take one: trained, saved, loaded, named in YAML, refused."""

import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml

from lightning_peft import (
    Assignment,
    LoRAMixture,
    MixLoRA,
    MoEUpcycling,
    Router,
    adapter_layers,
    get_registry,
    hookimpl,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.cli import main
from lightning_peft.errors import AdapterConfigError, ConfigError, ExportError, TargetError, UnknownNameError
from lightning_peft.moe.routing import TopKRouter
from lightning_peft.testing import tiny_llama, token_batch


@dataclass(frozen=True, kw_only=True)
class Cooled(Router):
    """Top-K of a softmax with a temperature."""

    name: ClassVar[str] = "cooled"
    causal: ClassVar[bool] = True
    uniform: ClassVar[bool] = True
    normalized: ClassVar[bool] = True

    top_k: int = 2
    """Experts of a token."""
    temperature: float = 1.0
    """What logits are divided by."""

    def __post_init__(self):
        if not self.temperature > 0:
            raise ConfigError(f"Cooled temperature must be positive, got {self.temperature!r}")

    def route(self, logits, *, mask=None, shape=None, training=False):
        return TopKRouter(top_k=self.top_k).route(logits / self.temperature, mask=mask)


@dataclass(frozen=True, kw_only=True)
class First(Router):
    """Every second token goes to the first expert, the others to none."""

    name: ClassVar[str] = "first"
    causal: ClassVar[bool] = True

    def route(self, logits, *, mask=None, shape=None, training=False):
        tokens = torch.arange(0, len(logits), 2)
        p = torch.softmax(logits, -1)
        return Assignment(tokens, torch.zeros_like(tokens), p[::2, 0], logits, p, None)


@dataclass(frozen=True, kw_only=True)
class LooksAhead(Cooled):
    """One that says that it is not causal."""

    name: ClassVar[str] = "looks_ahead"
    causal: ClassVar[bool] = False


@pytest.fixture(autouse=True)
def _registered():
    @hookimpl
    def register_routers():
        return [Cooled, First, LooksAhead]

    plugin = types.ModuleType("acme_routers")
    plugin.register_routers = register_routers
    get_registry.cache_clear()
    get_registry().register(plugin)
    yield
    get_registry.cache_clear()


FIELDS = {"router": "cooled", "router_fields": {"temperature": 0.25}, "top_k": 3, "experts": 4}
METHODS = pytest.mark.parametrize(
    ("kind", "fields"),
    [(MoEUpcycling, {"expert_noise": 0.1}), (MixLoRA, {"rank": 2}), (LoRAMixture, {"rank": 2})],
    ids=["moe_upcycling", "mix_lora", "lora_mixture"],
)


def routed(model):
    adapters = [layer.adapters["default"] for layer in adapter_layers(model).values()]
    return [adapter for adapter in adapters if hasattr(adapter, "router")]


@METHODS
def test_it_trains_is_saved_by_name_and_fields_and_loaded(kind, fields, tmp_path):
    torch.manual_seed(0)
    model, ids = tiny_llama(), token_batch()["input_ids"]
    inject(model, kind(**fields, **FIELDS))
    assert routed(model)[0].rule == Cooled(top_k=3, temperature=0.25)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert routed(model)[0].get_parameter("router").grad.abs().max() > 0
    save_adapter(model, tmp_path)
    written = "".join("".join(path.read_text().split()) for path in tmp_path.glob("*.json"))
    assert '"router":"cooled"' in written
    assert '"temperature":0.25' in written
    other = tiny_llama()
    load_adapter(other, tmp_path)
    assert routed(other)[0].rule == Cooled(top_k=3, temperature=0.25)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        assert torch.equal(other.eval()(input_ids=ids).logits, wanted)
        for one in routed(other):  # another rule is another function
            one.rule = TopKRouter(top_k=3)
        assert not torch.equal(other(input_ids=ids).logits, wanted)


def test_a_folder_whose_router_nobody_has_is_refused(tmp_path):
    model = tiny_llama()
    inject(model, MoEUpcycling(**FIELDS))
    save_adapter(model, tmp_path)
    get_registry.cache_clear()
    with pytest.raises(AdapterConfigError, match="lightning_peft.json': unknown router 'cooled'"):
        load_adapter(tiny_llama(), tmp_path)


ROWS = """
import torch
from lightning.pytorch import LightningDataModule


class AcmeRows(LightningDataModule):
    def train_dataloader(self):
        rows = torch.arange(64).view(8, 8)
        return torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4)
"""


def test_it_is_named_in_yaml_and_on_the_command_line(tmp_path, monkeypatch, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "acme_rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    checkpoint = {"class_path": "AdapterCheckpoint", "init_args": {"dirpath": "out", "filename": "last"}}
    config = {
        "model": {
            "base": {"class_path": "CausalLMLoader", "init_args": {"path": "base"}},
            "method": {"class_path": "moe_upcycling", "init_args": FIELDS},
        },
        "data": "acme_rows.AcmeRows",
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "callbacks": [checkpoint]},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml", "--trainer.max_steps=2", "--model.method.top_k=2"]) == 0
    model = tiny_llama()
    load_adapter(model, "out/last.adapter")
    assert routed(model)[0].rule == Cooled(top_k=2, temperature=0.25)
    capsys.readouterr()
    assert main(["plugins"]) == 0
    listed = capsys.readouterr().out
    assert "router: cooled, first, looks_ahead" in listed
    assert "router: topk, noisy_topk, sigmoid, expert_choice" in listed
    assert main(["fit", "--config", "run.yaml", "--model.method.router=coold"]) != 0
    assert "unknown router 'coold'; did you mean 'cooled'" in capsys.readouterr().err


def test_tokens_may_get_no_expert_where_the_method_allows_it():
    model, plain = tiny_llama(), tiny_llama()
    inject(model, MoEUpcycling(experts=2, router="first", uncovered="dense", router_std=0.0))
    x = torch.randn(1, 4, 64)
    with torch.no_grad():
        wanted, found = (one.model.layers[0].mlp(x) for one in (plain, model))
    assert torch.allclose(found[:, 1::2], wanted[:, 1::2], atol=1e-6)
    assert torch.allclose(found[:, ::2], wanted[:, ::2] / 2, atol=1e-6)  # p is one half


@pytest.mark.parametrize(
    ("method", "fields", "error", "message"),
    [
        (MoEUpcycling, {"router": "coold"}, UnknownNameError, "unknown router 'coold'; did you mean 'cooled'"),
        (MixLoRA, {"router": "top_k"}, UnknownNameError, "unknown router 'top_k'; did you mean 'topk'"),
        (LoRAMixture, {"router": "sigmod"}, UnknownNameError, "unknown router 'sigmod'; did you mean 'sigmoid'"),
        (MoEUpcycling, {"router": "cooled", "router_fields": {"temp": 2}}, ConfigError, "has no field 'temp'"),
        (MixLoRA, {"router": "cooled", "router_fields": {"temperature": 0}}, ConfigError, "must be positive, got 0"),
        (MixLoRA, {"router": "first"}, ConfigError, "'first' does not let each token choose the same number"),
        (LoRAMixture, {"router": "expert_choice"}, ConfigError, "'expert_choice' does not let each token choose"),
        (LoRAMixture, {"router": "looks_ahead"}, ConfigError, "'looks_ahead' does not let each token choose"),
        (MixLoRA, {"router_fields": {"combine": "softmax"}}, ConfigError, "MixLoRA needs a router whose weights sum"),
        (LoRAMixture, {"routing": "soft", "router": "sigmoid"}, ConfigError, "every token goes to all experts here"),
        (MoEUpcycling, {"router": "cooled", "granularity": 2}, ConfigError, "chooses all parts of a copy together"),
    ],
)
def test_what_does_not_fit_is_refused(method, fields, error, message):
    with pytest.raises(error) as caught:
        method(**fields)
    assert message in str(caught.value)


def test_one_that_is_not_causal_is_refused_in_a_decoder_and_none_leaves_as_mixtral(tmp_path):
    with pytest.raises(TargetError, match="router='looks_ahead' was asked for at .* in a decoder"):
        inject(tiny_llama(), MoEUpcycling(router="looks_ahead"))
    model = tiny_llama()
    inject(model, MoEUpcycling(**FIELDS))
    with pytest.raises(ExportError, match="'cooled' at .* has no format in transformers, which has 'topk' only"):
        get_registry().exporters["mixtral"]().export(model, tmp_path / "out")


@pytest.mark.parametrize("router", ["sigmoid", "noisy_topk"])
@pytest.mark.parametrize("kind", [MixLoRA, LoRAMixture])
def test_low_rank_experts_take_the_other_built_in_routers(kind, router):
    model, plain = tiny_llama(), tiny_llama()
    inject(model, kind(experts=4, rank=2, router=router, dropout=0.0))
    assert {type(one.rule).name for one in routed(model)} == {router}
    with torch.no_grad():
        wanted = plain(**token_batch()).logits
        assert float((model.train()(**token_batch()).logits - wanted).abs().max() / wanted.abs().max()) <= 2e-6

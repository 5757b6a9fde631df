"""Half precision rounds the frozen base and leaves what is trained alone, whatever the strategy."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from lightning_peft import (
    Bottleneck,
    DoRA,
    FrozenHalfPrecision,
    FullFineTuning,
    LoRA,
    LoRAMixture,
    MoEUpcycling,
    NormTuning,
    PEFTFSDPStrategy,
    PEFTMixin,
    PrefixTuning,
    PromptTuning,
    TrainableTokens,
    VeRA,
    inject,
    set_active_adapters,
)
from lightning_peft.errors import ConfigError, LightningPEFTWarning
from lightning_peft.testing import tiny_llama

KINDS = ["single", "ddp", "fsdp"]
METHODS = {
    "lora": LoRA(rank=4),
    "dora": DoRA(rank=4),
    "vera": VeRA(rank=8),
    "bottleneck": Bottleneck(),
    "prefix": PrefixTuning(num_virtual_tokens=4),
    "prompt": PromptTuning(num_virtual_tokens=4),
    "norms": NormTuning(),
    "tokens": TrainableTokens(tokens=[1, 2, 3]),
    "moe": MoEUpcycling(experts=4, top_k=2),
    "lora mixture": LoRAMixture(rank=2),
    "full": FullFineTuning(),
}


class Dtypes(Callback):
    """Notes what is trained in which dtype, and how much of it moved."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, module):
        self.before = {name: whole(p).clone() for name, p in module.named_parameters() if p.requires_grad}

    def on_train_end(self, trainer, module):
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        moved = [
            (whole(p) != self.before[name]).float().mean().item()
            for name, p in trained.items()
            if whole(p).numel() > 64
        ]
        frozen = {str(p.dtype) for p in module.parameters() if not p.requires_grad and p.is_floating_point()}
        buffers = {
            name: str(b.dtype) for name, b in module.named_buffers() if b.is_floating_point() and "inv_freq" in name
        }
        found = {
            "trained": {str(p.dtype) for p in trained.values()}, "frozen": frozen, "buffers": set(buffers.values()),
            "moved": sum(moved) / max(len(moved), 1), "precision": trainer.precision,
        }  # fmt: skip
        if trainer.is_global_zero:
            torch.save(found, self.path)


def whole(parameter):
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_method_trains_in_float32_over_a_rounded_base(run, tmp_path, name, kind):
    done = run(
        kind, method=METHODS[name], precision="bf16-true", callbacks=[Dtypes(tmp_path / "seen.pt")], lr=1e-3, steps=3
    )
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["trained"] == {"torch.float32"}
    assert seen["frozen"] == ({"torch.bfloat16"})
    assert seen["buffers"] == {"torch.float32"}
    assert len(set(done.losses)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_nearly_every_element_moves(run, tmp_path, kind):
    run(kind, precision="bf16-true", callbacks=[Dtypes(tmp_path / "seen.pt")], lr=2e-4, steps=30, batches=32)
    assert torch.load(tmp_path / "seen.pt")["moved"] >= 0.99


class Stock(HalfPrecision):
    """What Lightning does, under a name that is not replaced."""


def test_what_lightning_does_leaves_a_quarter_where_it_was_and_is_warned_of(run, tmp_path):
    with pytest.warns(
        LightningPEFTWarning, match=r"precision='bf16-true' rounds the adapters to 16 bits too.*call super\(\)\.setup"
    ):
        run(plugins=[Stock("bf16-true")], callbacks=[Dtypes(tmp_path / "seen.pt")], lr=2e-4, steps=30, batches=32)
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["trained"] == {"torch.bfloat16"}
    assert seen["moved"] < 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit(run, tmp_path, kind):
    alone = run(kind, precision="bf16-true", steps=4)
    run(kind, precision="bf16-true", steps=2, save=tmp_path / "a")
    resumed = run(kind, precision="bf16-true", steps=4, resume=str(tmp_path / "a" / "step=2.ckpt"))
    assert resumed.losses == alone.losses[2:]
    assert {value.dtype for value in resumed.state.values()} == {torch.float32}
    for key, value in alone.state.items():
        assert torch.equal(resumed.state[key], value), key


def test_all_strategies_agree(run):
    one, ddp, fsdp = (run(kind, precision="bf16-true", lr=1e-3) for kind in KINDS)
    assert ddp.losses == fsdp.losses
    assert max(abs(a - b) / b for a, b in zip(ddp.losses, one.losses, strict=True)) <= 1e-4


def test_it_is_near_to_mixed_precision_over_a_base_in_16_bits(run):
    def half():
        return tiny_llama().to(torch.bfloat16)

    true, mixed = run(precision="bf16-true", lr=1e-3), run(model=half, precision="bf16-mixed", lr=1e-3)
    assert max(abs(a - b) / b for a, b in zip(true.losses, mixed.losses, strict=True)) <= 1e-3


class Own(PEFTMixin, LightningModule):
    """A module of somebody else, with a head beside the adapted model."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = tiny_llama().train()
            inject(self.model, LoRA(rank=4))
            self.head = nn.Linear(self.model.config.vocab_size, 3)
            self.default = torch.get_default_dtype()

    def training_step(self, batch, batch_idx):
        return self.head(self.model(input_ids=batch["input_ids"]).logits.mean(1)).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_ones_own_with_a_head_is_made_and_kept_in_float32(run, tmp_path, kind):
    done = run(kind, module=Own(), precision="bf16-true", callbacks=[Dtypes(tmp_path / "seen.pt")], steps=2)
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["trained"] == {"torch.float32"}
    assert seen["frozen"] == {"torch.bfloat16"}
    assert len(set(done.losses)) == 2


def test_a_setup_that_calls_no_super_is_warned_of(run, tmp_path):
    class Forgetful(Own):
        def setup(self, stage):
            pass

    with pytest.warns(LightningPEFTWarning, match="where Forgetful overrides it"):
        run(module=Forgetful(), precision="bf16-true", steps=1)


@pytest.mark.parametrize("kind", ["single", "ddp"])
def test_any_module_is_served_by_the_plugin_and_by_the_strategies(run, tmp_path, kind):
    class Plain(LightningModule):
        training_step, configure_optimizers = Own.training_step, Own.configure_optimizers

        def __init__(self):
            super().__init__()
            self.model = tiny_llama().train()
            inject(self.model, LoRA(rank=4))
            self.head = nn.Linear(self.model.config.vocab_size, 3)

    module = Plain()
    chosen = {"plugins": [FrozenHalfPrecision()]} if kind == "single" else {"precision": "bf16-true"}
    run(kind, module=module, **chosen, callbacks=[Dtypes(tmp_path / "seen.pt")], steps=2)
    seen = torch.load(tmp_path / "seen.pt")
    assert (seen["trained"], seen["frozen"]) == ({"torch.float32"}, {"torch.bfloat16"})
    assert seen["precision"] == "bf16-true"


def test_adapters_that_are_not_active_and_packed_weights_stay_as_they_are():
    model = tiny_llama()
    inject(model, LoRA(rank=2), name="one")
    inject(model, LoRA(rank=2), name="two")
    set_active_adapters(model, ["one"])
    packed = nn.Parameter(torch.zeros(4, dtype=torch.float16), requires_grad=False)
    packed.quant_state = object()
    model.register_parameter("packed", packed)
    FrozenHalfPrecision().convert_module(model)
    by_adapter = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert by_adapter == {torch.float32}
    assert model.packed.dtype == torch.float16
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


# -- float16 -----------------------------------------------------------------------------------------------------------


def test_float16_runs_and_is_warned_of(run, tmp_path):
    with pytest.warns(LightningPEFTWarning, match="precision='16-true' scales no loss"):
        run(precision="16-true", callbacks=[Dtypes(tmp_path / "seen.pt")], steps=2, lr=1e-3)
    seen = torch.load(tmp_path / "seen.pt")
    assert (seen["trained"], seen["frozen"]) == ({"torch.float32"}, {"torch.float16"})


def test_sharding_refuses_what_scales_the_loss(run):
    scaled = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(
        ProcessRaisedException, match="ConfigError: precision='16-mixed' scales the loss.*use 'bf16-mixed'"
    ):
        run("fsdp", plugins=[scaled], devices=1)


# -- what is gathered --------------------------------------------------------------------------------------------------


class Gathered(Callback):
    """Notes the dtypes of weights of a block while it runs."""

    def __init__(self, path):
        self.path, self.seen = path, set()

    def on_train_start(self, trainer, module):
        for layer in module.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda mlp, _: self.seen.update(str(p.dtype) for p in mlp.parameters()))

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            torch.save(self.seen, self.path)


def test_weights_are_gathered_in_the_dtype_asked_for(run, tmp_path):
    half = PEFTFSDPStrategy(start_method="fork", gather_dtype="bf16")
    done = run(half, callbacks=[Gathered(tmp_path / "half.pt")], lr=1e-3)
    whole_run = run("fsdp", callbacks=[Gathered(tmp_path / "whole.pt")], lr=1e-3)
    assert torch.load(tmp_path / "half.pt") == {"torch.bfloat16"}
    assert torch.load(tmp_path / "whole.pt") == {"torch.float32"}
    assert {value.dtype for value in done.state.values()} == {torch.float32}
    assert done.losses != whole_run.losses
    assert max(abs(a - b) / b for a, b in zip(done.losses, whole_run.losses, strict=True)) <= 2e-3


def test_a_dtype_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="gather_dtype must be one of bf16, fp16, fp32 or None, got 'bfloat16'"):
        PEFTFSDPStrategy(gather_dtype="bfloat16")

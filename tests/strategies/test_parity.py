"""Two processes train what one trains: DDP and FSDP2 agree bit for bit, and with one process within rounding."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_peft import (
    BitFit,
    Bottleneck,
    FullFineTuning,
    LoRA,
    MoEUpcycling,
    PEFTDDPStrategy,
    PEFTFSDPStrategy,
    PEFTMixin,
    PEFTModule,
    PrefixTuning,
    QLoRA,
    inject,
)
from lightning_peft.strategies.clipping import clip_gradients_by_norm
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch


def gpt2():
    """A model with biases, and without dropout, whose masks are those of a process."""
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


METHODS = {
    "lora": (LoRA(rank=4, init="gaussian"), None),
    "bottleneck": (Bottleneck(), None),
    "prefix": (PrefixTuning(num_virtual_tokens=4), None),
    "bitfit": (BitFit(), gpt2),
    "moe": (
        MoEUpcycling(experts=4, top_k=2, balance_coef=0.0),
        None,
    ),  # with a balance, of all processes, in test_tokens.py
    "qlora": (QLoRA(rank=4, compute_dtype="float32", init="gaussian", double_quantization=True), None),
}


def relative(one, other):
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_trains(run, name, precision):
    """One process that runs the parts of both one after the other, as a window, rounds what they round, and has their bits."""
    method, model = METHODS[name]
    fields = {"method": method, "precision": precision, "lr": 1e-3} | ({"model": model} if model else {})
    parts, ddp, fsdp = run("single", parts=2, **fields), run("ddp", **fields), run("fsdp", **fields)
    assert ddp.losses == fsdp.losses == parts.losses
    assert len(set(ddp.losses)) == 4
    same_state(ddp, fsdp)
    same_state(ddp, parts)
    if precision == "32-true":
        assert relative(ddp.losses, run("single", **fields).losses) <= 1e-6


class AddsAsTwo(Callback):
    """Has one process add the gradients of a window as two do, each its own, then those of both, and their norm as the strategies do."""

    def __init__(self):
        self.sums, self.seen = [{}, {}], 0

    def setup(self, trainer, module, stage):
        plugin = trainer.precision_plugin
        plugin.clip_grad_by_norm = lambda optimizer, value: clip_gradients_by_norm(plugin.main_params(optimizer), value)

    def on_after_backward(self, trainer, module):
        own = self.sums[self.seen % 2]
        self.seen += 1
        trained = [p for p in module.parameters() if p.requires_grad]
        for p in trained:
            if p.grad is not None:
                own[p] = own[p] + p.grad if p in own else p.grad
                p.grad = None
        if self.seen == trainer.accumulate_grad_batches:
            for p in trained:
                parts = [part[p] for part in self.sums if p in part]
                p.grad = sum(parts[1:], parts[0]) if parts else None
            self.sums, self.seen = [{}, {}], 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_so_they_do_with_clipping_windows_and_activations_run_again(run, name, precision):
    """One process that adds what two add has their bits; in the order of its batches it rounds otherwise."""
    method, model = METHODS[name]
    fields = {"method": method, "precision": precision, "lr": 1e-3, "steps": 3} | ({"model": model} if model else {})
    fields |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-2}
    one, ddp = run("single", parts=2, callbacks=[AddsAsTwo()], **fields), run("ddp", **fields)
    fsdp = run(sharding(activation_checkpointing=True), **fields)
    assert ddp.losses == fsdp.losses == one.losses
    assert len(set(ddp.losses)) == 6
    same_state(ddp, fsdp)
    same_state(ddp, one)
    if precision == "32-true":
        assert relative(ddp.losses, run("single", parts=2, **fields).losses) <= 1e-6


def same_state(one, other):
    assert one.state.keys() == other.state.keys()
    assert one.state
    for key, value in one.state.items():
        assert torch.equal(other.state[key], value), key


def sharding(**fields):
    return PEFTFSDPStrategy(start_method="fork", **fields)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_that_of_the_whole_gradient(run, algorithm):
    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm, "method": LoRA(rank=4, init="gaussian")}
    one, ddp, fsdp = (run(kind, **clip) for kind in ("single", "ddp", "fsdp"))
    free = run("fsdp", method=LoRA(rank=4, init="gaussian"))
    assert ddp.losses == fsdp.losses
    same_state(ddp, fsdp)
    assert relative(ddp.losses, one.losses) <= 1e-6
    assert free.losses != fsdp.losses


class Operations(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Reductions(Callback):
    """Writes for each batch how often gradients were reduced, or for DDP, which reduces out of sight, whether all processes have the same."""

    def __init__(self, path):
        self.path, self.counts = path, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.mode = Operations()
        self.mode.__enter__()

    def on_after_backward(self, trainer, module):
        self.mode.__exit__(None, None, None)
        reduced = sum(name.startswith("c10d") and "reduce" in name for name in self.mode.names)
        if isinstance(trainer.strategy, PEFTDDPStrategy):
            mine = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
            both = [torch.empty_like(mine) for _ in range(trainer.world_size)]
            dist.all_gather(both, mine)
            reduced = int(torch.equal(*both))
        self.counts.append(reduced)

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            torch.save(self.counts, self.path)


def test_gradients_are_reduced_once_for_a_window_of_batches(run, tmp_path):
    done = {}
    for kind in ("single", "ddp", "fsdp"):
        watch = [] if kind == "single" else [Reductions(tmp_path / kind)]
        done[kind] = run(kind, accumulate_grad_batches=2, steps=3, callbacks=watch, lr=1e-3)
    assert done["ddp"].losses == done["fsdp"].losses
    same_state(done["ddp"], done["fsdp"])
    assert relative(done["ddp"].losses, done["single"].losses) <= 1e-6
    assert torch.load(tmp_path / "ddp") == [0, 1] * 3
    counts = torch.load(tmp_path / "fsdp")
    assert counts[0::2] == [0, 0, 0]
    assert min(counts[1::2]) > 0


SETTINGS = {
    "activation_checkpointing": {"activation_checkpointing": True},
    "kept after forward": {"reshard_after_forward": False},
    "units by class": {"units": ["LlamaAttention", "LlamaMLP"]},
    "units by path": {"units": ["model.layers.*.mlp", "re:.*self_attn"]},
    "one unit": {"units": []},
}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # nothing changes it in place
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "method", [LoRA(rank=4, init="gaussian"), MoEUpcycling(experts=4, top_k=2)], ids=["lora", "moe"]
)
def test_how_it_is_sharded_changes_no_bit(run, setting, method):
    ddp = run("ddp", method=method, lr=1e-3)
    fsdp = run(sharding(**SETTINGS[setting]), method=method, lr=1e-3)
    assert fsdp.losses == ddp.losses
    same_state(ddp, fsdp)


def test_full_fine_tuning_is_plain_sharding(run):
    one, ddp, fsdp = (run(kind, method=FullFineTuning(), lr=1e-4) for kind in ("single", "ddp", "fsdp"))
    assert ddp.losses == fsdp.losses
    same_state(ddp, fsdp)
    assert relative(ddp.losses, one.losses) <= 1e-6


class Local(Callback):
    """Writes the part of a weight that a process holds."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, module):
        weight = module.model.get_parameter("model.embed_tokens.weight")
        if trainer.is_global_zero:
            torch.save((weight.to_local().shape[0], weight.shape[0], trainer.strategy.sharded_units), self.path)


@pytest.mark.parametrize(("replicate", "part"), [(1, 4), (2, 2), (4, 1)])
def test_four_processes_shard_within_groups(run, tmp_path, replicate, part):
    one = run("single", steps=2, lr=1e-3)
    strategy = sharding(replicate=replicate)
    done = run(strategy, devices=4, steps=2, lr=1e-3, callbacks=[Local(tmp_path / "local.pt")])
    local, whole, units = torch.load(tmp_path / "local.pt")
    assert local * part == whole
    assert units == ["model.model.layers.0", "model.model.layers.1", "model"]
    assert relative(done.losses, one.losses) <= 1e-6
    assert done.state.keys() == one.state.keys()


# -- modules of one's own ----------------------------------------------------------------------------------------------


class Classifier(PEFTMixin, LightningModule):
    """An adapted model, and a head beside it."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = tiny_llama().train()
            inject(self.model, LoRA(rank=4, init="gaussian"))
            self.head = nn.Sequential(
                nn.LayerNorm(self.model.config.vocab_size), nn.Linear(self.model.config.vocab_size, 3)
            )

    def training_step(self, batch, batch_idx):
        scores = self.head(self.model(input_ids=batch["input_ids"]).logits.mean(1))  # (batch, 3)
        return nn.functional.cross_entropy(scores, batch["input_ids"][:, 0] % 3)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_head_beside_the_model_is_trained_and_sharded(run, precision):
    one, ddp, fsdp = (run(kind, module=Classifier(), precision=precision) for kind in ("single", "ddp", "fsdp"))
    assert ddp.losses == fsdp.losses
    same_state(ddp, fsdp)
    assert relative(ddp.losses, one.losses) <= (1e-6 if precision == "32-true" else 1e-3)
    assert {key for key in fsdp.state if key.startswith("head.")} == {
        "head.0.weight",
        "head.0.bias",
        "head.1.weight",
        "head.1.bias",
    }


# -- runs that do not train --------------------------------------------------------------------------------------------


class Measured(Callback):
    """Writes what was measured."""

    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, module):
        if trainer.is_global_zero and not trainer.sanity_checking:
            torch.save(
                {key: float(v) for key, v in trainer.callback_metrics.items() if key.startswith("val_")}, self.path
            )


def rows_of_tokens(count):
    """Return rows in which very different numbers of tokens are predicted."""
    made = []
    for number, row in enumerate(token_batch(seed=9, rows=count)["input_ids"]):
        labels = row.clone()
        labels[: number % 2 * (len(row) - 2) + number // 2] = -100
        made.append({"input_ids": row, "labels": labels})
    return made


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_validation_measures_what_one_process_measures(run, in_turn, tmp_path, kind):
    found = {}
    for name in ("single", kind):
        data = DataLoader(rows_of_tokens(10), batch_size=4, sampler=in_turn(10))
        run(name, val=data, callbacks=[Measured(tmp_path / f"{name}.pt")], lr=1e-3, val_check_interval=4)
        found[name] = torch.load(tmp_path / f"{name}.pt")
    one, several = found["single"], found[kind]
    assert one.keys() == several.keys() == {"val_loss", "val_perplexity", "val_token_accuracy"}
    assert several == pytest.approx(one, rel=1e-5)


class Predicted(Callback):
    """Writes what was predicted."""

    def __init__(self, path):
        self.path = path

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        torch.save(outputs, f"{self.path}{trainer.global_rank}")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_prediction_gives_what_one_process_gives(forked, tmp_path, kind):
    module = PEFTModule(tiny_llama(), LoRA(rank=4, init="gaussian"))
    module.configure_model()
    data = rows_of_tokens(4)
    expected = module.eval()(torch.stack([row["input_ids"] for row in data])).logits
    forked(kind, callbacks=[Predicted(f"{tmp_path}/")]).predict(
        module, DataLoader(data, batch_size=2), return_predictions=False
    )
    first, second = (torch.load(f"{tmp_path}/{rank}") for rank in range(2))
    torch.testing.assert_close(first, expected[0::2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second, expected[1::2], rtol=1e-5, atol=1e-6)

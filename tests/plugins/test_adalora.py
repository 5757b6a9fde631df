"""AdaLoRA against HF PEFT's: the same schedule, masks and logits step by step, and folders that load both ways."""

import copy
import json
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import (
    AdaLoRA,
    Adaptation,
    LoRA,
    NormTuning,
    PEFTMixin,
    PEFTModule,
    adapter_layers,
    adapter_state_dict,
    allocated_ranks,
    inject,
    load_adapter,
    merge_adapters,
    parameter_groups,
    save_adapter,
)
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.adapter_training import auxiliary_loss
from lightning_peft.callbacks import AdapterCheckpoint, Phase, PhaseSchedule
from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler
from lightning_peft.errors import AdapterConfigError, ConfigError, LightningPEFTWarning, TargetError
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::UserWarning:peft",
    "ignore:The following rank_pattern keys:RuntimeWarning",  # of HF PEFT's LoRA, about AdaLora's own pattern
    "ignore:Initializing zero-element tensors:UserWarning",
    "ignore:The dirpath has changed",  # Lightning, of the second folder of a test
)


class TestAdaLoRA(MethodConformance):
    # The suite compares runs of two and of four steps, whose budgets are the same only where nothing is pruned.
    method = AdaLoRA(init_rank=4, target_rank=4, alpha=128.0)


class TestOnGPT2(MethodConformance):
    method = AdaLoRA(init_rank=4, target_rank=4, alpha=128.0, orthogonality=0.0)

    def model(self):
        return tiny_gpt2()


class TestOnConvolutions(MethodConformance):
    method = AdaLoRA(init_rank=3, target_rank=3, alpha=2048.0)
    targets = ("0", "2")

    def model(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, (3, 2), stride=2), nn.Flatten(2), nn.Conv1d(4, 3, 3, padding=1))
        return net.eval()

    def inputs(self, seed=0):
        return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


MODELS = {"llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"]), "gpt2": (tiny_gpt2, ["c_attn", "c_fc"])}
SCHEDULE = {"initial_steps": 2, "final_steps": 3, "interval": 2}
TOTAL = 12


def hf_config(method, targets, **options):
    return AdaLoraConfig(
        init_r=method.init_rank,
        target_r=method.target_rank,
        lora_alpha=method.alpha,
        tinit=method.initial_steps,
        tfinal=method.final_steps,
        deltaT=method.interval,
        beta1=method.beta1,
        beta2=method.beta2,
        orth_reg_weight=method.orthogonality,
        total_step=TOTAL,
        target_modules=targets,
        **{"task_type": "CAUSAL_LM", **options},
    )


def theirs_at(theirs, path, letter):
    return getattr(theirs.get_submodule(f"base_model.model.{path}"), f"lora_{letter}")["default"]


def trained(theirs):
    """Return what HF PEFT trains and saves: 0.21.2 also lets the divisor ``ranknum`` require gradients, but saves it not."""
    return [p for name, p in theirs.named_parameters() if p.requires_grad and ".ranknum." not in name]


def pair(kind, method):
    """Return two models with the same tensors in float64: ours and HF PEFT's."""
    make, targets = MODELS[kind]
    ours = make().double()
    inject(ours, method, targets)
    theirs = get_peft_model(make().double(), hf_config(method, targets, fan_in_fan_out=kind == "gpt2"))
    for path, adapter in adapters_named(ours, "default").items():
        adapter.import_state({f"lora_{letter}": theirs_at(theirs, path, letter).detach() for letter in "AEB"})
    return ours.eval(), theirs.eval()  # without dropout


@torch.no_grad()
def logits(model, **inputs):
    return model(**(inputs or token_batch())).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def step_of_ours(model, method, optimizer, step, total=TOTAL, name="default"):
    batch = token_batch(step)["input_ids"]
    optimizer.zero_grad()
    loss = model(input_ids=batch, labels=batch).loss
    extra = auxiliary_loss(model)
    loss = loss if extra is None else loss + extra
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        method.after_optimizer_step(adapters_named(model, name), optimizer, step, total)
    return loss.item()


def step_of_theirs(model, optimizer, step):
    batch = token_batch(step)["input_ids"]
    optimizer.zero_grad()
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(step)
    return loss.item()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_step_is_that_of_hf_peft(kind, optimizer):
    method = AdaLoRA(init_rank=5, target_rank=2, alpha=10.0, orthogonality=0.3, beta2=0.7, **SCHEDULE)
    ours, theirs = pair(kind, method)
    make = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=5.0),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.1),
    }[optimizer]
    mine = make([p for p in ours.parameters() if p.requires_grad])
    peer = make(trained(theirs))
    kept = []
    for step in range(TOTAL):
        a, b = step_of_ours(ours, method, mine, step), step_of_theirs(theirs, peer, step)
        assert a == pytest.approx(b, rel=1e-6)
        for path, adapter in adapters_named(ours, "default").items():
            E = theirs_at(theirs, path, "E")
            assert torch.equal(adapter.lora_E == 0, E == 0), (step, path)
            if optimizer == "adamw":  # what HF PEFT leaves there
                for key in ("exp_avg", "exp_avg_sq"):
                    peer.state[E][key].masked_fill_(E == 0, 0.0)
        kept.append(sum(int((a.lora_E != 0).sum()) for a in adapters_named(ours, "default").values()))
    assert relative(logits(ours), logits(theirs)) <= 1e-5
    places = len(allocated_ranks(ours))
    assert sum(allocated_ranks(ours).values()) == kept[-1] == 2 * places
    assert len(set(allocated_ranks(ours).values())) > 1, "all places have the same rank, so nothing was allocated"
    pattern = theirs.peft_config["default"].rank_pattern
    assert {key.removesuffix(".lora_E.default"): sum(mask) for key, mask in pattern.items()} == allocated_ranks(ours)
    # Between two allocations pruned triplets live, and in the end they do not.
    assert kept[3] == 5 * places
    assert kept[4] < kept[3]
    assert kept[9:] == [2 * places] * 3


def test_the_penalty_is_that_of_hf_peft():
    method = AdaLoRA(init_rank=3, target_rank=2, orthogonality=0.7)
    ours, theirs = pair("llama", method)
    batch = token_batch()["input_ids"]
    plain = ours(input_ids=batch, labels=batch).loss
    with_penalty = theirs(input_ids=batch, labels=batch).loss
    penalty = auxiliary_loss(ours).item()
    assert (with_penalty - plain).item() == pytest.approx(penalty, rel=1e-6)
    assert penalty > 0.5


def test_the_budget_is_the_papers():
    method = AdaLoRA(init_rank=6, target_rank=2, initial_steps=10, final_steps=30)
    for step, wanted in {0: 600, 10: 600, 40: int(400 * 0.5**3 + 200), 69: 200, 70: 200, 99: 200}.items():
        assert method.budget(step, 100, 600, 200) == wanted
    # HF PEFT's scheduler, at every step.
    from peft.tuners.adalora.layer import RankAllocator

    config = AdaLoraConfig(init_r=6, target_r=2, tinit=10, tfinal=30, total_step=100)
    allocator = RankAllocator(nn.Linear(1, 1), config, "default")
    allocator.init_bgt, allocator.target_bgt = 600, 200
    assert [method.budget(t, 100, 600, 200) for t in range(100)] == [
        allocator.budget_schedule(t)[0] for t in range(100)
    ]


def pruned(kind="llama", **options):
    """Return a model whose ranks are settled, in float32, and its method."""
    method = AdaLoRA(init_rank=5, target_rank=2, **SCHEDULE, **options)
    make, targets = MODELS[kind]
    model = make()
    inject(model, method, targets)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-2)
    for step in range(TOTAL):
        step_of_ours(model, method, optimizer, step)
    return model, method, optimizer


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits(kind, settled, tmp_path):
    if settled:
        model, method, _ = pruned(kind)
    else:
        make, targets = MODELS[kind]
        model, method = make(), AdaLoRA(init_rank=5, target_rank=2, **SCHEDULE)
        inject(model, method, targets)
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-2)
        for step in range(6):  # pruned, but not for good
            step_of_ours(model, method, optimizer, step)
        assert sum(allocated_ranks(model).values()) < 5 * len(allocated_ranks(model))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank_pattern"] is not None) == settled
    assert config["total_step"] == (TOTAL if settled else 6)
    tensors = adapter_state_dict(model)
    for path, rank in allocated_ranks(model).items():
        rank = rank if settled else 5
        assert tensors[f"{path}.lora_E"].shape == (rank, 1)
        assert len(tensors[f"{path}.lora_A"]) == tensors[f"{path}.lora_B"].shape[1] == rank
    theirs = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path).eval()
    assert relative(logits(theirs), logits(model.eval())) <= 1e-5
    assert relative(logits(MODELS[kind][0]()), logits(model)) > 1e-2
    for own in (True, False):
        if not own:
            (tmp_path / "lightning_peft.json").unlink()
        again = MODELS[kind][0]()
        assert load_adapter(again, tmp_path).method == method
        assert relative(logits(again), logits(model)) <= 1e-5
        if settled:
            assert allocated_ranks(again) == allocated_ranks(model)
        save_adapter(again, tmp_path / "again")
        both = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path / "again").eval()
        assert relative(logits(both), logits(model)) <= 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_what_hf_peft_writes_after_the_final_allocation_loads_here(kind, tmp_path):
    method = AdaLoRA(init_rank=5, target_rank=2, **SCHEDULE)
    _, theirs = pair(kind, method)
    theirs.float()
    optimizer = torch.optim.AdamW(trained(theirs), lr=3e-2)
    for step in range(TOTAL):
        step_of_theirs(theirs, optimizer, step)
    theirs.save_pretrained(tmp_path)
    model = MODELS[kind][0]()
    assert load_adapter(model, tmp_path).method == method
    assert relative(logits(model), logits(theirs)) <= 1e-5
    assert sum(allocated_ranks(model).values()) == 2 * len(allocated_ranks(model))
    assert relative(logits(MODELS[kind][0]()), logits(model)) > 1e-2


def test_a_place_without_any_rank_left_is_saved_and_loaded(tmp_path):
    model, _, optimizer = pruned()
    adapter = adapters_named(model, "default")["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        adapter.prune(torch.zeros_like(adapter.kept), optimizer)
    again = tiny_llama()
    load_adapter(again, save_adapter(model, tmp_path))
    assert allocated_ranks(again)["model.layers.0.self_attn.q_proj"] == 0
    assert relative(logits(again), logits(model.eval())) <= 1e-5
    merge_adapters(again)
    assert relative(logits(again), logits(model)) <= 1e-5


def test_hf_settings_that_mean_something_else_are_refused(tmp_path):
    base = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "use_rslora": True}
    assert AdaLoRA.from_hf_config(base) == AdaLoRA(init_rank=4, target_rank=2, initial_steps=1, alpha=8)
    assert AdaLoRA.from_hf_config({**base, "lora_alpha": 0}).alpha == 4
    for key, value in {"modules_to_save": ["lm_head"], "bias": "all", "alpha_pattern": {"q": 2}}.items():
        with pytest.raises(AdapterConfigError, match=f"does not have HF PEFT's '{key}'"):
            AdaLoRA.from_hf_config({**base, key: value})
    with pytest.raises(AdapterConfigError, match="init_rank=4 down, which is less than target_rank=9"):
        AdaLoRA.from_hf_config({**base, "target_r": 9})


def test_a_loaded_adapter_trains_on_with_its_ranks(tmp_path):
    model, method, _ = pruned()
    again = tiny_llama()
    load_adapter(again, save_adapter(model, tmp_path), trainable=True)
    ranks, before = allocated_ranks(again), adapter_state_dict(again)
    before = {key: value.clone() for key, value in before.items()}
    optimizer = torch.optim.AdamW(parameter_groups(again), lr=1e-2)
    for step in range(4):
        step_of_ours(again, method, optimizer, step, total=0)
    assert allocated_ranks(again) == ranks
    after = adapter_state_dict(again)
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[key], before[key]) for key in after if after[key].numel())


def test_an_adapter_that_is_not_trained_is_left_alone():
    method = AdaLoRA(init_rank=4, target_rank=2)
    model = tiny_llama()
    inject(model, method, "query")
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    step_of_ours(model, method, optimizer, 0)
    for layer in adapter_layers(model).values():
        layer.set_trainable("default", False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():  # the last step, which settles ranks
        method.after_optimizer_step(adapters_named(model, "default"), optimizer, TOTAL - 1, TOTAL)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- the optimizer and the gradients -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_forgets_pruned_singular_values_and_nothing_else(kind):
    method = AdaLoRA(init_rank=4, target_rank=1, final_steps=1)
    model = tiny_llama()
    inject(model, method, "query")
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    for step in range(3):
        step_of_ours(model, method, optimizer, step, total=4)
    forgot = remembered = 0
    for adapter in adapters_named(model, "default").values():
        assert not adapter.kept.all()
        assert torch.equal(adapter.lora_E == 0, ~adapter.kept)
        for value in optimizer.state[adapter.lora_E].values():
            if isinstance(value, torch.Tensor) and value.shape == adapter.lora_E.shape:
                assert not value[~adapter.kept].any()
                forgot += int((~adapter.kept).sum())
                remembered += int(value[adapter.kept].count_nonzero())
        for matrix in (adapter.lora_A, adapter.lora_B):
            assert all(v.all() for v in optimizer.state[matrix].values() if getattr(v, "shape", None) == matrix.shape)
    assert forgot > 0
    assert remembered > 0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), None])
def test_a_step_that_overflowed_does_not_count(value):
    method = AdaLoRA(init_rank=4, target_rank=2, initial_steps=2, final_steps=1)
    model = tiny_llama()
    inject(model, method, "query")
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    step_of_ours(model, method, optimizer, 0)
    adapters = adapters_named(model, "default")
    before = {path: {k: v.clone() for k, v in adapter.named_buffers()} for path, adapter in adapters.items()}
    broken = next(iter(adapters.values())).lora_B
    if value is None:
        broken.grad = None
    else:
        broken.grad[0, 0] = value
    with torch.no_grad():
        method.after_optimizer_step(adapters, optimizer, 1, TOTAL)
    for path, adapter in adapters.items():
        assert all(torch.equal(before[path][key], now) for key, now in adapter.named_buffers())
    # Ranks are still settled when it is time.
    with torch.no_grad():
        method.after_optimizer_step(adapters, optimizer, TOTAL - 1, TOTAL)
    assert sum(allocated_ranks(model).values()) == 2 * len(adapters)


def test_nothing_is_pruned_before_anything_was_measured():
    method = AdaLoRA(init_rank=4, target_rank=2)
    model = tiny_llama()
    inject(model, method, "query")
    optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1)
    with torch.no_grad():
        method.after_optimizer_step(adapters_named(model, "default"), optimizer, 3, TOTAL)
    assert set(allocated_ranks(model).values()) == {4}


# -- in Lightning ------------------------------------------------------------------------------------------------------

METHOD = AdaLoRA(init_rank=4, target_rank=1, initial_steps=1, final_steps=2)


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def rows(number):
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(6, generator=generator), torch.randn(3, generator=generator)) for _ in range(number)]


def module(method=METHOD, **options):
    torch.manual_seed(4)
    return PEFTModule(
        net(),
        method,
        ["0", "2"],
        loss=lambda outputs, target: (outputs - target).square().mean(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05),
        **options,
    )


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_steps_by_itself_under_accumulation(accumulate, make_trainer, tmp_path):
    seen = []

    class Watched(AdaLoRA):
        def after_optimizer_step(self, adapters, optimizer, step, total_steps):
            super().after_optimizer_step(adapters, optimizer, step, total_steps)
            seen.append((step, total_steps, sum(int(adapter.kept.sum()) for adapter in adapters.values())))

    tuned = module(Watched(init_rank=4, target_rank=1, initial_steps=1, final_steps=2))
    loader = DataLoader(rows(8 * accumulate), batch_size=1)
    make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate).fit(tuned, loader)
    # Budgets of 8 triplets with a target of 2: 6 (1 - (t - 1) / 5)^3 + 2, rounded down.
    assert seen == [(0, 8, 8), (1, 8, 8), (2, 8, 5), (3, 8, 3), (4, 8, 2), (5, 8, 2), (6, 8, 2), (7, 8, 2)]
    assert sum(allocated_ranks(tuned.model).values()) == 2


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_interrupted_and_resumed_is_uninterrupted(stop, make_trainer, tmp_path):
    def fit(folder, ckpt=None):
        tuned = module()
        callback = AdapterCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
        trainer = make_trainer(folder, max_steps=8, callbacks=[callback])
        data = rows(8)
        trainer.fit(tuned, ResumableDataLoader(data, batch_size=1, sampler=ResumableSampler(data)), ckpt_path=ckpt)
        return tuned, trainer

    whole, one = fit(tmp_path / "whole")
    rest, two = fit(tmp_path / "rest", str(tmp_path / "whole" / f"step={stop}.ckpt"))
    a, b = whole.state_dict(), rest.state_dict()
    assert any("importance_A" in key for key in a)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    first, second = one.optimizers[0].state_dict()["state"], two.optimizers[0].state_dict()["state"]
    assert all(torch.equal(first[p][key], second[p][key]) for p in first for key in first[p])
    # A checkpoint holds what was measured by then.
    held = torch.load(tmp_path / "whole" / f"step={stop}.ckpt", weights_only=True)["state_dict"]
    assert bool(held["model.0.adapters.default.settled"]) == (stop > 6)
    assert bool(held["model.0.adapters.default.importance_E"].any()) == (stop <= 6)


def test_a_fit_without_an_end_is_refused(make_trainer, tmp_path):
    with pytest.raises(ConfigError, match=r"how many optimizer steps .* give the Trainer max_steps, or max_epochs"):
        make_trainer(tmp_path, max_epochs=-1, max_steps=-1).fit(module(), DataLoader(rows(4), batch_size=1))


def test_a_fit_that_is_too_short_for_the_schedule_is_refused(make_trainer, tmp_path):
    with pytest.raises(ConfigError, match="initial_steps=1 and final_steps=2, which leaves none of 3 optimizer steps"):
        make_trainer(tmp_path, max_steps=3).fit(module(), DataLoader(rows(4), batch_size=1))


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_steps_that_overflow_in_fp16_leave_importance_finite(make_trainer, tmp_path):
    overflowed = []

    class Watched(AdaLoRA):
        def after_optimizer_step(self, adapters, optimizer, step, total_steps):
            (first, *_) = adapters.values()
            finite = all(bool(p.grad.isfinite().all()) for a in adapters.values() for p in a.parameters())
            before = first.importance_E.clone()
            super().after_optimizer_step(adapters, optimizer, step, total_steps)
            overflowed.append(not finite)
            assert torch.equal(before, first.importance_E) != finite or step >= 6

    tuned = module(Watched(init_rank=4, target_rank=1, initial_steps=1, final_steps=2))
    # A first scale of the loss that is too large for half precision; every overflow makes it 2**-8 of that.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-8)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    make_trainer(tmp_path, max_steps=8, plugins=[precision]).fit(tuned, DataLoader(rows(8), batch_size=1))
    assert overflowed[0] is True
    assert overflowed[2:] == [False] * 6
    assert sum(allocated_ranks(tuned.model).values()) == 2
    assert all(bool(torch.isfinite(value).all()) for value in tuned.state_dict().values())


class Own(PEFTMixin, LightningModule):
    """A LightningModule that knows nothing of AdaLoRA beyond injecting it."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = net()
            torch.manual_seed(4)
            inject(self.model, METHOD, ["0", "2"])

    def training_step(self, batch):
        return (self.model(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def test_it_works_in_a_lightning_module_of_ones_own(make_trainer, tmp_path):
    own, tuned = Own(), module()
    for each in (own, tuned):
        torch.manual_seed(4)
        make_trainer(tmp_path, max_steps=8).fit(each, DataLoader(rows(8), batch_size=1))
    assert allocated_ranks(own.model) == allocated_ranks(tuned.model)
    assert sum(allocated_ranks(own.model).values()) == 2


def late(make_trainer, tmp_path, **options):
    """Train AdaLoRA in the last 2 of 12 steps only; return the warnings of it."""
    method = AdaLoRA(init_rank=4, target_rank=1, **options)
    both = [Adaptation(NormTuning(), ["1"], "norm"), Adaptation(method, ["0", "2"], "ranks")]
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    tuned = PEFTModule(model, both, loss=nn.functional.mse_loss)
    phases = [Phase(start=0, unit="step", trained=["norm"]), Phase(start=10, unit="step", trained=["ranks"])]
    data = [(torch.randn(6), torch.randn(3)) for _ in range(12)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, max_steps=12, callbacks=[PhaseSchedule(phases)], enable_checkpointing=False)
        trainer.fit(tuned, DataLoader(data, batch_size=1))
    return [str(one.message) for one in caught if issubclass(one.category, LightningPEFTWarning)]


def test_a_start_after_its_budget_has_fallen_is_warned_of_once(make_trainer, tmp_path):
    (message,) = late(make_trainer, tmp_path)
    assert message.startswith(
        "AdaLoRA has measured no importance before step 10 of 12, when its budget is 2 of 8 triplets"
    )
    assert "Set initial_steps to 10 or more" in message


def test_a_late_start_with_initial_steps_is_not_warned_of(make_trainer, tmp_path):
    assert late(make_trainer, tmp_path, initial_steps=10) == []


# -- arithmetic and refusals -------------------------------------------------------------------------------------------


def test_the_update_is_the_papers_formula_on_a_convolution():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1).double()
    model = nn.Sequential(copy.deepcopy(conv))
    inject(model, AdaLoRA(init_rank=4, target_rank=4, alpha=6.0), "0")
    (adapter,) = adapters_named(model, "default").values()
    with torch.no_grad():
        adapter.lora_E.normal_()
    state = adapter.export_state()
    # HF PEFT's shapes for a convolution: A (rank, in * kernel), B (out, rank).
    delta = state["lora_B"] @ torch.diag(state["lora_E"].flatten()) @ state["lora_A"] * 6.0 / (4 + 1e-5)
    x = torch.randn(2, 3, 8, 8).double()
    weight = conv.weight + delta.view_as(conv.weight)
    wanted = nn.functional.conv2d(x, weight, conv.bias, stride=2, padding=1)
    assert relative(model(x).detach(), wanted.detach()) <= 1e-12


def test_a_slice_of_a_fused_projection_is_refused():
    with pytest.raises(TargetError, match="AdaLoRA cannot adapt query alone, a slice of 'transformer.h.0.attn.c_attn'"):
        inject(tiny_gpt2(), AdaLoRA(), "query")


def test_ranks_of_another_method_are_refused():
    model = tiny_llama()
    inject(model, LoRA(rank=2), "query")
    with pytest.raises(ConfigError, match="'default', which is a LowRankLinear at .* only AdaLoRA allocates ranks"):
        allocated_ranks(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_rank": 0}, "init_rank must be an integer of at least 1, got 0"),
        ({"target_rank": True}, "target_rank must be an integer of at least 1, got True"),
        ({"initial_steps": -1}, "initial_steps must be an integer of at least 0, got -1"),
        ({"final_steps": 0.5}, "final_steps must be an integer of at least 0, got 0.5"),
        ({"interval": 0}, "interval must be an integer of at least 1, got 0"),
        ({"init_rank": 4}, "init_rank=4 down, which is less than target_rank=8"),
        ({"alpha": float("inf")}, "alpha must be a finite number, got inf"),
        ({"alpha": 0}, "alpha must be positive and orthogonality not negative, got 0 and 0.5"),
        ({"orthogonality": -0.1}, "orthogonality not negative, got 16.0 and -0.1"),
        ({"beta1": 1.0}, "beta1 must lie between 0 and 1, got 1.0"),
        ({"beta2": 0}, "beta2 must lie between 0 and 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dtype": "half"}, "dtype must be one of float32, base, got 'half'"),
    ],
)
def test_wrong_hyperparameters_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        AdaLoRA(**fields)


def test_the_loss_of_a_real_model_falls_while_ranks_do(trained_on_e2e, monkeypatch):
    losses = trained_on_e2e(AdaLoRA(init_rank=4, target_rank=2), lr=2e-2)
    assert losses[-1] < losses[0] - 0.2, losses

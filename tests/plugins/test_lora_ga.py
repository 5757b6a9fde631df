"""LoRA-GA keeps the contract; its start is HF PEFT's for the same gradients; its first step is that of full fine-tuning, as far as the rank allows."""

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from lightning_peft import (
    LightningPEFTWarning,
    LoRA,
    LoRAGA,
    PEFTModule,
    Targets,
    adapter_layers,
    adapter_state_dict,
    initialize_from_data,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.errors import AdapterConfigError, ConfigError, TargetError
from lightning_peft.plugins.lora_ga import WeightGradients
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch
from lightning_peft.testing.subject import base_tensors, differing, distance

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning", "ignore:Full backward hook is firing"
)


class TestLoRAGA(MethodConformance):
    method = LoRAGA(rank=4)


class TestOnSlicesOfGPT2(MethodConformance):
    method = LoRAGA(rank=4, direction="ArBr", scale="weight_svd", rslora=True, dropout=0.1, bias="lora_only", batches=2)
    targets = Targets(include=["query", "value", "up"])

    def model(self):
        return tiny_gpt2()


class TestAfterData(MethodConformance):
    """The whole contract once more, with values from data in every adapter."""

    method = LoRAGA(rank=4, scale="unit", direction="A2rBr", batches=1)

    def inject(self, model, name="default"):
        injection = super().inject(model, name)
        if not next(model.parameters()).is_meta:
            initialize_from_data(model, batches(), name=name)
        return injection


MODELS = {"llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"]), "gpt2": (tiny_gpt2, ["c_attn", "c_fc"])}


def batches(n=3):
    return [{**batch, "labels": batch["input_ids"]} for batch in (token_batch(seed, rows=6) for seed in range(n))]


def started(method, kind="llama", data=None, targets=None):
    make, known = MODELS[kind]
    model = make()
    inject(model, method, targets or known)
    initialize_from_data(model, batches() if data is None else data)
    return model


def places(model):
    return {path: layer.adapters["default"] for path, layer in adapter_layers(model).items()}


def mean_gradients(kind, data, paths):
    """The gradients of the weights, (out, in), as autograd has them where the weights are trained."""
    model = MODELS[kind][0]()
    for batch in data:
        (model(**batch).loss / len(data)).backward()
    weights = {path: model.get_submodule(path).weight.grad for path in paths}
    return {path: grad.t() if kind == "gpt2" else grad for path, grad in weights.items()}


@torch.no_grad()
def logits(model):
    return model.eval()(**token_batch(5)).logits


def train(model, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        batch = token_batch(step % 2)
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_trained_weights(kind, n, monkeypatch):
    found, held = {}, []

    def start(self, path, gradient):
        found[path] = gradient / self.batches
        held.append(len(self.sums))

    monkeypatch.setattr(WeightGradients, "_start", start)
    with pytest.warns(LightningPEFTWarning, match="no gradient"):  # nothing was started
        model = started(LoRAGA(rank=4, batches=n), kind, batches(5))
    wanted = mean_gradients(kind, batches(5)[:n], adapter_layers(model))
    assert found.keys() == wanted.keys()
    for path, gradient in found.items():
        assert distance(gradient, wanted[path]) <= 1e-5, path
    # Each is dropped when its layer is done: with one batch, none is ever kept.
    assert held == [0] * len(held) if n == 1 else held == list(reversed(range(len(held))))


def test_a_layer_that_is_called_twice_has_the_sum():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice()
    x = torch.randn(32, 8)
    model(x).square().mean().backward()
    gradient = model.layer.weight.grad.clone()
    model.zero_grad()
    inject(model, LoRAGA(rank=2, scale="unit"), ["layer", "idle"])
    with pytest.warns(LightningPEFTWarning, match="no gradient at 1 of 2 places, such as 'idle'; they start as LoRA"):
        initialize_from_data(model, [x], lambda batch: model(batch).square().mean())
    U, _, Vh = torch.linalg.svd(gradient)
    adapter = places(model)["layer"]
    assert torch.allclose((adapter.lora_A @ Vh[:2].t()).abs(), torch.eye(2), atol=1e-4)
    assert torch.allclose((adapter.lora_B @ U[:, 2:4]).abs(), torch.eye(2), atol=1e-4)
    assert not places(model)["idle"].lora_B.any()


def test_the_base_stays_frozen_and_as_it_is():
    base = tiny_llama()
    model = started(LoRAGA(rank=4))
    assert not differing(base_tensors(base), base_tensors(model))
    assert torch.equal(logits(model), logits(base))
    layers = adapter_layers(model).values()
    assert not any(p.requires_grad or p.grad is not None for layer in layers for p in layer.base_layer.parameters())
    assert all(not layer._forward_hooks for layer in layers)
    assert all(adapter.lora_B.any() for adapter in places(model).values())


# -- the start ---------------------------------------------------------------------------------------------------------

SCALES = {"stable": "stable", "unit": "unit", "weight_svd": "weight_svd", "gd": "gd_scale"}


def theirs(kind, data, rank, direction, scale, **options):
    make, targets = MODELS[kind]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=12, target_modules=targets, init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale=SCALES[scale], **options), fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    model = make()

    def step():
        for batch in data:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, step)
    return get_peft_model(model, config)


def held_by(peer):
    """HF PEFT's A (rank, in), B (out, rank) and scale by place."""
    modules = {p.removeprefix("base_model.model."): m for p, m in peer.named_modules() if hasattr(m, "lora_A")}
    found = {
        p: (m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"]) for p, m in modules.items()
    }
    return {path: (A.detach(), B.detach(), scaling) for path, (A, B, scaling) in found.items()}


def aligned(down, up, other, other_up):
    """``down`` (rank, in) and ``up`` (out, rank) with the signs of others: a decomposition leaves that of each pair of vectors open."""
    rows, columns = (down * other).sum(1).sign(), (up * other_up).sum(0).sign()
    return down * rows[:, None], up * columns


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_the_product_is_hf_pefts_for_the_same_gradients(direction, scale):
    # With rank 16, HF PEFT's randomised decomposition is of full rank, and so exact.
    torch.manual_seed(7)
    peer = theirs("llama", batches(), 16, direction, scale)
    model = started(LoRAGA(rank=16, alpha=12, direction=direction, scale=scale, convention="hf_peft"))
    assert places(model).keys() == held_by(peer).keys()
    for path, (A, B, scaling) in held_by(peer).items():
        adapter = places(model)[path]
        if direction == "random":  # other draws: the vectors of ours are among those that HF PEFT draws from
            assert adapter.scaling == scaling
            assert torch.allclose(adapter.lora_A.norm(dim=1).sort()[0], A.norm(dim=1).sort()[0], rtol=1e-4)
            continue
        A, B = aligned(A, B, adapter.lora_A, adapter.lora_B.t())
        assert adapter.scaling == scaling
        # HF PEFT takes the largest singular value of the weight from a decomposition of rank 16, which misses a little.
        assert distance(adapter.lora_B.detach().t() @ adapter.lora_A.detach(), (B @ A).detach()) <= (
            1e-3 if scale == "weight_svd" else 1e-4
        )
    assert distance(logits(model), logits(peer)) <= 1e-5


def test_from_the_same_start_it_trains_as_hf_peft_does():
    peer = theirs("llama", batches(), 16, "ArB2r", "stable", stable_gamma=4)
    model = started(LoRAGA(rank=16, alpha=12, convention="hf_peft", stable_gamma=4.0))
    for path, (A, B, _) in held_by(peer).items():
        places(model)[path].set_initial(A, B)
    wanted = train(peer, 6)
    assert train(model, 6) == pytest.approx(wanted, rel=1e-4)
    plain = tiny_llama()
    inject(plain, LoRA(rank=16, alpha=12), MODELS["llama"][1])
    assert train(plain, 6) != pytest.approx(wanted, rel=1e-3)


PARTS = {
    "ArB2r": (range(4), range(4, 8)),
    "A2rBr": (range(4, 8), range(4)),
    "ArBr": (range(1, 8, 2), range(0, 8, 2)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("direction", PARTS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_start_is_that_of_the_paper(kind, direction, scale):
    model = started(LoRAGA(rank=4, alpha=12, direction=direction, scale=scale), kind)
    gradients = mean_gradients(kind, batches(), adapter_layers(model))
    for path, adapter in places(model).items():
        U, _, Vh = torch.linalg.svd(gradients[path].double(), full_matrices=False)
        weight = MODELS[kind][0]().get_submodule(path).weight.detach().double()
        size = {
            "stable": len(gradients[path]) ** 0.25 / 4.0,
            "gd": 1 / 3,
            "unit": 1.0,
            "weight_svd": float((torch.linalg.svdvals(weight)[:4] / 3).sqrt().mean()),
        }[scale]
        down, up = (list(part) for part in PARTS[direction])
        A, B = aligned(Vh[down].float(), U[:, up].float(), adapter.lora_A, adapter.lora_B.t())
        assert distance((adapter.lora_B.t() @ adapter.lora_A).detach(), (size**2 * B @ A).detach()) <= 1e-3, path
        assert torch.allclose(adapter.lora_A.norm(dim=1), torch.full((4,), size), rtol=1e-4)
        assert torch.allclose(adapter.lora_B.norm(dim=1), torch.full((4,), size), rtol=1e-4)


def test_random_directions_are_a_split_of_the_first_ones():
    torch.manual_seed(1)
    model = started(LoRAGA(rank=4, direction="random", scale="unit"))
    gradients = mean_gradients("llama", batches(), adapter_layers(model))
    splits = set()
    for path, adapter in places(model).items():
        U, _, Vh = torch.linalg.svd(gradients[path], full_matrices=False)
        down = (adapter.lora_A @ Vh[:8].t()).abs().argmax(1).tolist()
        up = (adapter.lora_B @ U[:, :8]).abs().argmax(1).tolist()
        assert sorted(down + up) == list(range(8))
        splits.add(tuple(down))
    assert len(splits) > 1


# -- the first step ----------------------------------------------------------------------------------------------------


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def first_step(model, data, lr=1e-4):
    """What one step of gradient descent changes of the weights, (out, in)."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in data:
        (model(**batch).loss / len(data)).backward()
    optimizer.step()
    changes = {}
    for path, adapter in places(model).items():
        A, B = (factor.detach().double() for factor in adapter.factors())
        changes[path] = adapter.scaling * B.t() @ A
    return changes


def test_the_first_step_is_the_best_approximation_of_that_of_full_fine_tuning():
    data = batches()
    plain = tiny_llama()
    inject(plain, LoRA(rank=4), MODELS["llama"][1])
    ours, lora = first_step(started(LoRAGA(rank=4)), data), first_step(plain, data)
    for path, gradient in mean_gradients("llama", data, ours).items():
        full = -gradient.double()
        values = torch.linalg.svdvals(full)
        # Nothing of rank 8 comes closer to the gradient than its first 8 singular values (Eckart and Young).
        best = float((values[:8].square().sum() / values.square().sum()).sqrt())
        assert cosine(ours[path], full) == pytest.approx(best, abs=2e-3), path
        assert cosine(lora[path], full) < 0.75 * best, path


# -- files, limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_hf_peft_loads_the_folder_over_the_base_and_it_comes_back_as_the_method(kind, tmp_path):
    method = LoRAGA(rank=4, alpha=12)
    model = started(method, kind)
    train(model)
    save_adapter(model, tmp_path)
    make, _ = MODELS[kind]
    peer = PeftModel.from_pretrained(make(), tmp_path)
    assert peer.peft_config["default"].r == 8
    assert distance(logits(peer), logits(model)) <= 1e-5
    assert distance(logits(make()), logits(model)) > 1e-2
    again = make()
    assert load_adapter(again, tmp_path, trainable=True).method == method
    assert torch.equal(logits(again), logits(model))
    assert train(again) == pytest.approx(train(model), rel=1e-5)


def test_a_folder_of_hf_pefts_own_is_refused(tmp_path):
    theirs("llama", batches(), 4, "ArB2r", "stable").save_pretrained(tmp_path)
    with pytest.raises(
        AdapterConfigError, match="init_lora_weights='lora_ga' changed the base weights before training"
    ):
        load_adapter(tiny_llama(), tmp_path)


def test_a_fit_takes_its_start_from_its_batches(make_trainer, tmp_path):
    data = batches(4)
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    module = PEFTModule(
        tiny_llama(), LoRAGA(rank=4, batches=2), ["q_proj"], optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
    )
    make_trainer(tmp_path, max_steps=1).fit(module, loader)
    torch.manual_seed(0)
    wanted = adapter_state_dict(started(LoRAGA(rank=4), data=data[:2], targets=["q_proj"]))
    assert not differing(wanted, adapter_state_dict(module.model))


def test_a_rank_that_takes_more_directions_than_there_are_is_refused():
    with pytest.raises(
        TargetError, match="rank 17 was asked for at 'model.layers.0.self_attn.v_proj', whose gradient has 32 singular"
    ):
        inject(tiny_llama(), LoRAGA(rank=17), "value")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "AB"}, "LoRAGA direction must be one of ArB2r, A2rBr, ArBr, random, got 'AB'"),
        ({"scale": "big"}, "LoRAGA scale must be one of stable, gd, unit, weight_svd, got 'big'"),
        ({"convention": "hf"}, "LoRAGA convention must be one of paper, hf_peft, got 'hf'"),
        ({"stable_gamma": 0}, "LoRAGA stable_gamma must be a positive number, got 0"),
        ({"batches": 0}, "LoRAGA batches must be a positive integer, got 0"),
        ({"alpha": 0.0}, "LoRAGA alpha must not be zero"),
        ({"rank": 0}, "LoRA rank must be a positive integer, got 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LoRAGA(**options)


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(LoRAGA(rank=4))
    assert losses[-1] < losses[0] - 0.2, losses

"""PiSSA keeps the contract; its start and its training are those of HF PEFT's ``init_lora_weights="pissa"``; folders go both ways."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lightning_peft import LoRA, PiSSA, Targets, adapter_layers, inject, load_adapter, save_adapter
from lightning_peft.errors import AdapterConfigError, ConfigError
from lightning_peft.quantized_layers import dense_weight
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch
from lightning_peft.testing.subject import base_tensors, differing, distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


class TestPiSSA(MethodConformance):
    method = PiSSA()


class TestOnSlicesOfGPT2(MethodConformance):
    method = PiSSA(rank=4, svd="fast", iterations=2, rslora=True, dropout=0.1)
    targets = Targets(include=["query", "value", "up"])

    def model(self):
        return tiny_gpt2()


class TestOnAllOfGPT2(MethodConformance):
    method = PiSSA(rank=4, alpha_pattern={"up": 2.0}, rank_pattern={"down": 2}, bias="lora_only")

    def model(self):
        return tiny_gpt2()


class TestInThePrecisionOfTheBase(MethodConformance):
    method = PiSSA(rank=4, dtype="base")
    adapter_dtype = None


MODELS = {"llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"]), "gpt2": (tiny_gpt2, ["c_attn", "c_fc"])}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
}


def train(model, optimizer="adamw", steps=6):
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step in range(steps):
        batch = token_batch(step % 2)
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model.eval()(**token_batch(5)).logits


def theirs(kind, init, **options):
    make, targets = MODELS[kind]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=targets, init_lora_weights=init,
        fan_in_fan_out=kind == "gpt2", **options,
    )  # fmt: skip
    return get_peft_model(make(), config)


def ours(kind, method):
    make, targets = MODELS[kind]
    model = make()
    inject(model, method, targets)
    return model


@torch.no_grad()
def products(model):
    """By place, what the initial pair takes out of the weight."""
    if isinstance(model, PeftModel):
        held = {path.removeprefix("base_model.model."): m for path, m in model.named_modules() if hasattr(m, "lora_A")}
        return {
            path: m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight
            for path, m in held.items()
            if len(m.lora_A)
        }
    found = {path: layer.adapters["default"] for path, layer in adapter_layers(model).items()}
    return {path: adapter.scaling * adapter.lora_B.t() @ adapter.lora_A for path, adapter in found.items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rslora", [False, True])
def test_it_starts_where_hf_peft_starts(kind, rslora):
    model, peer = ours(kind, PiSSA(rank=4, alpha=12, rslora=rslora)), theirs(kind, "pissa", use_rslora=rslora)
    wanted = products(peer)
    assert products(model).keys() == wanted.keys()
    for path, product in products(model).items():
        assert distance(product, wanted[path]) <= 1e-5
    assert distance(logits(model), logits(peer)) <= 1e-5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_as_hf_peft_does(kind, optimizer):
    found = train(ours(kind, PiSSA(rank=4, alpha=12)), optimizer)
    wanted = train(theirs(kind, "pissa"), optimizer)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found[-1] < found[0] - 0.01
    lora = train(ours(kind, LoRA(rank=4, alpha=12)), optimizer)
    assert lora != pytest.approx(wanted, rel=1e-3)  # which start it is makes a difference that this test sees


def test_the_fast_start_is_close_to_hf_pefts_and_to_the_exact_one():
    exact, fast, peer = (
        products(model)
        for model in (
            ours("llama", PiSSA(rank=4)),
            ours("llama", PiSSA(rank=4, svd="fast", iterations=8)),
            theirs("llama", "pissa_niter_4"),
        )
    )
    weights = {path: dense_weight(module) for path, module in tiny_llama().named_modules() if path in exact}
    for path, weight in weights.items():
        # What is left of the weight: none can beat the exact one, and the others come close to it.
        best, own, other = (torch.linalg.matrix_norm(weight - part[path]) for part in (exact, fast, peer))
        assert best <= own * (1 + 1e-6)
        assert own <= 1.001 * best
        assert own <= other * (1 + 1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_hf_peft_loads_the_folder_over_the_base_and_it_comes_back_as_the_method(kind, tmp_path):
    method = PiSSA(rank=4, alpha=12)
    model = ours(kind, method)
    train(model)
    save_adapter(model, tmp_path)
    make, _ = MODELS[kind]
    peer = PeftModel.from_pretrained(make(), tmp_path)
    assert peer.peft_config["default"].r == 8
    assert peer.peft_config["default"].lora_alpha == 24
    assert distance(logits(peer), logits(model)) <= 1e-5
    assert distance(logits(make()), logits(model)) > 1e-2
    again = make()
    assert load_adapter(again, tmp_path, trainable=True).method == method
    assert torch.equal(logits(again), logits(model))
    assert train(again) == pytest.approx(train(model), rel=1e-5)


def test_what_hf_peft_converted_loads_as_lora_and_what_it_did_not_is_refused(tmp_path):
    peer = theirs("llama", "pissa")
    peer.peft_config["default"].init_lora_weights = True  # so that the start is saved as it is
    peer.save_pretrained(tmp_path / "start")
    peer.peft_config["default"].init_lora_weights = "pissa"
    train(peer)
    peer.save_pretrained(tmp_path / "plain")
    with pytest.raises(AdapterConfigError, match="init_lora_weights='pissa' changed the base weights before training"):
        load_adapter(tiny_llama(), tmp_path / "plain")
    wanted = logits(peer)
    peer.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = tiny_llama()
    assert load_adapter(model, tmp_path / "lora").method == LoRA(rank=8, alpha=24)
    assert distance(logits(model), wanted) <= 1e-5


def test_the_base_is_not_touched_and_two_starts_nest():
    model = tiny_llama()
    before = base_tensors(model)
    inject(model, PiSSA(rank=4), "query", name="one")
    train(model)
    inject(model, PiSSA(rank=2), "query", name="two")
    assert not differing(before, base_tensors(model))
    pair = adapter_layers(model)["model.layers.0.self_attn.q_proj"].adapters["two"]
    again = tiny_llama()
    inject(again, PiSSA(rank=2), "query")  # the second starts from the base, not from what the first made of it
    assert torch.equal(pair.lora_A, adapter_layers(again)["model.layers.0.self_attn.q_proj"].adapters["default"].lora_A)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"svd": "quick"}, "PiSSA svd must be one of exact, fast, got 'quick'"),
        ({"iterations": -1}, "PiSSA iterations must be 0 or a positive integer, got -1"),
        ({"alpha": 0.0}, "PiSSA alpha must not be zero"),
        ({"alpha_pattern": {"q": -1.0}}, r"PiSSA alpha_pattern\['q'\] must be positive, got -1.0"),
        ({"rank": 0}, "LoRA rank must be a positive integer, got 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PiSSA(**options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'init'"):
        PiSSA(init="gaussian")


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(PiSSA(rank=4, alpha=4))
    assert losses[-1] < losses[0] - 0.2, losses

"""Adapters by rows of a batch: equal to a pass for each adapter, in inference and in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_peft import (
    AdaLoRA,
    BitFit,
    Bottleneck,
    DoRA,
    FullFineTuning,
    LoRA,
    LoRAFA,
    Method,
    NormTuning,
    PrefixTuning,
    PromptTuning,
    VeRA,
    adapter_rows,
    adapters_disabled,
    inject,
    merge_adapters,
    set_active_adapters,
    set_row_adapters,
)
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.errors import AdapterNotFoundError, ConfigError, InjectionError, MergeError
from lightning_peft.testing.subject import distance
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama, token_batch

TOLERANCE = 1e-5

ZOO: dict[str, tuple[Method, str | list[str] | None]] = {
    "small": (LoRA(rank=2, alpha=8), None),
    "large": (LoRA(rank=7, alpha=3), ["all_linear"]),
    "bias": (LoRA(rank=3, bias="all"), None),
    "slices": (LoRA(rank=3), ["query", "value"]),
    "embedding": (LoRA(rank=4, tied="both"), ["embedding"]),
    "rslora": (LoRA(rank=5, rslora=True), None),
    "ada": (AdaLoRA(init_rank=4, target_rank=2), None),
    "fa": (LoRAFA(rank=4), None),
    "dora": (DoRA(rank=3), None),
    "vera": (VeRA(rank=6), None),
    "prefix": (PrefixTuning(num_virtual_tokens=4), None),
    "longer": (PrefixTuning(num_virtual_tokens=6), None),
    "prompt": (PromptTuning(num_virtual_tokens=3), None),
    "bottleneck": (Bottleneck(bottleneck_size=5), None),
    "parallel": (Bottleneck(bottleneck_size=4, placement="parallel"), None),
    "bitfit": (BitFit(), None),
    "norms": (NormTuning(), None),
}

MODELS = {"llama": lambda: tiny_llama(attention_bias=True), "gpt2": tiny_gpt2}


def randomise(model: nn.Module, names: Sequence[str], std: float = 0.05) -> None:
    """Give adapters values that act."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in names:
            for adapter in adapters_named(model, name).values():
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def held(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return ``model`` with those of the zoo."""
    for name in names:
        inject(model, *ZOO[name], name=name)
    randomise(model, names)
    return model


def activate(model: nn.Module, row: str | Sequence[str] | None) -> None:
    set_active_adapters(model, [] if row is None else row)


def alone(model: nn.Module, rows: Sequence[str | None], call: Callable[[], Tensor]) -> Tensor:
    """Return what passes with one adapter each give, row by row."""
    results = {}
    for name in set(rows):
        activate(model, name)
        results[name] = call()
    return torch.stack([results[name][row] for row, name in enumerate(rows)])


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_adapter_in_one_batch_is_a_pass_of_each(kind: str) -> None:
    names = list(ZOO)
    model = held(MODELS[kind](), names)
    rows = [None, *names, None, "large", "small"]
    batch = token_batch(rows=len(rows), length=9)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][::3, :2] = 0
    with torch.no_grad():
        with adapter_rows(model, rows):
            together = model(**batch).logits
        apart = alone(model, rows, lambda: model(**batch).logits)
    seen = batch["attention_mask"].bool()
    for row, name in enumerate(rows):
        assert distance(together[row][seen[row]], apart[row][seen[row]]) <= TOLERANCE, name
    changed = [name for row, name in enumerate(rows) if name and distance(apart[row], apart[0]) < 1e-4]
    assert not changed, f"{changed} do nothing, so the comparison shows nothing"


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_every_kind_are_those_of_a_pass_of_each(kind: str) -> None:
    names = list(ZOO)
    model = held(MODELS[kind](), names)
    set_row_adapters(model, names)
    rows = [None, *names, "large", "small"]
    batch = token_batch(rows=len(rows), length=7)
    goal = torch.randn(len(rows), 7, 128, generator=torch.Generator().manual_seed(1))

    def gradients(row: int | None) -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(**batch).logits if row is None else model(input_ids=batch["input_ids"][row : row + 1]).logits
        wanted = goal if row is None else goal[row : row + 1]
        (logits - wanted).square().sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    with adapter_rows(model, rows):
        together = gradients(None)
    apart: dict[str, Tensor] = {}
    for row, name in enumerate(rows):
        if name is not None:
            activate(model, name)
            for key, gradient in gradients(row).items():
                if f".adapters.{name}." in key:
                    apart[key] = apart.get(key, 0) + gradient
    assert {key.split(".adapters.")[1].split(".")[0] for key in apart} == set(names)
    assert sorted(together) == sorted(apart)
    largest = {
        name: max(float(g.abs().max()) for key, g in apart.items() if f".adapters.{name}." in key) for name in names
    }
    for key, gradient in apart.items():
        name = key.split(".adapters.")[1].split(".")[0]
        assert float((gradient - together[key]).abs().max()) <= TOLERANCE * largest[name], key


def test_rows_without_an_adapter_are_the_base_bit_for_bit() -> None:
    model = held(tiny_llama(), ["small", "large"])
    batch = token_batch(rows=4)
    with torch.no_grad():
        with adapter_rows(model, ["large", None, "small", None]):
            together = model(**batch).logits
        with adapters_disabled(model):
            base = model(**batch).logits
    assert torch.equal(together[1::2], base[1::2])


@pytest.mark.parametrize("tokens", [1, 40])
def test_rows_of_linear_layers_are_those_of_their_adapter_alone(tokens: int) -> None:
    model = nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 96))
    methods = {
        "a": LoRA(rank=2),
        "b": LoRA(rank=5, alpha=9),
        "c": AdaLoRA(init_rank=4, target_rank=2),
        "d": LoRAFA(rank=3),
    }
    for name, method in methods.items():
        inject(model, method, ["0", "1"], name=name)
    randomise(model, list(methods))
    x = torch.randn(7, tokens, 96, generator=torch.Generator().manual_seed(4))
    rows = ["a", "a", None, "b", "c", "d", "a"]
    with torch.no_grad():
        for order in (rows, rows[::-1], rows):
            with adapter_rows(model, order):
                together = model(x)
            apart = alone(model, order, lambda: model(x))
            assert distance(together, apart) <= TOLERANCE
            assert distance(together[order.index("b")], together[order.index("a")]) > 1e-3
        with adapters_disabled(model):
            base = model(x)
        assert torch.equal(together[2], base[2])


@pytest.mark.parametrize("tokens", [1, 40])
def test_an_adapter_that_diverged_spoils_its_own_rows_only(tokens: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    for name in ("sound", "lost"):
        inject(model, LoRA(rank=2), "0", name=name)
    randomise(model, ["sound", "lost"])
    x = torch.randn(3, tokens, 64, generator=torch.Generator().manual_seed(4))
    rows = ["sound", "lost", None]
    with torch.no_grad():
        with adapter_rows(model, rows):
            before = model(x)
        for tensor in ("lora_A", "lora_B"):
            adapters_named(model, "lost")["0"].get_parameter(tensor).fill_(float("inf"))
            with adapter_rows(model, rows):
                after = model(x)
            assert not torch.isfinite(after[1]).any()
            assert distance(after[::2], before[::2]) <= TOLERANCE


def test_blocks_nest_and_the_active_adapters_come_back() -> None:
    model = held(tiny_llama(), ["small", "large"])
    batch = token_batch(rows=2)
    with torch.no_grad():
        active = model(**batch).logits
        with adapter_rows(model, ["small", None]):
            outer = model(**batch).logits
            with pytest.raises(RuntimeError, match="stop"), adapter_rows(model, [None, "small"]):
                raise RuntimeError("stop")
            assert torch.equal(model(**batch).logits, outer)
        assert torch.equal(model(**batch).logits, active)


def test_changed_parameters_count_inside_a_block() -> None:
    model = held(tiny_llama(), ["small"])
    batch = token_batch(rows=2)
    with torch.no_grad(), adapter_rows(model, ["small", None]):
        before = model(**batch).logits
        randomise(model, ["small"])
        after = model(**batch).logits
    assert distance(after[0], before[0]) > 1e-3
    assert torch.equal(after[1], before[1])


def test_a_module_in_which_an_adapter_hands_on_runs_by_rows_and_is_left_as_it_was() -> None:
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        vocab_size=128,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    names = ["short", "long"]
    for name, length in zip(names, (2, 5), strict=True):
        inject(model, PromptTuning(num_virtual_tokens=length), name=name)
    inject(model, LoRA(rank=2), name="lora")
    randomise(model, [*names, "lora"])
    ids = token_batch(rows=4, length=6)["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :3]}
    rows = ["long", None, "short", "lora"]
    with torch.no_grad():
        with adapter_rows(model, rows[::-1]), adapter_rows(model, rows):
            together = model(**batch).logits
        apart = alone(model, rows, lambda: model(**batch).logits)
    assert distance(together, apart) <= TOLERANCE
    assert "forward" not in model.__dict__


def test_several_adapters_on_one_row_nest() -> None:
    model = held(tiny_llama(), ["small", "bottleneck"])
    batch = token_batch(rows=3)
    with torch.no_grad():
        with adapter_rows(model, [["small", "bottleneck"], "small", None]):
            together = model(**batch).logits
        set_active_adapters(model, ["small", "bottleneck"])
        both = model(**batch).logits
    assert distance(together[0], both[0]) <= TOLERANCE


def test_dropout_is_that_of_each_row() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    inject(model, LoRA(rank=4, dropout=0.5), "0", name="drops")
    inject(model, LoRA(rank=4), "0", name="keeps")
    randomise(model, ["drops", "keeps"])
    model.train()
    x = torch.randn(3, 5, 64)
    with torch.no_grad(), adapter_rows(model, ["drops", "keeps", None]):
        one, other = model(x), model(x)
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1:], other[1:])


@pytest.mark.parametrize("beams", [1, 2])
def test_one_batch_generates_what_each_adapter_does(beams: int) -> None:
    names = ["small", "large", "dora", "prefix", "longer"]
    model = held(tiny_llama(use_cache=True), names)
    rows = [None, *names]
    ids = token_batch(rows=len(rows), length=6)["input_ids"]
    options = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    with adapter_rows(model, rows):
        together = model.generate(ids, **options)
    assert torch.equal(together, alone(model, rows, lambda: model.generate(ids, **options)))
    assert len({tuple(row) for row in together[:, 6:].tolist()}) > 1


def _gradients(model: nn.Module, *, inside: bool, checkpointing: bool) -> dict[str, Tensor]:
    rows = ["small", None, "dora"]
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.zero_grad()
    with adapter_rows(model, rows):
        loss = model(**token_batch(), labels=token_batch()["input_ids"]).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_needs_backward_inside_the_block() -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = held(tiny_llama(), ["small", "dora"])
        set_row_adapters(model, ["small", "dora"])
        return model

    plain = _gradients(made(), inside=False, checkpointing=False)
    again = _gradients(made(), inside=True, checkpointing=True)
    assert sorted(plain) == sorted(again)
    assert all(distance(again[key], plain[key]) <= TOLERANCE for key in plain)
    with pytest.raises(InjectionError, match="call backward inside it"):
        _gradients(made(), inside=False, checkpointing=True)


def test_autocast_keeps_the_precision_of_the_base() -> None:
    model = held(tiny_llama(), ["small", "large", "dora"])
    batch = token_batch(rows=4)
    rows = ["small", None, "dora", "large"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with adapter_rows(model, rows):
            together = model(**batch).logits
        apart = alone(model, rows, lambda: model(**batch).logits)
    assert together.dtype == apart.dtype
    assert distance(together, apart) <= 3e-2


def test_a_compiled_model_takes_rows() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    inject(model, LoRA(rank=2), ["0", "2"], name="a")
    inject(model, LoRA(rank=3), ["0"], name="b")
    randomise(model, ["a", "b"])
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 8)
    with torch.no_grad(), adapter_rows(model, ["a", None, "b"]):
        assert distance(compiled(x), model(x)) <= TOLERANCE


def test_what_cannot_be_told_apart_by_rows_is_refused() -> None:
    model = held(tiny_llama(), ["small"])
    for names, error, why in (
        (["smal"], AdapterNotFoundError, "no such adapter"),
        ([], ConfigError, "for each row"),
        ("small", ConfigError, "for each row"),
        ([3], ConfigError, "got 3"),
    ):
        with pytest.raises(error, match=why), adapter_rows(model, names):
            pass
    with pytest.raises(InjectionError, match="first dimension of 3"), adapter_rows(model, ["small", None]):
        model(**token_batch(rows=3))
    merge_adapters(model)
    with pytest.raises(MergeError, match="which all rows share"), adapter_rows(model, ["small"]):
        pass
    full = tiny_llama()
    inject(full, FullFineTuning(), "lm_head")
    with pytest.raises(InjectionError, match="row_routable"), adapter_rows(full, ["default"]):
        pass
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    inject(encoder, LoRA(rank=2), ["linear1"])
    with pytest.raises(InjectionError, match="second dimension"), adapter_rows(encoder, ["default"]):
        pass
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    inject(experts, LoRA(rank=2), ["experts.0"])
    with pytest.raises(InjectionError, match="an expert"), adapter_rows(experts, ["default"]):
        pass
    two = held(tiny_llama(), ["dora", "small"])
    with pytest.raises(InjectionError, match="acts alone"), adapter_rows(two, [["dora", "small"]]):
        pass

"""What is forgotten and learned, against figures taken by hand; and that measuring changes nothing and copies nothing."""

import copy
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_peft import (
    AnchorText,
    Bottleneck,
    EvalTask,
    FullFineTuning,
    LoRA,
    NormTuning,
    Perplexity,
    PrefixTuning,
    adapters_disabled,
    inject,
    measure_forgetting,
    merge_adapters,
)
from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.anchors import divergence
from lightning_peft.evaluation.base_figures import BaseFigures, can_disable, digest_of_base
from lightning_peft.evaluation.budget import ForgettingBudget, ScaledPoint, best_scale, largest_scale
from lightning_peft.evaluation.forgetting import ForgettingMeasure, improvement, pareto_front

TEXT = "the cat sat on the mat. a dog ran to the red house and sat down. " * 12


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def perplexity(text, llama_dir):
    return Perplexity(path=text, tokenizer=llama_dir, block_size=32, max_tokens=128)


@pytest.fixture
def anchor(text, llama_dir):
    return AnchorText(path=text, tokenizer=llama_dir, block_size=32, batch_size=2, max_tokens=96)


def disturb(model):
    """Give an adapter other values than it began with."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_forgetting_is_the_loss_with_the_adapter_minus_that_without(llama, perplexity, anchor):
    inject(llama, LoRA(rank=2))
    disturb(llama)
    found = measure_forgetting(llama, {"text": perplexity}, {"again": perplexity}, anchor=anchor)
    tuned = perplexity.evaluate(llama)["loss"]
    with adapters_disabled(llama):
        base = perplexity.evaluate(llama)["loss"]
    assert found["forgetting"] == {"text": tuned - base, "mean": tuned - base}
    assert found["learning"]["again"] == base - tuned
    assert found["base"]["source/text"]["loss"] == base
    assert abs(tuned - base) > 1e-3


def test_the_divergence_is_that_of_the_distributions(llama, anchor):
    inject(llama, LoRA(rank=2))
    disturb(llama)
    found = divergence(llama, anchor)
    ids = torch.cat(list(anchor.batches()))
    with torch.no_grad():
        tuned = llama(input_ids=ids).logits.double().softmax(-1)
        with adapters_disabled(llama):
            base = llama(input_ids=ids).logits.double().softmax(-1)
    expected = (base * (base / tuned).log()).sum(-1).mean().item()
    assert found["kl"] == pytest.approx(expected, rel=1e-5)
    assert found["agreement"] == pytest.approx((base.argmax(-1) == tuned.argmax(-1)).double().mean().item())
    assert found["tokens"] == 96
    assert expected > 1e-3


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=2), NormTuning(), FullFineTuning(), Bottleneck()],
    ids=lambda method: method.name,
)
def test_nothing_is_forgotten_at_the_start_of_what_starts_as_the_identity(method, llama, perplexity, anchor):
    assert method.identity_at_init
    inject(llama, method)
    found = measure_forgetting(llama, {"text": perplexity}, anchor=anchor)
    assert found["forgetting"]["text"] == 0.0
    assert found["anchor"]["kl"] == 0.0
    assert found["anchor"]["agreement"] == 1.0
    disturb(llama)
    assert measure_forgetting(llama, {"text": perplexity})["forgetting"]["text"] != 0.0


def test_a_prefix_is_not_the_identity_and_is_told_so(llama, perplexity):
    inject(llama, PrefixTuning(num_virtual_tokens=4))
    assert measure_forgetting(llama, {"text": perplexity})["forgetting"]["text"] != 0.0


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made in a ``with`` block and live at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def test_measuring_makes_no_copy_of_the_base(llama_config, llama_dir, text):
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(llama_config)
    config.hidden_size, config.intermediate_size, config.head_dim = 192, 512, 48
    model = LlamaForCausalLM(config)
    base = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    inject(model, LoRA(rank=2))
    task = Perplexity(path=text, tokenizer=llama_dir, block_size=16, batch_size=1, max_tokens=32)
    anchor = AnchorText(path=text, tokenizer=llama_dir, block_size=16, batch_size=1, max_tokens=32)
    with PeakBytes() as plain:
        task.evaluate(model)
    with PeakBytes() as seen:
        measure_forgetting(model, {"text": task}, {"text": task}, anchor=anchor)
    assert seen.peak < base / 8
    assert seen.peak < 1.5 * plain.peak
    with PeakBytes() as copied:  # the count sees a copy
        twin = copy.deepcopy(model)
    assert copied.peak > 0.9 * base
    assert twin is not model


def test_gradients_modes_and_random_numbers_are_left_as_they_were(llama, perplexity, anchor):
    inject(llama, LoRA(rank=2))
    llama.train()
    llama(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    gradients = [parameter.grad.clone() for parameter in llama.parameters() if parameter.requires_grad]
    state = torch.get_rng_state()
    measure_forgetting(llama, {"text": perplexity}, anchor=anchor)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in llama.modules())
    assert all(
        torch.equal(parameter.grad, before)
        for parameter, before in zip((p for p in llama.parameters() if p.requires_grad), gradients, strict=True)
    )


# -- a base that is gone -----------------------------------------------------------------------------------------------


def test_a_base_that_was_trained_is_measured_beforehand_or_read_from_the_cache(llama, perplexity, anchor, tmp_path):
    assert not can_disable(llama)
    cache = BaseFigures(tmp_path / "cache", digest_of_base(llama))
    measure = ForgettingMeasure({"source": {"text": perplexity}}, anchor)
    measure.take_base(llama, fresh=True, cache=cache)
    assert measure.compare(llama)["forgetting"]["text"] == 0.0
    ids = torch.cat(list(anchor.batches()))
    before = F.log_softmax(llama(input_ids=ids).logits.double(), -1)
    disturb(llama)
    expected = perplexity.evaluate(llama)["loss"] - measure.base["source/text"]["loss"]
    after = F.log_softmax(llama(input_ids=ids).logits.double(), -1)
    again = ForgettingMeasure({"source": {"text": perplexity}}, anchor)
    again.take_base(llama, fresh=False, cache=BaseFigures(tmp_path / "cache", cache.digest))
    found = again.compare(llama)
    assert found["forgetting"]["text"] == expected != 0.0
    assert found["anchor"]["kl"] == pytest.approx(
        F.kl_div(after, before, reduction="sum", log_target=True).item() / ids.numel(), rel=1e-4
    )


def test_a_base_that_cannot_be_reached_is_refused(llama, perplexity, anchor, tmp_path):
    inject(llama, LoRA(rank=2))
    disturb(llama)
    merge_adapters(llama, keep_originals=False)
    with pytest.raises(
        ConfigError, match=r"missing for source/text, and LlamaForCausalLM does not .* merged for good.*eval --base"
    ):
        measure_forgetting(llama, {"text": perplexity})


def test_predictions_of_a_base_that_will_be_trained_need_a_folder(llama, perplexity, anchor):
    with pytest.raises(ConfigError, match="name a folder to keep them in: cache=FOLDER"):
        ForgettingMeasure({"source": {"text": perplexity}}, anchor).take_base(llama, fresh=True)
    with pytest.raises(ConfigError, match="its base is trained, and training has begun"):
        ForgettingMeasure({"source": {"text": perplexity}}).take_base(llama, fresh=False)


def test_figures_are_kept_by_base_and_by_what_the_files_hold(llama, llama_dir, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    task = Perplexity(path=str(file), tokenizer=llama_dir, block_size=16)
    BaseFigures(tmp_path, "one").put(task, {"loss": 1.0})
    assert BaseFigures(tmp_path, "one").get(task) == {"loss": 1.0}
    assert BaseFigures(tmp_path, "two").get(task) is None
    assert BaseFigures(tmp_path, "one").get(Perplexity(path=str(file), tokenizer=llama_dir, block_size=8)) is None
    twin = tmp_path / "twin.txt"
    twin.write_text(TEXT)
    same = Perplexity(path=str(twin), tokenizer=llama_dir, block_size=16)
    assert BaseFigures(tmp_path, "one").get(same) == {"loss": 1.0}
    file.write_text(TEXT + "more")
    assert BaseFigures(tmp_path, "one").get(task) is None
    (tmp_path / "one.json").write_text("[]")
    with pytest.raises(ConfigError, match="one.json' does not hold figures of a base; delete it"):
        BaseFigures(tmp_path, "one").get(task)
    assert digest_of_base(llama) != digest_of_base(disturb(llama))


# -- arithmetic --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Accuracy(EvalTask):
    name: ClassVar[str] = "accuracy"

    def compared_by(self):
        return "acc", True

    def evaluate(self, model):
        return {"acc": 1.0}


def test_better_is_better_whatever_the_figure(perplexity):
    assert improvement(Accuracy(), {"acc": 0.25}, {"acc": 0.75}) == 0.5
    assert improvement(perplexity, {"loss": 3.0}, {"loss": 2.5}) == 0.5
    with pytest.raises(
        ConfigError, match="Accuracy is compared by 'acc', which is not among its figures: f1; override"
    ):
        improvement(Accuracy(), {"f1": 0.0}, {"acc": 1.0})


def test_the_front_is_what_no_point_beats():
    torch.manual_seed(2)
    points = [tuple(pair) for pair in torch.rand(60, 2).tolist()]
    beaten = [any(a >= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]
    expected = sorted((i for i, lost in enumerate(beaten) if not lost), key=lambda i: points[i][0])
    assert pareto_front(points) == expected
    assert 1 < len(expected) < 60
    assert pareto_front([(0.0, 0.0), (0.0, 0.0)]) == [0]


def test_the_largest_scale_within_a_limit_is_found_by_halving():
    asked = []

    def forgetting(scale):
        asked.append(scale)
        return scale

    assert largest_scale(forgetting, 0.7, 5) == pytest.approx(0.6875)
    assert asked == [0.5, 0.75, 0.625, 0.6875, 0.71875]
    assert largest_scale(lambda scale: math.inf, 0.7, 3) == 0.0


def test_the_best_scale_is_the_one_that_learned_most_within_the_limit():
    points = [ScaledPoint(0.0, 0.0, 0.0), ScaledPoint(0.5, 0.4, 0.2), ScaledPoint(0.75, 0.3, 0.1)]
    assert best_scale([*points, ScaledPoint(1.0, 0.9, 0.3)], 0.2) == points[1]
    assert best_scale(points[1:], 0.01) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": -1.0}, "limit must be a number of at least 0, got -1.0"),
        ({"limit": 0.1, "action": "halt"}, "action must be stop, shrink or pick, got 'halt'"),
        ({"limit": 0.1, "halvings": 0}, "halvings must be at least 1, got 0"),
        ({"limit": 0.1, "scales": [2.0]}, r"scales must be numbers from 0 to 1, got \[2.0\]"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ForgettingBudget(**settings)


def test_the_curve_is_plain_json(llama, perplexity):
    inject(llama, LoRA(rank=2))
    found = measure_forgetting(llama, {"text": perplexity})
    assert json.loads(json.dumps(found)) == found

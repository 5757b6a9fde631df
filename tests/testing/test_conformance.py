"""The conformance suite bites: a sound method passes, and each of its sabotaged twins fails the test that names its fault."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_peft.interfaces import Adapter, Method
from lightning_peft.testing import MethodConformance

FP32, BF16 = torch.float32, torch.bfloat16


class SoundAdapter(Adapter):
    """y = W x + B A x, as plainly as it can be written."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        factory = {"device": module.weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.empty(2, module.in_features, **factory))
        self.B = nn.Parameter(torch.empty(module.out_features, 2, **factory))

    def reset_parameters(self, base_layer):
        nn.init.normal_(self.A, std=0.1)
        nn.init.zeros_(self.B)

    def forward(self, base, x):
        y = base(x)
        return y + self.update(x, y)

    def update(self, x, y):
        return x.to(y.dtype) @ self.A.t().to(y.dtype) @ self.B.t().to(y.dtype)

    def merged_parameters(self, base_layer):
        weight = base_layer.weight
        return {"weight": (weight.detach().float() + self.B.detach() @ self.A.detach()).to(weight.dtype)}


class _Verbs(Method):
    name: ClassVar[str] = "sound"
    default_targets: ClassVar[tuple[str, ...]] = ("query", "down")
    mergeable: ClassVar[bool] = True
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    kind: ClassVar[type[Adapter]] = SoundAdapter

    def supports(self, module):
        return isinstance(module, nn.Linear)

    def adapter(self, module, target):
        return self.kind(module)


@dataclass(frozen=True, kw_only=True)
class Sound(_Verbs):
    """A method without a fault."""

    strength: float = 1.0
    """Nothing depends on it."""


class TestSound(MethodConformance):
    method = Sound()


class TestSoundOnAPlainModule(MethodConformance):
    """Models need not be transformers', nor inputs keyword arguments."""

    method = Sound()
    targets = ["0", "2"]  # noqa: RUF012

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).eval()

    def inputs(self, seed=0):
        return (torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)),)


# -- sabotaged methods -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CanBeChanged(_Verbs):
    pass


@dataclass(frozen=True, kw_only=True)
class Undocumented(Sound):
    secret: int = 1


@dataclass(frozen=True, kw_only=True)
class ForgetsTheType(Sound):
    parts: tuple[int, ...] = (1, 2)
    """JSON has lists only, and nothing makes a tuple of them again."""


@dataclass(frozen=True, kw_only=True)
class PreparesAgain(Sound):
    def prepare(self, model):
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)


# -- sabotaged adapters ------------------------------------------------------------------------------------------------


class StartsSomewhere(SoundAdapter):
    def reset_parameters(self, base_layer):
        nn.init.normal_(self.A)
        nn.init.normal_(self.B)


class TakesTheBaseWeight(SoundAdapter):
    def __init__(self, module):
        super().__init__(module)
        self.weight = module.weight


class ChangesTheBaseOnInit(SoundAdapter):
    def __init__(self, module):
        super().__init__(module)
        module.weight.data.mul_(0.9)


class ChangesTheBaseInForward(SoundAdapter):
    def forward(self, base, x):
        with torch.no_grad():
            base.weight.mul_(1.001)
        return super().forward(base, x)


class RemembersItsInput(SoundAdapter):
    def update(self, x, y):
        self.last = x
        return super().update(x, y)


class CountsInABuffer(SoundAdapter):
    def __init__(self, module):
        super().__init__(module)
        self.register_buffer("calls", torch.zeros((), device=module.weight.device), persistent=False)

    def update(self, x, y):
        self.calls += 1
        return super().update(x, y)


class ReusesAGraph(SoundAdapter):
    product = None

    def update(self, x, y):
        if self.product is None or not torch.is_grad_enabled():
            self.product = (self.B @ self.A).exp()
        return x @ self.product.t().to(y.dtype)


class MergesTooMuch(SoundAdapter):
    def merged_parameters(self, base_layer):
        merged = super().merged_parameters(base_layer)["weight"]
        return {"weight": base_layer.weight + 1.5 * (merged - base_layer.weight)}


class MergesInPlace(SoundAdapter):
    def merged_parameters(self, base_layer):
        base_layer.weight.data.add_(self.B @ self.A)
        return {"weight": base_layer.weight.data}


class SavesHalf(SoundAdapter):
    def disk_tensors(self):
        return {"A": self.A}


class LoadsHalf(SoundAdapter):
    @torch.no_grad()
    def import_state(self, state):
        self.A.copy_(state["A"])


class HooksTheBase(SoundAdapter):
    def __init__(self, module):
        super().__init__(module)
        module.register_forward_hook(lambda module, args, y: y * 1.5)


class ReturnsFloat32(SoundAdapter):
    def forward(self, base, x):
        return super().forward(base, x).float()


class HasThePrecisionOfTheBase(SoundAdapter):
    def __init__(self, module):
        super().__init__(module)
        self.to(module.weight.dtype)


class LooksAtOtherRows(SoundAdapter):
    def update(self, x, y):
        return super().update(x - x.mean(dim=0, keepdim=True), y)


class HasADeadParameter(SoundAdapter):
    def __init__(self, module):
        super().__init__(module)
        self.dead = nn.Parameter(torch.zeros(3, device=module.weight.device))


class Detaches(SoundAdapter):
    def update(self, x, y):
        return super().update(x, y).detach()


class IgnoresTrainingMode(SoundAdapter):
    def train(self, mode=True):
        return super().train(True)


class BreaksTheGraph(SoundAdapter):
    def update(self, x, y):
        return super().update(x, y) * (1.0 if x.abs().max().item() < 1e9 else 0.0)


class IsAlwaysOnTheCPU(SoundAdapter):
    def __init__(self, module):
        super().__init__(module)
        self.A = nn.Parameter(torch.empty(2, module.in_features, device="cpu"))


class LeavesATensorEmpty(SoundAdapter):
    def reset_parameters(self, base_layer):
        nn.init.normal_(self.A)
        self.B.data.fill_(torch.nan)


class SharesATensor(SoundAdapter):
    def __init__(self, module):
        super().__init__(module)
        self.A = module.__dict__.setdefault("shared", self.A)


class CountsItsSteps(SoundAdapter):
    steps = 0

    def update(self, x, y):
        self.steps += self.training
        return super().update(x, y) * (1 + 0.1 * self.steps)


class DependsOnTheCallNumber(CountsItsSteps):
    """The second run of a block under gradient checkpointing is another."""


def made_of(kind: type[Adapter]) -> Method:
    """Return a method that differs from :class:`Sound` by its adapter only."""
    members = {"kind": kind, "__module__": __name__, "__annotations__": {}}
    return dataclass(frozen=True, kw_only=True)(type(kind.__name__, (Sound,), members))()


CASES = [
    (CanBeChanged(), "test_is_a_frozen_keyword_only_dataclass", (), "can be changed"),
    (Undocumented(), "test_every_field_is_documented", (), "secret"),
    (ForgetsTheType(), "test_fields_survive_json", (), "came back from JSON"),
    (PreparesAgain(), "test_preparing_twice_changes_nothing", (), "idempotent"),
    (made_of(StartsSomewhere), "test_a_fresh_adapter_is_the_base", (), "a fresh adapter changes the output"),
    (made_of(TakesTheBaseWeight), "test_only_adapter_parameters_are_trained", (), "of the base require gradients"),
    (made_of(ChangesTheBaseOnInit), "test_injecting_leaves_the_base_as_it_is", (), "of the base; copy what you need"),
    (
        made_of(ChangesTheBaseInForward),
        "test_training_changes_its_own_tensors_only",
        (),
        "forward must not write to it",
    ),
    (made_of(Detaches), "test_gradients_reach_every_adapter_parameter", (), "no gradient reaches"),
    (made_of(HasADeadParameter), "test_gradients_reach_every_adapter_parameter", (), "dead"),
    (made_of(HasADeadParameter), "test_training_changes_its_own_tensors_only", (), "dead"),
    (made_of(HooksTheBase), "test_disabled_is_the_base", (), "no hooks"),
    (made_of(HooksTheBase), "test_deleting_the_last_gives_the_base_back", (), "is a hook left"),
    (made_of(IgnoresTrainingMode), "test_train_and_eval_reach_the_adapter", (), "do not override train"),
    (made_of(DependsOnTheCallNumber), "test_gradient_checkpointing_gives_the_same_gradients", (), "depend on a state"),
    (made_of(BreaksTheGraph), "test_compiled_equals_eager", (), "in one graph"),
    (made_of(HasThePrecisionOfTheBase), "test_adapters_have_their_own_precision", (BF16,), "must be torch.float32"),
    (made_of(ReturnsFloat32), "test_the_output_has_the_precision_of_the_base", (BF16,), "cast the result"),
    (made_of(RemembersItsInput), "test_a_forward_leaves_nothing_behind", (), "last"),
    (made_of(CountsInABuffer), "test_a_forward_leaves_nothing_behind", (), "calls"),
    (made_of(ReusesAGraph), "test_two_forwards_then_both_backwards", (), "keep no state"),
    (made_of(LooksAtOtherRows), "test_rows_do_not_depend_on_each_other", (), "looks at other rows"),
    (
        made_of(LooksAtOtherRows),
        "test_rows_with_adapters_of_their_own_are_separate_passes",
        (),
        "is not what it is in a pass",
    ),
    (made_of(IsAlwaysOnTheCPU), "test_adapters_can_be_built_on_the_meta_device", (), "are real over a base"),
    (made_of(LeavesATensorEmpty), "test_adapters_can_be_built_on_the_meta_device", (), "not finite"),
    (made_of(MergesTooMuch), "test_merged_equals_unmerged", (FP32,), "check merged_parameters"),
    (made_of(MergesTooMuch), "test_two_adapters_act_together", (), "two merged adapters"),
    (made_of(MergesInPlace), "test_unmerging_restores_the_base", (), "must not write to the base"),
    (made_of(SavesHalf), "test_saved_and_loaded_is_the_same", (), "gives another output"),
    (made_of(LoadsHalf), "test_saved_and_loaded_is_the_same", (), "check export_state and import_state"),
    (made_of(SharesATensor), "test_named_adapters_are_independent", (), "share no tensor"),
    (made_of(CountsItsSteps), "test_resumed_equals_uninterrupted", (), "hidden state"),
]


@pytest.mark.parametrize(
    ("method", "test", "arguments", "message"), CASES, ids=[f"{type(case[0]).__name__}-{case[1]}" for case in CASES]
)
def test_a_sabotaged_method_fails_the_test_of_its_fault(method, test, arguments, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        _call(method, test, arguments, tmp_path)


def test_a_base_that_is_not_the_same_twice_is_noticed(tmp_path):
    class Restless(MethodConformance):
        method = Sound()
        calls = 0

        def model(self):
            type(self).calls += 1
            model = super().model()
            with torch.no_grad():
                next(model.parameters()).add_(self.calls)
            return model

    with pytest.raises(AssertionError, match="is not that of the base"):
        Restless().test_disabled_is_the_base()


def test_what_is_not_declared_is_skipped():
    suite = type("Suite", (MethodConformance,), {"method": Sound()})()
    with pytest.raises(pytest.skip.Exception, match="sound declares peft_type = None"):
        suite.test_hf_peft_reads_the_folder(None)


def test_the_suite_has_thirty_tests_or_more_and_each_says_why():
    tests = {name: test for name, test in inspect.getmembers(MethodConformance) if name.startswith("test_")}
    assert len(tests) >= 30
    assert [name for name, test in tests.items() if not inspect.getdoc(test)] == []


def _call(method: Method, test: str, arguments: tuple, tmp_path) -> None:
    suite = type("Suite", (MethodConformance,), {"method": method})()
    bound: Callable[..., None] = getattr(suite, test)
    bound(*([tmp_path] if "tmp_path" in inspect.signature(bound).parameters else []), *arguments)

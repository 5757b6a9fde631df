"""A training step asks nothing of the device that the host would have to wait for: on a GPU that would empty its queue.

Seen on the CPU: the operations that hand values or lengths to the host, and the methods of tensors that read memory. What a library does on
a GPU alone (attention, Triton) is not seen here.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import BitFit, MixLoRA, MoEUpcycling, TrainableTokens, adapter_rows, get_registry, inject
from lightning_peft.testing import tiny_llama, token_batch

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "is_nonzero",
    "bincount",
    "repeat_interleave",
)
READING = ("tolist", "numpy", "cpu")
SETTINGS = {
    "bitfit": lambda: BitFit(add_missing=True),
    "trainable_tokens": lambda: TrainableTokens(tokens=[3, 5]),
    "mix_lora": lambda: MixLoRA(implementation="wide"),  # what "auto" takes off the CPU
    "moe_upcycling": lambda: MoEUpcycling(implementation="grouped_mm"),  # likewise, where it fits
}


class Waits(TorchDispatchMode):
    """Counts what hands values, or shapes that depend on values, to the host."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = Counter()
        for name in READING:
            monkeypatch.setattr(Tensor, name, self._counted(name))

    def _counted(self, name):
        method = getattr(Tensor, name)

        def counted(tensor, *args, **kwargs):
            self.seen[name] += 1
            return method(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = (
            [one for one in args[1] if isinstance(one, Tensor)]
            if name.startswith("index") and name[5:7] in ("", "_p")
            else []
        )
        if name in WAITING or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def waits_in_a_step(monkeypatch, model):
    batch = token_batch(rows=3, length=8)
    with monkeypatch.context() as patched, Waits(patched) as waits:
        model(**batch).logits.square().mean().backward()
    return waits.seen


@pytest.fixture(scope="module")
def of_the_base():
    with pytest.MonkeyPatch.context() as monkeypatch:
        return waits_in_a_step(monkeypatch, tiny_llama().train())


def builtin():
    return [name for name, m in get_registry().methods.items() if m.__module__.startswith("lightning_peft.")]


@pytest.mark.parametrize("name", builtin())
def test_forward_and_backward_wait_no_more_than_the_base(name, monkeypatch, of_the_base):
    model = tiny_llama().train()
    inject(model, SETTINGS.get(name, get_registry().methods[name])())
    assert waits_in_a_step(monkeypatch, model) == of_the_base


@pytest.mark.parametrize(
    ("method", "waits"),
    [
        (MixLoRA(implementation="segments"), {"bincount": 2, "tolist": 2}),
        (MoEUpcycling(implementation="unbind"), {"tolist": 2}),
    ],
    ids=["segments", "unbind"],
)
def test_mixtures_that_run_expert_by_expert_wait_once_a_layer(method, waits, monkeypatch, of_the_base):
    model = tiny_llama().train()
    inject(model, method)
    assert waits_in_a_step(monkeypatch, model) - of_the_base == Counter(waits)


def test_rows_wait_no_more_than_the_base(monkeypatch, of_the_base):
    model = tiny_llama().train()
    for name in ("a", "b"):
        inject(model, get_registry().methods["lora"](), name=name)
    with adapter_rows(model, ["a", None, "b"]):
        assert waits_in_a_step(monkeypatch, model) == of_the_base


def test_a_wait_would_be_seen(monkeypatch):
    model = tiny_llama().train()
    seen = [0]

    def look(module, args, output):
        seen[0] = output.sum().item(), output[output > 0], output.flatten().tolist()

    model.model.layers[0].mlp.register_forward_hook(look)
    found = waits_in_a_step(monkeypatch, model)
    assert (found["index"], found["tolist"]) == (1, 1)
    assert found["_local_scalar_dense"] >= 1

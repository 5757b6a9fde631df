"""Several adapters in one model: added, switched, combined, copied and deleted."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_peft.activation import set_active_adapters
from lightning_peft.adapter_layer import adapter_names
from lightning_peft.errors import InjectionError
from lightning_peft.merging import merge_adapters
from lightning_peft.surgery import delete_adapter
from lightning_peft.testing.subject import Subject, adapter_parameters, base_tensors, differing, refused


class LifecycleTests(Subject):
    """Tests with two adapters, ``one`` and ``two``, trained one after the other."""

    def test_named_adapters_are_independent(self) -> None:
        """Training the second leaves the first as it was, and switching gives each its own output."""
        model = self.base()
        self.inject(model, "one")
        self.train(model)
        first, output = _tensors(model, "one"), self.outputs(model)
        self.inject(model, "two")
        self.train(model, seed=10)
        changed = differing(first, _tensors(model, "one"))
        assert not changed, (
            f"training a second adapter changed {changed[:3]} of the first; adapters must share no tensor"
        )
        second = self.outputs(model)
        assert not torch.equal(second, output), "two adapters trained on different data give the same output"
        set_active_adapters(model, "one")
        assert torch.equal(self.outputs(model), output), "switched back to, the first adapter gives another output"
        set_active_adapters(model, "two")
        assert torch.equal(self.outputs(model), second), "switched back to, the second adapter gives another output"

    def test_inactive_adapters_do_not_require_gradients(self) -> None:
        """Distributed training would wait for gradients that never come."""
        model = self._two()
        one, two = (
            {key: p.requires_grad for key, p in adapter_parameters(model).items() if f":{name}." in key}
            for name in ("one", "two")
        )
        assert not any(one.values()), (
            f"{[k for k, v in one.items() if v][:3]} require gradients while another is active"
        )
        assert all(two.values()), f"{[k for k, v in two.items() if not v][:3]} of the active adapter need no gradients"
        torch.autograd.backward(self.loss(self.forward(model)))
        reached = [k for k, p in adapter_parameters(model).items() if ":one." in k and p.grad is not None]
        assert not reached, f"{reached[:3]} of an inactive adapter got gradients"

    def test_two_adapters_act_together(self) -> None:
        """With ``composable`` both act at one place; merged into the weights or not, in either order, the result is one."""
        model = self._two()
        alone = self.outputs(model)
        if not self.method.composable:
            with refused(InjectionError, "two adapters were active at one place, though composable = False"):
                set_active_adapters(model, ["one", "two"])
            assert torch.equal(self.outputs(model), alone), "the refused activation changed the output"
            return
        set_active_adapters(model, ["one", "two"])
        both = self.outputs(model)
        assert torch.isfinite(both).all(), "with two active adapters the output is not finite"
        assert not torch.equal(both, alone), "a second active adapter does not change the output"
        if not self.method.mergeable:
            return
        set_active_adapters(model, ["two", "one"])
        assert self.close(self.outputs(model), both), "the order of two active adapters changes the output"
        merge_adapters(model)
        assert self.close(self.outputs(model), both), "two merged adapters do not act as the two adapters do"

    def test_deleting_one_leaves_the_other(self) -> None:
        """The rest of the model does not notice."""
        model = self._two()
        output, second = self.outputs(model), _tensors(model, "two")
        delete_adapter(model, "one")
        assert adapter_names(model) == ["two"], f"after deleting 'one' the model holds {adapter_names(model)}"
        assert torch.equal(self.outputs(model), output), "deleting an inactive adapter changed the output"
        changed = differing(second, _tensors(model, "two"))
        assert not changed, f"deleting one adapter changed {changed[:3]} of the other"

    def test_deleting_the_last_gives_the_base_back(self) -> None:
        """No wrapper, hook or tensor is left."""
        model, base = self._two(), self.base()
        delete_adapter(model, "two")
        delete_adapter(model, "one")
        kinds = [{path: type(module) for path, module in m.named_modules()} for m in (model, base)]
        assert kinds[0] == kinds[1], "after deleting all adapters the modules of the model are not those of the base"
        changed = differing(base_tensors(model), base_tensors(base))
        assert not changed, f"after deleting all adapters {changed[:3]} differ from the base"
        assert torch.equal(self.outputs(model), self.outputs(base)), (
            "after deleting all adapters the output is not that of the base; is a hook left?"
        )

    def test_a_deep_copy_is_equal_and_independent(self) -> None:
        """Copies are made for merging and for averaging weights."""
        model = self.trained()
        output = self.outputs(model)
        twin = copy.deepcopy(model)
        assert torch.equal(self.outputs(twin), output), "a deep copy gives another output"
        self.train(twin, seed=10)
        assert torch.equal(self.outputs(model), output), (
            "training a deep copy changed the original; what do they share?"
        )
        assert not torch.equal(self.outputs(twin), output), (
            "a deep copy cannot be trained: does its forward use the original?"
        )

    def _two(self) -> nn.Module:
        """Return a model with two trained adapters, the second active."""
        model = self.base()
        for seed, name in ((0, "one"), (10, "two")):
            self.inject(model, name)
            self.train(model, seed=seed)
        return model


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in adapter_parameters(model).items() if f":{name}." in key}

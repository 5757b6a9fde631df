"""Beside the method: a module trained in full in the same adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft.adapter_layer import adapter_layers, base_modules, unwrapped
from lightning_peft.arithmetic.parameter_copies import parameter_places
from lightning_peft.saved_modules import inside, own_adapters
from lightning_peft.state import adapter_state_dict, save_adapter
from lightning_peft.surgery import inject
from lightning_peft.testing.subject import Subject, base_tensors, differing


class SavedModulesTests(Subject):
    """Tests of ``modules_to_save``."""

    def test_a_module_is_trained_in_full_beside_the_method(self, tmp_path: Path) -> None:
        """The copies of a module that the method leaves alone act, are saved with the adapter, and leave the base as it is."""
        free = self._free()
        model, again = self.base(), self.base()
        before = base_tensors(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            inject(model, self.method, self.targets, modules_to_save=[free])
        assert free not in own_adapters(model, "default"), (
            f"the method's own verbs would be handed the copies at {free!r}"
        )
        fresh = self.outputs(model)
        with torch.no_grad():
            for parameter in adapter_layers(model)[free].adapters.parameters():
                parameter.add_(0.5)
        assert not torch.equal(self.outputs(model), fresh), f"the copies at {free!r} do not act beside the method"
        assert not differing(before, base_tensors(model)), "a module trained in full beside the method changed the base"
        self.load(again, save_adapter(model, tmp_path))
        changed = differing(adapter_state_dict(model), adapter_state_dict(again))
        assert not changed, f"{changed[:3]} are not the same after saving and loading beside {free!r}"
        assert torch.equal(self.outputs(again), self.outputs(model)), (
            "saved and loaded beside a module trained in full, the adapter gives another output"
        )

    def _free(self) -> str:
        """Return the path of a module that the method leaves alone and that has a part in the output."""
        adapted, model = set(adapter_layers(self.adapted())), self.base()
        modules = {path: unwrapped(module) for path, module in base_modules(model) if path}
        for path in reversed(parameter_places(model, list(modules))):
            leaf = next(modules[path].children(), None) is None
            if (
                leaf
                and not inside(path, adapted)
                and _floating(modules[path])
                and _shared_by_none(model, modules[path])
            ):
                return path
        pytest.skip(f"{self.method.name} adapts every module of the model")


def _floating(module: nn.Module) -> bool:
    return all(parameter.is_floating_point() for parameter in module.parameters())


def _shared_by_none(model: nn.Module, module: nn.Module) -> bool:
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    holders = [m for m in model.modules() if own & {id(parameter) for parameter in m.parameters(recurse=False)}]
    return len(holders) == 1

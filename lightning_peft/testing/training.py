"""What is trained, what is not, and that the base is there whenever it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.activation import adapters_disabled
from lightning_peft.adapter_layer import AdapterLayer, base_parameters
from lightning_peft.calibration import initialize_from_data
from lightning_peft.interfaces import Method
from lightning_peft.state import adapter_state_dict
from lightning_peft.testing.subject import (
    Subject,
    adapter_parameters,
    adapters,
    base_tensors,
    differing,
)


class TrainingTests(Subject):
    """Tests of a fresh adapter, of training it, and of switching it off."""

    def test_preparing_twice_changes_nothing(self) -> None:
        """``prepare`` runs before every injection, so it must know a model that it has prepared."""
        model = self.base()
        before = base_tensors(model)
        self.method.prepare(model)
        changed = differing(before, base_tensors(model))
        assert not changed, (
            f"prepare() changed {changed[:3]} of a model that it had prepared already; make it idempotent"
        )

    def test_injecting_leaves_the_base_as_it_is(self) -> None:
        """Building adapters must not write to what they adapt."""
        changed = differing(base_tensors(self.base()), base_tensors(self.adapted()))
        assert not changed, (
            f"adapter() or reset_parameters() changed {changed[:3]} of the base; copy what you need of it"
        )

    def test_a_fresh_adapter_is_the_base(self) -> None:
        """With ``identity_at_init`` training starts at the base, bit for bit; without, it really starts elsewhere."""
        fresh, base = self.outputs(self.adapted()), self.outputs(self.base())
        if not self.method.identity_at_init:
            assert not torch.equal(fresh, base), (
                "a fresh adapter leaves the output as it is: set identity_at_init = True"
            )
            return
        assert torch.equal(fresh, base), (
            "a fresh adapter changes the output; start it as the identity in reset_parameters, or set identity_at_init = False"
        )

    def test_values_come_from_data_where_they_are_said_to(self) -> None:
        """With ``data_driven`` batches change a fresh adapter, and nothing else; the declared identity stays."""
        if not self.method.data_driven:
            assert type(self.method).initialize is Method.initialize, (
                "initialize is never called: set data_driven = True"
            )
            pytest.skip(f"{self.method.name} declares data_driven = False")
        model = self.adapted()
        fresh, before = adapter_state_dict(model), base_tensors(model)
        fresh = {name: tensor.clone() for name, tensor in fresh.items()}
        batches = [self.inputs(seed) for seed in range(8)]
        initialize_from_data(model, batches, lambda batch: self.loss(self.forward(model, batch)))
        assert differing(fresh, adapter_state_dict(model)), "data changed no tensor of the adapter"
        assert not differing(before, base_tensors(model)), "taking values from data changed the base"
        if self.method.identity_at_init:
            assert torch.equal(self.outputs(model), self.outputs(self.base())), (
                "with values from data a fresh adapter changes the output; keep the identity or set identity_at_init = False"
            )

    def test_only_adapter_parameters_are_trained(self) -> None:
        """The base is frozen, the adapter is not."""
        model = self.adapted()
        own = adapter_parameters(model)
        assert own, "the method put no parameter into the model; what is trained must be an nn.Parameter of an Adapter"
        leaked = [name for name, parameter in base_parameters(model) if parameter.requires_grad]
        assert not leaked, (
            f"{leaked[:3]} of the base require gradients; an adapter must not hold or unfreeze what it adapts"
        )
        frozen = [name for name, parameter in own.items() if not parameter.requires_grad]
        assert not frozen, f"{frozen[:3]} do not require gradients; a tensor that is not trained must be a buffer"

    def test_gradients_reach_every_adapter_parameter(self) -> None:
        """A parameter without a gradient is not trained, and stops distributed training."""
        model = self.trained()
        torch.autograd.backward(self.loss(self.forward(model)))
        without = [name for name, parameter in adapter_parameters(model).items() if not _has_gradient(parameter)]
        assert not without, f"no gradient reaches {without[:3]}; use every parameter in forward, or make it a buffer"

    def test_training_changes_its_own_tensors_only(self) -> None:
        """After several steps the base is the same, bit for bit, and every parameter of the adapter is another."""
        model = self.adapted()
        base = base_tensors(model)
        own = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
        self.train(model)
        changed = differing(base, base_tensors(model))
        assert not changed, f"training changed {changed[:3]} of the base; forward must not write to it"
        kept = [name for name, parameter in adapter_parameters(model).items() if torch.equal(parameter, own[name])]
        assert not kept, f"training left {kept[:3]} as they were; does forward detach them?"

    def test_training_changes_the_output(self) -> None:
        """An adapter that does nothing would pass many other tests."""
        model = self.trained()
        assert not torch.equal(self.outputs(model), self.outputs(self.base())), (
            "the output of a trained adapter is that of the base; does forward use the parameters?"
        )

    def test_disabled_is_the_base(self) -> None:
        """Switched off, the model is the base bit for bit; switched on again, it is the adapted model."""
        model = self.trained()
        adapted, base = self.outputs(model), self.outputs(self.base())
        with adapters_disabled(model):
            disabled = self.outputs(model)
        assert torch.equal(disabled, base), (
            "with adapters disabled the output is not that of the base; act only in Adapter.forward: no hooks, no patching"
        )
        assert torch.equal(self.outputs(model), adapted), "enabling the adapter again does not give its output back"

    def test_train_and_eval_reach_the_adapter(self) -> None:
        """An adapter with dropout must know which it is."""
        model = self.adapted()
        for mode in (True, False):
            model.train(mode)
            wrong = [place for place, adapter in adapters(model).items() if adapter.training is not mode]
            assert not wrong, f"model.train({mode}) does not reach the adapters at {wrong[:3]}; do not override train()"

    def test_gradient_checkpointing_gives_the_same_gradients(self) -> None:
        """Activations that are computed again in backward must be the same."""
        plain, checkpointed = self.trained(), self.trained()
        wanted = self._gradients(plain.train(), checkpointing=False)
        found = self._gradients(checkpointed.train(), checkpointing=True)
        wrong = [name for name in wanted if not self.close(found[name], wanted[name])]
        assert not wrong, (
            f"gradients of {wrong[:3]} differ under gradient checkpointing; does forward depend on a state?"
        )

    def test_compiled_equals_eager(self) -> None:
        """``torch.compile`` takes the whole model in one graph and gives the same outputs and gradients.

        Of blocks that are alike the first is compiled alone: a graph repeats each of them, and that is most of the time.
        """
        model = _with_one_block(self.trained())
        eager, wanted = self.outputs(model), self._gradients(model, checkpointing=False)
        torch._dynamo.reset()
        try:
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            output = self.forward(compiled)  # type: ignore[arg-type]
            torch.autograd.backward(self.loss(output))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise AssertionError(f"torch.compile cannot take the adapted model in one graph: {error}") from error
        finally:
            torch._dynamo.reset()
        assert self.close(output.detach(), eager), "the output of the compiled model is not that of the eager one"
        found = _taken_gradients(model)
        wrong = [name for name in wanted if not self.close(found[name], wanted[name])]
        assert not wrong, f"gradients of {wrong[:3]} differ under torch.compile"

    def _gradients(self, model: nn.Module, *, checkpointing: bool) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            if checkpointing and not _enable_checkpointing(model):
                output = torch.utils.checkpoint.checkpoint(lambda: self.forward(model), use_reentrant=False)
            else:
                output = self.forward(model)
            torch.autograd.backward(self.loss(output))
        return _taken_gradients(model)


def _with_one_block(model: nn.Module) -> nn.Module:
    """Leave the first of the blocks in each outermost list, if all of them have the same adapters in the same places."""
    lists = {path: one for path, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) > 1}
    for path, blocks in lists.items():
        if any(path.startswith(f"{outer}.") for outer in lists):
            continue
        alike = [[(name, type(layer)) for name, layer in block.named_modules()] for block in blocks]
        adapted = any(isinstance(layer, AdapterLayer) for layer in blocks[0].modules())
        if adapted and all(one == alike[0] for one in alike):
            model.set_submodule(path, blocks[:1])
    return model


def _enable_checkpointing(model: nn.Module) -> bool:
    """Switch on transformers' own gradient checkpointing, block by block; tell whether the model has it."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the newer name first
        enable = getattr(model, f"{name}_enable", None)
        if callable(enable):
            enable(**{f"{name}_kwargs": {"use_reentrant": False}})
            return True
    return False


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()) and bool(parameter.grad.any())


def _taken_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the adapters and clear them; zeros where there is none."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in adapter_parameters(model).items()
    }
    model.zero_grad()
    return found

"""Precision, rows, and the memory of a forward: an adapter is a function of its input and its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.activation import adapters_disabled
from lightning_peft.adapter_layer import AdapterLayer, adapter_layers, base_modules, unwrapped
from lightning_peft.errors import InjectionError
from lightning_peft.interfaces import Method
from lightning_peft.registry import get_registry
from lightning_peft.surgery import materialize_adapters
from lightning_peft.testing.subject import (
    Subject,
    adapter_parameters,
    base_tensors,
    differing,
    tensors_in,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class ArithmeticTests(Subject):
    """Tests of dtypes, of devices without memory, and of the independence of rows and of calls."""

    @DTYPES
    def test_adapters_have_their_own_precision(self, dtype: torch.dtype) -> None:
        """In bfloat16 most updates of a small learning rate round to nothing, so adapters are float32 over any base."""
        wanted = self.adapter_dtype or dtype
        wrong = {n: p.dtype for n, p in adapter_parameters(self.adapted(dtype)).items() if p.dtype != wanted}
        assert not wrong, f"over a base in {dtype} adapters must be {wanted}, found {dict(list(wrong.items())[:3])}"

    @DTYPES
    def test_the_output_has_the_precision_of_the_base(self, dtype: torch.dtype) -> None:
        """The next layer expects what the base would have given it."""
        model = self.adapted(dtype)
        wanted: dict[str, list[torch.dtype]] = {}
        with adapters_disabled(model), _watching(model, wanted.__setitem__):
            self.outputs(model)

        def compare(path: str, found: list[torch.dtype]) -> None:
            assert found == wanted[path], (
                f"at {path!r}, over a base in {dtype}, the adapter returns {found} where the base returns {wanted[path]}; "
                "cast the result to the dtype of the base's"
            )

        with _watching(model, compare):
            self.outputs(model)

    def test_autocast_works(self) -> None:
        """Forward and backward run in mixed precision, and the gradients are those of float32 parameters."""
        model = self.trained()
        with torch.autocast("cpu", torch.bfloat16):
            with adapters_disabled(model):
                base = self.outputs(model)
            output = self.forward(model)
            loss = self.loss(output)
        torch.autograd.backward(loss)
        assert output.dtype == base.dtype, f"under autocast the output is {output.dtype}, that of the base {base.dtype}"
        assert torch.isfinite(output).all(), "under autocast the output is not finite"
        wrong = [
            name
            for name, parameter in adapter_parameters(model).items()
            if parameter.grad is None or not torch.isfinite(parameter.grad).all()
        ]
        assert not wrong, f"under autocast the gradients of {wrong[:3]} are missing or not finite"

    def test_a_forward_leaves_nothing_behind(self) -> None:
        """No attribute, buffer or cached tensor may change: it would leak from one batch into the next."""
        model = self.trained().train()
        before = dict(_state(model))
        self.forward(model)
        after = dict(_state(model))
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        assert not changed, f"a forward changed {changed[:3]}; keep what it computes in local variables"

    def test_two_forwards_then_both_backwards(self) -> None:
        """Gradients of two batches add up, in whatever order forwards and backwards run."""
        model = self.trained()
        try:
            for seed in (0, 1):
                torch.autograd.backward(self.loss(self.forward(model, self.inputs(seed))))
            wanted = {name: p.grad for name, p in adapter_parameters(model).items()}
            model.zero_grad()
            losses = [self.loss(self.forward(model, self.inputs(seed))) for seed in (0, 1)]
            for loss in losses:
                torch.autograd.backward(loss)
        except RuntimeError as error:
            raise AssertionError(
                f"backward fails after a second forward; keep no state between forwards: {error}"
            ) from error
        for name, parameter in adapter_parameters(model).items():
            one, other = parameter.grad, wanted[name]
            assert one is not None, f"{name} has no gradient"
            assert other is not None, f"{name} has no gradient"
            assert self.close(one, other), f"the gradient of {name} mixes two forwards; keep no state between them"

    def test_rows_do_not_depend_on_each_other(self) -> None:
        """With ``row_routable`` each row of a batch may have an adapter of its own, so it must not see the others."""
        self.need("row_routable")
        model, inputs = self.trained(), self.inputs()
        together = self.outputs(model, inputs)
        for row in range(len(together)):
            alone = self.outputs(model, _row(inputs, row))
            assert self.close(alone[0], together[row]), (
                f"row {row} of a batch is not what it is alone; the adapter looks at other rows: set row_routable = False"
            )

    def test_adapters_can_be_built_on_the_meta_device(self) -> None:
        """Large models are built without memory, adapted, and get their weights later."""
        if type(self.method).prepare is not Method.prepare:
            pytest.skip(f"{self.method.name} prepares the base, which needs its weights")
        with torch.device("meta"):
            model = self.model()
            self.inject(model)
        real = [name for name, parameter in adapter_parameters(model).items() if not parameter.is_meta]
        assert not real, (
            f"{real[:3]} are real over a base on the meta device; allocate with torch.empty(device=weight.device)"
        )
        _fill(model, self.base())
        materialize_adapters(model)
        empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
        empty += [name for name, tensor in model.named_buffers() if tensor.is_meta]
        assert not empty, f"{empty[:3]} are still on the meta device after materialize_adapters"
        output = self.outputs(model)
        assert torch.isfinite(output).all(), "the output is not finite; reset_parameters must give every tensor a value"
        if self.method.identity_at_init:
            assert torch.equal(output, self.outputs(self.base())), (
                "built on the meta device, a fresh adapter is no identity"
            )
        self.train(model, steps=1)

    def test_works_over_a_quantised_base(self) -> None:
        """With ``quantized_base`` the weights of the base may be packed in four bits, and stay as they are."""
        self.need("quantized_base")
        model = self.base()
        packed = _quantize(model)
        if not packed:
            pytest.skip(f"{type(model).__name__} has no linear layer that NF4 can take")
        self.inject(model)
        before = base_tensors(model)
        with adapters_disabled(model):
            base = self.outputs(model)
        self.train(model)
        changed = differing(before, base_tensors(model))
        assert not changed, f"training changed {changed[:3]} of the quantised base"
        assert not torch.equal(self.outputs(model), base), "over a quantised base training does not change the output"
        with adapters_disabled(model):
            assert torch.equal(self.outputs(model), base), "over a quantised base the disabled adapter is not the base"


@contextlib.contextmanager
def _watching(model: nn.Module, seen: Callable[[str, list[torch.dtype]], None]) -> Iterator[None]:
    """Call ``seen`` with the path and the dtypes of what each adapted place returns, for the time of a ``with`` block."""

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: seen(path, [tensor.dtype for tensor in tensors_in(output)])

    handles = [layer.register_forward_hook(hook(path)) for path, layer in adapter_layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what modules hold between two forwards: identity and version of tensors, plain values, identity of the rest."""
    for path, module in model.named_modules():
        own = isinstance(module, AdapterLayer) or ".adapters." in f".{path}."
        for key, value in {**module.__dict__, **module._buffers}.items():
            found = _mark(value)
            if own or any(True for _ in tensors_in(value)):
                yield f"{path}.{key}", found


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", id(value), value._version)
    if isinstance(value, dict):
        return {key: _mark(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, frozenset)) or value is None else id(value)


def _row(inputs: Any, row: int) -> Any:
    """Return one row of a batch, as a batch."""
    if isinstance(inputs, Tensor):
        return inputs[row : row + 1]
    if isinstance(inputs, dict):
        return {key: _row(value, row) for key, value in inputs.items()}
    return tuple(_row(value, row) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


def _fill(model: nn.Module, source: nn.Module) -> None:
    """Give the base of ``model``, on the meta device, the tensors of ``source``, as loading a checkpoint would."""
    modules = dict(base_modules(source))
    for path, module in base_modules(model):
        own = unwrapped(module)
        for key, parameter in modules[path]._parameters.items():
            own._parameters[key] = None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
        own._buffers.update(modules[path]._buffers)


def _quantize(model: nn.Module) -> list[str]:
    """Replace the linear layers of ``model``, but for its head, by layers of four bits; return their paths."""
    quantizer = get_registry().get("quantizer", "nf4")(compute_dtype="float32")
    getter = getattr(model, "get_output_embeddings", lambda: None)
    done = []
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is getter():
            continue
        try:
            packed = quantizer.quantize(module)
        except InjectionError:
            continue
        model.set_submodule(path, packed)
        done.append(path)
    return done

"""The method under test, the model it is tried on, and the handful of things that the tests do with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import adapter_layers, base_modules, unwrapped
from lightning_peft.errors import LightningPEFTError
from lightning_peft.injection import Injection
from lightning_peft.interfaces import Adapter, Method
from lightning_peft.registry import get_registry
from lightning_peft.state import load_adapter
from lightning_peft.surgery import inject
from lightning_peft.targets import Targets
from lightning_peft.testing.toys import tiny_llama, token_batch


class Subject:
    """What a subclass of the suite sets: ``method``, and where the defaults do not fit, the attributes and methods below."""

    method: Method
    """The method under test, with the hyperparameters to test it with."""
    targets: str | list[str] | Targets | None = None
    """What to adapt; the method's default targets if None."""
    tolerance: ClassVar[Mapping[torch.dtype, float]] = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
    """How far results that are equal on paper may differ, as a share of the largest value."""
    adapter_dtype: torch.dtype | None = torch.float32
    """Precision of adapters over a base in float32 or bfloat16; None if it is that of the base."""

    def model(self) -> nn.Module:
        """Return a small base model in float32 and eval mode, the same at every call."""
        return tiny_llama()

    def inputs(self, seed: int = 0) -> Any:
        """Return a batch for the model, another one for another seed: keyword arguments, a tuple of arguments, or a tensor."""
        return token_batch(seed)

    # -- models ----------------------------------------------------------------------------------------------------

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the base as the method prepares it, without adapters."""
        model = self.model().to(dtype)
        self.method.prepare(model)
        return model.eval()

    def adapted(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the base with a fresh adapter."""
        model = self.base(dtype)
        self.inject(model)
        return model

    def trained(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the base with an adapter that was trained a little."""
        model = self.adapted(dtype)
        self.train(model)
        return model

    def inject(self, model: nn.Module, name: str = "default") -> Injection:
        """Put an adapter into ``model``, the same values at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return inject(model, self.method, self.targets, name=name)

    def train(self, model: nn.Module, steps: int = 3, seed: int = 0) -> None:
        """Train what requires gradients in ``model`` for some steps, and leave it in eval mode."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.train()
            for step in range(steps):
                optimizer.zero_grad()
                loss = self.loss(self.forward(model, self.inputs(seed + step)))
                assert loss.requires_grad, "no gradient reaches any parameter of the adapter; does forward detach them?"
                try:
                    torch.autograd.backward(loss)
                except RuntimeError as error:
                    raise AssertionError(
                        f"training fails at step {step}; keep no state between forwards: {error}"
                    ) from error
                optimizer.step()
        optimizer.zero_grad()
        model.eval()

    # -- results ---------------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, inputs: Any = None) -> Tensor:
        """Return the logits, or the first tensor, that ``model`` makes of a batch."""
        dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        batch = _cast(self.inputs() if inputs is None else inputs, next(dtypes, torch.float32))
        if isinstance(batch, Mapping):
            result = model(**batch)
        else:
            result = model(*batch) if isinstance(batch, tuple) else model(batch)
        return first_tensor(result)

    @torch.no_grad()
    def outputs(self, model: nn.Module, inputs: Any = None) -> Tensor:
        """Return what :meth:`forward` does, without gradients."""
        return self.forward(model, inputs)

    def loss(self, output: Tensor) -> Tensor:
        """Return a loss that every element of ``output`` has a part in: the distance to fixed random values."""
        goal = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.device)
        return (output.float() - goal).square().mean()

    # -- the registry ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """Have the method in the registry for a while, so that the suite runs before its package is installed."""
        with mock.patch.dict(get_registry()._items["method"], {self.method.name: type(self.method)}):
            yield

    def load(self, model: nn.Module, folder: Path, **options: Any) -> Injection:
        """Load an adapter folder into ``model``."""
        with self.registered():
            return load_adapter(model, folder, **options)

    def need(self, capability: str) -> None:
        """Skip the test where the method does not declare ``capability``."""
        if not getattr(self.method, capability):
            pytest.skip(f"{self.method.name} declares {capability} = {getattr(self.method, capability)!r}")

    def close(self, a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> bool:
        """Tell whether two results are equal within the tolerance for ``dtype``."""
        return distance(a, b) <= self.tolerance[dtype]


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two results as a share of the largest value; infinite where one is not finite."""
    if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12))


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return every adapter in ``model`` by ``<module path>:<adapter name>``."""
    return {
        f"{path}:{name}": layer._adapter(name)
        for path, layer in adapter_layers(model).items()
        for name in layer.adapters
    }


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of every adapter in ``model``."""
    return {f"{place}.{key}": p for place, adapter in adapters(model).items() for key, p in adapter.named_parameters()}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers of the base of ``model``."""
    return {
        f"{path}.{key}": tensor.detach().clone()
        for path, module in base_modules(model)
        for own in [unwrapped(module)]
        for key, tensor in [*own.named_parameters(recurse=False), *own.named_buffers(recurse=False)]
    }


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not the same in both, bit for bit."""
    return sorted(
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])
    )


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Return a batch with its floating-point tensors in the precision of the model."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: _cast(value, dtype) for key, value in inputs.items()}
    return tuple(_cast(value, dtype) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value that modules pass around: nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def first_tensor(result: Any) -> Tensor:
    """Return the logits of what a model returned, or the first tensor in it."""
    tensor = next(tensors_in(getattr(result, "logits", result)), None)
    assert tensor is not None, f"the model must return a tensor or something with one, got {result!r}"
    return tensor


@contextlib.contextmanager
def refused(error: type[LightningPEFTError], why: str) -> Iterator[None]:
    """Demand that the block raises ``error``; ``why`` tells the author what is wrong if it does not."""
    try:
        yield
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{why}; it must raise {error.__name__}, but raised {other!r}") from other
    raise AssertionError(f"{why}; it must raise {error.__name__}, but raised nothing")

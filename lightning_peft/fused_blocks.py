"""Blocks that keep less for backward: norms and MLPs whose results are made again instead of being kept.

::

    x ── norm ──▶ n ──▶ q, k, v          kept: x, q, k, v             instead of    x, n, q, k, v
    x ── norm ──▶ n ──▶ gate, up ──▶ h = act(gate) * up ──▶ down      kept: x, gate, up    instead of    x, n, gate, up, act(gate), h

The modules stay where they are, with their names, their hooks and their adapters; only the forward of a norm and of an MLP is another one,
which gives the same numbers. Where it does not serve (without gradients, compiled, under ``torch.func``, trained norms, tensors that are split
over processes) it is the forward of the module's own class.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.arithmetic.recomputing import Kept, LayerNorm, Making, RMSNorm, made, transformed
from lightning_peft.errors import TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.moe.between import Between, autocast_of
from lightning_peft.moe.mlp_parts import MLPParts
from lightning_peft.registry import get_registry
from lightning_peft.targets import matches

_NORM: Final = "norm"
_MLP: Final = "mlp"
_EPS = ("variance_epsilon", "eps")


class FusedForward(ABC):
    """The forward of a module that keeps less for backward; it takes the place of ``module.forward``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def plain(self, x: Tensor) -> Tensor:
        """Return what the class of the module computes."""
        y: Tensor = type(self.module).forward(self.module, x)
        return y

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the module makes of x (..., features)."""
        serves = not torch.compiler.is_compiling() and torch.is_grad_enabled() and type(x) is Tensor
        return self.plain(x) if not serves or transformed() or self.why_not() is not None else self.fused(x)

    @abstractmethod
    def fused(self, x: Tensor) -> Tensor:
        """Return the same as :meth:`plain`, keeping less."""

    def why_not(self) -> str | None:
        """Return why the class's own forward runs at the moment; None where this one does."""
        return None


class FusedNorm(FusedForward):
    """RMSNorm or LayerNorm of which the input is kept and not the output."""

    def __init__(self, module: nn.Module, making: Making) -> None:
        super().__init__(module)
        self.making = making

    @override
    def fused(self, x: Tensor) -> Tensor:
        if not x.requires_grad or (isinstance(self.making, LayerNorm) and torch.is_autocast_enabled(x.device.type)):
            return self.plain(x)
        return made(self.making, x, *[one for one in self.module._parameters.values() if one is not None])

    @override
    def why_not(self) -> str | None:
        for one in self.module._parameters.values():
            if one is not None and (one.requires_grad or type(one) not in (nn.Parameter, Tensor)):
                return "its weight is trained" if one.requires_grad else "its weight is split over processes"
        return "it is an FSDP unit of its own" if hasattr(type(self.module), "unshard") else None


class FusedMLP(FusedForward):
    """An MLP of which the outputs of the gate and of the up-projection are kept, and nothing that is made of them."""

    def __init__(self, module: nn.Module, parts: MLPParts) -> None:
        super().__init__(module)
        self.parts = parts

    @override
    def fused(self, x: Tensor) -> Tensor:
        gate, up = self.parts.inward(self.module, x)
        between = self.parts.between(self.module)
        given = (up,) if gate is None else (gate, up)
        if any(one.requires_grad for one in given):
            hidden = made(_Hidden(between, autocast_of(x.device.type)), *given)
        else:
            hidden = between(given)
        return self.parts.outward(self.module, hidden)


class _Hidden(Making):
    """The hidden features of an MLP, of its gate, if any, and its up-projection."""

    __slots__ = ("autocast", "between")

    def __init__(self, between: Between, autocast: dict[str, Any]) -> None:
        self.between, self.autocast = between, autocast

    @override
    def make(self, *inputs: Tensor) -> tuple[Tensor, Kept]:
        return self.between(inputs), ()

    @override
    def plain(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(**self.autocast):
            return self.between(inputs)

    @override
    def again(self, kept: Kept) -> tuple[Tensor, Any]:
        again = self.between.again(kept, self.autocast)
        return again.hidden, again

    @override
    def pull(self, kept: Kept, help: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        again = help or self.between.again(kept, self.autocast)
        return again.pull(gradient, keep=True)


# -- in a model --------------------------------------------------------------------------------------------------------


def fuse_blocks(model: nn.Module) -> nn.Module:
    """Let the norms and MLPs of ``model`` keep less for backward, until :func:`unfuse_blocks`; names and state stay as they are.

    Models whose family has the roles ``norm`` and ``mlp`` are known: Llama, Mistral, Qwen, Gemma, Phi-3, GPT-2 and others. What is gained
    depends on the adapters: a norm's output and an MLP's hidden features are not kept where all that reads them is frozen or has a low-rank
    adapter. Call it before or after adapters go in; :func:`~lightning_peft.compute_paths` tells what each layer does.

    Args:
        model: the model, adapted or not.

    Returns:
        The model.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA, inject
        >>> from lightning_peft.testing import tiny_llama
        >>> model, ids = tiny_llama(), torch.tensor([[5, 6, 7, 8]])
        >>> _ = inject(model, LoRA(rank=2))
        >>> plain = model(input_ids=ids, labels=ids).loss
        >>> torch.equal(fuse_blocks(model)(input_ids=ids, labels=ids).loss, plain)
        True
    """
    for one in candidates(model):
        if one.forward is not None:
            one.module.__dict__["forward"] = one.forward
    return model


def unfuse_blocks(model: nn.Module) -> nn.Module:
    """Give all modules of ``model`` the forward of their class back that :func:`fuse_blocks` gave another; return the model."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.__dict__["forward"]
    return model


class Candidate(NamedTuple):
    """A norm or an MLP of a model."""

    path: str
    """Its path in the model without adapters."""
    kind: Literal["norm", "mlp"]
    """What the family says it is."""
    module: nn.Module
    """The module of the base."""
    forward: FusedForward | None
    """The forward that keeps less, new or in its place already; None where there is none."""
    why: str
    """Why there is none."""


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Yield every norm and MLP that the family of ``model`` names."""
    family = get_registry().resolve_family(model)
    norms, mlps = ({*matches(role, model, family)} if role in family.roles else set() for role in ("norm", "mlp"))
    checked: dict[type, str] = {}
    for path, found in base_modules(model):
        if path not in norms and path not in mlps:
            continue
        module = unwrapped(found)
        kind: Literal["norm", "mlp"] = _NORM if path in norms else _MLP
        present, why = module.__dict__.get("forward"), ""
        forward: FusedForward | None = present if isinstance(present, FusedForward) else None
        if present is not None and forward is None:
            why = "its forward was replaced"
        elif forward is None:
            forward, why = _norm(module, family) if kind == _NORM else _mlp(module)
            if forward is not None:
                if type(module) not in checked:
                    checked[type(module)] = _differs(module, forward, path)
                why = checked[type(module)]
        yield Candidate(path, kind, module, None if why else forward, why)


def _norm(module: nn.Module, family: ModelFamily) -> tuple[FusedForward | None, str]:
    if type(module) is nn.LayerNorm:
        given = [name for name, one in module._parameters.items() if one is not None]
        if len(module.normalized_shape) == 1 and given != ["bias"]:
            return FusedNorm(module, LayerNorm(module.eps)), ""
        return None, "a LayerNorm over several dimensions, or with a bias and no weight"
    eps = next((getattr(module, name) for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    if family.norm is None or eps is None or list(module._parameters) != ["weight"]:
        return None, f"{type(module).__name__} is no norm whose formula the family {family.name!r} states"
    return FusedNorm(module, RMSNorm(eps, family.norm == "rms_offset")), ""


def _mlp(module: nn.Module) -> tuple[FusedForward | None, str]:
    parts = MLPParts.of(module)
    if parts is None:
        return None, f"{type(module).__name__} is no MLP of a known kind"
    activation = getattr(module, parts.activation)
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return None, "its activation has weights"
    lost = [name for name, child in module._modules.items() if isinstance(child, nn.Dropout) and name != "dropout"]
    if lost:
        return None, f"it has a dropout {lost[0]!r}, and only one called 'dropout' has a known place"
    return FusedMLP(module, parts), ""


@torch.no_grad()
def _differs(module: nn.Module, forward: FusedForward, path: str) -> str:
    """Return what is wrong with ``forward`` for a class of modules; nothing where it gives what the module gives, or cannot be tried."""
    if len(inspect.signature(module.forward).parameters) != 1:
        return f"{type(module).__name__} takes more than one argument"
    if isinstance(forward, FusedMLP):
        try:
            forward.parts.check(module, path)
        except TargetError as error:
            return str(error)
        return ""
    assert isinstance(forward, FusedNorm)
    weight = next(iter(module.parameters(recurse=False)), None)
    if weight is None or weight.is_meta or type(weight) is not nn.Parameter:
        return ""
    x = torch.linspace(-2.0, 2.0, 2 * weight.numel(), device=weight.device).sin().view(2, -1).to(weight.dtype)
    wanted, found = module(x), forward.making.plain(x, *module.parameters(recurse=False))
    same = torch.allclose(found, wanted, rtol=1e-2, atol=1e-3)
    return "" if same else f"{type(module).__name__} computes something else than its family states"

"""Which way each norm, MLP and adapted linear layer of a model is computed, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from typing_extensions import override

from lightning_peft.adapter_layer import AdapterLayer, base_modules
from lightning_peft.arithmetic.lean_linear import why_not_lean
from lightning_peft.arithmetic.low_rank import LowRankLinear
from lightning_peft.fused_blocks import Candidate, FusedForward, candidates
from lightning_peft.targets import is_linear

Path = Literal["fused", "lean", "beside", "plain"]


@dataclass(frozen=True)
class ComputePath:
    """How one layer is computed."""

    place: str
    """Its path in the model without adapters."""
    kind: Literal["norm", "mlp", "linear"]
    """What it is."""
    path: Path
    """``fused``: its result is made again in backward. ``lean``: the weight and the update are multiplied in one go. ``beside``: the layer is
    called, and the update is added to what it returns. ``plain``: the operations of autograd."""
    why: str = ""
    """Why it is no better one; empty for ``fused`` and ``lean``."""


@dataclass(frozen=True)
class ComputePaths:
    """How the layers of a model are computed; printed as a table."""

    rows: tuple[ComputePath, ...]
    """The layers, in the order of the model."""

    @override
    def __str__(self) -> str:
        width = max([len(row.place) for row in self.rows], default=0)
        return "\n".join(f"{row.place:<{width}}  {row.kind:<6}  {row.path:<6}  {row.why}".rstrip() for row in self.rows)


def compute_paths(model: nn.Module) -> ComputePaths:
    r"""Return which way each norm, MLP and adapted linear layer of ``model`` is computed in training, and why.

    It is the state of the moment: hooks, other active adapters or a compiled model change it.

    Args:
        model: a model, adapted or not, with :func:`~lightning_peft.fuse_blocks` or without.

    Example:
        >>> from lightning_peft import LoRA, fuse_blocks, inject
        >>> from lightning_peft.testing import tiny_llama
        >>> model = fuse_blocks(tiny_llama())
        >>> _ = inject(model, LoRA(rank=2), "model.layers.0.mlp.down_proj")
        >>> handle = model.get_submodule("model.layers.0.mlp.down_proj").base_layer.register_forward_hook(print)
        >>> print("\n".join(str(compute_paths(model)).splitlines()[:2]))
        model.layers.0.mlp                       mlp     fused
        model.layers.0.mlp.down_proj             linear  beside  somebody listens to the layer, so it is called
    """
    compiled = {id(inner) for part in model.modules() if _compiled(part) for inner in part.modules()}
    blocks = {one.path: one for one in candidates(model)}
    rows: list[ComputePath] = []
    for place, module in base_modules(model):
        if (block := blocks.get(place)) is not None:
            why = _COMPILED if id(module) in compiled else _why_not(block)
            rows.append(ComputePath(place, block.kind, "plain" if why else "fused", why))
        if isinstance(module, AdapterLayer) and is_linear(module.base_layer):
            path, why = _linear(module)
            compiles = id(module) in compiled
            rows.append(ComputePath(place, "linear", "plain" if compiles else path, _COMPILED if compiles else why))
    return ComputePaths(tuple(rows))


_COMPILED = "compiled: torch.compile fuses operations, and chooses what is made again, itself"


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _why_not(block: Candidate) -> str:
    forward = block.forward
    if forward is None:
        return block.why
    present = isinstance(block.module.__dict__.get("forward"), FusedForward)
    return (forward.why_not() or "") if present else "fuse_blocks was not called"


def _linear(layer: AdapterLayer) -> tuple[Path, str]:
    if layer._rows is not None:
        return "plain", "rows of the batch have adapters of their own"
    if not layer._stack:
        return "plain", "no adapter acts"
    first, *others = layer._stack
    for one in (first, *others):
        if not isinstance(one, LowRankLinear) or type(one).forward is not LowRankLinear.forward:
            return "plain", f"{type(one).__name__} computes in a way of its own"
        if (why := why_not_lean(one)) is not None:
            return "plain", why
    if others:
        return "beside", f"{len(layer._stack)} adapters act"
    assert isinstance(first, LowRankLinear)
    base = layer.base_layer
    held = first.weights_of(base)
    if held is None:
        kind = base.__class__
        return (
            "beside",
            _CALLED if kind is first._plain else f"the weight of {kind.__name__} is not one matrix of numbers",
        )
    if any(one is not None and one.requires_grad for one in held):
        return "beside", "the weight of the layer is trained too"
    return "lean", ""


_CALLED = "somebody listens to the layer, so it is called"

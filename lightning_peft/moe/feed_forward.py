"""The MLPs of a model: which modules they are made of, and where something can stand that replaces them.

::

    gated    D (act(G x) * U x)      Llama, Mistral, Qwen, Gemma, Phi-3 (G and U in one module), T5 1.1
    plain    D act(U x)              GPT-2, GPT-NeoX, Phi, ViT, DistilBERT, T5 1.0

Where a module holds the MLP and nothing else, the replacement stands around it. BERT, OPT and Bloom have no such module; there it stands
around D, and what comes before D in the MLP hands its input on::

    BERT     intermediate (hands x on) ── output.dense (replaced) ── dropout ── norm(+)

A description is checked: the module, run on three random tokens, must give what its description gives.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.targets import is_conv1d_linear, is_linear, matches

_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn", "gelu_impl")


@dataclass(frozen=True)
class FeedForward:
    """The modules of one MLP, by path in the model."""

    place: str
    """Where a replacement stands: the MLP, or its down-projection."""
    up: str
    """The up-projection; with ``fused`` the gate is in its first half."""
    down: str
    """The down-projection."""
    gate: str | None
    """The gate, where it is a module of its own."""
    fused: bool
    """Whether gate and up-projection are one module."""
    activation: str
    """The activation."""
    width: int
    """Features of a token."""
    hidden: int
    """Features between the projections."""
    up_bias: bool = False
    """Whether the projections before the activation have biases."""
    down_bias: bool = False
    """Whether the down-projection has one."""
    bypassed: tuple[str, ...] = ()
    """What hands its input on, where the replacement stands at the down-projection."""
    inner_dropout: float = 0.0
    """Dropout before the down-projection."""
    outer_dropout: float = 0.0
    """Dropout after the down-projection, within the place."""

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.fused or self.gate is not None


class MLPs:
    """Finds the MLPs of one model.

    Args:
        model: the model, with or without adapters.
        family: what the roles mean in it.
    """

    def __init__(self, model: nn.Module, family: ModelFamily) -> None:
        self.model, self.family = model, family
        self.held = dict(base_modules(model))
        self.modules = {path: unwrapped(module) for path, module in self.held.items()}
        self.by_role = {
            role: sorted(matches(role, model, family) if family.globs(role) else set())
            for role in ("gate", "up", "gate_up", "down", "block", "attention")
        }

    def inside(self, path: str) -> list[str]:
        """Return the down-projections at or below ``path``, or of the MLP that ``path`` is a part of.

        Raises:
            TargetError: the family names none there.
        """
        found = [down for down in self.by_role["down"] if down == path or down.startswith(f"{path}.")]
        if not found:
            raise TargetError(
                f"{path!r} of {type(self.model).__name__} holds no MLP that is known: family {self.family.name!r} names "
                f"{len(self.by_role['down'])} modules of the role 'down', none of them there; target the MLPs, or register a ModelFamily with "
                "the roles 'up', 'down' and, where there is one, 'gate'"
            )
        return found

    def block(self, path: str) -> str | None:
        """Return the block that ``path`` lies in, or None."""
        around = [block for block in self.by_role["block"] if path.startswith(f"{block}.")]
        return max(around, key=len, default=None)

    def attention(self, path: str) -> str | None:
        """Return the first attention of the block that ``path`` lies in, or None."""
        block = self.block(path)
        within = [found for found in self.by_role["attention"] if block is not None and found.startswith(f"{block}.")]
        return next((found for found in self.modules if found in within), None)

    def describe(self, down: str) -> FeedForward:
        """Return the MLP that ends in the down-projection at ``down``.

        Raises:
            TargetError: it cannot be replaced, and why.
        """
        up, gate, fused = self._entries(down)
        parts = (up, down, gate, fused)
        sizes = self._sizes(*parts)
        around = _common(up, down)
        module = self.modules[around]
        whole = all(not path.startswith(f"{around}.") for path in self.by_role["attention"]) and _takes_one(module)
        if whole:
            activation = self._activation(around)
            dropouts = self._probe(around, *parts, activation)
            return FeedForward(around, *parts, activation, *sizes, (), *dropouts)
        if gate is not None or fused:
            raise self._refusal(down, "its gated MLP is spread over a module that does more than that")
        first = f"{around}." * bool(around) + up[len(around) :].lstrip(".").split(".")[0]
        activation = self._activation(around if first == up else first)
        bypassed = (up, activation) if first == up else (first,)
        dropout = getattr(module, "activation_dropout", 0.0)
        if dropout:
            raise self._refusal(down, f"activation_dropout={dropout!r} stands between its projections; set it to 0")
        if getattr(module, "pretraining_tp", 1) > 1 and getattr(module, "slow_but_exact", False):
            raise self._refusal(down, "slow_but_exact=True reads its weights in parts; set it to False")
        return FeedForward(down, *parts, activation, *sizes, bypassed)

    def is_causal(self, path: str) -> bool:
        """Tell whether the block around ``path`` is of a decoder, whose tokens must not depend on later ones."""
        attention = self.attention(path)
        if attention is not None:
            marks = [
                getattr(module, mark)
                for found, module in self.modules.items()
                if found == attention or found.startswith(f"{attention}.")
                for mark in ("is_causal", "is_decoder")
                if isinstance(vars(module).get(mark), bool)
            ]
            if marks:
                return any(marks)
        # Attention does not say: a decoder comes with a class for language modelling.
        source = inspect.getmodule(type(self.model))
        names = [*(vars(source) if source else ()), type(self.model).__name__]
        known = attention is not None or hasattr(self.model, "config")
        return known and any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)

    # -- details -----------------------------------------------------------------------------------------------------

    def _entries(self, down: str) -> tuple[str, str | None, bool]:
        """Return the up-projection that belongs to ``down``, the gate, and whether they are one module."""
        block = self.block(down) or down.rpartition(".")[0]
        fused = self.family.fused_for("gate")

        def nearest(role: str) -> str | None:
            near = [path for path in self.by_role[role] if path.startswith(f"{block}.") or not block]
            return max(near, key=lambda path: len(_common(path, down)), default=None)

        if fused is not None and fused.role == "gate_up" and list(fused.parts) == ["gate", "up"]:
            both = nearest("gate_up")
            if both is not None:
                return both, None, True
        up = nearest("up")
        if up is None:
            raise self._refusal(down, f"family {self.family.name!r} names no module of the role 'up' beside it")
        gate = nearest("gate")
        return up, gate if gate is not None and _common(gate, down) == _common(up, down) else None, False

    def _sizes(self, up: str, down: str, gate: str | None, fused: bool) -> tuple[int, int, bool, bool]:
        """Return width, hidden width, and which projections have biases, after checking that they belong together."""
        shapes = {}
        for path in filter(None, (up, gate, down)):
            module = self.modules[path]
            weight = getattr(module, "weight", None)
            if not is_linear(module) or not isinstance(weight, Tensor) or not weight.is_floating_point():
                kind = type(module).__name__
                raise self._refusal(path, f"a {kind} has no plain weight to copy; load the base in 16 or 32 bit")
            out, into = weight.shape[::-1] if is_conv1d_linear(module) else weight.shape
            shapes[path] = (out, into, module.bias is not None)
        width, hidden, down_bias = shapes[down]
        entry = (2 * hidden if fused else hidden, width, shapes[up][2])
        if shapes[up] != entry or (gate is not None and shapes[gate] != entry):
            raise self._refusal(down, f"its projections do not fit together: {shapes}")
        return width, hidden, bool(entry[2]), bool(down_bias)

    def _activation(self, around: str) -> str:
        """Return the path of the activation among the children of ``around``."""
        for name in _ACTIVATIONS:
            path = f"{around}.{name}" if around else name
            if path in self.modules:
                if next(self.modules[path].parameters(), None) is not None:
                    raise self._refusal(path, "an activation with parameters of its own is not copied")
                return path
        raise self._refusal(around, f"no activation is known in it (looked for {', '.join(_ACTIVATIONS)})")

    def _refusal(self, path: str, why: str) -> TargetError:
        return TargetError(
            f"the MLP at {path!r} of {type(self.model).__name__} (family {self.family.name!r}) cannot become a mixture of experts: {why}"
        )

    @torch.no_grad()
    def _probe(
        self, around: str, up: str, down: str, gate: str | None, fused: bool, activation: str
    ) -> tuple[float, float]:
        """Run the MLP on random tokens and compare; return the dropout before and after its down-projection."""
        module, held = self.modules[around], self.held
        weight = self.modules[down].get_parameter("weight")
        width = weight.shape[1] if is_conv1d_linear(self.modules[down]) else weight.shape[0]
        x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        calls: list[nn.Module] = []
        with _in_eval(module), _watching(module, calls):
            found = module(x)
            hidden = held[up](x)
            if fused:
                first, second = hidden.chunk(2, dim=-1)
                hidden = held[activation](first) * second
            elif gate is None:
                hidden = held[activation](hidden)
            else:
                hidden = held[activation](held[gate](x)) * hidden
            wanted = held[down](hidden.to(weight.dtype))
        same = isinstance(found, Tensor) and found.shape == wanted.shape
        if not same or not (found.is_meta or _close(found, wanted)):
            raise self._refusal(around, f"a {type(module).__name__} computes something else than its projections do")
        end = next((place for place, call in enumerate(calls) if call is self.modules[down]), len(calls))
        drops = [(place, call.p) for place, call in enumerate(calls) if isinstance(call, nn.Dropout)]
        before = [p for place, p in drops if place < end]
        after = [p for place, p in drops if place > end]
        return (before[0] if before else 0.0), (after[0] if after else 0.0)


def dense_tensors(
    feed_forward: FeedForward, get: Callable[[str], Tensor | None], transposed: Mapping[str, bool]
) -> dict[str, Tensor]:
    """Return the tensors of an MLP by part: ``gate``, ``up``, ``down`` and their ``_bias``, weights as (out, in).

    Args:
        feed_forward: the MLP.
        get: returns a tensor by its name in the model, such as ``layers.0.mlp.up_proj.weight``, or None.
        transposed: by path of a projection, whether its weight is (in, out), as in ``Conv1D``.
    """
    parts: dict[str, Tensor] = {}
    for part, path in (("gate", feed_forward.gate), ("up", feed_forward.up), ("down", feed_forward.down)):
        for name, suffix in (("weight", ""), ("bias", "_bias")) if path is not None else ():
            tensor = get(f"{path}.{name}")
            if tensor is None:
                continue
            if name == "weight" and transposed.get(path or "", False):
                tensor = tensor.t()
            if part == "up" and feed_forward.fused:
                parts[f"gate{suffix}"], parts[f"up{suffix}"] = tensor.chunk(2, dim=0)
            else:
                parts[part + suffix] = tensor
    return parts


def _common(one: str, other: str) -> str:
    """Return the path of the module that holds both."""
    shared = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


def _takes_one(module: nn.Module) -> bool:
    """Tell whether ``module`` is called with one argument."""
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [one for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return len(needed) == 1


def _close(a: Tensor, b: Tensor) -> bool:
    size = b.float().nan_to_num().abs().max()
    return torch.allclose(a.float(), b.float(), rtol=0.0, atol=float(size) * 1e-2, equal_nan=True)


@contextlib.contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """Have ``module`` in eval mode for the time of a ``with`` block."""
    modes = [(one, one.training) for one in module.modules()]
    for one, _ in modes:
        one.training = False
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


@contextlib.contextmanager
def _watching(module: nn.Module, calls: list[nn.Module]) -> Iterator[None]:
    """Add to ``calls`` which modules without children are called below ``module``, for the time of a ``with`` block."""
    leaves = [one for one in module.modules() if next(one.children(), None) is None]
    handles = [one.register_forward_pre_hook(lambda called, args: calls.append(called)) for one in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_half(paths: Sequence[str]) -> list[str]:
    """Return the last half of ``paths`` in each stack of layers, the larger one where their number is odd."""
    return [path for stack in _stacks(paths) for path in stack[len(stack) // 2 :]]


def every_other(paths: Sequence[str]) -> list[str]:
    """Return the second, fourth, ... of ``paths`` in each stack of layers."""
    return [path for stack in _stacks(paths) for path in stack[1::2]]


def _stacks(paths: Sequence[str]) -> list[list[str]]:
    """Return ``paths`` by the stack of layers they are in: encoders and decoders have one each."""
    stacks: dict[str, list[str]] = {}
    for path in paths:
        stacks.setdefault(re.split(r"(?:^|\.)\d+(?:\.|$)", path, maxsplit=1)[0], []).append(path)
    return list(stacks.values())

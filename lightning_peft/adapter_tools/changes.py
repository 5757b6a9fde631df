"""What an adapter of any mergeable method adds to the parameters of the base, before any rounding.

A merge rounds to the precision of the base. Here the method merges into a copy of one layer in float64, from which the base is
taken away again, so small changes of large weights keep their digits; a packed layer is unpacked for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import adapter_layers, base_modules, unwrapped
from lightning_peft.adapter_tools.report import LowRankReport
from lightning_peft.adapter_tools.updates import low_rank_method
from lightning_peft.arithmetic.low_rank import CONVOLUTIONS
from lightning_peft.arithmetic.thin_products import rank_for, tail_error, widened
from lightning_peft.errors import ConfigError, MergeError
from lightning_peft.injection import record
from lightning_peft.low_rank_pairs import Pair
from lightning_peft.quantized_layers import dense_weight, is_packed
from lightning_peft.targets import is_conv1d_linear, is_fused_experts

Changes = Iterator[tuple[str, dict[str, Tensor]]]
"""Module path, and parameter name there to what is added to it."""
_EXACT_SIDE = 1536
"""Weights whose shorter side is larger are decomposed in float32, which is as good as they need and much faster."""


def changes_in(model: nn.Module, name: str) -> Changes:
    """Yield, place by place, what the adapter ``name`` adds to each parameter, in float64.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        MergeError: its method cannot be merged, or an adapter is merged into the base at the moment.
    """
    return ((path, changes) for path, _, changes in changed_places(model, name))


def changed_places(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Yield what :func:`changes_in` does, with a module of the base's parameters in float64 between path and changes.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        MergeError: its method cannot be merged, or an adapter is merged into the base at the moment.
    """
    injection = record(model, name)
    if not injection.method.mergeable and not injection.method.merges_quantized:
        raise MergeError(f"adapter {name!r} is a {injection.method.name!r} adapter, {injection.method.merge_refusal}")
    if injection.method.exact_packed_base:
        raise MergeError(
            f"adapter {name!r} is a {injection.method.name!r} adapter, whose update belongs to packed weights of its own"
        )
    for path, layer in adapter_layers(model).items():
        if layer.merged:
            raise MergeError(f"adapter {layer.merged[0]!r} is merged into {path!r}; call unmerge_adapters(model) first")
    for path, layer in adapter_layers(model).items():
        if name in layer.adapters:
            twin = _wide_twin(layer.base_layer)
            with torch.no_grad():
                merged = layer._adapter(name).merged_parameters(twin)
            yield path, twin, {key: widened(value) - twin.get_parameter(key) for key, value in merged.items()}


def changes_between(base: nn.Module, tuned: nn.Module) -> Changes:
    """Yield what each parameter of ``tuned`` has more than that of ``base``, in float64, a shared parameter once.

    Raises:
        ConfigError: the models do not have the same parameters.
    """
    ours, theirs = ({path: unwrapped(module) for path, module in base_modules(model)} for model in (base, tuned))
    shapes = [
        {
            f"{path}.{key}": tuple(p.shape)
            for path, module in modules.items()
            for key, p in module.named_parameters(recurse=False)
        }
        for modules in (ours, theirs)
    ]
    if different := sorted(set(shapes[0].items()) ^ set(shapes[1].items())):
        raise ConfigError(
            f"the two models must have the same parameters in the same shapes, but differ in {len({key for key, _ in different})}, such as "
            f"{different[0][0]!r}: packed models must be loaded in 16 or 32 bit"
        )
    seen: set[int] = set()
    for path, module in ours.items():
        found = {}
        inner = {key for key, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.MultiheadAttention):
            inner |= {"out_proj.weight", "out_proj.bias"} & {key for key, _ in module.named_parameters()}
        for key in sorted(inner):
            parameter = module.get_parameter(key)
            if id(parameter) not in seen and parameter.is_floating_point():
                seen.add(id(parameter))
                found[key] = widened(theirs[path].get_parameter(key)).to(parameter.device) - widened(parameter)
        if found:
            yield path, found


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the ``weight`` of a module, or a change of it, as (out, in); a convolution's kernel counts as inputs."""
    return weight.t() if isinstance(module, nn.Embedding) or is_conv1d_linear(module) else weight.flatten(1)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, k), S (k,) and V^T (k, in), in float64 where that does not take minutes."""
    wide = matrix if min(matrix.shape) <= _EXACT_SIDE else matrix.float()
    return torch.linalg.svd(wide, full_matrices=False)  # type: ignore[no-any-return]


def _wide_twin(module: nn.Module) -> nn.Module:
    """Return a module that looks like ``module`` and holds copies of its parameters in float64."""
    if is_packed(module):
        weight = widened(dense_weight(module))
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        bias = getattr(module, "bias", None)
        linear.bias = None if bias is None else nn.Parameter(widened(bias), requires_grad=False)  # type: ignore[assignment]
        return linear
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {
        key: None if value is None else nn.Parameter(widened(value), requires_grad=False)
        for key, value in module._parameters.items()
    }
    twin.__dict__["_modules"] = {
        key: None if child is None else _wide_twin(child) for key, child in module._modules.items()
    }
    return twin


@dataclass
class Factored:
    """Changes of parameters in what a LoRA can hold: pairs and biases. Filled place by place with :meth:`add`."""

    rank: int | None = None
    energy: float | None = None
    pairs: dict[str, dict[str, Pair]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, path: str, module: nn.Module, changes: Mapping[str, Tensor]) -> None:
        """Factor the ``changes`` of the parameters of ``module``, which stands at ``path``, where they are not zero.

        Raises:
            ConfigError: a change is not finite.
        """
        for key, change in changes.items():
            if not torch.isfinite(change).all():
                raise ConfigError(f"the change of {path}.{key} is non-finite; the model is unchanged")
            if not change.any():
                continue
            name = _file_name(module, key)
            if name is not None:
                self._factor(
                    path, f"{path}.{key}".removesuffix(".weight").removesuffix(".in_proj_weight"), name, module, change
                )
            elif key == "bias" and (isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_conv1d_linear(module)):
                self.biases[path] = widened(module.get_parameter("bias")) + change
                self.pairs.setdefault(path, _nothing(module))
            else:
                self.left_out.append(f"{path}.{key}")

    def _factor(self, path: str, label: str, name: str, module: nn.Module, change: Tensor) -> None:
        matrix = as_matrix(module, change)
        U, S, Vh = svd(matrix)
        kept = rank_for(S, rank=self.rank, energy=self.energy)
        root = S[:kept].sqrt()
        up, down = U[:, :kept] * root, root[:, None] * Vh[:kept]
        shape = change.shape[1:] if isinstance(module, tuple(CONVOLUTIONS)) else matrix.shape[1:]
        self.pairs.setdefault(path, {})[name] = Pair(
            down=down.reshape(kept, *shape).float(), up=up.reshape(*up.shape, *[1] * (len(shape) - 1)).float()
        )
        self.ranks[label], self.errors[label] = kept, tail_error(S, kept)
        self.norms[label] = float(torch.linalg.vector_norm(S))

    def report(self, what: str, *, drop_rest: bool) -> LowRankReport:
        """Return the report, after refusing what a LoRA does not hold.

        Raises:
            ConfigError: parameters were changed that no LoRA holds, and ``drop_rest`` is false; or nothing was changed.
        """
        if self.left_out and not drop_rest:
            raise ConfigError(
                f"{what} changes {len(self.left_out)} parameters that a LoRA has no update for, such as {self.left_out[0]!r}; pass "
                "drop_rest=True to go without them"
            )
        if not self.pairs:
            raise ConfigError(f"{what} changes nothing that a LoRA could hold")
        return LowRankReport(self.ranks, self.errors, self.norms, tuple(self.left_out))


def _file_name(module: nn.Module, key: str) -> str | None:
    """Return the name of A in a file for the parameter ``key`` of ``module``; None where LoRA has no update for it."""
    if is_fused_experts(module) or not low_rank_method()().supports(module):
        return None
    if isinstance(module, nn.MultiheadAttention):
        return {"in_proj_weight": "lora_A.weight", "out_proj.weight": "base_layer.out_proj.lora_A.weight"}.get(key)
    if key != "weight":
        return None
    return "lora_embedding_A" if isinstance(module, nn.Embedding) else "lora_A.weight"


def _nothing(module: nn.Module) -> dict[str, Pair]:
    """Return an update of rank one that is zero, for a place of which only the bias changes."""
    weight = module.get_parameter("weight")
    shape = weight.t().shape if is_conv1d_linear(module) else weight.shape
    if is_packed(module):
        shape = dense_weight(module).shape
    down = torch.zeros(1, *shape[1:], device=weight.device)
    return {
        "lora_A.weight": Pair(down=down, up=torch.zeros(shape[0], 1, *[1] * (len(shape) - 2), device=weight.device))
    }

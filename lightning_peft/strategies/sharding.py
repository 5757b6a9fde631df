"""Which modules FSDP2 shards as units, and how: what ``fully_shard`` is called on, and with what.

::

    LightningModule                     stays whole: it has no forward that training runs
      model    (adapted)                a unit: embeddings, head, last norm
        layers.0, layers.1, ...         a unit each: gathered for its forward and backward, then freed
      head     (the user's own)         a unit

A unit holds the frozen weights and the adapters around them. FSDP2 shards each parameter for itself, in its own dtype, and reduces
the gradients of trained ones only, so a frozen base in bfloat16 beside adapters in float32 is one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_peft.adapter_layer import AdapterLayer, base_modules
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.injection import adapted_roots, records
from lightning_peft.quantized_layers import packed_layers, packing_quantizer
from lightning_peft.registry import get_registry
from lightning_peft.strategies.cost import cut_dimension
from lightning_peft.targets import matches


def blocks_of(model: nn.Module, policy: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Return the modules of ``model`` that become units of their own, by path, the inner ones first.

    Args:
        model: with or without adapters.
        policy: globs or ``re:`` expressions on module paths, or class names; the role ``block`` of the model's family if None.

    Raises:
        TargetError: an entry of ``policy`` matches nothing.
    """
    places = dict(base_modules(model))
    if policy is None:
        family = get_registry().resolve_family(model)
        found = matches("block", model, family) if family.globs("block") else set()
    else:
        found = set()
        for word in policy:
            by_class = {path for path, place in places.items() if _kind(place) == word}
            here = by_class or matches(word, model, get_registry().resolve_family(model))
            if not here:
                kinds = sorted({_kind(place) for place in places.values()})
                raise TargetError(
                    f"the policy asks for units {word!r}, but {type(model).__name__} has no module of that class or path; classes are "
                    f"{', '.join(kinds)}"
                )
            found |= here
    return {path: places[path] for path in sorted(found, key=lambda path: (-path.count("."), path)) if path}


def _kind(place: nn.Module) -> str:
    return type(place.base_layer if isinstance(place, AdapterLayer) else place).__name__


def shard(
    module: nn.Module, policy: Iterable[str] | None, options: Mapping[str, Any], *, prefetch: int = 0
) -> list[str]:
    """Call ``fully_shard`` on the blocks of every model in ``module``, and on the models; return the paths of the units.

    Args:
        module: the LightningModule. What it shards itself is left as it is.
        policy: as for :func:`blocks_of`.
        options: arguments of ``fully_shard``.
        prefetch: how many units ahead are asked for while one runs.

    Raises:
        ConfigError: a trained parameter belongs to ``module`` directly, where nothing gathers it; a parameter is in two units; or trained
            ones of one unit have several dtypes.
    """
    if any(isinstance(inner, FSDPModule) for inner in module.modules()):
        return []
    loose = [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
    if loose:
        raise ConfigError(
            f"{type(module).__name__} holds the trained parameters {loose} itself, and no forward of a module gathers them or reduces "
            "their gradients; put them into a module with a forward"
        )
    roots = set(map(id, adapted_roots(module)))
    units: dict[str, nn.Module] = {}
    in_turn: list[list[nn.Module]] = []
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        blocks = blocks_of(child, policy) if policy is not None or _holds(child, roots) else {}
        units.update({f"{name}.{path}": block for path, block in blocks.items()})
        units[name] = child
        in_turn.append([one for one in child.modules() if any(one is block for block in blocks.values())])
    _refuse_unlike(units)
    for unit in units.values():
        fully_shard(unit, **options)
    for blocks_in_turn in in_turn:
        _prefetch(blocks_in_turn, prefetch)
    return list(units)


def _refuse_unlike(units: Mapping[str, nn.Module]) -> None:
    """Refuse parameters that FSDP2 does not take, which it says in the midst of sharding or of a forward.

    Raises:
        ConfigError: a parameter is in two units, or trained ones of one unit have several dtypes.
    """
    owners: dict[int, tuple[str, str]] = {}
    taken: set[int] = set()
    for path, unit in units.items():
        kinds: dict[torch.dtype, str] = {}
        for inner_path, inner in unit.named_modules():
            for name, parameter in inner._parameters.items() if id(inner) not in taken else ():
                if parameter is None:
                    continue
                here = ".".join(part for part in (path, inner_path, name) if part)
                owner, first = owners.setdefault(id(parameter), (path, here))
                if owner != path:
                    raise ConfigError(
                        f"{first!r} and {here!r} are one parameter, and stand in two units, {owner!r} and {path!r}, of which each would be gathered and "
                        "freed by itself; choose units so that one holds both, such as units=[] for the whole model, or the strategy 'peft_ddp'"
                    )
                if parameter.requires_grad:
                    kinds.setdefault(parameter.dtype, here)
        taken.update(map(id, unit.modules()))
        if len(kinds) > 1:
            said = ", ".join(f"{name!r} in {dtype}" for dtype, name in kinds.items())
            raise ConfigError(
                f"unit {path!r} trains parameters of several dtypes, which FSDP2 does not reduce together: {said}; have all that is trained in float32, "
                "as adapters are"
            )


def _prefetch(blocks: list[Any], ahead: int) -> None:
    """Have each of ``blocks``, in the order of forward, ask for so many behind it in forward, and before it in backward."""
    for number, block in enumerate(blocks if ahead else ()):
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + ahead])
        block.set_modules_to_backward_prefetch(blocks[max(0, number - ahead) : number][::-1])


def along(processes: int) -> Callable[[nn.Parameter], Shard | None]:
    """Return what tells FSDP2 by which dimension ``processes`` share a parameter: not by few rows, of which most would have none."""

    def placed(parameter: nn.Parameter) -> Shard | None:
        if isinstance(parameter, DTensor):  # split already
            return None
        dimension = cut_dimension(tuple(parameter.shape), processes)
        return Shard(dimension) if dimension else None

    return placed


def _holds(module: nn.Module, roots: set[int]) -> bool:
    return any(id(inner) in roots for inner in module.modules())


def refuse_unshardable(module: nn.Module, casts: Iterable[torch.dtype] = ()) -> None:
    """Refuse what FSDP2 shards wrongly or not at all, by name.

    Args:
        module: what is about to be sharded.
        casts: the dtypes that parameters are cast to: those of ``gather_dtype`` and of the precision.

    Raises:
        ConfigError: a parameter has no dimension; a layer is quantised in a way that cannot be sharded; a method is not ``fsdp_ready``; or packed weights are stored in
            a floating-point dtype that a cast rounds.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(f"{name!r} is a scalar, which FSDP2 does not shard; give it the shape (1,)")
        packed = getattr(parameter, "quant_state", None) is not None
        if packed and parameter.is_floating_point():
            others = {dtype for dtype in casts if dtype != parameter.dtype}
            if parameter.dtype != torch.bfloat16 or others:
                raise ConfigError(
                    f"{name!r} holds packed weights stored as {parameter.dtype}; a cast, as under mixed precision with FSDP2, rounds them as if they "
                    f"were numbers and the weights are silently wrong{f' (here to {min(map(str, others))})' if others else ''}. Load the base with "
                    "bnb_4bit_quant_storage=torch.uint8, its default, or unquantised, and let the method quantise it"
                )
    for root in adapted_roots(module):
        for path, layer in packed_layers(root).items():
            quantizer = packing_quantizer(layer)
            if not quantizer.fsdp_ready:
                raise ConfigError(
                    f"{path!r} is quantised as {quantizer.name!r}, whose layers keep their weights outside of parameters, where FSDP2 does not shard "
                    "them; use quantization='nf4', or the strategy 'peft_ddp'"
                )
        for name, injection in records(root).items():
            if not injection.method.fsdp_ready:
                raise ConfigError(
                    f"adapter {name!r} is {injection.method!r}, which does not train sharded (fsdp_ready = False); use the strategy 'peft_ddp', or "
                    "other settings of the method, if its page says so"
                )


def bring_scales(module: nn.Module, device: torch.device) -> None:
    """Have the scales of quantised weights in ``module`` on ``device``: FSDP2 moves parameters only."""
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.to(device)


def checkpoint_activations(module: nn.Module, policy: Iterable[str] | None) -> None:
    """Have the blocks of every adapted model in ``module`` keep their inputs only, and run their forward again in backward."""
    from torch.distributed._composable.checkpoint_activation import checkpoint

    roots = set(map(id, adapted_roots(module)))
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        if policy is not None or _holds(child, roots):
            for block in blocks_of(child, policy).values():
                checkpoint(block)

"""A merged copy of an adapted model, which stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.activation import active_adapters
from lightning_peft.adapter_layer import AdapterLayer, adapter_layers, adapter_names, adapters_named
from lightning_peft.injection import records
from lightning_peft.merging import check_mergeable, chosen_names, merge_weights, refuse_shards
from lightning_peft.quantized_merging import Quantized, unpack_layers
from lightning_peft.surgery import unload_adapters


def merged_copy(
    model: nn.Module,
    names: Sequence[str] | str | None = None,
    *,
    share_unchanged: bool = False,
    quantized: Quantized = "refuse",
) -> nn.Module:
    """Return a copy of ``model`` with adapters folded into its weights and no adapter layers left. ``model`` is left as it is.

    Tied weights are tied in the copy, and what is merged already is merged there. Adapters that are neither merged nor named are
    left out.

    Args:
        model: an adapted model.
        names: adapters to merge; the active ones if None.
        share_unchanged: let the copy use the tensors of ``model`` wherever merging changes none. It then takes only the memory of the
            merged weights, and what changes these tensors in place changes both models. Without it nothing is shared.
        quantized: where the base is quantised: ``refuse``, ``requantize``, or ``dequantize``, with which all layers of the
            copy are dense, the unadapted ones too. See :func:`~lightning_peft.merge_adapters`.

    Raises:
        AdapterNotFoundError: the model has none of them, or no adapters.
        MergeError: as :func:`~lightning_peft.merge_adapters`.

    Example:
        >>> from lightning_peft import LoRA, inject
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> _ = inject(model, LoRA(rank=1), "0")
        >>> merged_copy(model)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    refuse_shards(model, "a merged copy cannot be made")
    if not adapter_names(model):
        adapters_named(model, "default")  # raises, saying that there are none
    held = {name for layer in adapter_layers(model).values() for name in layer.merged}
    if names is not None or not held or set(active_adapters(model)) - held:
        wanted = [name for name in chosen_names(model, names) if name not in held]
        check_mergeable(model, wanted, quantized)
    else:
        wanted = []
    twin = copy.deepcopy(model, _aliases(model))
    _separate_records(model, twin)
    if wanted:
        merge_weights(
            twin, wanted, quantized=quantized, keep_originals=False, in_place=False
        )  # the memory is that of the model
    unload_adapters(twin)
    if quantized == "dequantize":
        unpack_layers(twin)
    if not share_unchanged:
        _separate(model, twin)
    return twin


def _aliases(model: nn.Module) -> dict[int, Any]:
    """Return what stands for the tensors of ``model`` in a copy: parameters of its own over the same memory, and the same adapters."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            kept = (*module.adapters.values(), *module._originals.values(), *module._replaced)
            memo.update({id(value): value for value in kept})
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or id(tensor) in memo:
                continue
            plain = type(tensor) in (Tensor, nn.Parameter)
            memo[id(tensor)] = (
                _alias(tensor) if plain else tensor
            )  # packed weights are replaced whole, never written to
    return memo


def _alias(tensor: Tensor) -> Tensor:
    alias = tensor.detach()
    return nn.Parameter(alias, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else alias


def _separate_records(model: nn.Module, twin: nn.Module) -> None:
    """Let the copy know what was injected, under the same methods."""
    held = records(model)
    records(twin).clear()
    records(twin).update(held)


@torch.no_grad()
def _separate(model: nn.Module, twin: nn.Module) -> None:
    """Give the copy memory of its own for every tensor that it shares with ``model``."""
    theirs = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model)}
    packed: dict[int, Tensor] = {}
    for module in twin.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.untyped_storage().data_ptr() not in theirs:
                    continue
                if type(tensor) in (Tensor, nn.Parameter):
                    tensor.data = tensor.data.clone()
                else:
                    held[name] = packed.setdefault(id(tensor), copy.deepcopy(tensor))  # type: ignore[assignment]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]

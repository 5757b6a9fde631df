"""Merging into the very memory of the weights, where it is known beforehand that it goes well.

What is overwritten does not come back. So a sum ``W + s1 B1 A1 + ...`` is written over W only where it must be finite: every number
of W is, and no number of the products is as large as half a step between the two largest numbers of W's dtype, by the inequality of Cauchy and Schwarz::

    |s (B A)_ij|  <=  |s| max_i ||B_i|| max_j ||A_j||

Other merges are tried out first, on a copy of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import AdapterLayer
from lightning_peft.arithmetic.row_blocks import Product, add_
from lightning_peft.finite import all_finite


def sums_in_place(layer: AdapterLayer, names: Sequence[str]) -> list[Product] | None:
    """Return what merging the adapters ``names`` at ``layer`` adds to its weight, which stays finite; None where that is not all, or not known."""
    adapters = [layer.adapters[name] for name in layer.in_order(names)]
    weight = layer.base_layer._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or weight.is_inference() or not weight.is_floating_point():
        return None
    asked = [getattr(adapter, "added_product", None) for adapter in adapters]  # of LoRA; other kinds have none
    found = [ask(layer.base_layer) for ask in asked if ask is not None]
    products = [product for product in found if product is not None and product.shape == weight.shape]
    if len(products) < len(adapters) or weight._is_view() or not weight.is_contiguous() or weight.is_meta:
        return None
    info = torch.finfo(weight.dtype)
    room = info.max * info.eps / 8  # a quarter of a step
    largest = sum(_largest(product) for product in products)
    return products if largest < room and all_finite(weight) else None


def in_shared_memory(model: nn.Module) -> set[int]:
    """Return the ids of the parameters and buffers of ``model`` whose memory another of them uses too."""
    held = [one for one in (*model.parameters(), *model.buffers()) if type(one) in (nn.Parameter, Tensor)]
    spans = [(one.data_ptr(), one.nbytes, id(one)) for one in held if not one.is_meta and one.numel()]
    shared, last, end = set[int](), 0, 0
    for start, size, key in sorted(spans):
        if start < end:
            shared |= {last, key}
        if start + size > end:
            last, end = key, start + size
    return shared


@torch.no_grad()
def merge_in_place(layer: AdapterLayer, names: Sequence[str], products: Sequence[Product]) -> None:
    """Add ``products``, from :func:`sums_in_place`, to the weight of ``layer``, for good."""
    weight = layer.base_layer.get_parameter("weight")
    for product in products:
        add_(weight.detach(), product)  # which counts as a change: a graph from before it refuses to go backward
    layer.note_merged(layer.in_order(names), {}, keep_originals=False)


def _largest(product: Product) -> float:
    """Return what no number of ``product`` is larger than."""
    rows, columns = (_longest(product.left), _longest(product.right.t()))
    return abs(product.scale) * rows * columns


def _longest(rows: Tensor) -> float:
    """Return the largest norm of a row of a matrix (n, rank)."""
    wide = rows.detach().to(torch.float64)
    return float(torch.linalg.vector_norm(wide, dim=1).max()) if len(wide) else 0.0

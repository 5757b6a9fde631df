"""Several adapters with weights as one: all the ways of HF PEFT's ``add_weighted_adapter``, and task arithmetic for any method.

With updates ``s_i B_i A_i`` of weights ``w_i``, at every place the adapters that are there:

===================================  ===========================================================================================
``svd``                              the best rank-r approximation of ``sum w_i s_i B_i A_i``, through the thin factors
``cat``                              exactly that sum: A and B side by side, the rank is the sum of the ranks
``linear``                           ``(sum sqrt(w_i s_i) B_i) (sum sqrt(w_i s_i) A_i)``: equal ranks, and products across tasks
``magnitude_prune`` ``ties``         as ``linear``, with each A and B pruned, and TIES with signs elected:
``dare_linear`` ``dare_ties``        see :mod:`lightning_peft.arithmetic.task_vectors`
the same with ``_svd``               the same of the written-out updates, then the best rank-r approximation
``task_arithmetic``                  ``sum w_i (W_i - W)`` of what any mergeable method adds to the weights, then rank r; exactly, as copies,
                                     where all adapters are copies of parameters
===================================  ===========================================================================================

A negative weight takes a task away; of ``linear`` and its relatives its sign goes to A alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lightning_peft.adapter_files import read_adapter
from lightning_peft.adapter_tools.lora_folder import refuse_other_bases, write_lora
from lightning_peft.adapter_tools.report import LowRankReport
from lightning_peft.adapter_tools.task_arithmetic import add_tasks
from lightning_peft.adapter_tools.updates import adapted_in_order, put_in, updates_from
from lightning_peft.arithmetic.task_vectors import combined
from lightning_peft.arithmetic.thin_products import difference_norm, product_norm, product_svd, tail_error
from lightning_peft.errors import AdapterMismatchError, ConfigError
from lightning_peft.injection import record
from lightning_peft.low_rank_pairs import Pair, Updates, updates_in
from lightning_peft.surgery import check_name

Combination = Literal[
    "svd",
    "cat",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
    "task_arithmetic",
]
"""A way to make one adapter of several."""
METHODS: tuple[str, ...] = Combination.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How updates are combined; the fields are the arguments of :func:`combine_adapters`."""

    method: str = "svd"
    rank: int | None = None
    density: float = 0.5
    majority_sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise ConfigError(f"rank must be a positive integer, got {self.rank!r}")
        if self.rank is not None and self.method != "task_arithmetic" and not self.method.endswith("svd"):
            raise ConfigError(
                f"rank={self.rank} was given, but {self.method!r} has the rank that follows from the adapters; use 'svd', or cut it with prune_rank"
            )
        if not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
            raise ConfigError(f"density must be a share above 0 and at most 1, got {self.density!r}")
        if self.majority_sign not in ("total", "frequency"):
            raise ConfigError(f"majority_sign must be 'total' or 'frequency', got {self.majority_sign!r}")


def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    method: Combination = "svd",
    name: str = "merged",
    rank: int | None = None,
    density: float = 0.5,
    majority_sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
    drop_rest: bool = False,
) -> LowRankReport:
    """Make a new adapter of several in ``model``, and make it the active one; the others stay as they are.

    The new adapter is a LoRA of scale one, at every place where one of the others is; of a fused projection it adapts the whole.

    Args:
        model: the adapted model.
        weights: the adapters by name, and their weights, of either sign.
        method: how; see :mod:`lightning_peft.adapter_tools.combining`.
        name: the name of the new adapter.
        rank: the rank where it is free: of ``svd`` and its relatives the largest of the adapters if not given.
        density: the share of elements that pruning keeps.
        majority_sign: what elects the sign of an element: the sum of the values, or the number of them.
        seed: of the random pruning of DARE.
        drop_rest: whether ``task_arithmetic`` leaves out parameters that a LoRA has no update for, which are refused otherwise.

    Returns:
        The ranks, and the relative distance to ``sum w_i s_i B_i A_i`` (to what was pruned, for the other ``_svd``) of each weight;
        none for ways that do not aim at it.

    Raises:
        AdapterNotFoundError: the model has not all of the adapters.
        InjectionError: ``name`` is taken.
        ConfigError: an argument is out of its range, an adapter is something else than low-rank updates, ranks differ where they must
            not, or the result is non-finite. The model is unchanged then.

    Example:
        >>> from lightning_peft import LoRA, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = inject(model, LoRA(rank=2), "0", name="a"), inject(model, LoRA(rank=3), "0", name="b")
        >>> combine_adapters(model, {"a": 0.7, "b": 0.3}, method="cat").ranks
        {'0': 5}
    """
    recipe = Recipe(method=method, rank=rank, density=density, majority_sign=majority_sign, seed=seed)
    check_weights(list(weights.values()))
    check_name(model, name)
    held = [record(model, adapter) for adapter in weights]
    if recipe.method == "task_arithmetic":
        return add_tasks(model, weights, name=name, rank=recipe.rank, drop_rest=drop_rest)
    parts = [(weight, updates_in(model, adapter)) for adapter, weight in weights.items()]
    tied = _tied_places([updates for _, updates in parts])
    places = adapted_in_order(model, {path: None for _, updates in parts for path in updates.pairs})
    pairs, report = combined_updates(parts, places, recipe)
    put_in(model, name, pairs, family=held[0].family, tied=bool(tied))
    return report


def _tied_places(updates: Sequence[Updates]) -> frozenset[str]:
    """Return the places whose update is one for all modules that share the weight; every adapter must agree on them."""
    tied = frozenset(path for one in updates for path in one.tied)
    for one in updates:
        if apart := sorted((tied - one.tied) & one.pairs.keys()):
            raise ConfigError(
                f"{one.origin} has an update of its own at {apart[0]!r}, whose weight other modules share, and another adapter one for all "
                "of them; train both with the same tied="
            )
    return tied


def combine_folders(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float],
    method: Combination = "svd",
    rank: int | None = None,
    density: float = 0.5,
    majority_sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
    check_base: bool = True,
) -> LowRankReport:
    """Write the LoRA folder that :func:`combine_adapters` would make of several folders; no model is needed.

    Args:
        folders: LoRA folders, ours or HF PEFT's.
        output: the folder to write.
        weights: one weight for each folder, of either sign.
        method: how; all but ``task_arithmetic``, which needs the model.
        rank: the rank where it is free.
        density: the share of elements that pruning keeps.
        majority_sign: what elects the sign of an element.
        seed: of the random pruning of DARE, which draws for the places in the order of their names.
        check_base: whether to refuse folders that were trained on different bases.

    Raises:
        AdapterFileError: a folder cannot be read.
        BaseMismatchError: two of them were trained on different bases.
        ConfigError: as :func:`combine_adapters`; or the output is one of the folders.
    """
    recipe = Recipe(method=method, rank=rank, density=density, majority_sign=majority_sign, seed=seed)
    if len(folders) != len(weights):
        raise ConfigError(f"give one weight for each adapter: got {len(folders)} adapters and {len(weights)} weights")
    check_weights(weights)
    if recipe.method == "task_arithmetic":
        raise ConfigError("task_arithmetic needs the base model; load the adapters over it and call combine_adapters")
    read = [read_adapter(folder) for folder in folders]
    if check_base:
        refuse_other_bases(read)
    parts = [(weight, updates_from(folder)) for weight, folder in zip(weights, read, strict=True)]
    places = list(dict.fromkeys(path for _, updates in parts for path in updates.pairs))
    pairs, report = combined_updates(parts, places, recipe)
    write_lora(output, pairs, read)
    return report


def check_weights(weights: Sequence[float]) -> None:
    """Refuse no weights, and weights that are not finite numbers.

    Raises:
        ConfigError: they are such.
    """
    if not weights:
        raise ConfigError("name at least one adapter with its weight, such as {'a': 0.7, 'b': 0.3}")
    for weight in weights:
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ConfigError(f"a weight must be a finite number, got {weight!r}")


# -- details -----------------------------------------------------------------------------------------------------------


def combined_updates(
    parts: Sequence[tuple[float, Updates]], places: Sequence[str], recipe: Recipe
) -> tuple[dict[str, dict[str, Pair]], LowRankReport]:
    """Return the combined pairs, of scale one, at ``places``, and the report."""
    rank = recipe.rank or max(updates.largest_rank for _, updates in parts)
    generator = torch.Generator().manual_seed(recipe.seed)
    pairs: dict[str, dict[str, Pair]] = {}
    ranks, errors, norms = {}, {}, {}
    labels = {id(pair): label for _, updates in parts for label, pair in updates.labelled.items()}
    for path in places:
        pairs[path] = {}
        here = [(weight, updates.pairs[path]) for weight, updates in parts if path in updates.pairs]
        for key in dict.fromkeys(key for _, held in here for key in held):
            terms = [(weight, held[key]) for weight, held in here if key in held]
            label = labels[id(terms[0][1])]
            _check_shapes(label, [pair for _, pair in terms])
            result, error, norm = _combined(label, terms, rank, recipe, generator)
            pairs[path][key] = result
            ranks[label] = result.rank
            if error is not None:
                errors[label], norms[label] = error, norm
    return pairs, LowRankReport(ranks, errors, norms)


def _combined(
    label: str, terms: Sequence[tuple[float, Pair]], rank: int, recipe: Recipe, generator: torch.Generator
) -> tuple[Pair, float | None, float]:
    """Return the combined pair, its relative distance to what it approximates (None without that), and the norm of that."""
    like = terms[0][1]
    if recipe.method in ("svd", "cat"):
        up, down = _side_by_side(terms)
        if recipe.method == "cat":
            return like.like(up, down), 0.0, product_norm(up, down)
        return _cut(like, product_svd(up, down), rank)
    if recipe.method.endswith("_svd"):
        products = [_product(pair) for _, pair in terms]
        weights = [weight for weight, _ in terms]
        # In the layout of the weight itself, in which random pruning draws.
        products = [product.t() if like.transposed else product for product in products]
        total = _mixed(recipe.method.removesuffix("_svd"), products, weights, recipe, generator)
        U, S, Vh = torch.linalg.svd(total.t() if like.transposed else total, full_matrices=False)
        return _cut(like, (U, S, Vh), rank)
    if len({pair.rank for _, pair in terms}) > 1:
        raise ConfigError(
            f"method={recipe.method!r} needs adapters of one rank, but at {label!r} they have {[pair.rank for _, pair in terms]}; use 'svd', "
            "'cat' or a method with _svd"
        )
    strengths = [weight * pair.scaling for weight, pair in terms]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]
    A = _mixed(recipe.method, [pair.matrices()[1].float() for _, pair in terms], signed, recipe, generator)
    B = _mixed(recipe.method, [pair.matrices()[0].float() for _, pair in terms], roots, recipe, generator)
    if recipe.method != "linear":
        return like.like(B, A), None, 0.0
    exact = _side_by_side(terms)
    norm = product_norm(*exact)
    return like.like(B, A), difference_norm(exact, (B, A)) / norm if norm else 0.0, norm


def _product(pair: Pair) -> torch.Tensor:
    """Return the update written out, (out, in) in float32."""
    up, down = (matrix.float() for matrix in pair.matrices())
    return pair.scaling * (up @ down)


def _side_by_side(terms: Sequence[tuple[float, Pair]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, A) whose product is the weighted sum of the updates."""
    found = [(weight, *pair.scaled()) for weight, pair in terms]
    device = found[0][1].device
    up = torch.cat([weight * up.to(device) for weight, up, _ in found], dim=1)  # (out, ranks)
    return up, torch.cat([down.to(device) for _, _, down in found])  # (ranks, in)


def _mixed(
    kind: str, tensors: Sequence[torch.Tensor], weights: Sequence[float], recipe: Recipe, generator: torch.Generator
) -> torch.Tensor:
    device = tensors[0].device
    return combined(
        kind,
        [tensor.contiguous().to(device) for tensor in tensors],
        weights,
        density=recipe.density,
        majority_sign=recipe.majority_sign,
        generator=generator,
    )


def _cut(
    like: Pair, decomposed: tuple[torch.Tensor, torch.Tensor, torch.Tensor], rank: int
) -> tuple[Pair, float, float]:
    U, S, Vh = decomposed
    kept = min(rank, S.numel())
    norm = float(torch.linalg.vector_norm(S))
    return like.like(U[:, :kept] * S[:kept], Vh[:kept]), tail_error(S, kept), norm


def _check_shapes(label: str, pairs: Sequence[Pair]) -> None:
    shapes = {(pair.up.shape[0], *pair.down.shape[1:]) for pair in pairs}
    if len(shapes) > 1:
        raise AdapterMismatchError(f"the adapters change {label!r} as weights of different shapes: {sorted(shapes)}")

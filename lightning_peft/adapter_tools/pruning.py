"""Adapters cut to a smaller rank: the best approximation there is, found through the thin factors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_peft.adapter_files import read_adapter
from lightning_peft.adapter_tools.lora_folder import write_lora
from lightning_peft.adapter_tools.report import LowRankReport
from lightning_peft.adapter_tools.updates import put_in, updates_from
from lightning_peft.arithmetic.thin_products import check_rank_or_energy, product_svd, rank_for, tail_error
from lightning_peft.injection import record
from lightning_peft.low_rank_pairs import Pair, Updates, updates_in
from lightning_peft.surgery import check_name


def prune_rank(
    model: nn.Module,
    name: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    new_name: str = "pruned",
) -> LowRankReport:
    """Make a LoRA adapter of smaller rank from a low-rank adapter, beside it, and make that the active one.

    Args:
        model: the adapted model.
        name: an adapter of low-rank updates: LoRA and its relatives.
        rank: the rank to keep.
        energy: instead of a rank, the share of the sum of squared singular values that each weight keeps; ranks then differ.
        new_name: the name of the new adapter.

    Returns:
        The rank and the relative error of each weight.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        InjectionError: ``new_name`` is taken.
        ConfigError: the adapter is something else than low-rank updates, or ``rank`` and ``energy`` are out of range.

    Example:
        >>> from lightning_peft import LoRA, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = inject(model, LoRA(rank=4), "0")
        >>> model[0].adapters["default"].lora_B.data[0].normal_().shape
        torch.Size([8])
        >>> report = prune_rank(model, energy=0.99)
        >>> report.ranks, report.error < 1e-6
        ({'0': 1}, True)
    """
    check_name(model, new_name)
    check_rank_or_energy(rank, energy)
    updates = updates_in(model, name)
    pairs, report = shortened(updates, rank=rank, energy=energy)
    put_in(model, new_name, pairs, family=record(model, name).family, tied=bool(updates.tied))
    return report


def prune_folder(
    adapter: str | Path, output: str | Path, *, rank: int | None = None, energy: float | None = None
) -> LowRankReport:
    """Write the adapter of one folder in smaller rank to another; no model is needed.

    Args:
        adapter: a LoRA folder, ours or HF PEFT's.
        output: the folder to write.
        rank: the rank to keep.
        energy: instead of a rank, the share of the sum of squared singular values that each weight keeps.

    Raises:
        AdapterFileError: the folder cannot be read.
        ConfigError: it is not one of low-rank updates alone, or is the output, or ``rank`` and ``energy`` are out of range.
    """
    check_rank_or_energy(rank, energy)
    folder = read_adapter(adapter)
    pairs, report = shortened(updates_from(folder), rank=rank, energy=energy)
    write_lora(output, pairs, [folder])
    return report


def shortened(
    updates: Updates, *, rank: int | None, energy: float | None
) -> tuple[dict[str, dict[str, Pair]], LowRankReport]:
    """Return the updates in smaller rank, of scale one, and what that loses."""
    ranks, errors, norms = {}, {}, {}
    labels = iter(updates.labelled)
    pairs: dict[str, dict[str, Pair]] = {}
    for path, here in updates.pairs.items():
        pairs[path] = {}
        for key, pair in here.items():
            label = next(labels)
            U, S, Vh = product_svd(*pair.scaled())
            kept = rank_for(S, rank=rank, energy=energy)
            root = S[:kept].sqrt()
            pairs[path][key] = pair.like(U[:, :kept] * root, root[:, None] * Vh[:kept])
            ranks[label], errors[label] = kept, tail_error(S, kept)
            norms[label] = float(torch.linalg.vector_norm(S))
    return pairs, LowRankReport(ranks, errors, norms)

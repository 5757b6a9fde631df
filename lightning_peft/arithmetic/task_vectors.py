"""One tensor from several, each the change that a task made: sums, TIES, DARE and pruning by magnitude.

* a weighted sum, task arithmetic: Ilharco et al., "Editing Models with Task Arithmetic", 2022 (arXiv:2212.04089);
* TIES: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023 (arXiv:2306.01708);
* DARE: Yu et al., "Language Models are Super Mario", 2023 (arXiv:2311.03099).

::

    prune          magnitude: the share ``density`` with the largest values stays       random: each stays with probability
                                                                                        ``density`` and is divided by it
    sum            sum_i w_i t_i
    agree (TIES)   the sign of each element is elected by all t_i; the mean of w_i t_i over those that have it

The election sees the values before the weights, as HF PEFT has it, so a negative weight takes away what was elected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_by_magnitude(tensor: Tensor, density: float) -> Tensor:
    """Return ``tensor`` with all but the share ``density`` of its elements zero, those of the largest magnitude left."""
    if density >= 1:
        return tensor
    kept = torch.zeros_like(tensor).flatten()
    places = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    kept[places] = tensor.flatten()[places]
    return kept.view(tensor.shape)


def kept_at_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return ``tensor`` with each element kept with probability ``density`` and divided by it, else zero.

    The draws are made in float32 on the device of ``generator``, in the order of the elements.
    """
    if density >= 1:
        return tensor
    chance = torch.full(tensor.shape, density, dtype=torch.float32, device=generator.device)
    mask = torch.bernoulli(chance, generator=generator).to(tensor)
    return tensor * mask / density


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of ``tensors``, all of one shape, each times its weight."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + weight * tensor
    return total


def agreeing_mean(tensors: Sequence[Tensor], weights: Sequence[float], majority_sign: str) -> Tensor:
    """Return, element by element, the mean of weight times value over the ``tensors`` whose sign was elected.

    Args:
        tensors: all of one shape.
        weights: one for each.
        majority_sign: what elects: ``total``, the sum of the values, or ``frequency``, the number of them. A draw is positive.
    """
    stacked = torch.stack(list(tensors))  # (tensors, ...)
    votes = (stacked.sign() if majority_sign == "frequency" else stacked).sum(dim=0)
    elected = torch.where(votes >= 0, 1, -1).to(stacked.dtype)
    agree = stacked.sign() == elected  # (tensors, ...)
    factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(-1, *[1] * (stacked.dim() - 1))
    return (stacked * factors * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def combined(
    kind: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    majority_sign: str,
    generator: torch.Generator,
) -> Tensor:
    """Return one tensor from several of one shape.

    Args:
        kind: ``linear``, ``ties``, ``dare_linear``, ``dare_ties`` or ``magnitude_prune``.
        tensors: the changes.
        weights: one for each, of either sign.
        density: the share that pruning keeps, above 0 and at most 1.
        majority_sign: see :func:`agreeing_mean`.
        generator: where the random pruning of DARE draws from.
    """
    if kind in ("ties", "magnitude_prune"):
        tensors = [kept_by_magnitude(tensor, density) for tensor in tensors]
    elif kind in ("dare_linear", "dare_ties"):
        tensors = [kept_at_random(tensor, density, generator) for tensor in tensors]
    if kind in ("ties", "dare_ties"):
        return agreeing_mean(tensors, weights, majority_sign)
    return weighted_sum(tensors, weights)

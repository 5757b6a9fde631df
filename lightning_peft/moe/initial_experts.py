"""The first values of experts that come from a dense MLP.

::

    copy          every expert is the MLP                            Komatsuzaki et al., arXiv:2212.05055
    noise         W + N(0, (noise std(W))²), each expert its own
    re-drawing    a share of the neurons of each expert is drawn from N(mean, std²) of what it replaces      arXiv:2502.19261
    shards        each copy is cut along its hidden features into G experts, which the router sees as one       arXiv:2410.07524

Expert e * G + g is shard g of copy e. What fills the experts fills the state of an optimizer too, which has the same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """How experts lie in stacked tensors.

    Example:
        >>> Layout(copies=4, granularity=2, width=8, hidden=16, gated=True).shapes(up_bias=False, down_bias=False)
        {'gate_up_proj': (8, 16, 8), 'down_proj': (8, 8, 8)}
    """

    copies: int
    """Copies of the MLP."""
    granularity: int
    """Experts that each copy is cut into."""
    width: int
    """Features of a token."""
    hidden: int
    """Features between the projections of the MLP."""
    gated: bool
    """Whether there is a gate."""

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return self.copies * self.granularity

    @property
    def first(self) -> str:
        """Name of the tensor before the activation."""
        return "gate_up_proj" if self.gated else "up_proj"

    def shapes(self, *, up_bias: bool, down_bias: bool) -> dict[str, tuple[int, ...]]:
        """Return tensor name to shape."""
        rows = (2 if self.gated else 1) * self.hidden // self.granularity
        shapes: dict[str, tuple[int, ...]] = {
            self.first: (self.experts, rows, self.width),
            "down_proj": (self.experts, self.width, self.hidden // self.granularity),
        }
        if up_bias:
            shapes[f"{self.first}_bias"] = (self.experts, rows)
        if down_bias:
            shapes["down_proj_bias"] = (self.experts, self.width)
        return shapes

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
        """Copy the parts of an MLP (``gate``, ``up``, ``down``, ``gate_bias``, ...) into every expert of ``tensors``."""
        copies, shards, size = self.copies, self.granularity, self.hidden // self.granularity
        parts = ("gate", "up") if self.gated else ("up",)
        for suffix in ("", "_bias"):
            target = tensors.get(self.first + suffix)
            if target is None:
                continue
            rows = target.view(copies, shards, len(parts), size, *target.shape[2:])
            for place, part in enumerate(parts):
                rows[:, :, place] = torch.unflatten(dense[part + suffix], 0, (shards, size))
        down = tensors["down_proj"].view(copies, shards, self.width, size)
        down.copy_(torch.unflatten(dense["down"], 1, (shards, size)).transpose(0, 1))
        if "down_proj_bias" in tensors:
            tensors["down_proj_bias"].copy_(dense["down_bias"])


@torch.no_grad()
def add_noise(tensors: Mapping[str, Tensor], dense: Mapping[str, Tensor], layout: Layout, noise: float) -> None:
    """Add to every weight of every expert a normal number of ``noise`` times the deviation of the matrix it came from."""
    for name, part in _matrices(tensors, layout):
        deviation = float(dense[part].float().std())
        for expert in tensors[name]:
            rows = _part_of(expert, part, layout)
            rows.add_(torch.randn_like(rows), alpha=noise * deviation)


@torch.no_grad()
def redraw(tensors: Mapping[str, Tensor], layout: Layout, share: float) -> None:
    """Draw a ``share`` of the hidden neurons of each expert anew, all that belongs to a neuron together.

    The new values have mean and deviation of those they replace, in each expert and matrix.
    """
    size = layout.hidden // layout.granularity
    count = round(share * size)
    for expert in range(layout.experts if count else 0):
        neurons = torch.randperm(size)[:count].to(tensors["down_proj"].device)
        for name, part in _matrices(tensors, layout):
            rows = _part_of(tensors[name][expert], part, layout)
            rows = rows.t() if part == "down" else rows  # (neurons, width)
            old = rows[neurons]
            rows[neurons] = torch.randn_like(old) * old.std() + old.mean()


@torch.no_grad()
def scale(tensors: Mapping[str, Tensor], layout: Layout, weights: float, bias: float, *, spread: bool) -> None:
    """Scale the output of every expert.

    An MLP is linear in its down-projection, and where there is a gate in its up-projection too, so that factors on these scale the
    output by just that. With the activation's input scaled as well it is so for ReLU alone.

    Args:
        tensors: of the experts.
        layout: how they lie.
        weights: factor of the output, but for the part of the last bias.
        bias: factor of the last bias.
        spread: the same factor for every matrix, the activation's input included, as in arXiv:2410.07524.
    """
    linear = 2 if layout.gated else 1  # projections that the output is linear in
    factor = weights ** (1 / (linear + spread))
    for name in (layout.first, f"{layout.first}_bias"):
        if name in tensors and (layout.gated or spread):
            rows = tensors[name]
            (rows if spread else rows[:, rows.shape[1] // 2 :]).mul_(factor)
    tensors["down_proj"].mul_(factor)
    if "down_proj_bias" in tensors:
        tensors["down_proj_bias"].mul_(bias)


@torch.no_grad()
def reset_router(router: Tensor, layout: Layout, std: float) -> None:
    """Draw a row for each copy of the MLP; the shards of a copy share it, so that they are chosen together."""
    rows = torch.empty(layout.copies, layout.width, dtype=router.dtype, device=router.device)
    nn.init.normal_(rows, std=std)
    router.copy_(rows.repeat_interleave(layout.granularity, dim=0))


def _matrices(tensors: Mapping[str, Tensor], layout: Layout) -> list[tuple[str, str]]:
    """Return the name of the tensor, and the part of the MLP, of each matrix."""
    parts = ("gate", "up") if layout.gated else ("up",)
    return [*((layout.first, part) for part in parts), ("down_proj", "down")]


def _part_of(expert: Tensor, part: str, layout: Layout) -> Tensor:
    """Return the rows of ``part`` in the matrix of one expert."""
    if part == "down" or not layout.gated:
        return expert
    return expert.chunk(2, dim=0)[0 if part == "gate" else 1]

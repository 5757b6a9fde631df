"""Low-rank adapters that start from a pair taken from the weight, over a base that stays as it is.

The papers take the initial pair out of the base: W' = W - s B0 A0, and train ``y = W' x + s B A x``. The same function,
with the same gradients, is a change of the base that nobody has touched::

    y = W x + s (B A - B0 A0) x = W x + s [(B - B0) A + B0 (A - A0)] x

    x ──┬── W (frozen) ────────────────────────────(+)── y        A, A0: (rank, in)    A starts at A0
        └── [A; A - A0] ── [B - B0, B0] ── s ───────┘             B, B0: (out, rank)   B starts at B0

Both differences are zero at first, so a fresh adapter is the identity bit for bit; the base is shared, can be switched on its
own, and adapters nest. The stacked pair on the right is a plain LoRA of twice the rank: it is what acts and what a file holds.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.low_rank import LowRankLinear, LowRankSettings
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.interfaces import Target
from lightning_peft.quantized_layers import dense_weight

_OVERSAMPLING = 8
"""Directions beyond the rank in which a randomised decomposition looks."""


class InitialPairLinear(LowRankLinear):
    """A low-rank update of a linear layer, as a change of an initial pair A0, B0. A subclass says where that comes from.

    The parameters ``lora_A`` and ``lora_B`` are the paper's A and B; ``initial_A`` and ``initial_B`` are buffers. ``rank`` is that
    of the update, twice that of the pair. Each slice of a fused projection has a pair of its own.

    Args:
        settings: the hyperparameters at this place, with the rank of the pair.
        module: the layer to adapt.
        target: where it stands.

    Raises:
        TargetError: the rank is larger than the weight has.
    """

    def __init__(self, settings: LowRankSettings, module: nn.Module, target: Target) -> None:
        super().__init__(settings, module, target.slices)
        limit = min(self.lora_A.shape[1], self.out_features, *(part.features for part in target.slices))
        if settings.rank > limit:
            raise TargetError(
                f"rank {settings.rank} was asked for at {target.path!r}, whose weight has rank {limit} at most; "
                "the initial pair cannot have more: lower the rank, or give this place one of its own in rank_pattern"
            )
        self.pair_rank, self.rank, self.file_rank = settings.rank, 2 * settings.rank, 2 * self.file_rank
        for name, parameter in (("initial_A", self.lora_A), ("initial_B", self.lora_B)):
            self.register_buffer(name, torch.empty_like(parameter, requires_grad=False))
        self.initial_A: Tensor
        self.initial_B: Tensor

    @abstractmethod
    def pair(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return A0 (rank, in) and B0 (out, rank) for ``weight`` (out, in), of a whole layer or of one slice, in float32."""

    @override
    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_bias(base_layer)
        weight = dense_weight(base_layer)  # (out, in)
        if not weight.is_meta:
            pairs = [self.pair(rows) for rows in self._rows(weight)]
            self.set_initial(torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs]))

    def _rows(self, weight: Tensor) -> list[Tensor]:
        """Return what each slice has of ``weight`` (out, in)."""
        if not self.slices:
            return [weight]
        return [part.view(weight.t()).reshape(weight.shape[1], -1).t() for part in self.slices]

    @torch.no_grad()
    def set_initial(self, down: Tensor, up: Tensor) -> None:
        """Start at another pair.

        Args:
            down: A0 (k * rank, in), for k slices or one whole layer.
            up: B0 (features of all slices, rank).

        Raises:
            ConfigError: the pair does not fit.
        """
        for own, value in ((self.initial_A, down), (self.initial_B, up.t())):
            if own.shape != value.shape:
                raise ConfigError(
                    f"an initial A or B of shape {tuple(value.t().shape)} was given, but this place needs {tuple(own.t().shape)}"
                )
            own.copy_(value)
        self.lora_A.copy_(self.initial_A)
        self.lora_B.copy_(self.initial_B)

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        A, A0 = (half.view(-1, self.pair_rank, half.shape[1]) for half in (self.lora_A, self.initial_A))
        stacked = torch.cat([A, A - A0], dim=1).flatten(0, 1)  # (k * 2 rank, in)
        return stacked, torch.cat([self.lora_B - self.initial_B, self.initial_B])  # (2 rank, features)

    @override
    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        stacked = state["lora_A.weight"].to(self.lora_A)
        A, dA = stacked.view(-1, 2, self.pair_rank, stacked.shape[1]).flatten(2).unbind(1)  # each (k, rank * in)
        dB, B0 = self._narrow(state["lora_B.weight"]).to(self.lora_B).chunk(2)  # each (rank, features)
        self.lora_A.copy_(A.reshape(self.lora_A.shape))
        self.initial_A.copy_(-_minuend(-A, dA).reshape(self.lora_A.shape))
        self.initial_B.copy_(B0)
        self.lora_B.copy_(_minuend(B0, dB))
        if self.bias is not None:
            self.bias.copy_(state["base_layer.bias"])


def _minuend(subtrahend: Tensor, difference: Tensor) -> Tensor:
    """Return x such that ``x - subtrahend`` rounds to ``difference``: the sum, or a neighbour of it."""
    total = subtrahend + difference
    found = total
    for limit in (math.inf, -math.inf):
        neighbour = torch.nextafter(total, torch.full_like(total, limit))
        found = torch.where(found - subtrahend == difference, found, neighbour)
    return torch.where(found - subtrahend == difference, found, total)


def principal_directions(weight: Tensor, rank: int, *, iterations: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, rank), S (rank,) and V^T (rank, in): the largest singular values of ``weight`` and their vectors.

    Args:
        weight: (out, in).
        rank: how many.
        iterations: None for a full decomposition. A number for a randomised one with that many power iterations: Halko et al.,
            "Finding Structure with Randomness", 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1. It is the same at every call.
    """
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    columns = min(rank + _OVERSAMPLING, *weight.shape)
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(weight.shape[1], columns, generator=generator, dtype=weight.dtype).to(weight.device)
    Q = torch.linalg.qr(weight @ test).Q  # (out, columns)
    for _ in range(iterations):
        Q = torch.linalg.qr(weight.t() @ Q).Q  # (in, columns)
        Q = torch.linalg.qr(weight @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.t() @ weight, full_matrices=False)
    return (Q @ U)[:, :rank], S[:rank], Vh[:rank]

"""Low-rank updates as triplets of a singular value and two vectors: ``B diag(E) A``, of which some can be pruned.

A is held as (rank, in), B transposed as (rank, out), E as (rank, 1): row k of all three is a triplet. Files hold A (rank, in),
B (out, rank) and E (rank, 1), without the triplets that are pruned for good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.arithmetic.low_rank import LowRankAdapter, LowRankLinear, LowRankSettings
from lightning_peft.arithmetic.low_rank_conv import LowRankConv
from lightning_peft.arithmetic.low_rank_rows import low_rank_rows

_MATRICES = ("lora_A", "lora_E", "lora_B")


class TripletAdapter(LowRankAdapter):
    """What updates by triplets share: importance, pruning, the penalty, and the way to a file.

    Beside the parameters stand buffers of the training state, which a ``.ckpt`` holds and a file does not: the moving averages
    of importance and uncertainty of every element, which triplets were ``kept`` when last allocated, and whether that is
    ``settled``.
    """

    lora_A: nn.Parameter  # noqa: N815 - the papers' name
    lora_E: nn.Parameter  # noqa: N815 - the papers' name
    lora_B: nn.Parameter  # noqa: N815 - the papers' name
    kept: Tensor
    settled: Tensor
    total_steps: Tensor

    penalty: float = 0.0
    """Factor of the distance of A and B from orthogonality, in the loss."""

    def allocate_state(self) -> None:
        """Allocate E, for A and B that are there, and the buffers."""
        self.lora_E = self.new(self.rank, 1)
        for name in _MATRICES:
            for kind in ("importance", "uncertainty"):
                self.register_buffer(f"{kind}_{name[-1]}", torch.empty_like(self.get_parameter(name)))
        self.register_buffer("kept", torch.empty(self.rank, 1, dtype=torch.bool, device=self._device))
        self.register_buffer("settled", torch.empty((), dtype=torch.bool, device=self._device))
        self.register_buffer("total_steps", torch.empty((), dtype=torch.int64, device=self._device))

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        nn.init.zeros_(self.lora_E)
        self._reset_state()

    @torch.no_grad()
    def _reset_state(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self.kept.fill_(True)

    def down(self) -> Tensor:
        """Return diag(E) A (rank, in, ...)."""
        return self.lora_A * self.lora_E.view(-1, *[1] * (self.lora_A.dim() - 1))

    @override
    def auxiliary_loss(self) -> Tensor | None:
        if not self.penalty or not self.lora_A.requires_grad:
            return None
        total = self.lora_A.new_zeros(())
        for matrix in (self.lora_A.flatten(1), self.lora_B):  # (rank, in) and (rank, out)
            identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            total = total + torch.linalg.norm(matrix @ matrix.t() - identity)
        return self.penalty * total

    # -- importance ------------------------------------------------------------------------------------------------

    def measure(self, beta1: float, beta2: float) -> None:
        """Move the averages of importance and uncertainty on by one step, from values and gradients as they are."""
        for name in _MATRICES:
            parameter = self.get_parameter(name)
            assert parameter.grad is not None
            now = (parameter * parameter.grad).abs()
            importance, uncertainty = self._averages(name)
            importance.mul_(beta1).add_(now, alpha=1 - beta1)
            uncertainty.mul_(beta2).add_((now - importance).abs(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """Return the score of each triplet (rank, 1)."""
        A, E, B = (
            (importance * uncertainty).flatten(1).mean(1, keepdim=True)
            for importance, uncertainty in (self._averages(name) for name in ("lora_A", "lora_E", "lora_B"))
        )
        return E + (A + B)

    def _averages(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"importance_{name[-1]}"), self.get_buffer(f"uncertainty_{name[-1]}")

    # -- pruning ---------------------------------------------------------------------------------------------------

    def prune(self, kept: Tensor, optimizer: Optimizer) -> None:
        """Set the singular values that are not ``kept`` (rank, 1) to zero, and what the optimizer remembers of them."""
        self.kept.copy_(kept)
        self.lora_E.masked_fill_(~self.kept, 0.0)
        for value in optimizer.state.get(self.lora_E, {}).values():
            if isinstance(value, Tensor) and value.shape == self.lora_E.shape:
                value.masked_fill_(~self.kept, 0)

    def settle(self, total_steps: int) -> None:
        """Keep the ranks as they are from now on; importance is no longer needed."""
        kept = self.kept.clone()
        self._reset_state()
        self.kept.copy_(kept)
        self.settled.fill_(True)
        self.total_steps.fill_(total_steps)

    # -- files -----------------------------------------------------------------------------------------------------

    def _written(self) -> Tensor:
        """Return which triplets (rank,) a file holds: those pruned before ranks are settled may come back."""
        return self.kept.flatten() if self.settled else torch.ones_like(self.kept.flatten())

    def pattern(self, init_rank: int) -> list[bool]:
        """Return which of the ``init_rank`` triplets there were in the beginning a file holds."""
        written: list[bool] = self._written().tolist()
        return written + [False] * (init_rank - len(written))

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        held = {"lora_A": self.lora_A.flatten(1), "lora_B": self.lora_B, "lora_E": self.lora_E}
        if not self.lora_E.is_meta and not self._written().all():
            held = {name: tensor[self._written()] for name, tensor in held.items()}
        return {**held, "lora_B": held["lora_B"].t()}

    @override
    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        rows = self._written().nonzero().flatten()
        for name in _MATRICES:
            parameter = self.get_parameter(name)
            value = state[name].t() if name == "lora_B" else state[name]
            parameter[rows] = value.reshape(-1, *parameter.shape[1:]).to(parameter)

    @override
    @torch.no_grad()
    def fit_to(self, shapes: Mapping[str, Sequence[int]]) -> None:
        rank = (shapes.get("lora_E") or (self.rank,))[0]
        if rank >= self.rank:
            return
        # Triplets were pruned for good: the ranks are settled.
        self.rank = self.file_rank = rank
        for name in _MATRICES:
            parameter = self.get_parameter(name)
            fewer = nn.Parameter(parameter[:rank].clone(), requires_grad=parameter.requires_grad)
            self.register_parameter(name, fewer)
            for average in self._averages(name):
                average.resize_(fewer.shape)
        self.kept.resize_(rank, 1)
        self._reset_state()
        self.settled.fill_(True)


class SVDLinear(TripletAdapter, LowRankLinear):
    """Triplets around ``nn.Linear`` (quantised ones too) and transformers' ``Conv1D``."""

    def __init__(self, settings: LowRankSettings, module: nn.Module) -> None:
        super().__init__(settings, module)
        self.allocate_state()

    @override
    def _update(self, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        """Return y (tokens, out) plus the update of x (tokens, in)."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        h = x.to(y.dtype) @ self.down().to(y.dtype).t()  # (tokens, rank)
        if in_place:
            return y.addmm_(h, self.lora_B.to(y.dtype), alpha=self.scaling)
        return torch.addmm(y, h, self.lora_B.to(y.dtype), alpha=self.scaling)

    @override
    def grouped_rows(self) -> Callable[..., Any] | None:
        return low_rank_rows if type(self)._update is SVDLinear._update else None

    @override
    def row_factors(self) -> tuple[Tensor, Tensor]:
        return self.down(), self.lora_B

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        delta = self.scaling * (self.lora_B.detach().t() @ self.down().detach())  # (out, in)
        return self.merged_with(base_layer, weight=delta.t() if self.transposed else delta)


class SVDConv(TripletAdapter, LowRankConv):
    """Triplets around convolutions: A (rank, in, *kernel) strides over the input as the base does, B (rank, out) mixes."""

    def __init__(self, settings: LowRankSettings, module: nn.Module) -> None:
        super().__init__(settings, module)
        self.lora_B = self.new(self.rank, self.lora_B.shape[0])
        self.allocate_state()

    @override
    def forward(self, base: Any, x: Tensor) -> Tensor:
        """X (batch, in, *size) -> y (batch, out, *size)."""
        y: Tensor = base(x)
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        h = self.convolve(x, self.down().to(y.dtype), **self.settings)  # (batch, rank, *size)
        mixed = torch.einsum("br...,ro->bo...", h, self.lora_B.to(y.dtype))
        return y + mixed * self.scaling

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        delta = torch.tensordot(self.lora_B.detach().t(), self.down().detach(), dims=1)  # (out, in, *kernel)
        return self.merged_with(base_layer, weight=self.scaling * delta)

"""Weight-decomposed low-rank adapters: a trained length for each output feature, and a low-rank update of its direction.

::

    W' = m / ||W + s B A|| * (W + s B A)        a norm for each output feature; m starts at ||W||

The norm comes from thin products alone, ``||W||^2 + 2 s <W, B A> + s^2 ||B A||^2`` row by row, so that no dense update is
built. It takes no part in backward. What a forward adds to LoRA's is one elementwise product::

    u = W x + b + s B A x                       LoRA
    y = u + (m / ||W + s B A|| - 1) (u - b)     exactly u where m is the norm
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.low_rank import (
    LowRankAdapter,
    LowRankLinear,
    LowRankSettings,
)
from lightning_peft.arithmetic.low_rank_conv import LowRankConv
from lightning_peft.arithmetic.low_rank_embedding import LowRankEmbedding
from lightning_peft.errors import MergeError


class _WeightDecomposed(LowRankAdapter):
    """What the decomposed adapters share; stands before the low-rank adapter of a kind of layer among the bases.

    Args:
        settings: the hyperparameters at this place.
        module: the layer to adapt.
        dense: returns the weight of a layer, unpacked if it is quantised.
    """

    lora_magnitude_vector: nn.Parameter
    scalable: ClassVar[bool] = False  # the length of W + s B A does not grow in proportion to s

    def __init__(self, settings: LowRankSettings, module: Any, dense: Callable[[nn.Module], Tensor]) -> None:
        super().__init__(settings, module)
        self._unpacked = dense
        self.lora_magnitude_vector = self.new(self.matrices()[1].shape[0])

    @abstractmethod
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, inputs) and B (out, rank)."""

    @abstractmethod
    def rows(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as a matrix with a row for each output feature, as a view: (out, inputs)."""

    @abstractmethod
    def shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return what :meth:`rows` takes, of the shape of ``like``."""

    channel_dim: int = -1
    """The dimension of the output that counts its features."""

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        super().reset_parameters(base_layer)  # type: ignore[safe-super]  # of the adapter that stands after this class
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self.norms(base_layer))

    @torch.no_grad()
    def norms(self, base_layer: nn.Module) -> Tensor:
        """Return ``||W + s B A||`` of each output feature (out,), rounded as the magnitudes are. Without gradients."""
        W = self.rows(self._unpacked(base_layer))  # (out, inputs)
        wide = torch.promote_types(torch.float32, W.dtype)
        A, B = self.matrices()
        with torch.autocast(W.device.type if W.device.type != "meta" else "cpu", enabled=False):
            squares = torch.linalg.vector_norm(W, dim=1, dtype=wide).square()  # (out,)
            products = (W @ A.to(W.dtype).t()).to(wide)  # (out, rank)
            A, B = A.to(wide), self.scaling * B.to(wide)
            squares = squares + (B * (2 * products + B @ (A @ A.t()))).sum(dim=1)
        norms: Tensor = squares.clamp(min=0).sqrt()
        return norms.to(self.lora_magnitude_vector.dtype)

    def stretch(self, base_layer: nn.Module) -> Tensor:
        """Return ``m / ||W + s B A|| - 1`` of each output feature (out,); 0 where a direction of length zero has none."""
        norms = self.norms(base_layer)
        wide = torch.promote_types(torch.float32, norms.dtype)
        magnitudes, norms = self.lora_magnitude_vector.to(wide), norms.to(wide)
        empty = norms == 0
        return torch.where(empty, norms, magnitudes / norms.masked_fill(empty, 1.0) - 1)

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X -> y, shapes as in the base, which is the adapted module itself: this adapter acts alone at a place."""
        assert isinstance(base, nn.Module)
        # With what training changed of the bias.
        u: Tensor = super().forward(base, x)  # type: ignore[safe-super]  # of the adapter that stands after this class
        bias: Tensor | None = getattr(base, "bias", None) if self.bias is None else self.bias
        factor = self._along(self.stretch(base).to(u.dtype))
        return torch.addcmul(u, u if bias is None else u - self._along(bias.to(u.dtype)), factor)

    def _along(self, vector: Tensor) -> Tensor:
        """Return ``vector`` (out,) so that it multiplies the features of an output."""
        return vector if self.channel_dim == -1 else vector.view(-1, *[1] * (-self.channel_dim - 1))

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {**super().disk_tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        weight = base_layer.get_parameter("weight").detach()
        if self._unpacked(base_layer).shape != weight.shape:
            raise MergeError(
                f"the weight of {type(base_layer).__name__} is packed as {weight.dtype}: a quantised base cannot be merged into; "
                "load the base in 16 or 32 bit and merge there, or merge with quantized='dequantize' or quantized='requantize'"
            )
        A, B = (matrix.detach() for matrix in self.matrices())
        stretch = self.stretch(base_layer).detach().unsqueeze(1)  # (out, 1)
        W = self.rows(weight).to(stretch.dtype)
        delta = stretch * W + (1 + stretch) * (self.scaling * (B @ A))  # (out, inputs)
        return self.merged_with(base_layer, weight=self.shaped(delta, weight))


class WeightDecomposedLinear(_WeightDecomposed, LowRankLinear):
    """A decomposed weight of ``nn.Linear`` (quantised ones too) and transformers' ``Conv1D``."""

    @override
    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B.t()

    @override
    def rows(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    @override
    def shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.t() if self.transposed else rows


class WeightDecomposedEmbedding(_WeightDecomposed, LowRankEmbedding):
    """A decomposed table of ``nn.Embedding``: the length of a feature is that of its column, over the vocabulary."""

    @override
    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A.t(), self.lora_embedding_B.t()

    @override
    def rows(self, weight: Tensor) -> Tensor:
        return weight.t()

    @override
    def shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.t()


class WeightDecomposedConv(_WeightDecomposed, LowRankConv):
    """A decomposed kernel of a convolution: the length of a channel is that of all weights that lead to it."""

    @property
    @override
    def channel_dim(self) -> int:  # type: ignore[override]
        return 1 - self.lora_B.dim()

    @override
    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.flatten(1), self.lora_B.flatten(1)

    @override
    def rows(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @override
    def shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.view(like.shape)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        tensors = super().disk_tensors()
        shape = (1, -1, *[1] * (self.lora_B.dim() - 2))  # as in HF PEFT's files
        return {**tensors, "lora_magnitude_vector": self.lora_magnitude_vector.view(shape)}

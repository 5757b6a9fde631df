"""LoRA on an embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.low_rank import LowRankAdapter, LowRankSettings, RankAxis
from lightning_peft.arithmetic.row_blocks import Product
from lightning_peft.errors import TargetError


class LowRankEmbedding(LowRankAdapter):
    """LoRA on ``nn.Embedding``: A (rank, vocabulary) starts at zero, B (dim, rank) at random, both held transposed."""

    scalable: ClassVar[bool] = True
    paddable: ClassVar[bool] = True

    def __init__(self, settings: LowRankSettings, module: nn.Embedding) -> None:
        super().__init__(settings, module)
        if module.max_norm is not None:
            raise TargetError("LoRA cannot adapt an embedding with max_norm, which rewrites its own weights in forward")
        self.padding_idx = module.padding_idx
        # Some models (Gemma 3) scale what the embedding returns; the update is part of the weight, so it is scaled too.
        self.embed_scale = float(getattr(module, "scalar_embed_scale", 1.0))
        self.lora_embedding_A = self.new(module.num_embeddings, self.rank)
        self.lora_embedding_B = self.new(self.rank, module.embedding_dim)

    @override
    def rank_axes(self) -> Mapping[str, RankAxis]:
        return {"lora_embedding_A": RankAxis(1), "lora_embedding_B": RankAxis(0, up=True)}

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    @override
    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        """Ids (...) -> y (..., dim)."""
        y: Tensor = base(ids)
        h = F.embedding(ids, self.lora_embedding_A.to(y.dtype), self.padding_idx)  # (..., rank)
        return y + (h @ self.lora_embedding_B.to(y.dtype)) * (self.scaling * self.embed_scale)

    @override
    def disk_tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_embedding_A.t(), "lora_embedding_B": self.lora_embedding_B.t()}

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        delta = Product(self.lora_embedding_A.detach(), self.lora_embedding_B.detach(), self.scaling)
        return self.merged_with(base_layer, weight=delta)

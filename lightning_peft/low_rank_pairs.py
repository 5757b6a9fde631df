"""Adapters that are low-rank products and nothing else, as pairs of matrices in the shapes of a file.

What a file of LoRA holds is the common language of tools and formats: for every place a pair, A (rank, in, ...) and
B (out, rank, ...), and a scale. Slices of fused projections, initial pairs (PiSSA) and transposed layouts are all written so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_peft.adapter_layer import adapters_named
from lightning_peft.arithmetic.low_rank import LowRankAdapter
from lightning_peft.arithmetic.low_rank_experts import LowRankExperts
from lightning_peft.arithmetic.trained_bias import BiasAdapter
from lightning_peft.errors import ConfigError
from lightning_peft.injection import record
from lightning_peft.saved_modules import SavedParameters
from lightning_peft.sharded_parameters import has_shards

PAIR_NAMES = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
"""The name of A in a file, for a linear layer and for an embedding, to that of B."""


@dataclass(frozen=True)
class Pair:
    """One update ``scaling * B A``, in the shapes of a file."""

    down: Tensor
    """A (rank, in, ...)."""
    up: Tensor
    """B (out, rank, ...)."""
    scaling: float = 1.0
    """Factor of the update."""
    transposed: bool = False
    """Whether the module holds its weight as (in, out): an embedding, a ``Conv1D``."""

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return B (out, rank) and A (rank, in), without the scale; a convolution's kernel counts as inputs."""
        return self.up.reshape(self.up.shape[0], -1), self.down.reshape(self.rank, -1)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Return (B, A) with the scale in B, so that the update is their product, in float64 where there is that."""
        wide = torch.float32 if self.up.device.type == "mps" else torch.float64
        up, down = (matrix.to(wide) for matrix in self.matrices())
        return up * self.scaling, down

    def like(self, up: Tensor, down: Tensor) -> Self:
        """Return a pair of scale one with the matrices B (out, rank) and A (rank, in), in the shapes and dtype of this one."""
        return replace(
            self,
            down=down.reshape(-1, *self.down.shape[1:]).to(self.down.dtype).contiguous(),
            up=up.reshape(*up.shape, *[1] * (self.up.dim() - 2)).to(self.up.dtype).contiguous(),
            scaling=1.0,
        )


@dataclass(frozen=True)
class Updates:
    """All low-rank updates of one adapter."""

    pairs: Mapping[str, Mapping[str, Pair]]
    """Module path to what stands before the names of a pair there in a file, with the name of A, to the pair."""
    origin: str
    """Where they come from, for messages."""
    tied: frozenset[str] = frozenset()
    """The places that share a weight and one update; only one place of each weight has a pair."""

    @property
    def labelled(self) -> dict[str, Pair]:
        """The pairs by the path of the weight they change: mostly that of a module."""
        return {_label(path, key): pair for path, here in self.pairs.items() for key, pair in here.items()}

    @property
    def largest_rank(self) -> int:
        """The largest rank of all pairs."""
        return max(pair.rank for here in self.pairs.values() for pair in here.values())


def _label(path: str, key: str) -> str:
    name = next(name for name in PAIR_NAMES if key.endswith(name))
    inner = key.removesuffix(name).replace("base_layer.", "").rstrip(".")
    return f"{path}.{inner}" if inner else path


def updates_in(model: nn.Module, name: str, *, without_saved: bool = False) -> Updates:
    """Return the updates of the adapter ``name`` in ``model``; places that follow another's tensors are left out.

    Args:
        model: the adapted model.
        name: the adapter.
        without_saved: leave its ``modules_to_save`` out, and do not refuse them.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        ConfigError: the adapter is something else than low-rank updates, has values that are not finite, or is sharded.
    """
    injection, what = record(model, name), f"adapter {name!r}"
    if injection.method.exact_packed_base:
        raise ConfigError(
            f"{what} is a {injection.method.name!r} adapter, whose update is over packed weights of its own and no LoRA"
        )
    pairs: dict[str, dict[str, Pair]] = {}
    tied = set()
    for path, adapter in adapters_named(model, name).items():
        if isinstance(adapter, SavedParameters) and without_saved:
            continue
        if has_shards(adapter):
            raise ConfigError(
                f"{what} is sharded over processes at {path!r}, and none holds it whole; read it from the folder that AdapterCheckpoint writes, or in "
                "all processes inside whole_adapters() of lightning_peft.sharded_tensors"
            )
        if isinstance(adapter, SavedParameters):
            raise ConfigError(f"{what} trains {path!r} in full (modules_to_save), which is no low-rank update")
        if isinstance(adapter, LowRankExperts):
            raise ConfigError(
                f"{what} adapts the fused experts at {path!r}; pairs of several experts are not taken apart"
            )
        if adapter.tied_parameters:
            tied.add(path)
        if adapter.tied_parameters and next(adapter.parameters(), None) is None:
            continue  # it acts with the tensors of another place
        held = bool(getattr(adapter, "transposed", False))
        found, rest = paired(adapter.export_state(), getattr(adapter, "scaling", 1.0), held)
        if isinstance(adapter, BiasAdapter) or any(key.endswith("bias") for key in rest):
            raise ConfigError(f"{what} trains the bias of {path!r} too, which is no low-rank update; {_ADVICE}")
        if rest or not found or not isinstance(adapter, LowRankAdapter):
            raise ConfigError(
                f"{what} is a {injection.method.name!r} adapter, which at {path!r} is not one low-rank product but {sorted(rest) or 'nothing'}; "
                + _ADVICE
            )
        for pair in found.values():
            if not (torch.isfinite(pair.down).all() and torch.isfinite(pair.up).all()):
                raise ConfigError(f"{what} has values at {path!r} that are not finite: its training has diverged")
        pairs[path] = found
    return Updates(pairs=pairs, origin=what, tied=frozenset(tied))


_ADVICE = "convert it with to_lora(model, name, rank=...), or combine with method='task_arithmetic'"


def paired(state: Mapping[str, Tensor], scaling: float, transposed: bool) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Return the pairs among the tensors of one place by the name of A there, and the tensors that are left."""
    rest, found = dict(state), {}
    for key in state:
        name = next((name for name in PAIR_NAMES if key == name or key.endswith(f".{name}")), None)
        partner = key.removesuffix(name) + PAIR_NAMES[name] if name else ""
        if partner in state:
            found[key] = Pair(rest.pop(key), rest.pop(partner), scaling, transposed or key == "lora_embedding_A")
    return found, rest

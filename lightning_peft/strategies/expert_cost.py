"""What experts on different processes would move, beside experts that FSDP2 shards.

Expert parallelism keeps each expert whole on one process of a group and sends tokens to it, in place of sending experts to all tokens::

    FSDP2              experts  ──▶  every process, for forward and again for backward; their gradients back
    expert parallelism tokens   ──▶  the experts that the router chose, their outputs back; in backward the same with gradients

The first costs the bytes of all experts of a layer, however few the tokens. The second costs four vectors for each token and expert chosen,
however large the experts. So it pays where a step has few tokens for each process, or many experts.

References:
    Lepikhin et al., "GShard", arXiv:2006.16668; Fedus et al., "Switch Transformers", arXiv:2101.03961.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_peft.errors import ConfigError
from lightning_peft.strategies.cost import Tensors, check_counts, step_cost


@dataclass(frozen=True, kw_only=True)
class ExpertCost:
    """Of the experts of a model in one training step, for one process; bytes."""

    exchanged_bytes: float
    """Sent with tokens, under expert parallelism."""
    averaged_bytes: float
    """Sent so that copies of an expert in different groups average their gradients, under expert parallelism."""
    sharded_bytes: float
    """Sent if FSDP2 shards the experts over as many processes instead, and replicates them over the others."""
    held_bytes: float
    """Of experts, their gradients and AdamW's state in float32, either way."""
    working_bytes: float
    """Of experts that FSDP2 holds whole for a moment beside that, those of two layers, and expert parallelism does not."""
    tokens_where_equal: float
    """Tokens for each process and step below which expert parallelism sends less."""

    @property
    def sent_bytes(self) -> float:
        """All that is sent under expert parallelism."""
        return self.exchanged_bytes + self.averaged_bytes


def expert_cost(
    *,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    layers: int,
    tokens: int,
    processes: int,
    group: int,
    matrices: int = 3,
    token_bytes: float = 2.0,
    weight_bytes: float = 2.0,
    gradient_bytes: float = 4.0,
) -> ExpertCost:
    """Return what experts cost each process in a step, with routers that spread tokens evenly.

    Args:
        hidden: width of the model.
        intermediate: width of an expert.
        experts: of each layer, all of them trained.
        top_k: experts for each token.
        layers: that have experts.
        tokens: for each process and step.
        processes: in all.
        group: how many processes share the experts of a layer; divides ``processes`` and ``experts``.
        matrices: of an expert, (hidden, intermediate) each; 3 for a gated MLP.
        token_bytes: of an element of a token that is sent.
        weight_bytes: of an element of an expert.
        gradient_bytes: of an element of its gradient when it is reduced.

    Raises:
        ConfigError: a number is not positive, ``top_k`` is more than ``experts``, or ``group`` does not divide what it should.

    Example:
        >>> cost = expert_cost(
        ...     hidden=4096, intermediate=14336, experts=8, top_k=2, layers=32, tokens=8192, processes=64, group=8
        ... )
        >>> f"{cost.sent_bytes / 1e9:.0f} GB, sharded {cost.sharded_bytes / 1e9:.0f} GB"
        '54 GB, sharded 355 GB'
    """
    check_counts(hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, layers=layers)
    check_counts(tokens=tokens, processes=processes, group=group, matrices=matrices)
    _check_shares(experts, top_k, processes, group)
    shape: dict[str, Any] = {"rows": experts, "columns": matrices * hidden * intermediate, "count": layers}
    stored = Tensors(**shape, bytes_per_element=weight_bytes, reduce_bytes=gradient_bytes, role="trained")
    copies = processes // group
    sharded = step_cost([stored], processes=processes, replicate=copies)
    averaged = 2 * (copies - 1) / copies * stored.reduced(1) / group
    # Vectors there and back, in forward and in backward.
    a_token = 4 * layers * top_k * (group - 1) / group * hidden * token_bytes
    return ExpertCost(
        exchanged_bytes=tokens * a_token,
        averaged_bytes=averaged,
        sharded_bytes=sharded.sent_bytes,
        held_bytes=sharded.memory_bytes - sharded.working_bytes,
        working_bytes=stored.gathered(group) / layers * min(2, layers) * (group > 1),
        tokens_where_equal=max(0.0, sharded.sent_bytes - averaged) / a_token if a_token else math.inf,
    )


def _check_shares(experts: int, top_k: int, processes: int, group: int) -> None:
    if top_k > experts:
        raise ConfigError(f"top_k={top_k} is more than the {experts} experts")
    if processes % group or experts % group:
        raise ConfigError(f"group={group} must divide the {processes} processes and the {experts} experts")

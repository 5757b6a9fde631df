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

from lightning_peft.errors import ConfigError
from lightning_peft.strategies.cost import check_counts


@dataclass(frozen=True, kw_only=True)
class ExpertCost:
    """Of the experts of a model in one training step, for one process; bytes."""

    exchanged_bytes: float
    """Sent with tokens, under expert parallelism."""
    averaged_bytes: float
    """Sent so that copies of an expert in different groups average their gradients, under expert parallelism."""
    sharded_bytes: float
    """Sent if FSDP2 shards the experts over all processes instead."""
    held_bytes: float
    """Of experts, their gradients and AdamW's state in float32, under expert parallelism."""
    sharded_held_bytes: float
    """The same if FSDP2 shards the experts over all processes."""
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
        group: how many processes share the experts of a layer under expert parallelism; divides ``processes`` and ``experts``.
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
    if top_k > experts:
        raise ConfigError(f"top_k={top_k} is more than the {experts} experts")
    if processes % group or experts % group:
        raise ConfigError(f"group={group} must divide the {processes} processes and the {experts} experts")
    elements = layers * experts * matrices * hidden * intermediate
    copies = processes // group
    averaged = 2 * (copies - 1) / copies * elements / group * gradient_bytes
    sharded = (processes - 1) / processes * elements * (2 * weight_bytes + gradient_bytes)
    # Vectors there and back, in forward and in backward.
    a_token = 4 * layers * top_k * (group - 1) / group * hidden * token_bytes
    return ExpertCost(
        exchanged_bytes=tokens * a_token,
        averaged_bytes=averaged,
        sharded_bytes=sharded,
        held_bytes=elements / group * (weight_bytes + gradient_bytes + 8),
        sharded_held_bytes=elements / processes * (weight_bytes + gradient_bytes + 8),
        tokens_where_equal=max(0.0, sharded - averaged) / a_token if a_token else math.inf,
    )

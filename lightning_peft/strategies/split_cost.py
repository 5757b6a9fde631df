"""What tensor parallelism sends in a training step, and when that is less than FSDP2 sends.

In each layer four sums of ``tokens x hidden`` go around the group: one behind attention and one behind feed-forward, and in backward one
before each; the first layer of a model with a frozen embedding needs no gradient of its input. The factors of adapters that each process
has whole sum their gradients as well. FSDP2 sends weights instead, whatever the tokens::

    tensor parallelism   4 L t h b · 2 (T - 1) / T        t tokens of a process and step, in L layers of width h, b bytes each
    FSDP2                2 W (N - 1) / N                  W bytes of weights

References:
    Shoeybi et al., "Megatron-LM", arXiv:1909.08053.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning_peft.strategies.cost import check_counts


def tensor_parallel_bytes(
    *,
    tokens: int,
    hidden: int,
    layers: int,
    tensor_parallel: int,
    activation_bytes: float = 2.0,
    whole_factors: Iterable[tuple[int, int]] = (),
    factor_bytes: float = 4.0,
    checkpointed: bool = False,
    batches: int = 1,
) -> float:
    """Return the bytes that each process of a tensor-parallel group sends to the others in a step.

    Args:
        tokens: in one batch of the group.
        hidden: width of the model.
        layers: with attention and feed-forward, both of them split.
        tensor_parallel: processes in the group.
        activation_bytes: of an element of what flows between layers.
        whole_factors: shapes of the trained factors that each process has whole: A of colwise layers, B of rowwise ones.
        factor_bytes: of an element of these.
        checkpointed: the forward of each layer runs again in backward, with the sum behind its attention; the one behind its
            feed-forward comes last, and is not waited for.
        batches: whose gradients are accumulated in a step.

    Raises:
        ConfigError: a number is not positive.

    Example:
        >>> f"{tensor_parallel_bytes(tokens=8192, hidden=4096, layers=32, tensor_parallel=8) / 1e9:.1f} GB"
        '14.9 GB'
    """
    check_counts(tokens=tokens, hidden=hidden, layers=layers, tensor_parallel=tensor_parallel, batches=batches)
    sums = 4 * layers - 1 + (layers if checkpointed else 0)
    gradients = sum(rows * columns for rows, columns in whole_factors) * factor_bytes
    around = 2 * (tensor_parallel - 1) / tensor_parallel
    return batches * around * (sums * tokens * hidden * activation_bytes + gradients)

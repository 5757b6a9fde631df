"""What a training step of an adapted model moves between processes, what each process holds, and how long the moving takes.

Plain arithmetic: no process is started and torch is not needed. With N processes, W the bytes of all weights in the dtype in which they are
gathered, G the bytes of the gradients of what is trained, and rings, in which a process sends what it receives::

    strategy                                sent by each process in a step
    peft_ddp                                2 G (N - 1) / N
    peft_fsdp                               (2 W + G) (N - 1) / N
    peft_fsdp, reshard_after_forward=False  (W + G) (N - 1) / N
    peft_fsdp, replicate=R, S = N / R       (2 W + G) (S - 1) / S  +  2 G / S (R - 1) / R

A frozen base has no gradients, so G is that of adapters alone. A tensor is cut by its rows, and padded to a multiple of the processes that
share it; where that adds more than an eighth and another dimension is such a multiple, by that one. Where none is, a matrix of 16 rows
takes part with the bytes of 1,000 rows among 1,000 processes.

References:
    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009; Zhao et al., "PyTorch FSDP",
    arXiv:2304.11277; Rajbhandari et al., "ZeRO", arXiv:1910.02054.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_peft.errors import ConfigError

DDP_BUCKET = 25 * 2**20
"""Bytes of gradients that DDP reduces in one go."""


def cut_dimension(shape: Sequence[int], processes: int) -> int:
    """Return the dimension along which ``processes`` share a tensor of that shape under ``peft_fsdp``.

    It is the first, which FSDP2 pads, or the largest that needs no padding, if padding would add more than an eighth.

    Example:
        >>> cut_dimension((4096, 4096), 16), cut_dimension((8, 4096), 16), cut_dimension((8, 4096), 1000)
        (0, 1, 0)
    """
    rows = shape[0] if shape else 1
    if math.ceil(rows / processes) * processes * 8 <= rows * 9:
        return 0
    even = [dim for dim, size in enumerate(shape) if dim and size and size % processes == 0]
    return max(even, key=lambda dim: shape[dim], default=0)


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Tensors of a model that are alike, ``count`` of them."""

    rows: int
    """The first dimension."""
    columns: int = 1
    """The product of the other dimensions."""
    others: tuple[int, ...] = ()
    """The other dimensions one by one, if there are several."""
    count: int = 1
    bytes_per_element: float = 2.0
    """As stored."""
    gather_bytes: float | None = None
    """Bytes of an element when it is gathered; as stored if None."""
    reduce_bytes: float | None = None
    """Bytes of an element of its gradient when it is reduced; as stored if None."""
    role: Literal["frozen", "trained", "buffer", "constant"] = "frozen"
    """A buffer is whole in each process and sent out in each step; a constant, such as the scales of a packed weight, only whole."""
    unit: int | None = None
    """Which unit of FSDP2 it belongs to; None for the one around all others: embeddings, head, last norm."""

    def elements(self, processes: int = 1) -> int:
        """Return the elements of all ``count`` tensors, padded to what ``processes`` share equally."""
        if cut_dimension((self.rows, *(self.others or (self.columns,))), processes):
            return self.count * self.rows * self.columns
        return self.count * math.ceil(self.rows / processes) * processes * self.columns

    def stored(self, processes: int = 1) -> float:
        """Return the bytes that one of ``processes`` holds of all ``count`` tensors."""
        return self.elements(processes) / processes * self.bytes_per_element

    def gathered(self, processes: int) -> float:
        """Return the bytes of all ``count`` tensors when ``processes`` gather them."""
        return self.elements(processes) * (self.bytes_per_element if self.gather_bytes is None else self.gather_bytes)

    def reduced(self, processes: int) -> float:
        """Return the bytes of the gradients of all ``count`` tensors when ``processes`` reduce and scatter them."""
        return self.elements(processes) * (self.bytes_per_element if self.reduce_bytes is None else self.reduce_bytes)


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bandwidths in bytes a second and one way, latencies in seconds. The defaults are nominal values of a node of eight H100, not measurements."""

    inside: float = 450e9
    """What a process sends to others of its node (NVLink 4)."""
    node: float = 400e9
    """What all processes of a node together send to other nodes (eight adapters of 400 Gbit/s)."""
    inside_latency: float = 3.4e-6
    """Of one hop of a ring within a node."""
    node_latency: float = 14e-6
    """Of one hop of a ring between nodes."""

    def __post_init__(self) -> None:
        for name in ("inside", "node"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"Links {name} must be a positive number of bytes a second, got {getattr(self, name)!r}"
                )
        for name in ("inside_latency", "node_latency"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"Links {name} must be a number of seconds from 0, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one training step, for one process; bytes and seconds."""

    gathered_bytes: float = 0.0
    """Sent so that weights are whole where they are used."""
    reduced_bytes: float = 0.0
    """Sent so that gradients are averaged."""
    broadcast_bytes: float = 0.0
    """Sent so that buffers agree."""
    collectives: int = 0
    """How often processes wait for each other."""
    seconds: float = 0.0
    """All collectives one after the other, none of them hidden behind computation."""
    weight_bytes: float = 0.0
    """Held for the whole of training, the trained weights included."""
    working_bytes: float = 0.0
    """Weights that are whole for a moment under FSDP2, at most; under DDP, buckets of gradients."""
    gradient_bytes: float = 0.0
    optimizer_bytes: float = 0.0

    @property
    def sent_bytes(self) -> float:
        """All that a process sends in a step."""
        return self.gathered_bytes + self.reduced_bytes + self.broadcast_bytes

    @property
    def memory_bytes(self) -> float:
        """All but activations."""
        return self.weight_bytes + self.working_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class _Group:
    """Processes that take part in a collective: ``size`` of them, every ``stride``-th one."""

    size: int
    stride: int
    per_node: int
    links: Links

    def seconds(self, sent: float, turns: int) -> float:
        """Return the time of rings that together turn ``turns`` times, and in which each process sends ``sent`` bytes."""
        if self.size == 1 or not sent:
            return 0.0
        together = min(self.size, max(1, self.per_node // self.stride))
        between = math.ceil(self.size / together) - 1
        rate = self.links.inside if together > 1 else math.inf
        if between:  # groups that lie side by side share what leaves the node
            rate = min(rate, self.links.node / min(self.stride, self.per_node))
        hops = between * self.links.node_latency + (self.size - 1 - between) * self.links.inside_latency
        return sent / rate + turns * hops

    def part(self) -> float:
        """Return which part of the bytes each process sends on in one turn."""
        return (self.size - 1) / self.size


def step_cost(
    tensors: Iterable[Tensors],
    *,
    processes: int,
    per_node: int = 8,
    strategy: Literal["peft_ddp", "peft_fsdp"] = "peft_fsdp",
    reshard_after_forward: bool = True,
    replicate: int = 1,
    prefetch: int = 0,
    optimizer_bytes: float = 8.0,
    links: Links | None = None,
) -> Cost:
    """Return what a step of a model with these tensors costs each process.

    Args:
        tensors: as from :func:`tensors_of`.
        processes: in all.
        per_node: how many of them share a host.
        strategy: as registered with Lightning.
        reshard_after_forward: as for ``peft_fsdp``.
        replicate: as for ``peft_fsdp``.
        prefetch: as for ``peft_fsdp``.
        optimizer_bytes: of the optimizer's state, for each trained element; 8 for AdamW in float32.
        links: between the processes.

    Raises:
        ConfigError: a number is not positive, ``replicate`` does not divide ``processes``, or the strategy is not one of the two.
    """
    check_counts(processes=processes, per_node=per_node, replicate=replicate)
    if strategy not in ("peft_ddp", "peft_fsdp"):
        raise ConfigError(f"strategy must be 'peft_ddp' or 'peft_fsdp', got {strategy!r}")
    if processes % replicate:
        raise ConfigError(f"replicate={replicate} does not divide the {processes} processes")
    held, links = list(tensors), links or Links()
    if strategy == "peft_ddp":
        cost = _replicated(held, _Group(processes, 1, per_node, links))
    else:
        shared = processes // replicate
        groups = _Group(shared, 1, per_node, links), _Group(replicate, shared, per_node, links)
        ahead = max(1, prefetch)  # FSDP2 by itself gathers the next unit while one runs
        cost = _sharded(held, *groups, passes=2 if reshard_after_forward else 1, together=1 + ahead)
    sharing = 1 if strategy == "peft_ddp" else processes // replicate
    buffers = sum(one.stored() for one in held if one.role == "buffer") * (processes > 1)
    trained = [one for one in held if one.role == "trained"]
    return replace(
        cost,
        broadcast_bytes=buffers,
        collectives=cost.collectives + bool(buffers),
        seconds=cost.seconds + _Group(processes, 1, per_node, links).seconds(buffers, 1),
        weight_bytes=sum(one.stored(sharing if one.role in ("frozen", "trained") else 1) for one in held),
        gradient_bytes=sum(one.stored(sharing) for one in trained),
        optimizer_bytes=sum(one.elements(sharing) / sharing for one in trained) * optimizer_bytes,
    )


def _replicated(held: list[Tensors], group: _Group) -> Cost:
    """Return what DDP sends: gradients in buckets, which it also keeps."""
    gradients = sum(one.reduced(1) for one in held if one.role == "trained")
    if group.size == 1:
        return Cost()
    buckets, sent = math.ceil(gradients / DDP_BUCKET), 2 * gradients * group.part()
    return Cost(
        reduced_bytes=sent,
        collectives=buckets,
        seconds=group.seconds(sent, 2 * buckets),
        working_bytes=gradients,
    )


def _sharded(held: list[Tensors], shard: _Group, replicas: _Group, passes: int, together: int) -> Cost:
    """Return what FSDP2 sends: weights for each pass, gradients to their owners, and from there to the other replicas."""
    weights: dict[int | None, float] = {}
    gradients: dict[int | None, float] = {}
    for one in held:
        if one.role in ("frozen", "trained"):
            weights[one.unit] = weights.get(one.unit, 0.0) + one.gathered(shard.size)
        if one.role == "trained":
            gradients[one.unit] = gradients.get(one.unit, 0.0) + one.reduced(shard.size)
    gathered = passes * sum(weights.values()) * shard.part()
    scattered = sum(gradients.values()) * shard.part()
    averaged = 2 * sum(gradients.values()) / shard.size * replicas.part()
    gathers, reductions = passes * len(weights) * (shard.size > 1), len(gradients)
    outer = weights.pop(None, 0.0)
    inner = sum(sorted(weights.values())[-together:] if passes == 2 else weights.values())
    return Cost(
        gathered_bytes=gathered,
        reduced_bytes=scattered + averaged,
        collectives=gathers + reductions * ((shard.size > 1) + (replicas.size > 1)),
        seconds=shard.seconds(gathered, gathers)
        + shard.seconds(scattered, reductions)
        + replicas.seconds(averaged, 2 * reductions),
        working_bytes=(outer + inner) if shard.size > 1 else 0.0,
    )


def communication_cost(
    *,
    parameters: int,
    trained: int,
    bytes_per_parameter: float = 2.0,
    trained_bytes: float = 4.0,
    rank: int | None = None,
    units: int = 32,
    processes: int,
    per_node: int = 8,
    strategy: Literal["peft_ddp", "peft_fsdp"] = "peft_fsdp",
    **options: Any,
) -> Cost:
    """Return what a step costs each process, from the size of a model alone.

    Args:
        parameters: elements of the frozen base.
        trained: elements of what is trained, beside it.
        bytes_per_parameter: of the base as it is stored and gathered; 2 for bfloat16, 0.5 for NF4.
        trained_bytes: of a trained element.
        rank: rows of the trained matrices, which are padded where the number of processes divides neither them nor their width; hardly any
            padding if None.
        units: blocks of the model, over which everything is spread evenly.
        processes: in all.
        per_node: how many of them share a host.
        strategy: as registered with Lightning.
        options: further arguments of :func:`step_cost`.

    Raises:
        ConfigError: as for :func:`step_cost`, or ``rank`` does not divide ``trained``.

    Example:
        >>> cost = communication_cost(parameters=8_000_000_000, trained=40_000_000, processes=8, strategy="peft_ddp")
        >>> f"{cost.sent_bytes / 1e6:.0f} MB"
        '280 MB'
    """
    check_counts(parameters=parameters, trained=trained, units=units, processes=processes)
    if rank is not None and (rank < 1 or trained % rank):
        raise ConfigError(f"rank={rank} is not a positive number that divides the {trained} trained elements")
    tensors = []
    for unit, (base, columns) in enumerate(
        zip(_split(parameters, units), _split(trained // (rank or 1), units), strict=True)
    ):
        rows, columns = (columns, 1) if rank is None else (rank, columns)
        tensors.append(Tensors(rows=base, bytes_per_element=bytes_per_parameter, unit=unit))
        tensors.append(Tensors(rows=rows, columns=columns, bytes_per_element=trained_bytes, role="trained", unit=unit))
    return step_cost(tensors, processes=processes, per_node=per_node, strategy=strategy, **options)


def _split(number: int, parts: int) -> list[int]:
    return [number * (part + 1) // parts - number * part // parts for part in range(parts)]


def check_counts(**counts: int) -> None:
    """Refuse what is not a whole number from 1.

    Raises:
        ConfigError: one is not; the message has its name.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number from 1, got {value!r}")


def tensors_of(model: Any, *, gather_bytes: float | None = None, reduce_bytes: float | None = None) -> list[Tensors]:
    """Return the tensors of a model, adapted or not, with the units that ``peft_fsdp`` shards it in. The meta device will do.

    Args:
        model: an ``nn.Module``; what requires gradients counts as trained.
        gather_bytes: of an element of a floating-point weight when it is gathered, as ``gather_dtype`` has it; as stored if None.
        reduce_bytes: of an element of a gradient when it is reduced, as ``reduce_dtype`` has it; as stored if None.
    """
    from lightning_peft.strategies.buffers import moving_buffers
    from lightning_peft.strategies.sharding import blocks_of

    owner: dict[int, int] = {}
    for unit, block in enumerate(blocks_of(model).values()):
        for tensor in block.parameters():
            owner.setdefault(id(tensor), unit)
    found = []
    for tensor in model.parameters():
        own = {"unit": owner.get(id(tensor)), "gather_bytes": gather_bytes if tensor.is_floating_point() else None}
        role: Literal["frozen", "trained"] = "trained" if tensor.requires_grad else "frozen"
        found.append(_described(tensor, role=role, reduce_bytes=reduce_bytes, **own))
        packing = getattr(tensor, "quant_state", None)
        for state in (packing, getattr(packing, "state2", None)):
            scales = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
            found += [_described(scale, role="constant") for scale in scales if scale is not None]
    moving = set(map(id, moving_buffers(model)))
    return found + [_described(one, role="buffer" if id(one) in moving else "constant") for one in model.buffers()]


def _described(tensor: Any, **more: Any) -> Tensors:
    rows = tensor.shape[0] if tensor.dim() else 1
    columns = tensor.numel() // max(1, rows)
    others = tuple(tensor.shape[1:]) if tensor.dim() > 2 else ()
    return Tensors(rows=rows, columns=columns, others=others, bytes_per_element=tensor.element_size(), **more)

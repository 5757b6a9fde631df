"""EVA: LoRA that starts from what its inputs vary in most, with ranks where there is most to explain.

Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", 2024 (arXiv:2410.07170)::

    X = inputs of a layer over training batches, less their mean (tokens, in) = U S V^T

    y = W x + s B A x        A starts at V_r^T, the r principal directions; B at zero, so that a fresh adapter changes nothing
    r: the directions of all places compete by the share S_i^2 / |X|^2 of the variance they explain, r <= rho * rank

X is never held. Batches go one by one into a decomposition that keeps a fixed number of directions, as in Ross et al.,
"Incremental Learning for Robust Visual Tracking", 2008: memory (directions, in) a place, where the covariance would take (in, in).
Twice as many are kept as are asked for, and 128 at least, so what is cut off at each batch hardly reaches the ones that count;
a layer of no more inputs than that loses nothing. Layers that read the same tensor share one decomposition.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.arithmetic.initial_pairs import principal_directions
from lightning_peft.arithmetic.low_rank import LowRankAdapter, LowRankLinear
from lightning_peft.errors import ConfigError, LightningPEFTWarning
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.plugins.lora import LoRA
from lightning_peft.targets import is_conv1d_linear

_KEPT = 128
"""Directions that are kept at least while batches come in."""
_EXACT = 512
"""A full decomposition up to this many rows or columns; beyond, a randomised one of the directions that are kept."""
_IGNORED = -100
"""The label of a token that has no part in the loss."""


@dataclass(frozen=True, kw_only=True)
class EVA(LoRA):
    """LoRA on linear layers whose A starts at the principal directions of the inputs, and whose ranks follow their variance.

    Example:
        >>> import torch
        >>> from lightning_peft import initialize_from_data, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = inject(model, EVA(rank=1), "0")
        >>> x = torch.randn(64, 4) * torch.tensor([1.0, 9.0, 1.0, 1.0])
        >>> initialize_from_data(model, [x], lambda batch: model(batch).sum())
        >>> int(model[0].adapters["default"].lora_A.abs().argmax())
        1
    """

    name: ClassVar[str] = "eva"
    ties: ClassVar[bool] = False
    data_driven: ClassVar[bool] = True

    rho: float = 2.0
    """The largest rank of a place is rho times its own; 1 leaves ranks as they are."""
    tau: float = 0.99
    """A direction is found when the cosine between it and that of the batch before is at least so much."""
    batches: int = 64
    """Training batches to take at most, where directions are not found before."""
    whiten: bool = False
    """Divide each direction by the square root of its singular value."""
    label_mask: bool = True
    """Leave out tokens whose label is -100, besides those that ``attention_mask`` hides."""
    adjust_scaling_factors: bool = True
    """Let alpha follow the rank, so that the scale alpha / rank of the update stays as it is where the rank changes."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for label, value in (("rho", self.rho), ("tau", self.tau)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise ConfigError(f"EVA {label} must be a finite number, got {value!r}")
        if self.rho < 1:
            raise ConfigError(f"EVA rho must be 1 or more, got {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"EVA tau must lie in [0, 1], got {self.tau!r}")
        if not isinstance(self.batches, int) or isinstance(self.batches, bool) or self.batches < 1:
            raise ConfigError(f"EVA batches must be a positive integer, got {self.batches!r}")

    @override
    def supports(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_conv1d_linear(module)

    @override
    def linear_adapter(self, module: nn.Module, target: Target) -> LowRankAdapter:
        return ExplainedVarianceLinear(self, module, target)

    def scaling_at(self, rank: int) -> float:
        """Return the factor s of the update at a place that got ``rank``."""
        if self.adjust_scaling_factors:
            return self.scaling * (math.sqrt(rank / self.rank) if self.rslora else 1.0)
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    @override
    @torch.no_grad()
    def initialize(
        self, model: nn.Module, adapters: Mapping[str, Adapter], batches: Iterable[Any], loss: Callable[[Any], Tensor]
    ) -> None:
        places = {path: a for path, a in adapters.items() if isinstance(a, ExplainedVarianceLinear)}
        inputs = LayerInputs(model, places)
        for batch in islice(batches, self.batches):
            unfinished = inputs.unfinished(self.tau)
            if not unfinished:
                break
            with inputs.watched(unfinished, _masks(batch, labels=self.label_mask)):
                loss(batch)
        inputs.gather()
        for path, rank in inputs.ranks().items():
            places[path].start(inputs.components(path).directions(rank, whiten=self.whiten))
        unseen = sorted(places.keys() - inputs.ranks().keys())
        if unseen:
            warnings.warn(
                f"EVA saw no inputs that vary at {len(unseen)} of {len(places)} places, such as {unseen[0]!r}; they start as LoRA does",
                LightningPEFTWarning,
                stacklevel=2,
            )


class ExplainedVarianceLinear(LowRankLinear):
    """A low-rank update of a linear layer whose rank and A come from data. Slices of a fused projection start with equal A.

    Args:
        method: the method as it is at this place.
        module: the layer to adapt.
        target: where it stands.
    """

    def __init__(self, method: EVA, module: nn.Module, target: Target) -> None:
        super().__init__(method.settings, module, target.slices)
        self.method = method
        self.budget = self.rank
        self.largest_rank = min(round(method.rho * self.rank), self.lora_A.shape[1])

    @torch.no_grad()
    def start(self, down: Tensor) -> None:
        """Take the rank of ``down`` (rank, in) and start A there, B at zero."""
        self._resize(len(down))
        self.lora_A.copy_(down.repeat(self.file_rank // self.rank, 1))
        self.lora_B.zero_()

    def _resize(self, rank: int) -> None:
        self.rank, self.file_rank = rank, rank * max(1, len(self.slices))
        self.scaling = self.method.scaling_at(rank)
        for name, rows in (("lora_A", self.file_rank), ("lora_B", self.rank)):
            old: nn.Parameter = getattr(self, name)
            setattr(self, name, nn.Parameter(old.new_empty(rows, old.shape[1]), requires_grad=old.requires_grad))

    @override
    def fit_to(self, shapes: Mapping[str, Sequence[int]]) -> None:
        down = tuple(shapes.get("lora_A.weight", shapes.get("lora_A", ())))
        rows = down[0] if down else 0
        rank, rest = divmod(rows, max(1, len(self.slices)))
        if rest or not 1 <= rank <= max(self.budget, self.largest_rank) or rank == self.rank:
            return
        if "lora_A.weight" in shapes:
            fits = tuple(shapes.get("lora_B.weight", ())) == (self.out_features, rows)
        else:
            fits = tuple(shapes.get("lora_B", ())) == (rank, self.lora_B.shape[1])
        if fits and down == (rows, self.lora_A.shape[1]):
            self._resize(rank)


class LayerInputs:
    """The principal components of what goes into layers, and the ranks that follow from them.

    Args:
        model: the adapted model.
        places: the adapters by module path.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, ExplainedVarianceLinear]) -> None:
        self.layers = adapter_layers(model)
        self.places = places
        self.wanted = max((adapter.largest_rank for adapter in places.values()), default=1)
        self.found: dict[str, PrincipalComponents] = {}
        self.first: dict[str, str] = {}
        """Place to the first place that reads the same tensor."""
        self._last: tuple[str, Tensor] | None = None

    def components(self, path: str) -> PrincipalComponents:
        """Return the components of the inputs at a place."""
        return self.found[self.first[path]]

    def unfinished(self, tau: float) -> list[str]:
        """Return the places to watch: those not seen yet, and those whose directions still move."""
        ranks = self.ranks()
        needed: dict[str, int] = {}
        for path, rank in ranks.items():
            needed[self.first[path]] = max(rank, needed.get(self.first[path], 0))
        moving = {path for path, rank in needed.items() if not self.found[path].converged(rank, tau)}
        return [path for path in self.places if path not in ranks or path in moving]

    @contextlib.contextmanager
    def watched(self, paths: Iterable[str], masks: Mapping[tuple[int, ...], Tensor]) -> Iterator[None]:
        """Take up what goes into the layers at ``paths``, for the time of a ``with`` block."""

        def watch(path: str) -> Callable[..., None]:
            def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._take(path, args[0] if args else next(iter(kwargs.values())), masks)

            return take

        handles = [self.layers[path].register_forward_pre_hook(watch(path), with_kwargs=True) for path in paths]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _take(self, path: str, x: Tensor, masks: Mapping[tuple[int, ...], Tensor]) -> None:
        if path not in self.first:
            # Query, key and value are called one after the other with the same tensor; only that one is held.
            self.first[path] = self._last[0] if self._last is not None and self._last[1] is x else path
        self._last = (self.first[path], x)
        if self.first[path] == path:
            self.found.setdefault(path, PrincipalComponents(self.wanted)).update(_rows(x, masks))

    def ranks(self) -> dict[str, int]:
        """Return the rank of every place where inputs were seen: one for each, the rest of the budget by explained variance."""
        limits = {
            path: min(adapter.largest_rank, len(self.components(path).values))
            for path, adapter in self.places.items()
            if path in self.first
        }
        ranks = {path: 1 for path, limit in limits.items() if limit}
        shares = [
            (share, path) for path in ranks for share in self.components(path).explained()[1 : limits[path]].tolist()
        ]
        shares.sort(key=lambda pair: -pair[0])  # stable: of equals, the first place comes first
        budget = sum(self.places[path].budget for path in ranks) - len(ranks)
        for _, path in shares[:budget]:
            ranks[path] += 1
        return ranks

    def gather(self) -> None:
        """In a distributed run, join what all processes have seen: every one has the same components then."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.first)
        self.first = {path: first for seen in reversed(everyone) for path, first in seen.items()}
        for path in sorted(set(self.first.values())):
            own = self.found.get(path)
            dist.all_gather_object(everyone, None if own is None else own.state())
            joined = PrincipalComponents(self.wanted)
            for state in everyone:
                if state is not None:
                    count, total, mean, rows = state
                    device = self.places[path].lora_A.device
                    joined.join(count, total, mean.to(device), rows.to(device))
            self.found[path] = joined


class PrincipalComponents:
    """The mean, the variance and the principal directions of rows that come in batches.

    Args:
        wanted: how many directions are asked for.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted, self.kept = wanted, max(2 * wanted, _KEPT)
        self.count, self.total = 0, 0.0
        self.mean = torch.empty(0)
        self.values = torch.empty(0)
        """Singular values of the rows less their mean, the largest first; those that are zero are left out."""
        self.vectors = torch.empty(0)
        """The directions (values, in) they belong to, of length one."""
        self.cosines = torch.empty(0)
        """Cosine of each direction with that before the last batch."""

    def update(self, rows: Tensor) -> None:
        """Take in ``rows`` (n, in)."""
        if len(rows):
            rows = rows.float()
            mean = rows.mean(0)
            centred = rows - mean
            self.join(len(rows), float(centred.square().sum()), mean, centred)

    def state(self) -> tuple[int, float, Tensor, Tensor]:
        """Return what :meth:`join` of another one takes, on the CPU."""
        return self.count, self.total, self.mean.cpu(), (self.values[:, None] * self.vectors).cpu()

    def join(self, count: int, total: float, mean: Tensor, centred: Tensor) -> None:
        """Take in ``count`` rows.

        Args:
            count: how many rows.
            total: the sum of their squared distances from their mean.
            mean: their mean (in,).
            centred: the rows less their mean (any number, in), or another matrix with the same product ``X^T X``.
        """
        if not count:
            return
        if self.count:
            # The means of both sides differ; this one row makes up for it (Ross et al. 2008, lemma 1).
            shift = (self.mean - mean) * math.sqrt(self.count * count / (self.count + count))
            total += self.total + float(shift.square().sum())
            mean = (self.mean * self.count + mean * count) / (self.count + count)
            centred = torch.cat([self.values[:, None] * self.vectors, centred, shift[None]])
        self.count, self.total, self.mean = self.count + count, total, mean
        iterations = None if min(centred.shape) <= max(_EXACT, self.kept) else 4
        _, values, vectors = principal_directions(centred, self.kept, iterations=iterations)
        there = values > values[:1] * max(centred.shape) * torch.finfo(values.dtype).eps
        values, vectors = values[there], vectors[there]
        both = min(len(self.vectors), len(vectors))
        self.cosines = (self.vectors[:both] * vectors[:both]).sum(1).abs() if both else self.cosines
        self.values, self.vectors = values, vectors

    def converged(self, rank: int, tau: float) -> bool:
        """Tell whether the last batch left the first ``rank`` directions as they were, up to a cosine of ``tau``."""
        return len(self.cosines) >= rank and bool((self.cosines[:rank] >= tau).all())

    def explained(self) -> Tensor:
        """Return the share of the variance that each direction explains."""
        return self.values.square() / self.total if self.total else self.values

    def directions(self, rank: int, *, whiten: bool) -> Tensor:
        """Return the first directions (rank, in)."""
        vectors = self.vectors[:rank]
        return vectors / self.values[:rank, None].sqrt() if whiten else vectors


def _masks(batch: Any, *, labels: bool) -> dict[tuple[int, ...], Tensor]:
    """Return which positions of a batch count, by shape: an encoder and a decoder may differ in theirs."""
    masks: dict[tuple[int, ...], Tensor] = {}
    for key in ("attention_mask", "labels") if isinstance(batch, Mapping) else ():
        value = batch.get(key)
        if isinstance(value, Tensor) and (labels or key != "labels"):
            mask = value != (_IGNORED if key == "labels" else 0)
            shape = tuple(mask.shape)
            masks[shape] = masks[shape] & mask if shape in masks else mask
    return masks


def _rows(x: Tensor, masks: Mapping[tuple[int, ...], Tensor]) -> Tensor:
    """Return the positions of ``x`` (..., in) that count, (n, in)."""
    rows = x.detach().reshape(-1, x.shape[-1])
    mask = masks.get(tuple(x.shape[:-1]))
    if mask is None:  # some layers see (batch * seq, in)
        mask = next((held for held in masks.values() if x.dim() == 2 and held.numel() == len(rows)), None)
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device)]


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register EVA."""
    return [EVA]

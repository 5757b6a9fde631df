"""LoRA-GA: LoRA whose first step goes where that of full fine-tuning would.

Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024 (arXiv:2407.05000)::

    G = dL/dW, averaged over training batches, = U S V^T      A0 = c V_1..r^T      B0 = c U_r+1..2r      c = sqrt(sqrt(out) / gamma)

    y = W x + s (B A - B0 A0) x        A starts at A0, B at B0, s = alpha / rank

A step of gradient descent then moves the weight along ``G A0^T A0 + B0 B0^T G``, the best approximation of G of rank 2 r. The paper
trains B A over W - s B0 A0; that is the same function, and here the base stays as it is: see :mod:`lightning_peft.arithmetic.initial_pairs`.

G is never asked of the weight. It is the product of the gradient of a layer's output and of its input, both of which pass by in
backward, so the base stays frozen and may be quantised. With one batch each G is decomposed and dropped before the next layer is
reached; over several, sums wait in the memory of the CPU, and each is dropped in the last backward.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.arithmetic.initial_pairs import InitialPairLinear, principal_directions
from lightning_peft.arithmetic.low_rank import LowRankAdapter
from lightning_peft.errors import ConfigError, LightningPEFTWarning, TargetError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.plugins.lora import LoRA
from lightning_peft.quantized_layers import dense_weight
from lightning_peft.targets import is_conv1d_linear

_EXACT = 1024
"""A full decomposition up to this many rows or columns; beyond, a randomised one with four power iterations."""


@dataclass(frozen=True, kw_only=True)
class LoRAGA(LoRA):
    """LoRA on linear layers whose A and B start at singular vectors of the gradient of the weight.

    Example:
        >>> import torch
        >>> from lightning_peft import initialize_from_data, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> _ = inject(model, LoRAGA(rank=1), "0")
        >>> x = torch.randn(32, 16)
        >>> before = model(x)
        >>> initialize_from_data(model, [x], lambda batch: model(batch).square().mean())
        >>> bool(model[0].adapters["default"].lora_B.any()), torch.equal(model(x), before)
        (True, True)
    """

    name: ClassVar[str] = "lora_ga"
    ties: ClassVar[bool] = False
    data_driven: ClassVar[bool] = True
    init: ClassVar[Literal["kaiming"]] = "kaiming"  # type: ignore[misc]  # no field here: A and B come from the gradient

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    """Which of the first 2 rank singular vectors go where: A has the first half, B has, they alternate (B first), or at random."""
    scale: Literal["stable", "gd", "unit", "weight_svd"] = "stable"
    """Size of A and B: by the width of the output, by 1 / s, one, or by the singular values of the weight."""
    stable_gamma: float = 16.0
    """Divisor of ``stable``: larger values start with smaller A and B."""
    batches: int = 8
    """Training batches over which the gradient is averaged."""
    convention: Literal["paper", "hf_peft"] = "paper"
    """``hf_peft`` weighs the columns of B by the singular values of the gradient and scales B alone."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "direction": ("ArB2r", "A2rBr", "ArBr", "random"),
            "scale": ("stable", "gd", "unit", "weight_svd"),
            "convention": ("paper", "hf_peft"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"LoRAGA {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        gamma = self.stable_gamma
        if not isinstance(gamma, (int, float)) or isinstance(gamma, bool) or not (math.isfinite(gamma) and gamma > 0):
            raise ConfigError(f"LoRAGA stable_gamma must be a positive number, got {gamma!r}")
        if not isinstance(self.batches, int) or isinstance(self.batches, bool) or self.batches < 1:
            raise ConfigError(f"LoRAGA batches must be a positive integer, got {self.batches!r}")
        alphas = {"alpha": self.alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for label, alpha in alphas.items():
            if alpha <= 0:
                raise ConfigError(f"LoRAGA {label} must be positive, got {alpha!r}")

    @override
    def supports(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_conv1d_linear(module)

    @override
    def linear_adapter(self, module: nn.Module, target: Target) -> LowRankAdapter:
        return GradientLinear(self, module, target)

    @override
    def initialize(
        self, model: nn.Module, adapters: Mapping[str, Adapter], batches: Iterable[Any], loss: Callable[[Any], Tensor]
    ) -> None:
        places = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, GradientLinear)}
        gradients = WeightGradients(model, places)
        try:
            with torch.enable_grad():
                for batch, last in _with_last(islice(batches, self.batches)):
                    gradients.last, gradients.batches = last, gradients.batches + 1
                    loss(batch).backward()  # type: ignore[no-untyped-call]
        finally:
            gradients.stop()
        gradients.finish()
        unseen = sorted(places.keys() - gradients.started)
        if unseen:
            warnings.warn(
                f"LoRAGA saw no gradient at {len(unseen)} of {len(places)} places, such as {unseen[0]!r}; they start as LoRA does",
                LightningPEFTWarning,
                stacklevel=2,
            )


class GradientLinear(InitialPairLinear):
    """An update that starts from the singular vectors of the gradient of the weight; before there is one, as LoRA.

    Args:
        method: the method as it is at this place.
        module: the layer to adapt.
        target: where it stands.

    Raises:
        TargetError: the weight has fewer singular vectors than twice the rank.
    """

    def __init__(self, method: LoRAGA, module: nn.Module, target: Target) -> None:
        super().__init__(method.settings, module, target)
        self.method = method
        limit = min(self.lora_A.shape[1], self.out_features, *(part.features for part in target.slices))
        if 2 * self.pair_rank > limit:
            raise TargetError(
                f"rank {self.pair_rank} was asked for at {target.path!r}, whose gradient has {limit} singular vectors at most; LoRAGA "
                "takes two for each rank: lower the rank, or give this place one of its own in rank_pattern"
            )

    @override
    def pair(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        A = weight.new_empty(self.pair_rank, weight.shape[1])
        self.reset_down(A)
        return A, weight.new_zeros(weight.shape[0], self.pair_rank)

    @torch.no_grad()
    def start(self, gradient: Tensor, base_layer: nn.Module) -> None:
        """Start at the singular vectors of ``gradient`` (out, in)."""
        by_weight = self.method.scale == "weight_svd"
        weights = self._rows(dense_weight(base_layer)) if by_weight else [None] * max(1, len(self.slices))
        pairs = [self._from(rows, weight) for rows, weight in zip(self._rows(gradient), weights, strict=True)]
        self.set_initial(torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs]))

    def _from(self, gradient: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return A0 (rank, in) and B0 (out, rank) for the gradient (out, in) of a layer or of one slice."""
        rank, method, s = self.pair_rank, self.method, self.scaling
        hf = method.convention == "hf_peft"
        U, S, Vh = _directions(gradient, 2 * rank)
        mixed = torch.randperm(2 * rank).to(S.device) if method.direction == "random" else torch.empty(0)
        every = torch.arange(2 * rank, device=S.device)
        down, up = {
            "ArB2r": (every[:rank], every[rank:]),
            "A2rBr": (every[rank:], every[:rank]),
            "ArBr": (every[1::2], every[::2]),
            "random": (mixed[:rank], mixed[:rank] if hf else mixed[rank:]),
        }[method.direction]
        A, B = Vh[down], U[:, up]
        if hf:
            B = B * S[up]
        sizes = _directions(weight, rank)[1] if weight is not None else None
        if method.scale == "stable":
            factor = (len(gradient) ** 0.25) / math.sqrt(method.stable_gamma)
            return (A, B * factor) if hf else (A * factor, B * factor)
        if method.scale == "gd":
            return A / s, B / s
        if sizes is None:
            return A, B
        if hf:
            return A, B * sizes[0] / S[up][0].clamp(min=torch.finfo(S.dtype).tiny)
        mean = (sizes / s).sqrt().mean()
        return A * mean, B * mean


class WeightGradients:
    """The gradients of the weights of adapted layers, from what goes in and what comes back.

    Args:
        model: the adapted model.
        places: the adapters by module path, each of which starts once its gradient is complete.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, GradientLinear]) -> None:
        layers = adapter_layers(model)
        self.places, self.layers = places, {path: layers[path] for path in places}
        self.sums: dict[str, Tensor] = {}
        self.started: set[str] = set()
        self.last = False
        """Whether the batch that runs is the last one."""
        self.batches = 0
        """How many batches ran, with that one."""
        self._waiting: Counter[str] = Counter()
        self._together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._handles = [
            layer.register_forward_hook(functools.partial(self._seen, path), with_kwargs=True)
            for path, layer in self.layers.items()
        ]

    def stop(self) -> None:
        """Look at the layers no longer."""
        for handle in self._handles:
            handle.remove()

    def _seen(self, path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if not output.requires_grad:
            output.requires_grad_()
        self._waiting[path] += 1
        output.register_hook(functools.partial(self._take, path, x.detach()))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _take(self, path: str, x: Tensor, back: Tensor) -> None:
        """Add what one call of the layer contributes: input x (..., in) and the gradient of its output (..., out)."""
        gradient = back.reshape(-1, back.shape[-1]).float().t() @ x.reshape(-1, x.shape[-1]).float()  # (out, in)
        if path in self.sums:
            gradient += self.sums.pop(path).to(gradient.device)
        self._waiting[path] -= 1
        if self.last and not self._waiting[path] and not self._together:
            self._start(path, gradient)
        else:
            self.sums[path] = gradient.cpu()

    @torch.no_grad()
    def finish(self) -> None:
        """Start the adapters that have not started; in a distributed run all do, from the sum over the processes."""
        if self._together:  # "random" draws the same in all of them; who called puts the random state back
            seed = [torch.initial_seed()]
            dist.broadcast_object_list(seed)
            torch.manual_seed(seed[0])
        paths = list(self.places if self._together else self.sums)
        for path in paths:
            device = self.places[path].lora_A.device
            shape = (self.places[path].out_features, self.places[path].lora_A.shape[1])
            gradient = self.sums.pop(path, torch.zeros(shape)).to(device)
            if self._together:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            self._start(path, gradient)

    def _start(self, path: str, gradient: Tensor) -> None:
        if bool(gradient.any()):
            self.places[path].start(gradient / self.batches, self.layers[path].base_layer)
            self.started.add(path)


def _directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` largest singular values of ``matrix`` and their vectors: U (out, rank), S (rank,), V^T (rank, in)."""
    exact = min(matrix.shape) <= _EXACT
    U, S, Vh = principal_directions(matrix.float(), rank if exact else 2 * rank, iterations=None if exact else 4)
    return U[:, :rank], S[:rank], Vh[:rank]


def _with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each item, and whether it is the last."""
    items = iter(items)
    held = next(items, None)
    while held is not None:
        following = next(items, None)
        yield held, following is None
        held = following


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register LoRAGA."""
    return [LoRAGA]

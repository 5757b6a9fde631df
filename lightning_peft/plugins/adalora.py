"""AdaLoRA: low-rank updates in the form of a singular value decomposition, whose ranks are allocated while they train.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023 (arXiv:2303.10512)::

    y = W x + s B diag(E) A x        s = alpha / init_rank        A: (rank, in), E: (rank, 1), B: (out, rank)

    importance of an element     I = |w * gradient|,  I' = beta1 I' + (1 - beta1) I,  U' = beta2 U' + (1 - beta2) |I - I'|
    score of a triplet k         I'U' of E_k + mean of I'U' over row k of A + mean of I'U' over column k of B
    budget b after t steps       all | target + (all - target) (1 - (t - t_i) / (T - t_f - t_i))^3 | target
                                   t_i initial steps        the budget phase              t_f final steps

Each time ranks are allocated, the triplets that are not among the b best of all places have their singular value E_k set to
zero. They may come back, until the budget is down at its target. A penalty keeps rows of A and columns of B orthogonal. Every
number here is that of HF PEFT's AdaLora, whose files are read and written.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.adapter_layer import adapters_named
from lightning_peft.arithmetic.low_rank import CONVOLUTIONS, LowRankLinear, LowRankSettings
from lightning_peft.arithmetic.singular_triplets import SVDConv, SVDLinear, TripletAdapter
from lightning_peft.errors import AdapterConfigError, ConfigError, LightningPEFTWarning, TargetError
from lightning_peft.hf_types import refuse_other_keys
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target
from lightning_peft.targets import is_conv1d_linear


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Low-rank updates of linear layers and convolutions, with a rank for each place that is found in training.

    Example:
        >>> import torch
        >>> from lightning_peft import inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = inject(model, AdaLoRA(init_rank=4, target_rank=2), ["0", "2"])
        >>> allocated_ranks(model)
        {'0': 4, '2': 4}
    """

    name: ClassVar[str] = "adalora"
    mergeable: ClassVar[bool] = True
    row_routable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "ADALORA"
    auxiliary_losses: ClassVar[bool] = True

    init_rank: int = 12
    """Rank at every place before anything is pruned."""
    target_rank: int = 8
    """Average rank of the places in the end."""
    alpha: float = 16.0
    """Scale of the update: it is multiplied by alpha / init_rank."""
    dropout: float = 0.0
    """Probability of dropping an input of the low-rank path in training."""
    initial_steps: int = 0
    """Optimizer steps before the budget falls, t_i in the paper."""
    final_steps: int = 0
    """Optimizer steps at the end with ranks that stay, t_f in the paper; with 0 they are settled by the last step."""
    interval: int = 1
    """Optimizer steps from one allocation of ranks to the next."""
    beta1: float = 0.85
    """How slowly the importance of an element changes: share of the old value in its moving average."""
    beta2: float = 0.85
    """The same for the uncertainty of the importance."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps rows of A and columns of B orthogonal; 0 for none."""
    dtype: Literal["float32", "base"] = "float32"
    """Precision of the adapter: at least float32, or that of the base."""

    def __post_init__(self) -> None:
        for name, least in {
            "init_rank": 1,
            "target_rank": 1,
            "initial_steps": 0,
            "final_steps": 0,
            "interval": 1,
        }.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"AdaLoRA {name} must be an integer of at least {least}, got {value!r}")
        if self.target_rank > self.init_rank:
            raise ConfigError(
                f"AdaLoRA prunes from init_rank={self.init_rank} down, which is less than target_rank={self.target_rank}; "
                "raise init_rank, usually to one and a half times target_rank"
            )
        for name in ("alpha", "orthogonality", "beta1", "beta2", "dropout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise ConfigError(f"AdaLoRA {name} must be a finite number, got {value!r}")
        if self.alpha <= 0 or self.orthogonality < 0:
            raise ConfigError(
                f"AdaLoRA alpha must be positive and orthogonality not negative, got {self.alpha!r} and {self.orthogonality!r}"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"AdaLoRA {name} must lie between 0 and 1, got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"AdaLoRA dropout must lie in [0, 1), got {self.dropout!r}")
        if self.dtype not in ("float32", "base"):
            raise ConfigError(f"AdaLoRA dtype must be one of float32, base, got {self.dtype!r}")

    @override
    def supports(self, module: nn.Module) -> bool:
        if isinstance(module, tuple(CONVOLUTIONS)):
            return bool(module.groups == 1 and module.padding_mode == "zeros")
        return isinstance(module, nn.Linear) or is_conv1d_linear(module)

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if target.slices:
            raise TargetError(
                f"AdaLoRA cannot adapt {', '.join(part.role for part in target.slices)} alone, a slice of {target.path!r}; "
                "name the whole module"
            )
        # HF PEFT divides by init_rank + 1e-5, so files mean that.
        scaling = self.alpha / (self.init_rank + 1e-5)
        settings = LowRankSettings(rank=self.init_rank, scaling=scaling, dropout=self.dropout, dtype=self.dtype)
        return SVDConv(settings, module) if isinstance(module, tuple(CONVOLUTIONS)) else SVDLinear(settings, module)

    @override
    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Let each adapter know its share of the penalty, which is a mean over the matrices A and B of all places."""
        for adapter in _triplets(adapters).values():
            adapter.penalty = self.orthogonality / (2 * len(adapters))

    # -- the budget ------------------------------------------------------------------------------------------------

    def budget(self, step: int, total_steps: int, everything: int, target: int) -> int:
        """Return how many triplets are kept at ``step`` of ``total_steps``, from ``everything`` in the beginning to ``target``."""
        if step <= self.initial_steps:
            return everything
        if step >= total_steps - self.final_steps:
            return target
        left = 1 - (step - self.initial_steps) / (total_steps - self.final_steps - self.initial_steps)
        return int((everything - target) * left**3 + target)

    @override
    def after_optimizer_step(
        self, adapters: Mapping[str, Adapter], optimizer: Optimizer, step: int, total_steps: int
    ) -> None:
        """Measure the importance of every element, and allocate ranks when it is time.

        Raises:
            ConfigError: nobody knows how many steps there will be, or there are too few for the schedule.
        """
        trained = [adapter for adapter in _triplets(adapters).values() if adapter.lora_E.requires_grad]
        if not trained:
            return
        if any(torch.stack([adapter.settled.to(trained[0].settled.device) for adapter in trained]).tolist()):
            for adapter in trained:
                adapter.prune(adapter.kept, optimizer)
            return
        self._check_steps(total_steps)
        if not any(adapter.get_buffer("importance_E").any() for adapter in trained):
            self._warn_of_late_start(step, total_steps, trained)
        if step < total_steps - self.final_steps and _gradients_are_finite(trained):
            for adapter in trained:
                adapter.measure(self.beta1, self.beta2)
        last = step >= min(total_steps - self.final_steps, total_steps - 1)
        if last or (step > self.initial_steps and step % self.interval == 0):
            everything, target = sum(adapter.rank for adapter in trained), self.target_rank * len(trained)
            budget = target if last else self.budget(step, total_steps, everything, target)
            _allocate(trained, everything - budget, optimizer)
        if last:
            for adapter in trained:
                adapter.settle(total_steps)

    def _check_steps(self, total_steps: int) -> None:
        if total_steps == 0:
            raise ConfigError(
                "AdaLoRA needs to know how many optimizer steps there will be, and this fit has no end; give the Trainer max_steps, or "
                "max_epochs with a train_dataloader that has a length"
            )
        if self.initial_steps + self.final_steps >= total_steps:
            raise ConfigError(
                f"AdaLoRA has initial_steps={self.initial_steps} and final_steps={self.final_steps}, which leaves none of {total_steps} optimizer "
                "steps to allocate ranks in; lower them, or train for more steps"
            )

    def _warn_of_late_start(self, step: int, total_steps: int, trained: list[TripletAdapter]) -> None:
        """Warn if more than three quarters of what the schedule prunes are due at ``step``, before which nothing was measured."""
        everything, target = sum(adapter.rank for adapter in trained), self.target_rank * len(trained)
        budget = self.budget(step, total_steps, everything, target)
        if everything - budget <= 0.75 * (everything - target) or everything == target:
            return
        warnings.warn(
            f"AdaLoRA has measured no importance before step {step} of {total_steps}, when its budget is {budget} of {everything} triplets already: "
            f"the budget follows the steps of the whole run, so ranks are allocated by almost no measurement. Set initial_steps to {step} or "
            "more, or train it from the beginning",
            LightningPEFTWarning,
            stacklevel=2,
        )

    # -- HF PEFT's adapter_config.json -----------------------------------------------------------------------------

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        places = _triplets(adapters)
        patterns = {f"{path}.lora_E": adapter.pattern(self.init_rank) for path, adapter in places.items()}
        known = max((int(adapter.total_steps) for adapter in places.values()), default=0)
        transposed = [adapter.transposed for adapter in places.values() if isinstance(adapter, LowRankLinear)]
        return {
            "init_r": self.init_rank,
            "target_r": self.target_rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "tinit": self.initial_steps,
            "tfinal": self.final_steps,
            "deltaT": self.interval,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orthogonality,
            # HF PEFT reads no file without a number of steps that the schedule fits into.
            "total_step": max(known, self.initial_steps + self.final_steps + 1),
            "rank_pattern": patterns if any(not all(kept) for kept in patterns.values()) else None,
            "bias": "none",
            "fan_in_fan_out": bool(transposed) and all(transposed),
        }

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> AdaLoRA:
        set_here = {key: value for key, value in config.items() if (key, value) != ("bias", "none")}
        refuse_other_keys("AdaLoRA", set_here, _HF_UNDERSTOOD)
        given = {field: config[key] for key, field in _HF_FIELDS.items() if config.get(key) is not None}
        alpha = given.setdefault("alpha", 8)
        if isinstance(alpha, (int, float)) and alpha <= 0:
            given["alpha"] = given.get("init_rank", 12)  # what HF PEFT takes then
        try:
            return cls(**given)
        except ConfigError as error:
            raise AdapterConfigError(str(error)) from error


_HF_FIELDS = {
    "init_r": "init_rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "tinit": "initial_steps",
    "tfinal": "final_steps",
    "deltaT": "interval",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orthogonality",
}
_HF_UNDERSTOOD = frozenset(
    [
        *_HF_FIELDS,
        # The ranks are those of the tensors, the host knows the steps, and the rest is without effect on AdaLora.
        "rank_pattern",
        "total_step",
        "r",
        "use_rslora",
        "init_lora_weights",
        "fan_in_fan_out",
        "target_modules",
        "layers_to_transform",
        "layers_pattern",
        "exclude_modules",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
    ]
)


def allocated_ranks(model: nn.Module, name: str = "default") -> dict[str, int]:
    """Return the rank that AdaLoRA's last allocation left at each place of the adapter ``name``, by module path.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
        ConfigError: it is not an AdaLoRA adapter.
    """
    found = adapters_named(model, name)
    for path, adapter in found.items():
        if not isinstance(adapter, TripletAdapter):
            raise ConfigError(
                f"allocated_ranks was asked about adapter {name!r}, which is a {type(adapter).__name__} at {path!r}; only AdaLoRA allocates ranks"
            )
    return {path: int(adapter.kept.sum()) for path, adapter in _triplets(found).items()}


def _triplets(adapters: Mapping[str, Adapter]) -> dict[str, TripletAdapter]:
    return {path: adapter for path, adapter in adapters.items() if isinstance(adapter, TripletAdapter)}


def _gradients_are_finite(adapters: list[TripletAdapter]) -> bool:
    """Tell whether every gradient is there and finite: after an overflow in fp16 the optimizer has not stepped."""
    finite: list[Tensor] = []
    for adapter in adapters:
        for parameter in adapter.parameters():
            if parameter.grad is None:
                return False
            finite.append(torch.isfinite(parameter.grad).all())
    return all(torch.stack([flag.to(finite[0].device) for flag in finite]).tolist())


def _allocate(adapters: list[TripletAdapter], number: int, optimizer: Optimizer) -> None:
    """Prune the ``number`` triplets of the lowest scores, wherever they are; what is as low as the last of them goes too."""
    scores = [adapter.scores() for adapter in adapters]  # each (rank, 1)
    ranking = torch.cat([score.flatten().to(scores[0].device) for score in scores])
    threshold = float(torch.kthvalue(ranking, number).values) if number and ranking.any() else -math.inf
    for adapter, score in zip(adapters, scores, strict=True):
        adapter.prune(score > threshold, optimizer)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register AdaLoRA."""
    return [AdaLoRA]

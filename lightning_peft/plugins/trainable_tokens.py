"""Trainable tokens: of a vocabulary, the embeddings of chosen tokens are trained and all others stay frozen.

Only the vectors of new or special tokens are learnt, as textual inversion does with one: Gal et al., "An Image is Worth One
Word: Personalizing Text-to-Image Generation using Textual Inversion", 2022 (arXiv:2208.01618)::

    embedding   y = W'[ids]        W' is W with the rows of the chosen tokens replaced by the trained ones
    head        y = W' x + b       the same rows, where the head shares the weight of the embedding, or is a target itself

The trained rows start at those of the base. Files are those of HF PEFT's TRAINABLE_TOKENS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import AdapterConfigError, AdapterMismatchError, ConfigError, TargetError
from lightning_peft.families import ModelFamily
from lightning_peft.hf_types import refuse_other_keys
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method, Target

_TIED_RULE = "tied weights"


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Train the embeddings of chosen tokens.

    Example:
        >>> import torch
        >>> from lightning_peft import inject, trainable_summary
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 8))
        >>> _ = inject(model, TrainableTokens(tokens=[97, 98, 99]), "0")
        >>> trainable_summary(model).trainable
        24
    """

    name: ClassVar[str] = "trainable_tokens"
    default_targets: ClassVar[tuple[str, ...]] = ("embedding",)
    mergeable: ClassVar[bool] = True
    row_routable: ClassVar[bool] = True
    composable: ClassVar[bool] = False
    quantized_base: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"

    tokens: Sequence[int]
    """The ids of the tokens to train, as the tokenizer gives them."""

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Sequence) or not self.tokens:
            raise ConfigError(f"TrainableTokens tokens must list at least one token id, got {self.tokens!r}")
        seen: set[int] = set()
        for token in self.tokens:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ConfigError(f"TrainableTokens tokens must be ids, integers from 0 on, got {token!r}")
            if token in seen:
                raise ConfigError(f"TrainableTokens tokens must be given once each, got {token!r} twice")
            seen.add(token)
        object.__setattr__(self, "tokens", tuple(self.tokens))

    @override
    def supports(self, module: nn.Module) -> bool:
        """Tell whether ``module`` is an embedding, plain or with a scale, or a linear layer whose weight is not packed."""
        if isinstance(module, nn.Embedding):
            looks_up = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
            return looks_up and module.max_norm is None and module.weight.is_floating_point()
        return isinstance(module, nn.Linear) and module.weight.is_floating_point()

    @override
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        if target.slices:
            raise TargetError(f"TrainableTokens cannot adapt a slice of {target.path!r}; name an embedding or a head")
        size = module.get_parameter("weight").shape[0]
        outside = [token for token in self.tokens if token >= size]
        if outside:
            raise TargetError(
                f"TrainableTokens tokens {outside[:5]} were asked for, but {target.path!r} has {size} rows (0 to {size - 1}); resize the "
                "embeddings of the model first, or correct the ids"
            )
        if isinstance(module, nn.Embedding):
            return EmbeddingRows(self.tokens, module)
        return HeadRows(self.tokens, module)

    @override
    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        """Add every module that shares its weight with a target, such as a tied head."""
        modules = {path: unwrapped(module) for path, module in base_modules(model)}
        places = {target.path: target for target in targets}
        for group in _shared_weights(model, set(places)):
            for path in group:
                if not self.supports(modules[path]):
                    raise TargetError(
                        f"the weight of {group[0]!r} is also that of {path!r}, a {type(modules[path]).__name__} where TrainableTokens cannot "
                        "replace rows; untie the weights"
                    )
                places.setdefault(path, Target(path=path, rule=_TIED_RULE))
        return list(places.values())

    @override
    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Let the places of one weight train one set of rows."""
        for leader_path, *others in _shared_weights(model, set(adapters)):
            leader = adapters[leader_path]
            for path in others:
                follower = adapters[path]
                assert isinstance(leader, TokenRows)
                assert isinstance(follower, TokenRows)
                follower.follow(leader)

    # -- HF PEFT's files -------------------------------------------------------------------------------------------

    @override
    def placed_tensors(self, model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors by place; of a place that shares its weight with another, HF PEFT's file repeats the rows."""
        tensors = super().placed_tensors(model, stored)
        names = {name.rpartition(".")[0]: name for name in tensors}
        for leader, *others in _shared_weights(model, set(names)):
            for path in others:
                if path not in names or leader not in names:
                    continue
                if not torch.equal(tensors.pop(names[path]), tensors[names[leader]]):
                    raise AdapterMismatchError(
                        f"{names[path]!r} and {names[leader]!r} differ, but in {type(model).__name__} both places have one weight"
                    )
        return tensors

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        leaders = [path for path, adapter in adapters.items() if isinstance(adapter, TokenRows) and not adapter.follows]
        return {"token_indices": list(self.tokens), "init_weights": True, "target_modules": leaders}

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> TrainableTokens:
        refuse_other_keys("TrainableTokens", config, _HF_UNDERSTOOD)
        try:
            return cls(tokens=config.get("token_indices") or [])
        except ConfigError as error:
            raise AdapterConfigError(str(error)) from error


class TokenRows(Adapter):
    """The trained rows (n, features) of one weight (vocabulary, features).

    Args:
        tokens: the rows to train, in the order of the file.
        module: the module whose ``weight`` has them.
    """

    def __init__(self, tokens: Sequence[int], module: nn.Module) -> None:
        super().__init__()
        self.tokens = tuple(tokens)
        weight = module.get_parameter("weight")
        dtype = torch.promote_types(torch.float32, weight.dtype)
        shape = (len(self.tokens), weight.shape[1])
        self.trainable_tokens_delta = nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))
        self._leader: tuple[TokenRows, ...] = ()  # a tuple, so that its rows are registered once

    @property
    def follows(self) -> bool:
        """Whether the rows are those of another place."""
        return bool(self._leader)

    def follow(self, leader: TokenRows) -> None:
        """Train the rows of ``leader``, whose module shares the weight."""
        del self.trainable_tokens_delta
        self._leader = (leader,)
        self.tied_parameters |= {"weight"}
        leader.tied_parameters |= {"weight"}

    def rows(self) -> Tensor:
        """Return the trained rows (n, features)."""
        return self._leader[0].rows() if self._leader else self.trainable_tokens_delta

    def index(self, device: torch.device | str) -> Tensor:
        """Return the tokens (n,) as a tensor."""
        return torch.tensor(self.tokens, dtype=torch.long, device=device)

    @override
    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module) -> None:
        weight = base_layer.get_parameter("weight")
        if not self._leader:
            self.trainable_tokens_delta.copy_(weight[self.index(weight.device)])

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        if self._leader:
            return {}  # the weight is merged where the leader is
        weight = base_layer.get_parameter("weight").detach()
        rows = self.rows().detach().to(weight.dtype)
        return {"weight": weight.index_copy(0, self.index(weight.device), rows)}


class EmbeddingRows(TokenRows):
    """Trained rows of an embedding, plain or one that scales what it looks up."""

    ordered: Tensor
    order: Tensor

    def __init__(self, tokens: Sequence[int], module: nn.Embedding) -> None:
        super().__init__(tokens, module)
        # Some models scale what the embedding returns, Gemma by a factor that is rounded to the precision of the weight first.
        rounded = getattr(module, "scalar_embed_scale", None)
        self.scale_is_rounded = rounded is not None
        self.embed_scale = float(getattr(module, "embed_scale", 1.0) if rounded is None else rounded)
        for name in ("ordered", "order"):  # the tokens in ascending order, and which row each has
            empty = torch.empty(len(self.tokens), dtype=torch.long, device=module.weight.device)
            self.register_buffer(name, empty, persistent=False)

    @override
    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module) -> None:
        super().reset_parameters(base_layer)
        ordered, order = torch.sort(self.index("cpu"))
        self.ordered.copy_(ordered)
        self.order.copy_(order)

    @override
    def forward(self, base: Callable[..., Any], ids: Tensor) -> Tensor:
        """Ids (...) -> y (..., features)."""
        y: Tensor = base(ids)
        place = torch.searchsorted(self.ordered, ids.long()).clamp(max=len(self.tokens) - 1)
        chosen = (self.ordered[place] == ids).unsqueeze(-1)  # (..., 1)
        new = F.embedding(self.order[place], self.rows().to(device=y.device, dtype=y.dtype))  # (..., features)
        if self.embed_scale != 1.0:
            new = new * (torch.tensor(self.embed_scale, dtype=y.dtype) if self.scale_is_rounded else self.embed_scale)
        return torch.where(chosen, new, y)


class HeadRows(TokenRows):
    """Trained rows of a linear layer that gives one logit a token. What they change is added, so that a fresh adapter is exact."""

    base_rows: Tensor
    places: Tensor

    def __init__(self, tokens: Sequence[int], module: nn.Module) -> None:
        super().__init__(tokens, module)
        self.register_buffer("base_rows", torch.empty_like(self.trainable_tokens_delta).detach(), persistent=False)
        places = torch.empty(len(self.tokens), dtype=torch.long, device=self.base_rows.device)
        self.register_buffer("places", places, persistent=False)

    @override
    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module) -> None:
        super().reset_parameters(base_layer)
        weight = base_layer.get_parameter("weight")
        self.places.copy_(self.index("cpu"))
        self.base_rows.copy_(weight[self.index(weight.device)])

    @override
    def forward(self, base: Callable[..., Any], x: Tensor) -> Tensor:
        """X (..., features) -> y (..., vocabulary)."""
        y: Tensor = base(x)
        change = (self.rows().to(self.base_rows.device) - self.base_rows).to(y.dtype)  # (n, features)
        return y.index_add(-1, self.places, F.linear(x.to(y.dtype), change))


def _shared_weights(model: nn.Module, chosen: set[str]) -> Iterator[list[str]]:
    """Yield the groups of places with one ``weight`` that have one of ``chosen`` in them; the place that leads comes first.

    The first embedding leads, whichever was chosen: a file then says the same whatever the target was.
    """
    modules = {path: unwrapped(module) for path, module in base_modules(model) if path}
    users: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(path)
    for group in users.values():
        if len(group) > 1 and chosen & set(group):
            yield sorted(group, key=lambda path: not isinstance(modules[path], nn.Embedding))


_HF_UNDERSTOOD = frozenset(
    [
        "token_indices",
        "init_weights",
        "target_modules",
        "exclude_modules",
    ]
)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register the training of tokens."""
    return [TrainableTokens]

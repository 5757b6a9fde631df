"""Low-rank adapters of one weight that several modules use: an embedding and the head that is tied to it.

::

    embedding  W + s A B        A: (vocabulary, rank)   B: (rank, dim)     the leader: it has the tensors
    head       W + s A B        its down matrix is B, its up matrix is A   a follower: it looks them up at the leader

A head multiplies with the transpose of what the embedding looks up, so one pair of matrices is the same update of the weight at
both places: trained together, merged once, and still tied afterwards.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.arithmetic.low_rank import LowRankAdapter, LowRankLinear, LowRankSettings
from lightning_peft.arithmetic.low_rank_embedding import LowRankEmbedding
from lightning_peft.errors import LightningPEFTWarning, TargetError
from lightning_peft.interfaces import Adapter, Target
from lightning_peft.targets import is_conv1d_linear

TIED_RULE = "tied weights"
"""The rule of a place whose adapter shares the tensors of another place."""


class _Follower(LowRankAdapter):
    """What followers share: they hold no pair of matrices, but find that of their leader under the usual names."""

    _leader: tuple[LowRankAdapter, ...] = ()  # a tuple, so that its parameters are registered once

    def drop_own(self) -> None:
        """Give up the pair of matrices that the adapter allocated."""
        for name in self.pair():
            delattr(self, name)

    def pair(self) -> tuple[str, str]:
        """Return the names under which the pair is held here, as the keys of :func:`_seen_as`."""
        return ("lora_A", "lora_B") if isinstance(self, LowRankLinear) else ("lora_embedding_A", "lora_embedding_B")

    def follow(self, leader: LowRankAdapter) -> None:
        """Use the tensors of ``leader`` from now on."""
        self._leader = (leader,)
        self.tied_parameters |= {"weight"}
        leader.tied_parameters |= {"weight"}

    def __getattr__(self, name: str) -> Any:
        if (
            name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
            and self._leader
            and name in self.pair()
        ):
            return _seen_as(name, self._leader[0])
        return super().__getattr__(name)

    @override
    def held_tensors(self) -> list[Tensor]:
        return [*super().held_tensors(), *(tensor for leader in self._leader for tensor in leader.held_tensors())]

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        self.reset_bias(base_layer)

    @override
    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        return self.merged_with(base_layer)  # the weight is merged where the leader is


class TiedLinear(_Follower, LowRankLinear):
    """LoRA on a linear layer with the tensors of another place."""

    def __init__(self, settings: LowRankSettings, module: nn.Module) -> None:
        super().__init__(settings, module)
        self.drop_own()


class TiedEmbedding(_Follower, LowRankEmbedding):
    """LoRA on an embedding with the tensors of another embedding."""

    def __init__(self, settings: LowRankSettings, module: nn.Embedding) -> None:
        super().__init__(settings, module)
        self.drop_own()


def _seen_as(name: str, leader: LowRankAdapter) -> Tensor:
    """Return the tensor of ``leader`` that another module of the same weight has as ``name``."""
    if isinstance(leader, LowRankEmbedding) and name in ("lora_A", "lora_B"):  # (rank, in) and (rank, out) of the head
        return leader.lora_embedding_B if name == "lora_A" else leader.lora_embedding_A.t()
    tensor: Tensor = getattr(leader, name)
    return tensor


def tied_places(model: nn.Module) -> list[list[str]]:
    """Return the groups of places whose ``weight`` is one parameter, in the order of the model, embeddings first."""
    modules = {path: unwrapped(module) for path, module in base_modules(model) if path}
    users: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(path)
    groups = [paths for paths in users.values() if len(paths) > 1]
    return [sorted(paths, key=lambda path: not isinstance(modules[path], nn.Embedding)) for paths in groups]


def with_tied(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """Return ``targets`` with every place that shares a weight with one of them; all but one of a group follow it.

    Raises:
        TargetError: a module that shares the weight uses it in a way that cannot have the same update.
    """
    modules = {path: unwrapped(module) for path, module in base_modules(model)}
    result = {target.path: target for target in targets}
    for group in tied_places(model):
        asked = [path for path in group if path in result]
        if not asked:
            continue
        for path in group:
            module = modules[path]
            plain = isinstance(module, (nn.Embedding, nn.Linear)) and not is_conv1d_linear(module)
            if not plain or (path in result and result[path].slices):
                raise TargetError(
                    f"the weight of {asked[0]!r} is also that of {path!r}, a {type(module).__name__} that cannot have one update with it "
                    "as a whole embedding or linear layer; use tied='one' to adapt the target alone"
                )
        leader, *followers = group
        result.setdefault(leader, Target(path=leader, rule=result[asked[0]].rule))
        for path in followers:
            result[path] = dataclasses.replace(result.get(path, Target(path=path)), rule=TIED_RULE)
    return list(result.values())


def refuse_or_warn_of_tied(model: nn.Module, targets: Sequence[Target], *, refuse: bool) -> None:
    """Tell, or refuse, that ``targets`` adapt weights at some of the places only that share them.

    Raises:
        TargetError: ``refuse``, and a target shares its weight.
    """
    chosen = {target.path for target in targets}
    for group in tied_places(model):
        asked = [path for path in group if path in chosen]
        if not asked:
            continue
        others = ", ".join(repr(path) for path in group if path != asked[0])
        what = f"the weight of {asked[0]!r}, which is to be adapted, is also that of {others}"
        if refuse:
            raise TargetError(
                f"{what}; use tied='both' to adapt them as one, tied='one' for the target alone, or untie them"
            )
        warnings.warn(
            f"{what}: with tied='one' each target has an update of its own, the others have none, and it cannot be merged. tied='both' "
            "gives them one update",
            LightningPEFTWarning,
            stacklevel=5,
        )


def tie(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Let every follower among ``adapters``, by module path, find its leader.

    Raises:
        TargetError: patterns give the places of one weight different ranks or scales.
    """
    for leader_path, *paths in tied_places(model):
        leader = adapters.get(leader_path)
        for path in paths:
            follower = adapters.get(path)
            if not isinstance(follower, _Follower) or not isinstance(leader, LowRankAdapter):
                continue
            if (follower.rank, follower.scaling) != (leader.rank, leader.scaling):
                raise TargetError(
                    f"{leader_path!r} and {path!r} share one weight and, with tied='both', one update, but have rank {leader.rank} and "
                    f"{follower.rank}, scale {leader.scaling} and {follower.scaling}; name both as targets and in the patterns"
                )
            follower.follow(leader)

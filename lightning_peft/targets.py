r"""From the words a user writes to the modules of a model: roles, globs, regular expressions, layer ranges.

A target is one of

* a **role** of the model's family: ``query key value qkv output gate up gate_up down experts attention mlp block embedding
  head norm``, or ``all_linear``, every linear layer but the head and the fused experts, which every model has;
* a **glob** on the module path: ``*.self_attn.q_proj``, or just its end: ``q_proj``; a word that is no role of the family is
  a glob too;
* ``re:`` and a **regular expression** that must match the whole module path: ``re:.*\\.[0-3]\\.mlp\\..*``.

Every target must match something. Where a model fuses several projections into one module (GPT-2's ``c_attn``), the
role of a part (``query``) gives that module together with the slice of its output features.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import ConfigError, TargetError, did_you_mean
from lightning_peft.families import GENERIC, ROLES, ModelFamily
from lightning_peft.interfaces import Slice, Target

_Hits = list[tuple[str, tuple[Slice, ...]]]  # the targets that match a place, with the slices each asks for


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets with exclusions and a range of layers.

    Example:
        >>> Targets(include=["query", "value"], layers="-2:")
        Targets(include=('query', 'value'), exclude=(), layers='-2:')
    """

    include: Sequence[str]
    """Roles, globs or ``re:`` expressions to adapt."""
    exclude: Sequence[str] = ()
    """Roles, globs or ``re:`` expressions to leave out of what ``include`` matched."""
    layers: str | Sequence[int] | None = None
    """Which layers, by the first number in the module path: a list (``[0, -1]``) or a slice (``"4:8"``, ``"-2:"``)."""

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not self.include:
            raise ConfigError(f"targets must name at least one role, glob or 're:' expression, got {self.include!r}")
        for word in (*self.include, *self.exclude):
            if not isinstance(word, str) or not word:
                raise ConfigError(f"a target must be a non-empty string, got {word!r}")
            if word.startswith("re:"):
                try:
                    re.compile(word[3:])
                except re.error as error:
                    raise ConfigError(f"target {word!r} is not a regular expression: {error}") from error
        if isinstance(self.layers, str):
            if not re.fullmatch(r"-?\d*:-?\d*(:[1-9]\d*)?", self.layers):
                raise ConfigError(
                    f"layers must be a list of numbers or a slice such as '4:8' or '-2:', got {self.layers!r}"
                )
        elif self.layers is not None:
            numbers = tuple(self.layers) if isinstance(self.layers, Sequence) else None
            if numbers is None or not all(isinstance(number, int) for number in numbers):
                raise ConfigError(
                    f"layers must be a list of numbers or a slice such as '4:8' or '-2:', got {self.layers!r}"
                )
            object.__setattr__(self, "layers", numbers)

    @classmethod
    def of(cls, targets: str | Sequence[str] | Targets) -> Targets:
        """Return ``targets`` as a :class:`Targets`."""
        return (
            targets
            if isinstance(targets, Targets)
            else cls(include=(targets,) if isinstance(targets, str) else tuple(targets))
        )


def resolve_targets(
    model: nn.Module,
    targets: str | Sequence[str] | Targets,
    family: ModelFamily = GENERIC,
    *,
    supports: Callable[[nn.Module], bool] = lambda module: True,
    method: str = "the method",
    refusal: str = "name the modules inside it, or another role",
) -> list[Target]:
    """Return the places of ``model`` that ``targets`` name, in the order of the model.

    Args:
        model: any module, with or without adapters; paths are those of the model without adapters.
        targets: one target, several, or a :class:`Targets` with exclusions and layers.
        family: what the roles mean in this model.
        supports: whether a module can be adapted. A role or a pattern with wildcards selects among what it matches by
            this; a pattern without wildcards must match nothing else.
        method: who asks, for messages.
        refusal: what to do where a target cannot be adapted, for messages.

    Raises:
        TargetError: a target matches nothing, or nothing that can be adapted.
    """
    spec = Targets.of(targets)
    search = _Search(model, family, supports, method, refusal)
    found: dict[str, _Hits] = {}
    excluded: dict[str, _Hits] = {}
    for word in spec.include:
        for path, slices in search.find(word).items():
            found.setdefault(path, []).append((word, slices))
    for word in spec.exclude:
        for path, slices in search.find(word, able=False).items():
            excluded.setdefault(path, []).append((word, slices))
    kept_layers = _layers(spec.layers, search.modules) if spec.layers is not None else None
    result = []
    for path in search.modules:
        if path not in found or (kept_layers is not None and path not in kept_layers):
            continue
        left = search.left(path, found[path], excluded.get(path, []))
        if left is not None:
            result.append(Target(path=path, slices=left, rule=found[path][0][0]))
    if not result:
        raise TargetError(
            f"{spec} leaves nothing to adapt in {type(model).__name__}: exclude or layers removed every match"
        )
    kept = {target.path for target in result}
    for word in spec.include:
        if not any(word == hit for path in kept for hit, _ in found[path]):
            raise TargetError(
                f"target {word!r} of {spec} has no place left: exclude or layers removed every match of it. Leave it out, or adapt it "
                "on its own"
            )
    return result


def matches(word: str, model: nn.Module, family: ModelFamily) -> set[str]:
    """Return the paths of all modules that one target matches; an empty set where it matches none."""
    return set(_Search(model, family, lambda module: True)._candidates(word))


class _Search:
    """Looks targets up in one model."""

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        supports: Callable[[nn.Module], bool],
        method: str = "",
        refusal: str = "",
    ) -> None:
        self.model, self.family, self.supports, self.method, self.refusal = model, family, supports, method, refusal
        self.modules = {path: unwrapped(module) for path, module in base_modules(model) if path}
        self.config = getattr(model, "config", None)
        # Module to the nn.MultiheadAttention around it, which computes with its weight and does not call it.
        self.bypassed = {
            f"{path}.{name}": path
            for path, module in self.modules.items()
            if type(module).forward is nn.MultiheadAttention.forward
            for name, _ in module.named_children()
        }

    def find(self, word: str, *, able: bool = True) -> dict[str, tuple[Slice, ...]]:
        """Return path to slices for one target: of what can be adapted, or of every match."""
        matched = self._candidates(word)
        if not matched:
            raise TargetError(self._nothing(word))
        chosen = [path for path in matched if not able or self._able(path)]
        exact = (
            word not in self.family.role_names
            and not word.startswith("re:")
            and not any(sign in word for sign in "*?[")
        )
        if not chosen or (exact and len(chosen) < len(matched)):
            raise TargetError(self._unable(word, next(path for path in matched if path not in chosen)))
        return {path: self._slices(word, path) for path in chosen}

    def left(self, path: str, found: _Hits, excluded: _Hits) -> tuple[Slice, ...] | None:
        """Return the slices to adapt of what was found and not excluded; none for the whole place, None for nothing."""
        cut = {part for _, slices in excluded for part in slices}
        if any(not slices for _, slices in excluded):
            return None
        if all(slices for _, slices in found):
            kept = {part for _, slices in found for part in slices} - cut
        elif excluded:
            kept = set(self._slices(excluded[0][0], path, all_parts=True)) - cut
        else:
            return ()
        return tuple(sorted(kept, key=lambda part: part.start)) or None

    def _able(self, path: str) -> bool:
        return self.supports(self.modules[path]) and path not in self.bypassed

    def _unable(self, word: str, path: str) -> str:
        what = f"target {word!r} matches {path!r}, a {type(self.modules[path]).__name__}, which"
        if path in self.bypassed:
            return (
                f"{what} is never called: the nn.MultiheadAttention around it reads its weight; "
                f"name that, {self.bypassed[path]!r}"
            )
        return f"{what} {self.method} cannot adapt; {self.refusal}"

    def _candidates(self, word: str) -> list[str]:
        if word in self.family.role_names:
            return self._by_role(word)
        if word.startswith("re:"):
            pattern = re.compile(word[3:])
            return [path for path in self.modules if pattern.fullmatch(path)]
        if not any(sign in word for sign in "*?["):
            return [path for path in self.modules if path.endswith(f".{word}") or path == word]
        return [path for path in self.modules if fnmatch.fnmatchcase(f".{path}", f"*.{word}") or path == word]

    def _by_role(self, role: str) -> list[str]:
        if role == "all_linear":
            return self._all_linear()
        fused = self.family.fused_for(role)
        globs = self.family.globs(fused.role if fused and role not in self.family.roles else role)
        patterns = [_family_glob(glob) for glob in globs]
        return [path for path in self.modules if any(pattern.fullmatch(path) for pattern in patterns)]

    def _all_linear(self) -> list[str]:
        output = self._output_embedding()
        heads = [*self._by_role("head"), *(path for path, module in self.modules.items() if module is output)]
        inside = tuple(f"{head}." for head in heads)
        return [
            path
            for path, module in self.modules.items()
            if (is_linear(module) or is_fused_experts(module)) and path not in heads and not path.startswith(inside)
        ]

    def _output_embedding(self) -> nn.Module | None:
        getter = getattr(self.model, "get_output_embeddings", None)
        try:
            head = getter() if callable(getter) else None
        except (AttributeError, NotImplementedError):
            return None
        return unwrapped(head) if isinstance(head, nn.Module) else None

    def _slices(self, word: str, path: str, *, all_parts: bool = False) -> tuple[Slice, ...]:
        fused = self.family.fused_for(word)
        if fused is None or word in self.family.roles:
            return ()
        module = self.modules[path]
        features = getattr(module, "out_features", None) or getattr(module, "nf", None)
        if not isinstance(features, int):
            raise TargetError(
                f"role {word!r} is a slice of {path!r}, whose output width is unknown: {type(module).__name__}"
            )
        roles = list(fused.parts) if all_parts else [word]
        return fused.slices(roles, features, getattr(self.config, "text_config", self.config))

    def _nothing(self, word: str) -> str:
        last = sorted({path.rsplit(".", 1)[-1] for path in self.modules} - {str(number) for number in range(1000)})
        hint = did_you_mean(word, {*last, *self.family.role_names} - {word}) or "."
        if word in ROLES and word not in self.family.role_names:
            hint = f": it is a role, and nobody told family {self.family.name!r} which modules play it; a plugin can, with a ModelFamily."
        return (
            f"target {word!r} matches no module of {type(self.model).__name__}{hint} "
            f"Roles of family {self.family.name!r}: {', '.join(self.family.role_names)}. "
            f"Module names: {', '.join(last[:40])}{', ...' if len(last) > 40 else ''}"
        )


def is_linear(module: nn.Module) -> bool:
    """Tell whether ``module`` is a linear layer: ``nn.Linear`` (quantised ones too) or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d_linear(module)


def is_conv1d_linear(module: nn.Module) -> bool:
    """Tell whether ``module`` is transformers' ``Conv1D``: a linear layer with weight (in_features, out_features)."""
    kind: Any = type(module)
    return bool(_is_conv1d(kind))


@functools.cache
def _is_conv1d(kind: Any) -> bool:
    # By name, so that this does not import transformers.
    return any(base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in kind.__mro__)


def is_fused_experts(module: nn.Module) -> bool:
    """Tell whether ``module`` holds the experts of a mixture as three-dimensional parameters of a known layout.

    Such are the experts of transformers 5, which it marks with ``is_transposed`` and ``has_bias``.
    """
    marked = all(isinstance(vars(module).get(mark), bool) for mark in ("is_transposed", "has_bias"))
    return marked and bool(fused_parameters(module))


def fused_parameters(module: nn.Module) -> list[str]:
    """Return the names of the three-dimensional parameters of ``module`` itself."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]


def layer_index(path: str) -> int | None:
    """Return the number of the layer that ``path`` lies in: the first number among its parts.

    Example:
        >>> layer_index("model.layers.12.mlp.experts.3.w1"), layer_index("lm_head")
        (12, None)
    """
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def in_first_layers(path: str, layers: int) -> bool:
    """Tell whether ``path`` lies in one of the first ``layers`` layers of its stack; what is in no layer does not."""
    index = layer_index(path)
    return index is not None and index < layers


def _layers(layers: str | Sequence[int], paths: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths that lie in ``layers``, counted from the end where negative."""
    stacks: dict[
        str, dict[str, int]
    ] = {}  # the path before the number -> path -> number, as encoders and decoders differ
    for path in paths:
        index = layer_index(path)
        if index is not None:
            stacks.setdefault(re.split(r"(?:^|\.)\d+(?:\.|$)", path, maxsplit=1)[0], {})[path] = index
    kept: set[str] = set()
    for stack in stacks.values():
        depth = max(stack.values()) + 1
        if isinstance(layers, str):
            wanted = set(range(depth)[slice(*(int(part) if part else None for part in layers.split(":")))])
        else:
            wanted = {index + depth if index < 0 else index for index in layers}
        kept |= {path for path, index in stack.items() if index in wanted}
    if isinstance(layers, tuple):
        deepest = max((max(stack.values()) + 1 for stack in stacks.values()), default=0)
        for index in layers:
            if not -deepest <= index < deepest:
                raise TargetError(
                    f"layer {index} was asked for, but the model has {deepest} layers (0 to {deepest - 1})"
                )
    return kept


def _family_glob(glob: str) -> re.Pattern[str]:
    """Compile a family's glob: ``*`` within one part of the path, ``**`` across parts, matched from the end."""
    parts = [".*" if part == "**" else re.escape(part).replace(r"\*", r"[^.]*") for part in glob.split(".")]
    return re.compile(r"(.*\.)?" + r"\.".join(parts))

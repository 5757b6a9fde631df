"""Model families: what the roles mean in a kind of model. Data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.interfaces import Slice

Role = Literal[
    "query", "key", "value", "qkv", "output", "gate", "up", "gate_up", "down", "experts",
    "attention", "mlp", "block", "embedding", "head", "norm", "all_linear",
]  # fmt: skip
"""The roles a module can play in a model."""

ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class Fused:
    """How one module computes several roles at once.

    Example:
        >>> Fused(role="qkv", parts={"query": "num_attention_heads", "key": "num_key_value_heads", "value": 1}).parts["value"]
        1
    """

    role: str
    """The role of the fused module itself."""
    parts: Mapping[str, int | str]
    """Role to share of the output features, in order: a number, or the configuration attribute that holds it."""
    groups: int | str = 1
    """In how many groups the parts are interleaved: a number, or the configuration attribute that holds it."""

    def slices(self, roles: Sequence[str], features: int, config: object) -> tuple[Slice, ...]:
        """Return the slices for ``roles`` of a module with ``features`` outputs in a model with ``config``."""

        def number(value: int | str) -> int:
            found = getattr(config, value, None) if isinstance(value, str) else value
            if not isinstance(found, int) or found < 1:
                raise TargetError(
                    f"the fused role {self.role!r} needs the integer {value!r} of the configuration, found {found!r}"
                )
            return found

        groups, shares = number(self.groups), {role: number(share) for role, share in self.parts.items()}
        width, rest = divmod(features, groups)
        unit, rest_of_unit = divmod(width, sum(shares.values()))
        if rest or rest_of_unit:
            raise TargetError(
                f"the fused role {self.role!r} is cut into {groups} groups of parts {shares}, but {features} output features do not "
                "divide into them; name the whole module, or correct the family"
            )
        slices, start = [], 0
        for role, share in shares.items():
            stop = start + share * unit
            if role in roles:
                slices.append(Slice(role=role, groups=groups, width=width, start=start, stop=stop))
            start = stop
        return tuple(slices)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Where the roles are in a family of models. Data only.

    Example:
        >>> family = ModelFamily(name="toy", roles={"query": ("*.attn.q",), "block": ("layers.*",)})
        >>> family.globs("query")
        ('*.attn.q',)
    """

    name: str
    """The name of the family, such as ``llama``."""
    model_types: tuple[str, ...] = ()
    """Values of the ``model_type`` of a transformers configuration that belong to the family."""
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Role to globs on the module path. ``*`` stands for any run of characters but a dot in a family's globs."""
    fused: tuple[Fused, ...] = ()
    """Modules that play several roles at once."""
    norm: Literal["rms", "rms_offset"] | None = None
    """What the modules of the role ``norm`` compute where they are no ``nn.LayerNorm``: ``rms`` for weight * (x / rms(x)), ``rms_offset`` for
    (1 + weight) * x / rms(x)."""

    def __post_init__(self) -> None:
        for role in [*self.roles, *(part for fused in self.fused for part in fused.parts)]:
            if role not in ROLES:
                raise ConfigError(f"family {self.name!r} has the unknown role {role!r}; roles are: {', '.join(ROLES)}")

    def globs(self, role: str) -> tuple[str, ...]:
        """Return the globs of ``role``, empty where the family has no module that plays it alone."""
        return tuple(self.roles.get(role, ()))

    def fused_for(self, role: str) -> Fused | None:
        """Return the fused module that plays ``role`` as one of its parts, if any."""
        return next((fused for fused in self.fused if role in fused.parts), None)

    @property
    def role_names(self) -> list[str]:
        """Return all roles that can be targets in this family."""
        parts = [part for fused in self.fused for part in fused.parts]
        return [role for role in ROLES if role in self.roles or role in parts or role == "all_linear"]


GENERIC = ModelFamily(name="generic")
"""The family of a model nobody knows: ``all_linear``, globs and regular expressions still work."""

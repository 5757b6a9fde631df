"""Routers as methods name them: a name of the registry, and fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.errors import ConfigError
from lightning_peft.registry import get_registry
from lightning_peft.routers import Router


def router_named(name: str, config: Mapping[str, Any] | None = None, shared: Mapping[str, Any] | None = None) -> Router:
    """Return the router registered as ``name``.

    Args:
        name: as a plugin registers it with ``register_routers``.
        config: its fields.
        shared: values for those of its fields that ``config`` leaves out; names that are no fields of it are passed by.

    Raises:
        UnknownNameError: there is none.
        PluginLoadError: the plugin that should have it is broken.
        ConfigError: it has no such field, or a value is out of its range.

    Example:
        >>> router_named("expert_choice", {"capacity": 1.5}, {"top_k": 2, "combine": "softmax"})
        ExpertChoiceRouter(capacity=1.5, group='batch', combine='softmax')
    """
    kind: type[Router] = get_registry().get("router", name)
    return kind.with_shared(shared or {}, config or {})


def check_router_fields(method: object, name: object, config: object) -> None:
    """Refuse what cannot name a router and its fields.

    Raises:
        ConfigError: ``name`` is no word, or ``config`` no mapping by field.
    """
    kind = type(method).__name__
    if not isinstance(name, str):
        raise ConfigError(f"{kind} router must be the name of a registered router, got {name!r}")
    if not isinstance(config, Mapping):
        raise ConfigError(f"{kind} router_fields must map fields of the router to values, got {config!r}")

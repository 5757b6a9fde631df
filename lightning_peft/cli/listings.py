"""What is installed: the methods, and the plugins they come from."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_peft.interfaces import Method
    from lightning_peft.registry import Registry

CAPABILITIES = ("identity_at_init", "mergeable", "row_routable", "quantized_base")
"""Class attributes of a method that are columns of the table."""


def methods() -> None:
    """List the adaptation methods that are installed."""
    registry = _registry()
    table = _table("name", "class", "HF PEFT type", "default targets", *CAPABILITIES, "package")
    for name, method in sorted(registry.methods.items()):
        able = ["yes" if getattr(method, capability) else "no" for capability in CAPABILITIES]
        targets = ", ".join(method.default_targets)
        table.add_row(name, method.__name__, method.peft_type or "-", targets, *able, _package(registry, method))
    _print(table)


def plugins() -> None:
    """List the plugins, what they provide, and why a broken one is broken."""
    table = _table("source", "provides", "status")
    for plugin in _registry().plugins:
        provides = "\n".join(f"{kind}: {', '.join(names)}" for kind, names in plugin.provides.items())
        status = "ok" if plugin.error is None else f"broken: {type(plugin.error).__name__}: {plugin.error}"
        table.add_row(plugin.source, provides or "-", status)
    _print(table)


def _registry() -> Registry:
    from lightning_peft.errors import LightningPEFTWarning
    from lightning_peft.registry import get_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LightningPEFTWarning)  # a broken plugin is a row of the table
        return get_registry()


def _package(registry: Registry, method: type[Method]) -> str:
    """Return the package, with its version where it is known, that registered ``method``."""
    from lightning_peft import __version__

    plugin = next((plugin for plugin in registry.plugins if method.name in plugin.provides.get("method", ())), None)
    if plugin is None or plugin.builtin:
        return f"lightning-peft {__version__}"
    return plugin.source.partition(" (")[0]


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, max_width=80)
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    # In a pipe or a file a row is a line, whatever its width.
    width = None if sys.stdout.isatty() else 1000
    console = Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    console.print(table)

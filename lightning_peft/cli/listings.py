"""What is installed: the methods, and the plugins they come from."""

from __future__ import annotations

import sys
import warnings
from typing import Any

# No name of another module in signatures: the parser would import it to read them.


def methods(markdown: bool = False) -> None:
    """List the adaptation methods that are installed, and what each can do.

    Args:
        markdown: print the table as Markdown, as it stands in the documentation.
    """
    from lightning_peft.cli.capabilities import capability_matrix, markdown_table, package_of

    registry = _registry()
    headings, rows = capability_matrix(registry)
    if markdown:
        print("\n".join(markdown_table(headings, rows)))
        return
    table = _table(*headings, "default targets", "package")
    for (name, method), row in zip(sorted(registry.methods.items()), rows, strict=True):
        table.add_row(*row, ", ".join(method.default_targets), package_of(registry, registry.methods[name]))
    _print(table)


def plugins() -> None:
    """List the plugins, what they provide, and why a broken one is broken."""
    table = _table("source", "provides", "status")
    for plugin in _registry().plugins:
        provides = "\n".join(f"{kind}: {', '.join(names)}" for kind, names in plugin.provides.items())
        status = "ok" if plugin.error is None else f"broken: {type(plugin.error).__name__}: {plugin.error}"
        table.add_row(plugin.source, provides or "-", status)
    _print(table)


def _registry() -> Any:
    from lightning_peft.errors import LightningPEFTWarning
    from lightning_peft.registry import get_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LightningPEFTWarning)  # a broken plugin is a row of the table
        return get_registry()


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, max_width=80)
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    # In a pipe or a file a row is a line, whatever its width.
    width = None if sys.stdout.isatty() else 1000
    console = Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    console.print(table)

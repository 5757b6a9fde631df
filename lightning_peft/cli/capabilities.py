"""What the methods declare of themselves, as a table."""

from __future__ import annotations

from lightning_peft.interfaces import Method
from lightning_peft.registry import Registry

CAPABILITIES = {
    "identity_at_init": "identity at init",
    "mergeable": "mergeable",
    "row_routable": "row-routable",
    "composable": "composable",
    "quantized_base": "quantised base",
    "fsdp_ready": "FSDP-ready",
    "data_driven": "values from data",
}
"""Class attributes of a method that are columns of the table, with their headings."""


def capability_matrix(registry: Registry) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table of methods: everything in it is declared by the classes."""
    headings = ["name", "class", *CAPABILITIES.values(), "HF PEFT format"]
    rows = []
    for name, method in sorted(registry.methods.items()):
        able = ["yes" if getattr(method, capability) else "no" for capability in CAPABILITIES]
        rows.append([name, method.__name__, *able, method.peft_type or "no"])
    return headings, rows


def markdown_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of the table in Markdown."""
    marked = [[f"`{row[0]}`", f"`{row[1]}`", *row[2:]] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *marked)]


def package_of(registry: Registry, method: type[Method]) -> str:
    """Return the package, with its version where it is known, that registered ``method``."""
    from lightning_peft import __version__

    plugin = next((plugin for plugin in registry.plugins if method.name in plugin.provides.get("method", ())), None)
    if plugin is None or plugin.builtin:
        return f"lightning-peft {__version__}"
    return plugin.source.partition(" (")[0]

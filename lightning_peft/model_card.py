"""The page beside an adapter, ``README.md``: what it is, what it was trained on, how to load it.

Its front matter is that of model cards on the Hugging Face hub. The last line tells whether the page is still as it was written here: a page
that somebody has edited, or wrote, is left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lightning_peft.adapter_files import write_file
from lightning_peft.injection import Injection
from lightning_peft.interfaces import HF_PREFIX

CARD = "README.md"
_MARK = re.compile(r"\n<!-- written by lightning_peft, (\w{16}): edit this page and it is not written again -->\n\Z")
_SHOWN = 12
"""Places and values that are listed; the rest is counted."""


@dataclass(frozen=True)
class CardFacts:
    """What only the one who saves knows of an adapter."""

    data: str | None = None
    """Name of the data it was trained on."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Measurements at the time it is saved, by name."""
    step: int | None = None
    """Optimizer steps it was trained for."""
    pretrained: bool = False
    """Whether the base is a model of transformers, so that ``from_pretrained`` loads it."""


def write_card(folder: Path, injection: Injection, own: Mapping[str, Any], trained: int, facts: CardFacts) -> None:
    """Write the page of an adapter into its folder, unless somebody else's stands there. Another file of the folder is written after it.

    Args:
        folder: the adapter folder.
        injection: what was put into the model.
        own: the content of ``lightning_peft.json``.
        trained: how many numbers the adapter holds.
        facts: what its file does not say.

    Raises:
        OSError: it cannot be written.
    """
    page = folder / CARD
    if page.exists() and not _is_ours(page):
        return
    text = card(injection, own, trained, facts)
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    line = f"\n<!-- written by lightning_peft, {mark}: edit this page and it is not written again -->\n"
    write_file(page, (text + line).encode(), last=False)


def card(injection: Injection, own: Mapping[str, Any], trained: int, facts: CardFacts) -> str:
    """Return the page of an adapter, in Markdown with front matter; the arguments are those of :func:`write_card`."""
    method, base = injection.method, public_name(own["base"].get("name_or_path"))
    front = {
        **({"base_model": base} if base else {}),
        "library_name": "peft" if method.peft_type else "lightning_peft",
        "tags": sorted({"lightning_peft", "adapter", method.name, *(["peft"] if method.peft_type else [])}),
    }
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())  # JSON is YAML
    sections = [
        f"---\n{head}\n---\n\n# {method.name} adapter for {base or own['base']['class']}\n",
        _facts_table(injection, own, trained, facts),
        _table("## Hyperparameters", ("field", "value"), _fields(own["method"]["fields"])),
        _places(injection),
        _table("## Metrics when it was saved", ("metric", "value"), {k: f"{v:.6g}" for k, v in facts.metrics.items()}),
        _loading(injection, own, base, facts.pretrained),
        _table("## Versions", ("library", "version"), {k: v for k, v in own["versions"].items() if v}),
    ]
    return "\n".join(section for section in sections if section)


def public_name(name: str | None) -> str | None:
    """Return the name of a base to be shown to others: a hub id as it is, of a local folder the last part.

    Example:
        >>> public_name("meta-llama/Llama-3.2-1B"), public_name("/home/me/models/my-llama")
        ('meta-llama/Llama-3.2-1B', 'my-llama')
    """
    if not name:
        return None
    local = _absolute(name) or name.startswith((".", "~")) or Path(name).exists()
    return (PureWindowsPath(name).name if "\\" in name else PurePosixPath(name).name) if local else name


def _absolute(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def _is_ours(page: Path) -> bool:
    """Tell whether a page is one that was written here and not changed since."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    found = _MARK.search(text)
    return found is not None and hashlib.sha256(text[: found.start()].encode()).hexdigest()[:16] == found[1]


def _facts_table(injection: Injection, own: Mapping[str, Any], trained: int, facts: CardFacts) -> str:
    base = own["base"]
    rows = {
        "base": f"`{public_name(base.get('name_or_path')) or 'not known'}` ({base['class']})",
        "fingerprint of the base": f"`{base['digest']}`" if base.get("digest") else "none",
        "method": f"`{injection.method.name}`",
        "model family": injection.family,
        "numbers in the adapter": f"{trained:,}",
        **({"data": facts.data} if facts.data else {}),
        **({"optimizer steps": f"{facts.step:,}"} if facts.step is not None else {}),
    }
    return _table("", ("", ""), rows)


def _fields(fields: Mapping[str, Any]) -> dict[str, str]:
    shown = {
        name: Path(value).name if isinstance(value, str) and _absolute(value) else value
        for name, value in fields.items()
    }
    return {f"`{name}`": f"`{json.dumps(value)}`" for name, value in shown.items()}


def _places(injection: Injection) -> str:
    lines = [f"* `{path}`" for path in injection.paths[:_SHOWN]]
    rest = len(injection.paths) - len(lines)
    saved = [f"* `{target.path}`, trained in full" for target in injection.saved]
    more = [f"* and {rest} more"] if rest > 0 else []
    return "\n".join([f"## Places ({len(injection.paths)})\n", *lines, *more, *saved, ""])


def _loading(injection: Injection, own: Mapping[str, Any], base: str | None, pretrained: bool) -> str:
    name, method = base or "path/to/the/base", injection.method
    kind = own["base"]["class"]
    load = f'base = transformers.{kind}.from_pretrained("{name}")' if pretrained else "base = ...  # the base model"
    start = "import transformers\n" if pretrained else ""
    blocks = [
        "## How to load it\n\nThe folder of this page is `path/to/adapter`. With lightning_peft, which compares the base first:\n",
        f'```python\n{start}from lightning_peft import load_adapter\n\n{load}\nload_adapter(base, "path/to/adapter")\n```\n',
    ]
    if (
        method.peft_type and start and not method.exact_packed_base
    ):  # those weights are not the base that is loaded here
        blocks.append(
            f"With HF PEFT:\n\n```python\n{start}from peft import PeftModel\n\n{load}\n"
            'model = PeftModel.from_pretrained(base, "path/to/adapter")\n```\n'
        )
        if method.hf_prefix == HF_PREFIX and method.transformers_loads:
            blocks.append(
                f'With transformers:\n\n```python\n{start}\n{load}\nbase.load_adapter("path/to/adapter")\n```\n'
            )
    return "\n".join(blocks)


def _table(title: str, columns: tuple[str, str], rows: Mapping[str, object]) -> str:
    if not rows:
        return ""
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join([*([title, ""] if title else []), f"| {columns[0]} | {columns[1]} |", "|---|---|", *lines, ""])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")

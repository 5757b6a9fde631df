"""What the model is about to be trained on, shown before it is."""

from __future__ import annotations

from typing import Any, Literal

from lightning_peft.errors import ConfigError
from lightning_peft.field_checks import is_whole

PREDICTED, READ = "bold green", "dim"
"""How rich writes what the model learns to predict, and what it reads."""


def preview(
    config: str, rows: int = 3, set: str = "train", colour: Literal["auto", "always", "never"] = "auto"
) -> None:
    """Show rows of the data of a configuration, with what is predicted in colour.

    Args:
        config: the configuration of a run, as of fit.
        rows: how many rows to show.
        set: which set; train, the name of an adapter, or of a validation set.
        colour: whether what is predicted is in colour or in [[double brackets]]; auto is colour on a terminal.

    Raises:
        ConfigError: the configuration has no data module of this library, or no such set.
    """
    from rich.console import Console
    from rich.text import Text

    from lightning_peft.cli.peft_cli import PEFTCLI
    from lightning_peft.data import RowsDataModule

    if not is_whole(rows, 1):
        raise ConfigError(f"preview shows at least one row, got rows={rows!r}")
    data = PEFTCLI(args=["--config", config], run=False).datamodule
    if not isinstance(data, RowsDataModule):
        raise ConfigError(
            f"{config!r} has {type(data).__name__} as data, whose rows are not known; preview shows data modules of lightning_peft"
        )
    console = Console(force_terminal={"auto": None, "always": True, "never": False}[colour], highlight=False)
    marked = not console.is_terminal
    examples = data.first(set, rows)
    console.print(Text(data.summary()), soft_wrap=True)
    for number, example in enumerate(examples, start=1):
        pieces = data.shown(example)
        count = _counted(example.get("labels"))
        console.print(Text(f"\n{set}, row {number}{count}", style="bold"))
        console.print(_text(pieces, marked), soft_wrap=True)


def _text(pieces: list[tuple[str, bool]], marked: bool) -> Any:
    # Not typed as rich's Text: for --help, what this file imports for types is imported.
    from rich.text import Text

    text = Text()
    for piece, predicted in pieces:
        text.append(f"[[{piece}]]" if predicted and marked else piece, style=PREDICTED if predicted else READ)
    return text


def _counted(labels: object) -> str:
    import torch

    from lightning_peft.batch_parts import IGNORED

    if not isinstance(labels, torch.Tensor):
        return ""
    return f": {len(labels)} tokens, {int((labels != IGNORED).sum())} predicted"

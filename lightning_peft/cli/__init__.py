"""The ``lightning-peft`` program, and :class:`PEFTCLI` for a program of your own.

::

    lightning-peft fit --config run.yaml --model.method LoRA --model.method.rank 16
    lightning-peft merge --adapter runs/last.adapter --output merged
    lightning-peft methods

``fit``, ``validate``, ``test`` and ``predict`` are Lightning's command line; the other verbs are typed functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft.cli.program import main

if TYPE_CHECKING:
    from lightning_peft.cli.peft_cli import PEFTCLI

__all__ = ["PEFTCLI", "main"]


def __getattr__(name: str) -> Any:
    if name != "PEFTCLI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_peft.cli.peft_cli import PEFTCLI  # imports Lightning, which `--help` should not wait for

    return PEFTCLI

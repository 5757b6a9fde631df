"""Checkpoints that processes wrote together into a folder, read as one file would hold them.

``torch.distributed.checkpoint`` stores the states of optimizers by names; a file stores them by position, as torch's optimizers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.errors import CheckpointMismatchError


def is_sharded_folder(path: str | Path) -> bool:
    """Tell whether ``path`` is a folder that a run with sharded saving left."""
    return (Path(path) / ".metadata").is_file()


def read_folder(folder: str | Path) -> dict[str, Any]:
    """Return the checkpoint in a folder that processes wrote together, whole. Needs no process group.

    Raises:
        CheckpointMismatchError: ``folder`` is no such checkpoint.
    """
    from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint

    folder = Path(folder)
    missing = [name for name in (".metadata", _METADATA_FILENAME) if not (folder / name).is_file()]
    if missing:
        raise CheckpointMismatchError(
            f"{str(folder)!r} is no whole sharded checkpoint: it has no {' and no '.join(missing)}"
        )
    checkpoint: dict[str, Any] = _load_distributed_checkpoint(folder)
    states: list[dict[str, Any]] = []
    while f"optimizer_{len(states)}" in checkpoint:
        states.append(_by_position(checkpoint.pop(f"optimizer_{len(states)}")))
    if states:
        checkpoint["optimizer_states"] = states
    return checkpoint


def _by_position(state: Mapping[str, Any]) -> dict[str, Any]:
    numbers: dict[str, int] = {}
    groups = []
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    return {"state": {numbers[name]: entry for name, entry in state["state"].items()}, "param_groups": groups}

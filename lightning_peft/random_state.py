"""The state of the random number generators of a process, in types that a weights-only load accepts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of the generators of python, numpy, torch and, where CUDA is in use, the current GPU."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [
            kind,
            torch.from_numpy(np.array(keys, dtype=np.uint32).view(np.int32)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        # A run on the CPU must not start CUDA, so this does not ask whether it is available.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def state_for(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """Return the state of a process out of those of all processes that saved one, which may have been fewer.

    A process that was not there gets one of its own, drawn from that of another: the same in every run, and not the other's numbers.
    """
    state = states[rank % len(states)]
    if rank < len(states):
        return state
    now = random_state()
    try:
        set_random_state(state)
        for _ in range(rank // len(states)):
            seed = random.getrandbits(32)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return random_state()
    finally:
        set_random_state(now)


def of_all_processes(state: dict[str, Any], each: int = 1) -> list[dict[str, Any]]:
    """Return the ``state`` of every process by rank, of so many side by side that of the first. All of them must call this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states[::each]

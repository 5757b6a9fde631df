"""What the allocator of glibc costs training on a CPU, said once where nobody has set it.

glibc hands large blocks back to the system as soon as they are free, and the system clears the pages of the next one, one page fault each.
Two variables of the environment let it keep them. It reads them when a process starts, so all that can be done later is to say so.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch

VARIABLES: Mapping[str, str] = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
"""Blocks of up to 1 GB are kept in the heap, and up to 8 GB of it when they are free."""
_told = False


def allocator_hint(device: torch.device) -> str | None:
    """Return what to set before training on ``device``; None where it would not help, or is set, or was said in this process before.

    Another allocator (jemalloc, tcmalloc) that ``LD_PRELOAD`` brings has no need of it, nor ``GLIBC_TUNABLES`` that set the thresholds.
    """
    global _told
    set_already = [name for name in VARIABLES if name in os.environ]
    elsewhere = "malloc" in os.environ.get("LD_PRELOAD", "") or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if _told or device.type != "cpu" or set_already or elsewhere or platform.libc_ver()[0] != "glibc":
        return None
    _told = True
    settings = " ".join(f"{name}={value}" for name, value in VARIABLES.items())
    return (
        "Training runs on a CPU, where glibc gives the memory of large tensors back to the system and meets page faults for the next ones. Start "
        f"with {settings} to keep it: a step of LoRA on 1,024 tokens with a vocabulary of 32,000 took 12 % less time (docs/performance.md). The process then holds the memory of its largest step"
    )

"""Paired measurements: what all tables of speed and memory here are made with.

The arms of a round run in random order; what counts is the median of the ratios of an arm to the first one in the same round, with a
95 % bootstrap interval. The first arm runs twice a round, and the ratio of the two (A/A) says how far the machine can be trusted: where its
interval leaves 3 %, the figures say nothing. One thread and CPU time on a CPU; events on CUDA.

Two allocators: *plain* glibc gives large tensors back to the system and meets a page fault for each page of the next one; *tuned* keeps them, by
two variables of glibc's malloc, which is nearer to what a GPU's caching allocator does. A script starts itself once for each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_peft.allocator_hint import VARIABLES

Arm = Callable[[], Any]
AGAIN = "again"


@dataclass(frozen=True)
class Staged:
    """An arm of which only the middle counts."""

    before: Callable[[], Any]
    """Makes what ``run`` takes."""
    run: Callable[[Any], Any]
    """What is measured."""
    after: Callable[[Any], Any] = lambda made: None
    """Clears up; it takes what ``run`` took."""

    def __call__(self) -> None:
        self.through(lambda run: run())

    def through(self, measure: Callable[[Arm], Any]) -> Any:
        """Return what ``measure`` finds of the middle."""
        made = self.before()
        found = measure(lambda: self.run(made))
        self.after(made)
        return found


ALLOCATORS: dict[str, Mapping[str, str]] = {"plain": {}, "tuned": VARIABLES}
TRUSTED = 0.03
"""How far from 1 the interval of A/A may reach."""


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and (storage := one.untyped_storage())._cdata not in given:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def peak_bytes(arm: Arm, device: str = "cpu") -> int:
    """Return how many bytes ``arm`` has at a time, at most, above what there was before it."""
    if isinstance(arm, Staged):
        return arm.through(lambda run: peak_bytes(run, device))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as counted:
        arm()
    return counted.peak


def seconds(arm: Arm, device: str = "cpu") -> float:
    """Return what one call of ``arm`` takes: of the CPU, or between two events of the GPU."""
    if isinstance(arm, Staged):
        return arm.through(lambda run: seconds(run, device))
    if device != "cuda":
        start = time.process_time()
        arm()
        return time.process_time() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    arm()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]


@dataclass
class Row:
    """What was measured of one arm."""

    case: str
    """Shape, dtype and whatever else the arms share."""
    arm: str
    """Its name."""
    allocator: str
    """``plain``, ``tuned``, or ``cuda``."""
    ms: float
    """Median milliseconds."""
    ratio: float
    """Median ratio to the first arm."""
    low: float
    """Lower end of the ratio's interval."""
    high: float
    """Upper end."""
    trusted: bool
    """Whether the A/A interval of this case lies within 3 % of 1."""
    peak: int | None = None
    """Peak bytes, where they were counted."""
    peak_ratio: float | None = None
    """To the first arm."""
    overhead: float | None = None
    """(arm - bound) / (first - bound): 1 costs what the first costs, 0 nothing."""


def compare(
    case: str,
    arms: Mapping[str, Arm],
    *,
    rounds: int = 20,
    bound: str | None = None,
    device: str = "cpu",
    memory: bool = False,
    clock: Callable[[Arm], float] | None = None,
) -> list[Row]:
    """Measure ``arms`` beside each other; the first is what the others are compared with.

    Args:
        case: what is measured.
        arms: functions by name.
        rounds: how often each runs, after two rounds that do not count.
        bound: the arm below which none can come; with it rows have an overhead fraction.
        device: ``cpu`` or ``cuda``.
        memory: whether to count peak bytes too.
        clock: returns the seconds of an arm; those of :func:`seconds` if None.
    """
    first, *_ = arms
    again = f"{first} {AGAIN}"
    runs = {first: arms[first], again: arms[first], **arms}
    timed = clock or (lambda arm: seconds(arm, device))
    for _ in range(2):
        for arm in arms.values():
            arm()
    peaks = {name: peak_bytes(arm, device) for name, arm in runs.items()} if memory else {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            times[name].append(timed(runs[name]))
    return judged(case, times, bound=bound, device=device, peaks=peaks)


def judged(
    case: str,
    times: Mapping[str, list[float]],
    *,
    bound: str | None = None,
    device: str = "cpu",
    peaks: Mapping[str, int] | None = None,
) -> list[Row]:
    """Return the rows of ``times``: seconds of each arm, round by round. The first arm is there again under its name with ``AGAIN``."""
    first, *_ = times
    ratios = {name: [a / b for a, b in zip(found, times[first], strict=True)] for name, found in times.items()}
    low, high = interval(ratios[f"{first} {AGAIN}"])
    trusted = low > 1 - TRUSTED and high < 1 + TRUSTED
    rows = []
    for name, found in ratios.items():
        row = Row(
            case,
            name,
            allocator(device),
            1e3 * statistics.median(times[name]),
            statistics.median(found),
            *interval(found),
            trusted,
        )
        if peaks:
            row.peak, row.peak_ratio = peaks[name], peaks[name] / max(1, peaks[first])
        if bound is not None:
            least = statistics.median(ratios[bound])
            row.overhead = (row.ratio - least) / (1 - least) if least < 1 else None
        rows.append(row)
    return rows


def allocator(device: str = "cpu") -> str:
    """Return the name of the allocator this process runs with."""
    if device == "cuda":
        return "cuda"
    return "tuned" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "plain"


def machine(device: str = "cpu") -> str:
    """Return the line that a table is published with."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, torch {torch.__version__}, Python {platform.python_version()}"


def processor() -> str:
    """Return what the processor calls itself."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def markdown(rows: Iterable[Row]) -> str:
    """Return the table of ``rows``."""
    lines = [
        "| case | allocator | arm | median ms | time ratio [95 %] | overhead | peak MB | peak ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = ("", "") if row.peak is None else (f"{row.peak / 1e6:.1f}", f"{row.peak_ratio:.3f}")
        overhead = "" if row.overhead is None else f"{row.overhead:.2f}"
        doubt = "" if row.trusted else " (?)"
        lines.append(
            f"| {row.case} | {row.allocator} | {row.arm} | {row.ms:.4g} | {row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]{doubt} | {overhead} | "
            f"{memory[0]} | {memory[1]} |"
        )
    return "\n".join(lines)


def parser(description: str | None, **sizes: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts have, and a whole number for each of ``sizes``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {**sizes, "rounds": 20}.items():
        made.add_argument(f"--{name}", type=int, default=value)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument(
        "--allocator", choices=("plain", "tuned", "both", "asis"), default="both", help="asis: that of this process"
    )
    made.add_argument("--json", type=Path, help="a file for the figures")
    return made


def publish(args: argparse.Namespace, measure: Callable[[argparse.Namespace], Iterable[Row]]) -> None:
    """Run ``measure`` in a process for each allocator asked for; print the table, and write the figures where they are wanted."""
    torch.set_num_threads(1)
    if args.device == "cuda" or args.allocator == "asis":
        rows = list(measure(args))
    else:
        rows = [
            row
            for name in (("plain", "tuned") if args.allocator == "both" else (args.allocator,))
            for row in started(name)
        ]
    print(f"{machine(args.device)}\n\n{markdown(rows)}", flush=True)
    if args.json:
        about = {"machine": machine(args.device), "arguments": {k: str(v) for k, v in vars(args).items()}}
        args.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))


def started(name: str) -> list[Row]:
    """Run this script again with the allocator ``name`` and return what it measured."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, *sys.argv, "--allocator", "asis", "--json", str(file)]
        subprocess.run(
            command,
            check=True,
            env={**environment, **ALLOCATORS[name], "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        return [Row(**row) for row in json.loads(file.read_text())["rows"]]

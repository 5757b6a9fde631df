"""All measurements of speed and memory beside HF PEFT, by one command: one JSON and one Markdown table.

    python benchmarks/run.py                             # everything, in both allocators: hours
    python benchmarks/run.py --quick                     # a short round of everything: small models, few rounds
    python benchmarks/run.py --only host sizes --output somewhere
    python benchmarks/run.py --device cuda               # what has a GPU's side, with CUDA events

Each script of the table below runs as a program of its own, with what it needs to be small under ``--quick``; arguments behind ``--`` go to all of
them. Peers other than HF PEFT are measured by ``peers.py`` where they are installed, and named as not installed where they are not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from paired import Row, machine, markdown

HERE = Path(__file__).parent
PEERS = {
    "peft": "HF PEFT",
    "adapters": "AdapterHub adapters",
    "litgpt": "LitGPT",
    "torchtune": "torchtune",
    "unsloth": "Unsloth",
}


@dataclass(frozen=True)
class Script:
    """A program that takes the options of ``paired.parser`` and writes its rows."""

    about: str
    """What it measures."""
    quick: str
    """Its options for a short round."""
    cuda: bool = True
    """Whether it has something to measure on a GPU."""


SCRIPTS: dict[str, Script] = {
    "host": Script(
        "what the library costs around the arithmetic",
        "--hidden 256 --layers 2 --vocabulary 512 --adapters 8 --many_hidden 64 --gpt_width 128 --gpt_layers 4 --steps 100 --rounds 3",
        cuda=False,
    ),
    "steps": Script("a step of training", "--cases tiny --rounds 2"),
    "quantized": Script("a step over a quantised base", "--rounds 2"),
    "loss": Script("a loss in chunks", "--hidden 64 --tokens 128 --layers 2 --vocabularies 512 --rounds 2"),
    "sizes": Script("how the cost of a step grows", "--short --rounds 2"),
    "peers": Script("LoRA of peers other than HF PEFT, where installed", "--hidden 64 --tokens 32 --rounds 3"),
}


def installed() -> dict[str, str | None]:
    """Return the version of each peer, or None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PEERS:
        try:
            found[package] = importlib.metadata.version(package) if importlib.util.find_spec(package) else None
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def measured(name: str, args: argparse.Namespace) -> tuple[list[Row], str | None]:
    """Run one script; return its rows, and what it said where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--device", args.device, "--json", str(file)]
        command += ["--allocator", args.allocator] if args.device == "cpu" else []
        command += SCRIPTS[name].quick.split() if args.quick else []
        command += [part for part in args.rest if part != "--"]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment())
        if done.returncode or not file.exists():
            return [], f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        return [Row(**row) for row in json.loads(file.read_text())["rows"]], None


def environment() -> dict[str, str]:
    """Return the environment of the scripts, which find ``paired`` beside them and ask no hub for anything."""
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}


def page(
    args: argparse.Namespace, found: dict[str, list[Row]], failed: dict[str, str], peers: dict[str, str | None]
) -> str:
    """Return the Markdown of a run."""
    lines = ["# Measurements", "", machine(args.device), ""]
    lines += [f"* {PEERS[package]}: {version or 'not installed'}" for package, version in peers.items()]
    for name, rows in found.items():
        lines += [
            "",
            f"## {name}.py: {SCRIPTS[name].about}",
            "",
            markdown(rows) if rows else failed.get(name, "nothing to measure"),
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    here = [name for name in SCRIPTS if (HERE / f"{name}.py").exists()]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=here, help="some of the scripts")
    options.add_argument(
        "--quick", action="store_true", help="small models and few rounds, to see that everything runs"
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--allocator", choices=("plain", "tuned", "both", "asis"), default="both")
    options.add_argument("--output", type=Path, default=Path("measurements"), help="the folder of the two files")
    options.add_argument("rest", nargs="*", help="arguments for the scripts, behind --")
    args = options.parse_args(arguments)
    chosen = [name for name in args.only or here if args.device == "cpu" or SCRIPTS[name].cuda]
    found: dict[str, list[Row]] = {}
    failed: dict[str, str] = {}
    peers = installed()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        print(f"{name}.py ...", flush=True)
        found[name], wrong = measured(name, args)
        if wrong is not None:
            failed[name] = wrong
            print(wrong, file=sys.stderr)
        figures = {
            "machine": machine(args.device),
            "peers": peers,
            "failed": failed,
            "rows": {script: [vars(row) for row in rows] for script, rows in found.items()},
        }
        (args.output / "measurements.json").write_text(json.dumps(figures, indent=1))
        (args.output / "measurements.md").write_text(page(args, found, failed, peers))
    print((args.output / "measurements.md").read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

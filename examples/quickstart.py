"""Adapt a language model to another domain in about a minute and a half, on a CPU and without a network.

::

    documentation of Python  ──>  tokenizer, tiny Llama pretrained from scratch    .cache/quickstart/base
    code of its library      ──>  lightning-peft fit, with LoRA                    .cache/quickstart/run/last.adapter
    base and adapter         ──>  lightning-peft merge                             .cache/quickstart/merged

A second run finds the base in the cache and only adapts it.

Run: ``python examples/quickstart.py``
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from quickstart_base import BASE, CACHE, make_base
from rich.console import Console
from rich.table import Table

CONFIG = "examples/configs/quickstart.yaml"
RUN, MERGED = CACHE / "run", CACHE / "merged"
ADAPTER = RUN / "last.adapter"
DOMAINS = {"docs": "documentation (source domain)", "code": "source code (target domain)"}
PROMPT = "def __init__(self, "
TOLERANCE = 1e-5

console = Console()


def main() -> int:
    """Run all steps and return the exit code."""
    os.chdir(Path(__file__).resolve().parents[1])
    set_environment()
    clock = Clock()

    console.rule("1. The base: a tiny Llama, pretrained on the documentation of Python")
    made = make_base()
    console.print(f"{BASE} was {'made' if made else 'made by an earlier run and is used again'}.")
    clock.lap("base" if made else "base (from the cache)")

    console.rule("2. Adaptation with LoRA to the code of the standard library")
    shutil.rmtree(RUN, ignore_errors=True)
    lightning_peft("fit", "--config", CONFIG)
    clock.lap("adaptation")

    console.rule("3. Merging the adapter into the base")
    lightning_peft("merge", "--adapter", str(ADAPTER), "--output", str(MERGED), "--overwrite")
    clock.lap("merging")

    console.rule("4. What it learned, what it forgot, what it cost")
    table, difference = report()
    clock.lap("evaluation")
    table.caption = f"{clock} A second run uses the base again."
    console.print(table)
    if difference > TOLERANCE:
        console.print(
            f"[red]The merged model is not the adapted one:[/red] the relative difference of their logits is "
            f"{difference:.1e}, more than {TOLERANCE:.0e}."
        )
        return 1
    return 0


def set_environment() -> None:
    """Choose what suits a tiny model, for this program and for those it runs, before torch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # at this size a second thread costs more than it brings
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What torch and Lightning say to each other is not for the reader of a quickstart.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers")


def lightning_peft(*arguments: str) -> None:
    """Run the program ``lightning-peft`` as a user would."""
    console.print(f"$ lightning-peft {' '.join(arguments)}", style="bold")
    subprocess.run([sys.executable, "-m", "lightning_peft.cli", *arguments], check=True)


def report() -> tuple[Table, float]:
    """Return the figures, and the relative difference between the logits of the merged and the adapted model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from lightning_peft import Perplexity, adapters_disabled, load_adapter, trainable_summary

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(BASE)
    load_adapter(model, ADAPTER, trainable=True)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with adapters_disabled(model):
        console.print("[bold]The base goes on:[/bold]", repr(continue_text(model, tokenizer)), markup=True)
    console.print("[bold]Adapted, it goes on:[/bold]", repr(continue_text(model, tokenizer)), markup=True)

    table = Table("", "base", "adapted", title="LoRA on a tiny Llama: from documentation to source code")
    for domain, label in DOMAINS.items():
        text = {"path": str(CACHE / f"{domain}_valid.txt"), "tokenizer": str(BASE)}
        task = Perplexity(**text, block_size=128, batch_size=16, max_tokens=32768)
        with adapters_disabled(model):
            before = task.evaluate(model)["loss"]
        table.add_row(f"loss on held-out {label}", f"{before:.3f}", f"{task.evaluate(model)['loss']:.3f}")

    summary = trainable_summary(model)
    parameters, adapter, base = summary.total - summary.trainable, size(ADAPTER), size(BASE / "model.safetensors")
    share = 100 * summary.trainable / parameters
    table.add_row("parameters, and those trained", f"{parameters:,}", f"{summary.trainable:,} ({share:.1f} %)")
    table.add_row("bytes on disk: model, adapter", f"{base:,}", f"{adapter:,} ({100 * adapter / base:.1f} %)")

    merged = AutoModelForCausalLM.from_pretrained(MERGED).eval()
    ids = tokenizer((CACHE / "code_valid.txt").read_text(encoding="utf-8")[:2000], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        unmerged_logits, merged_logits = (each(input_ids=ids[:, :256]).logits for each in (model, merged))
    difference = float((unmerged_logits - merged_logits).norm() / unmerged_logits.norm())
    table.add_row("logits, merged against unmerged", "", f"differ by {difference:.1e}")
    return table, difference


def continue_text(model: Any, tokenizer: Any) -> str:
    """Let the model sample a continuation of the prompt."""
    import torch

    torch.manual_seed(0)
    ids = model.generate(
        **tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=60, do_sample=True, temperature=0.7, top_k=20
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


class Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: list[str] = []

    def lap(self, name: str) -> None:
        """Note the end of a step."""
        now = time.perf_counter()
        self.laps.append(f"{name} {now - self.last:.0f} s")
        self.last = now

    def __str__(self) -> str:
        return f"Time: {', '.join(self.laps)}; {self.last - self.started:.0f} s in all."


if __name__ == "__main__":
    sys.exit(main())

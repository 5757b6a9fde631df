"""Upcycling against training the dense model on: validation loss at equal tokens, and at equal time.

::

    export LIGHTNING_PEFT_DATA=...
    OMP_NUM_THREADS=1 python benchmarks/moe_upcycling.py train --lr 3e-4 1e-4    # curves, in runs/benchmarks/moe_upcycling.json
    python benchmarks/moe_upcycling.py table                                     # the tables of docs/mixtures.md, from that file

The model is stories260k, which goes on with stories, all parameters trained by a fresh AdamW at a constant rate. For one seed all runs
read the same rows in the same order. The clock runs during training steps only, and is that of the processor: other programs on the
machine take no part in it. The dense model trains for more steps, so that there is a loss of it at the time at which mixtures end.
Learning rates are as given and nothing is tuned.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_peft import CausalLMLoader, FullFineTuning, MoEUpcycling, PEFTModule, TextDataModule

RESULTS = Path("runs/benchmarks/moe_upcycling.json")
EXPERTS: dict[str, Any] = {"experts": 8, "top_k": 2, "train": "all"}
DENSE = "dense"
CONTESTANTS = {
    DENSE: FullFineTuning(),
    "E8K2 renorm": MoEUpcycling(**EXPERTS, combine="renorm"),
    "E8K2 softmax, scaled": MoEUpcycling(**EXPERTS, combine="softmax", weight_scale="auto"),
}


class Curve(Callback):
    """Measures the validation loss every ``every`` steps, and what training took until then."""

    def __init__(self, batches: list[dict[str, torch.Tensor]], every: int) -> None:
        self.batches, self.every, self.seconds, self.begin = batches, every, 0.0, 0.0
        self.points: list[dict[str, float]] = []

    def on_train_start(self, trainer, module):
        self.measure(trainer, module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.begin = time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seconds += time.process_time() - self.begin
        if trainer.global_step % self.every == 0:
            self.measure(trainer, module)

    @torch.no_grad()
    def measure(self, trainer, module):
        module.model.eval()
        total = sum(float(module.model(**batch).loss) * len(batch["labels"]) for batch in self.batches)
        module.model.train()
        loss = total / sum(len(batch["labels"]) for batch in self.batches)
        self.points.append({"step": trainer.global_step, "seconds": self.seconds, "loss": loss})
        print(self.points[-1], flush=True)


def run(label: str, lr: float, seed: int, steps: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train one contestant and return its curve."""
    data_dir = Path(os.environ["LIGHTNING_PEFT_DATA"])
    folder = str(data_dir / "models" / "stories260k")
    data = TextDataModule(
        folder,
        str(data_dir / "lm" / "tinystories_train.jsonl"),
        str(data_dir / "lm" / "tinystories_valid.jsonl"),
        block_size=options.block,
        batch_size=options.rows,
        val_batch_size=16,
        max_val_tokens=options.val_tokens,
        seed=seed,
    )
    data.setup("fit")
    loaders = data.val_dataloader()
    curve = Curve(list(loaders[0] if isinstance(loaders, list) else loaders), options.every)
    seed_everything(seed, verbose=False)
    module = PEFTModule(
        CausalLMLoader(path=folder), CONTESTANTS[label], optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr)
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=[curve],
    )
    trainer.fit(module, data)
    return curve.points


def train(options: argparse.Namespace) -> None:
    """Train every contestant at every rate with every seed; the file is complete after each."""
    torch.set_num_threads(1)
    settings = {key: value for key, value in vars(options).items() if key != "part"}
    results: dict[str, Any] = {"settings": settings, "torch": torch.__version__, "runs": []}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for lr in options.lr:
        for seed in options.seeds:
            for label in CONTESTANTS:
                print(label, lr, seed, flush=True)
                steps = options.dense_steps if label == DENSE else options.steps
                points = run(label, lr, seed, steps, options)
                results["runs"].append({"label": label, "lr": lr, "seed": seed, "points": points})
                RESULTS.write_text(json.dumps(results, indent=1))


def at_time(points: list[dict[str, float]], seconds: float) -> float | None:
    """Return the loss at a time, between two measurements on a straight line; None after the last one."""
    for before, after in zip(points, points[1:], strict=False):
        if seconds <= after["seconds"]:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before["loss"] + share * (after["loss"] - before["loss"])
    return None


def table() -> None:
    """Print the tables of the docs."""
    results = json.loads(RESULTS.read_text())
    steps, every = results["settings"]["steps"], results["settings"]["every"]
    runs = {(one["lr"], one["seed"], one["label"]): one["points"] for one in results["runs"]}
    marks = range(0, steps + 1, every)
    print(f"Equal tokens\n\n| rate | seed | | {' | '.join(f'{mark} steps' for mark in marks)} | ms a step |")
    print("|---" * (len(marks) + 4) + "|")
    for (lr, seed, label), points in runs.items():
        losses = [f"{point['loss']:.4f}" for point in points if point["step"] <= steps]
        ms = 1e3 * points[-1]["seconds"] / points[-1]["step"]
        print(f"| {lr:g} | {seed} | {label} | {' | '.join(losses)} | {ms:.0f} |")
    print("\nEqual time: shares of what the dense model takes for as many steps as the mixtures have\n")
    shares = (0.25, 0.5, 0.75, 1.0, 1.5)
    print(f"| rate | seed | | {' | '.join(f'{share:g}' for share in shares)} | at its end | dense at that time |")
    print("|---" * (len(shares) + 5) + "|")
    for (lr, seed, label), points in runs.items():
        dense = runs[lr, seed, DENSE]
        unit = next(point["seconds"] for point in dense if point["step"] == steps)
        cells = [at_time(points, share * unit) for share in shares]
        last = points[-1]
        end = [None, None] if label == DENSE else [last["loss"], at_time(dense, last["seconds"])]
        written = ["" if loss is None else f"{loss:.4f}" for loss in (*cells, *end)]
        print(f"| {lr:g} | {seed} | {label} | {' | '.join(written)} |")
    print("\nStart, and difference from dense continuation after the last step of the mixtures\n")
    for (lr, seed, label), points in runs.items():
        if label != DENSE:
            pairs = [(point, next(p for p in runs[lr, seed, DENSE] if p["step"] == point["step"])) for point in points]
            start, end = ([mine["loss"] - dense["loss"] for mine, dense in pairs][place] for place in (0, -1))
            print(f"{lr:g} seed {seed} {label}: start {start:+.1e}, end {end:+.4f}")
    for lr in dict.fromkeys(one["lr"] for one in results["runs"]):
        ends = {
            label: statistics.mean(
                next(p["loss"] for p in points if p["step"] == steps)
                for (rate, _, name), points in runs.items()
                if (rate, name) == (lr, label)
            )
            for label in CONTESTANTS
        }
        print(f"{lr:g} mean of the seeds after {steps} steps: {ends}")


def main() -> None:
    """Run the part that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "table"])
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--dense-steps", type=int, default=700)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--val-tokens", type=int, default=32768)
    options = parser.parse_args()
    if options.part == "train":
        train(options)
    else:
        table()


if __name__ == "__main__":
    main()

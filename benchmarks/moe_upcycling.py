"""Upcycling against training the dense model on: validation loss at equal tokens, and at equal time.

::

    export LIGHTNING_PEFT_DATA=...
    OMP_NUM_THREADS=1 python benchmarks/moe_upcycling.py train --lr 3e-4 1e-4    # curves, in runs/benchmarks/moe_upcycling.json
    python benchmarks/moe_upcycling.py table                                     # the tables of docs/mixtures.md, from that file
    python benchmarks/moe_upcycling.py start                                     # the loss before any step, for many choices
    python benchmarks/moe_upcycling.py pretrain --lr 1.5e-3                      # a model that has not learned all it can
    python benchmarks/moe_upcycling.py train --lr 1.5e-3 --model runs/benchmarks/unfinished --results runs/benchmarks/unfinished.json

The model is stories260k, or the one that ``pretrain`` made, which goes on with stories, all parameters trained by a fresh AdamW at a constant rate. For one seed all runs
read the same rows in the same order. The clock runs during training steps only, and is that of the processor: other programs on the
machine take no part in it. The dense model trains for more steps, so that there is a loss of it at the time at which mixtures end.
Learning rates are as given and nothing is tuned.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import AutoTokenizer

from lightning_peft import CausalLMLoader, FullFineTuning, MoEUpcycling, PEFTModule, TextDataModule, inject
from lightning_peft.moe.statistics import Routed, RouterStatistics

UNFINISHED = Path("runs/benchmarks/unfinished")
EXPERTS: dict[str, Any] = {"experts": 8, "top_k": 2, "train": "all"}
DENSE = "dense"
CONTESTANTS = {
    DENSE: FullFineTuning(),
    "E8K2 renorm": MoEUpcycling(**EXPERTS, combine="renorm"),
    "E8K2 softmax, scaled": MoEUpcycling(**EXPERTS, combine="softmax", weight_scale="auto"),
}

CHOICE: dict[str, Any] = {"router": "expert_choice", "allow_noncausal": True}
STARTS: list[tuple[str, dict[str, Any]]] = [
    ("E8 K2 renorm", {}),
    ("E8 K1 straight-through", {"top_k": 1, "combine": "straight_through"}),
    ("E8 K2 softmax, no scale", {"combine": "softmax", "weight_scale": "none"}),
    ("the same, last half of the layers", {"combine": "softmax", "weight_scale": "none", "layers": "last_half"}),
    ("the same, every other layer", {"combine": "softmax", "weight_scale": "none", "layers": "every_other"}),
    ("E8 K2 softmax, `auto`", {"combine": "softmax"}),
    ("E8 K2 softmax, `spread`", {"combine": "softmax", "weight_scale": "spread"}),
    ("E8 K2 sigmoid, `auto`", {"router": "sigmoid", "combine": "softmax"}),
    ("G2: E16 K4 renorm", {"granularity": 2, "top_k": 4}),
    ("G2: E16 K4 softmax, `auto`", {"granularity": 2, "top_k": 4, "combine": "softmax"}),
    ("E8 K2 renorm, noise 1 %", {"expert_noise": 0.01}),
    ("E8 K2 renorm, noise 10 %", {"expert_noise": 0.1}),
    ("E8 K2 renorm, 10 % re-drawn", {"reinit": 0.1}),
    ("E8 K2 renorm, 50 % re-drawn", {"reinit": 0.5}),
    ("Expert Choice E8 C1", {**CHOICE, "capacity": 1.0}),
    ("Expert Choice E8 C2", CHOICE),
    ("Expert Choice E8 C2, each sequence", {**CHOICE, "group": "sequence"}),
    ("Expert Choice E8 C2, uncovered: dense", {**CHOICE, "uncovered": "dense"}),
    ("Expert Choice E32 C2", {**CHOICE, "experts": 32}),
    ("Expert Choice E32 C2, last half", {**CHOICE, "experts": 32, "layers": "last_half"}),
]


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

    def measure(self, trainer, module):
        loss = validation_loss(module.model, self.batches)
        self.points.append({"step": trainer.global_step, "seconds": self.seconds, "loss": loss})
        print(self.points[-1], flush=True)


@torch.no_grad()
def validation_loss(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Return the mean loss a token; all rows have the same length."""
    model.eval()
    total = sum(float(model(**batch).loss) * len(batch["labels"]) for batch in batches)
    model.train()
    return total / sum(len(batch["labels"]) for batch in batches)


def stories260k() -> str:
    """Return the folder of stories260k, whose tokenizer all runs use."""
    return str(Path(os.environ["LIGHTNING_PEFT_DATA"]) / "models" / "stories260k")


def pretrain(options: argparse.Namespace) -> None:
    """Train a Llama of 4 layers of width 128 from nothing, with AdamW at a constant rate, and write it to ``UNFINISHED``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    data, steps, (lr,) = stories(0, options), options.pretrain_steps, options.lr
    seed_everything(0, verbose=False)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    epochs = itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count())
    for step, batch in enumerate(itertools.islice(epochs, steps), 1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(step, f"training {float(loss):.4f}", flush=True)
    print(f"validation {validation_loss(model, validation_batches(data)):.4f} after {steps} steps")
    model.save_pretrained(UNFINISHED)
    AutoTokenizer.from_pretrained(stories260k()).save_pretrained(UNFINISHED)


def stories(seed: int, options: argparse.Namespace) -> TextDataModule:
    """Return the training and validation rows."""
    texts = Path(os.environ["LIGHTNING_PEFT_DATA"]) / "lm"
    data = TextDataModule(
        stories260k(),
        str(texts / "tinystories_train.jsonl"),
        str(texts / "tinystories_valid.jsonl"),
        block_size=options.block,
        batch_size=options.rows,
        val_batch_size=16,
        max_val_tokens=options.val_tokens,
        seed=seed,
    )
    data.setup("fit")
    return data


def validation_batches(data: TextDataModule) -> list[dict[str, torch.Tensor]]:
    """Return the validation rows in batches."""
    loaders = data.val_dataloader()
    return list(loaders[0] if isinstance(loaders, list) else loaders)


def start(options: argparse.Namespace) -> None:
    """Print the loss before any step, with one draw of the routers each."""
    torch.set_num_threads(1)
    batches = validation_batches(stories(0, options))
    dense = validation_loss(CausalLMLoader(path=options.model or stories260k()).load(), batches)
    print(f"dense loss {dense:.4f}\n\n| | loss above dense | tokens without an expert, a layer |\n|---|---|---|")
    for label, fields in (one for one in STARTS if one[0].startswith(options.only)):
        seed_everything(options.seeds[0], verbose=False)
        model = CausalLMLoader(path=options.model or stories260k()).load()
        inject(model, MoEUpcycling(**fields))
        loss = validation_loss(model, batches) - dense
        routers = [module for module in model.modules() if isinstance(module, Routed)]
        for router in routers:
            router.statistics = RouterStatistics(router.num_experts)
        with torch.no_grad():  # statistics are of training, which is the same forward here
            for batch in batches[:4]:
                model.train()(**batch)
        shares = [router.statistics.report().uncovered for router in routers]
        uncovered = f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %" if max(shares) else "none"
        print(f"| {label} | {loss:+.4f} | {uncovered} |", flush=True)


def run(label: str, lr: float, seed: int, steps: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train one contestant and return its curve."""
    data = stories(seed, options)
    curve = Curve(validation_batches(data), options.every)
    seed_everything(seed, verbose=False)
    module = PEFTModule(
        CausalLMLoader(path=options.model or stories260k()),
        CONTESTANTS[label],
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr),
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
    settings = {key: value for key, value in vars(options).items() if key not in ("part", "model", "results")}
    results: dict[str, Any] = {"settings": settings, "torch": torch.__version__, "runs": []}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for lr in options.lr:
        for seed in options.seeds:
            for label in CONTESTANTS:
                print(label, lr, seed, flush=True)
                steps = options.dense_steps if label == DENSE else options.steps
                points = run(label, lr, seed, steps, options)
                results["runs"].append({"label": label, "lr": lr, "seed": seed, "points": points})
                options.results.write_text(json.dumps(results, indent=1))


def at_time(points: list[dict[str, float]], seconds: float) -> float | None:
    """Return the loss at a time, between two measurements on a straight line; None after the last one."""
    for before, after in itertools.pairwise(points):
        if seconds <= after["seconds"]:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before["loss"] + share * (after["loss"] - before["loss"])
    return None


def table(options: argparse.Namespace) -> None:
    """Print the tables of the docs."""
    results = json.loads(options.results.read_text())
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
    shares = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.7)
    print(f"| rate | seed | | {' | '.join(f'{share:g}' for share in shares)} |")
    print("|---" * (len(shares) + 3) + "|")
    for (lr, seed, label), points in runs.items():
        dense = runs[lr, seed, DENSE]
        unit = next(point["seconds"] for point in dense if point["step"] == steps)
        cells = [at_time(points, share * unit) for share in shares]
        written = ["" if loss is None else f"{loss:.4f}" for loss in cells]
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
    parser.add_argument("part", choices=["pretrain", "train", "table", "start"])
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--dense-steps", type=int, default=700)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--only", default="", help="of start, the rows whose label begins with this")
    parser.add_argument("--val-tokens", type=int, default=32768)
    parser.add_argument("--model", help="folder of the dense model, in place of stories260k")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks/moe_upcycling.json"))
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    options = parser.parse_args()
    {"pretrain": pretrain, "train": train, "table": table, "start": start}[options.part](options)


if __name__ == "__main__":
    main()

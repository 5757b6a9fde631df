"""Every built-in method at equal steps: what it learns, what it forgets, what it costs.

::

    export LIGHTNING_PEFT_DATA=...
    export OMP_NUM_THREADS=1
    python benchmarks/methods.py train --corpus e2e            # results in runs/benchmarks/e2e/<method>.json
    python benchmarks/methods.py train --corpus shakespeare
    python benchmarks/methods.py time                          # runs/benchmarks/time.json
    python benchmarks/methods.py table                         # writes docs/benchmarks.md from these files

The model is stories260k (a Llama of 260,032 parameters trained on short stories). The target is the held-out loss on E2E
restaurant descriptions or Shakespeare, the source the loss on stories it was trained on: what rises there is forgotten. Learning
rates are common ones for each kind of method and were not tuned. Step times are medians over rounds in which every
method takes one step after the other, on the same batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

import lightning_peft as lp
from lightning_peft import AdapterCheckpoint, CausalLMLoader, PEFTModule, TextDataModule, inject, trainable_summary

RUNS = Path("runs/benchmarks")
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BASE = "(the base)"

CONTESTANTS: dict[str, tuple[dict[str, Any], float]] = {
    # class name, or class name and variant: fields, learning rate
    "LoRA": ({"rank": 8}, 2e-3),
    "LoRA:rslora": ({"rank": 8, "rslora": True}, 2e-3),
    "QLoRA": ({"rank": 8}, 2e-3),
    "DoRA": ({"rank": 8}, 2e-3),
    "PiSSA": ({"rank": 8}, 2e-3),
    "OLoRA": ({"rank": 8}, 2e-3),
    "LoftQ": ({"rank": 8}, 2e-3),
    "EVA": ({"rank": 8}, 2e-3),
    "LoRAGA": ({"rank": 8}, 2e-3),
    "LoRAPlus": ({"rank": 8}, 5e-4),
    "LoRAFA": ({"rank": 8}, 2e-3),
    "VeRA": ({"rank": 64}, 2e-2),
    "AdaLoRA": ({"init_rank": 12, "target_rank": 8, "initial_steps": 20, "final_steps": 60}, 5e-3),
    "Bottleneck:houlsby": ({"bottleneck_size": 8}, 2e-3),
    "Bottleneck:pfeiffer": ({"bottleneck_size": 16}, 2e-3),
    "Bottleneck:lin": ({"bottleneck_size": 16}, 2e-3),
    "Bottleneck:parallel": ({"bottleneck_size": 16}, 2e-3),
    "Compacter": ({"bottleneck_size": 16}, 5e-3),
    "PrefixTuning": ({"num_virtual_tokens": 20}, 1e-2),
    "PromptTuning": ({"num_virtual_tokens": 20}, 3e-2),
    "PTuning": ({"num_virtual_tokens": 20}, 5e-3),
    "TrainableTokens": ({"tokens": list(range(3, 103))}, 2e-2),
    "BitFit": ({"add_missing": True}, 1e-2),
    "NormTuning": ({}, 2e-2),
    "MixLoRA": ({"experts": 4, "rank": 8}, 2e-3),
    "LoRAMixture": ({"experts": 4, "rank": 4}, 2e-3),
    "MoEUpcycling": ({"experts": 4}, 1e-3),
    "TopLayers": ({}, 1e-3),
    "FullFineTuning": ({}, 1e-3),
}


def make(label: str) -> tuple[Any, float]:
    """Return the method of a row, and its learning rate."""
    name, _, variant = label.partition(":")
    fields, lr = CONTESTANTS[label]
    kind = getattr(lp, name)
    preset = getattr(kind, variant, None) if variant else None
    return (preset(**fields) if callable(preset) else kind(**fields)), lr


def check_complete() -> None:
    """Demand that no registered method is missing."""
    ours = {m.__name__ for m in lp.get_registry().methods.values() if m.__module__.startswith("lightning_peft.")}
    missing = ours - {label.partition(":")[0] for label in CONTESTANTS}
    if missing:
        raise SystemExit(f"CONTESTANTS lacks {sorted(missing)}")


def data_module(corpus: str, model: str) -> TextDataModule:
    """Return the batches of a corpus, with the source stories as a second validation set."""
    data = Path(os.environ["LIGHTNING_PEFT_DATA"])
    common: dict[str, Any] = {"separator": "bos", "block_size": 128, "batch_size": 8, "val_batch_size": 16}
    common["max_val_tokens"] = 32768
    stories = str(data / "lm" / "tinystories_valid.jsonl")
    if corpus == "e2e":
        texts = {"e2e": str(data / "e2e" / "valid.jsonl"), "stories": stories}
        pair = "{mr} => {ref}"
        template = {"train": pair, "e2e": pair, "stories": "{text}"}
        return TextDataModule(model, str(data / "e2e" / "train.jsonl"), texts, template, **common)
    return TextDataModule(
        model, str(data / "lm" / "tinyshakespeare.txt"), {"stories": stories}, val_fraction=0.1, **common
    )


def train(corpus: str, steps: int, only: list[str]) -> None:
    """Train every method and write one file of figures for each."""
    model = f"{os.environ['LIGHTNING_PEFT_DATA']}/models/stories260k"
    for label in only or [BASE, *CONTESTANTS]:
        folder = RUNS / corpus / label.replace(":", "-").strip("()").replace(" ", "_")
        seed_everything(1, verbose=False)
        method, lr = make("LoRA" if label == BASE else label)
        module = PEFTModule(
            CausalLMLoader(path=model), method, optimizer=lambda groups, lr=lr: torch.optim.AdamW(groups, lr=lr)
        )
        checkpoint = AdapterCheckpoint(dirpath=folder, filename="end", enable_version_counter=False)
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0 if label != BASE else None,
            callbacks=[checkpoint],
            default_root_dir=folder,
        )
        data = data_module(corpus, model)
        if label != BASE:
            trainer.fit(module, data)
        judge = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = judge.validate(module, data, verbose=False)
        by_name = {key: value for one in losses for key, value in one.items()}
        keys = sorted((key for key in by_name if key.startswith("val_loss/")), key=lambda key: "stories" in key)
        target, source = (by_name[key] for key in keys)
        figures = {
            "target": target,
            "source": source,
            "steps": 0 if label == BASE else steps,
            "lr": lr,
        }
        if label != BASE:
            figures |= {
                "trained": trainable_summary(module.model).trainable,
                "adapter_bytes": (folder / "end.adapter" / "adapter_model.safetensors").stat().st_size,
                "ckpt_bytes": (folder / "end.ckpt").stat().st_size,
            }
        (folder.parent / f"{folder.name}.json").parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / f"{folder.name}.json").write_text(json.dumps({"label": label, **figures}, indent=2))
        print(corpus, label, figures, flush=True)


def measure_time(rounds: int) -> None:
    """Measure a training step of every method, interleaved, and write the medians."""
    folder = f"{os.environ['LIGHTNING_PEFT_DATA']}/models/stories260k"
    torch.manual_seed(0)
    batch = torch.randint(3, 512, (8, 128))
    steppers = {}
    for label in CONTESTANTS:
        method, lr = make(label)
        model = CausalLMLoader(path=folder).load().train()
        inject(model, method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

        def step(model: Any = model, optimizer: Any = optimizer) -> float:
            begin = time.perf_counter()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - begin

        steppers[label] = step
    times: dict[str, list[float]] = {label: [] for label in steppers}
    for number in range(rounds + 2):
        for label, step in steppers.items():
            seconds = step()
            if number >= 2:  # the first rounds warm up
                times[label].append(seconds)
    ratios = {
        label: statistics.median(mine / lora for mine, lora in zip(times[label], times["LoRA"], strict=True))
        for label in times
    }
    RUNS.mkdir(parents=True, exist_ok=True)
    figures = {
        label: {"ms": 1000 * statistics.median(values), "to_lora": ratios[label]} for label, values in times.items()
    }
    (RUNS / "time.json").write_text(json.dumps({"rounds": rounds, "figures": figures}, indent=2))


def table() -> None:
    """Write docs/benchmarks.md from the files of figures."""
    check_complete()
    timing = json.loads((RUNS / "time.json").read_text())
    held = {
        corpus: {d["label"]: d for file in (RUNS / corpus).glob("*.json") if (d := json.loads(file.read_text()))}
        for corpus in ("e2e", "shakespeare")
    }
    steps = held["e2e"]["LoRA"]["steps"]
    head = [
        "method",
        "learning rate",
        "E2E loss",
        "stories after E2E",
        "Shakespeare loss",
        "stories after Shakespeare",
        "trained parameters",
        "adapter bytes",
        "`.ckpt` bytes",
        "step, ms",
        "step, LoRA = 1",
    ]
    rows = [_row(label, held, timing["figures"]) for label in [BASE, *CONTESTANTS]]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    DOCS.write_text(
        _TEXT.format(
            steps=steps,
            rounds=timing["rounds"],
            torch=torch.__version__,
            machine=platform.machine(),
            table="\n".join(lines),
        ),
        encoding="utf-8",
    )


def _row(label: str, held: dict[str, Any], timing: dict[str, Any]) -> list[str]:
    e2e, shakespeare = held["e2e"][label], held["shakespeare"][label]
    losses = [f"{figures[key]:.3f}" for figures in (e2e, shakespeare) for key in ("target", "source")]
    if label == BASE:
        return [label, "", *losses, "0", "0", "0", "", ""]
    sizes = [f"{e2e[key]:,}" for key in ("trained", "adapter_bytes", "ckpt_bytes")]
    name = " ".join(f"`{part}`" for part in label.split(":"))
    return [name, f"{e2e['lr']:g}", *losses, *sizes, f"{timing[label]['ms']:.0f}", f"{timing[label]['to_lora']:.2f}"]


_TEXT = """# Benchmarks

## All methods at equal steps

{steps} steps of AdamW with 8 rows of 128 tokens on stories260k, a Llama of 260,032 parameters trained on short stories; float32, one
thread, {machine}, torch {torch}. *E2E* and *Shakespeare* are held-out losses a token on the text that was trained on (lower is better);
*stories* is the loss on what the model knew before: what stands above the row of the base is forgotten. Learning rates are
common ones for each kind of method and were not tuned, so a row says what the method does at that rate, not the best it can do.
Step times are medians of {rounds} rounds in which every method takes one step in turn on the same batch; the last column is the median
ratio to LoRA's step in the same round, on a machine that does other work too. On a model this small the fixed cost of Python weighs
more than on a large one.

{table}

Made by `benchmarks/methods.py`, which says how to run it.
"""


def main() -> None:
    """Run the part that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "time", "table"])
    parser.add_argument("--corpus", choices=["e2e", "shakespeare"], default="e2e")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=[], help="labels of methods to train")
    given = parser.parse_args()
    if given.part == "train":
        train(given.corpus, given.steps, given.only)
    elif given.part == "time":
        measure_time(given.rounds)
    else:
        table()


if __name__ == "__main__":
    main()

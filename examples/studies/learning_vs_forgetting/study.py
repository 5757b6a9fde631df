"""Does LoRA learn less and forget less? The question of Biderman et al. (arXiv 2405.09673), asked of two small pretrained Llamas.

::

    export LIGHTNING_PEFT_DATA=...                                        # folder of models and texts
    python examples/studies/learning_vs_forgetting/study.py               # every run that is not there yet, then the report
    python examples/studies/learning_vs_forgetting/study.py --report      # the report alone

Each run trains one base with one method at one learning rate on one text, and `ForgettingEvaluation` measures it as it goes: the loss on
held-out text of the target (learned), the loss on stories of the kind the base was pretrained on and its judgement of
grammatical sentences in BLiMP (forgotten), and the divergence from the base on stories. A run is one JSON file in the output folder, so a study that
was stopped goes on where it was. Every file is of one seed; runs are spread over as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

STEPS, MEASURED_EVERY, SEED = 200, 50, 1
ROWS, BLOCK = 8, 128
JUDGED_TOKENS, ANCHOR_TOKENS, PAIRS_OF_A_KIND = 8192, 4096, 10
TRAINED_TOKENS: int | None = None  # all there are

# Method and the learning rates it is tried at: three around what is common for it.
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "full": ("FullFineTuning", {}, (3e-4, 1e-3, 3e-3)),
    "LoRA r=1": ("LoRA", {"rank": 1, "alpha": 2}, (1e-3, 3e-3, 1e-2)),
    "LoRA r=4": ("LoRA", {"rank": 4, "alpha": 8}, (1e-3, 3e-3, 1e-2)),
    "LoRA r=16": ("LoRA", {"rank": 16, "alpha": 32}, (1e-3, 3e-3, 1e-2)),
    "LoRA r=64": ("LoRA", {"rank": 64, "alpha": 128}, (1e-3, 3e-3, 1e-2)),
    "BitFit": ("BitFit", {"add_missing": True}, (3e-3, 1e-2, 3e-2)),
    "prefix": ("PrefixTuning", {"num_virtual_tokens": 20}, (3e-3, 1e-2, 3e-2)),
    "adapters": ("Bottleneck", {"bottleneck_size": 16}, (1e-3, 3e-3, 1e-2)),
}
TARGETS = {"LoRA": ["all_linear"]}  # of the model, where the paper adapts more than the default of the method
STUDIES = (("stories260k", "shakespeare"), ("stories260k", "e2e"), ("babyllama105", "e2e"))


@dataclass(frozen=True)
class Run:
    """One training run."""

    base: str
    corpus: str
    method: str
    lr: float

    def file(self, output: Path) -> Path:
        """Where its figures are."""
        return (
            output / self.base / self.corpus / self.method.replace(" ", "_").replace("=", "") / f"lr={self.lr:g}.json"
        )


def runs() -> Iterator[Run]:
    """All runs, the longest first, so that no process is left with one at the end."""
    for base, corpus in reversed(STUDIES):
        for method, (_, _, rates) in METHODS.items():
            for lr in rates:
                yield Run(base, corpus, method, lr)


def corpora(base: str, corpus: str, data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the data module reads, and what the held-out loss is measured on."""
    if corpus == "e2e":
        pair = "{mr} => {ref}"
        return {"train": str(data / "e2e/train.jsonl"), "template": pair}, {
            "path": str(data / "e2e/valid.jsonl"),
            "template": pair,
        }
    return {"train": str(data / "lm/tinyshakespeare.txt"), "val_fraction": 0.1}, {}


def carry_out(run: Run, output: Path, steps: int = STEPS) -> float:
    """Train and measure one run, write its file, and return the seconds it took."""
    import torch
    from lightning.pytorch import Trainer, seed_everything

    import lightning_peft as lp

    started = time.perf_counter()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = Path(os.environ["LIGHTNING_PEFT_DATA"])
    model = str(data / "models" / run.base)
    kind, fields, _ = METHODS[run.method]
    texts, held_out = corpora(run.base, run.corpus, data)
    if not held_out:
        held_out = {"path": str(held_out_part(Path(texts["train"]), texts["val_fraction"], output))}
    text = partial(lp.Perplexity, tokenizer=model, block_size=BLOCK, batch_size=16, max_tokens=JUDGED_TOKENS)
    stories = {"path": str(data / "lm/tinystories_valid.jsonl"), "separator": "bos"}
    callback = lp.ForgettingEvaluation(
        {
            "stories": text(**stories),
            "blimp": lp.MinimalPairs(
                path=str(data / "mc/blimp_dev.jsonl"), tokenizer=model, examples_per_group=PAIRS_OF_A_KIND
            ),
        },
        {run.corpus: text(**held_out, separator="bos" if "template" in held_out else "none")},
        anchor=lp.AnchorText(**stories, tokenizer=model, max_tokens=ANCHOR_TOKENS),
        every_n_steps=MEASURED_EVERY,
        output=str(run.file(output).with_suffix("")),
    )
    seed_everything(SEED, verbose=False)
    module = lp.PEFTModule(
        lp.CausalLMLoader(path=model),
        getattr(lp, kind)(**fields),
        TARGETS.get(kind),
        optimizer=partial(torch.optim.AdamW, lr=run.lr, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_up_and_decay, steps)),
    )
    batches = lp.TextDataModule(
        model, **texts, separator="bos", block_size=BLOCK, batch_size=ROWS, max_train_tokens=TRAINED_TOKENS, seed=SEED
    )
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        limit_val_batches=0,
        gradient_clip_val=1.0,
        **quiet,
    )
    trainer.fit(module, batches)
    seconds = time.perf_counter() - started
    found = {
        **run.__dict__,
        "trained": lp.trainable_summary(module.model).trainable,
        "base_figures": {name: dict(figures) for name, figures in callback.base.items()},
        "points": callback.points,
        "seconds": seconds,
    }
    file = run.file(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    partial_file.replace(file)  # so that a file is whole or not there
    return seconds


def warm_up_and_decay(steps: int, step: int) -> float:
    """A tenth of the steps up, then down in a cosine to a tenth of the rate."""
    import math

    up = max(1, steps // 10)
    if step < up:
        return (step + 1) / up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - up) / max(1, steps - up)))


def held_out_part(text: Path, fraction: float, output: Path) -> Path:
    """Write the end of a text file, which the data module holds out, to a file of its own."""
    whole = text.read_text(encoding="utf-8")
    file = output / f"{text.stem}_held_out.txt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")
        own.write_text(whole[-int(len(whole) * fraction * 0.95) :], encoding="utf-8")
        own.replace(file)
    return file


def main() -> None:
    """Carry out what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/learning_vs_forgetting"), help="folder of runs and report"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    parser.add_argument("--only", default="", help="carry out only runs with this in their file's name")
    parser.add_argument(
        "--report", action="store_true", help="write the report of the runs there are, and carry out none"
    )
    given = parser.parse_args()
    if not os.environ.get("LIGHTNING_PEFT_DATA"):
        raise SystemExit("set LIGHTNING_PEFT_DATA to the folder of models and texts")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    missing = [run for run in runs() if given.only in str(run.file(Path())) and not run.file(given.output).exists()]
    failed = [] if given.report else carry_out_all(missing, given.output, given.steps, given.workers)
    sys.path.insert(0, str(Path(__file__).parent))
    from report import write_report

    write_report([run.file(given.output) for run in runs() if run.file(given.output).exists()], given.output)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(str(run) for run in failed)}")


def carry_out_all(missing: list[Run], output: Path, steps: int, workers: int) -> list[Run]:
    """Carry out runs in processes, print each as it ends, and return those that failed."""
    failed = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(carry_out, run, output, steps): run for run in missing}
        for number, future in enumerate(as_completed(waiting), 1):
            run = waiting[future]
            try:
                said = f"{future.result():.0f} s"
            except Exception:
                traceback.print_exc()
                failed.append(run)
                said = "failed"
            print(f"{number}/{len(missing)}  {run.base} {run.corpus} {run.method} lr={run.lr:g}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    main()

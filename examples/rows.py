"""Two adapters learn from one stream of mixed batches, each from its own rows, and then answer side by side.

::

    {"input_ids": (8, 12), "labels": (8, 12), "adapter": ["up", "down", "up", "", ...]}      "": the base alone

Everything is random and small: a few seconds on a CPU, without a network. Run: ``python examples/rows.py``
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_peft import Adaptation, Bottleneck, LoRA, PEFTModule
from lightning_peft.testing import tiny_llama

STEPS = {"up": 1, "down": -1, "": 0}
"""What each adapter learns to count by; the base is not trained."""


def examples(rows: int) -> list[dict[str, Any]]:
    """Return rows of counting tokens, each with the name of its adapter."""
    made = []
    for row in range(rows):
        name = list(STEPS)[row % len(STEPS)]
        ids = (torch.arange(12) * STEPS[name] + row * 7) % 128
        made.append({"input_ids": ids, "labels": ids, "adapter": name})
    return made


def main() -> dict[str, float]:
    """Train, predict, and return how often each adapter is right about the next token."""
    warnings.filterwarnings("ignore")
    module = PEFTModule(
        tiny_llama(),
        [Adaptation(LoRA(rank=8), name="up"), Adaptation(Bottleneck(bottleneck_size=16), name="down")],
        by_rows=True,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=6, enable_model_summary=False, **options)
    trainer.fit(module, DataLoader(examples(192), batch_size=24))
    shown = examples(6)
    logits = trainer.predict(module, DataLoader(shown, batch_size=6))[0]
    found: dict[str, float] = {}
    for row, example in enumerate(shown):
        right = (logits[row, :-1].argmax(-1) == example["input_ids"][1:]).float().mean()
        found[example["adapter"] or "base"] = float(right)
    return found


if __name__ == "__main__":
    for name, share in main().items():
        print(f"{name:5} {share:4.0%} of the next tokens right")

"""What torchrun starts in tests: some steps with each strategy, on a toy, and the losses of all processes in a file.

``torchrun ... train_both.py FILE PROCESSES_OF_A_HOST HOSTS``
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTModule
from lightning_peft.testing import tiny_llama, token_batch


class Losses(Callback):
    """Keeps the mean of the losses of all processes, for each batch."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone())))


def rows():
    """Return rows of tokens with labels."""
    batches = (token_batch(seed=number, rows=4)["input_ids"] for number in range(8))
    return [{"input_ids": row, "labels": row} for batch in batches for row in batch]


def main(path):
    """Train, and let the first process write."""
    found = {}
    for strategy in ("peft_ddp", "peft_fsdp"):
        seed_everything(0, verbose=False)
        kept = Losses()
        module = PEFTModule(
            tiny_llama(), LoRA(rank=4, init="gaussian"), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
        )
        trainer = Trainer(
            accelerator="cpu",
            devices=int(sys.argv[2]),
            num_nodes=int(sys.argv[3]),
            strategy=strategy,
            max_steps=4,
            callbacks=[kept],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(rows(), batch_size=2))
        found[strategy] = kept.losses
    if dist.get_rank() == 0:
        path.write_text(json.dumps({**found, "world": dist.get_world_size()}))
    dist.barrier()
    time.sleep(0.5)  # a process that hangs up while others listen makes them fail


if __name__ == "__main__":
    main(Path(sys.argv[1]))

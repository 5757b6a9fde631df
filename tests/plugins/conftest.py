"""Fixtures for the tests of methods: a few steps of training of a real pretrained model."""

import json

import pytest
import torch

from lightning_peft import CausalLMLoader, inject


@pytest.fixture
def trained_on_e2e(data_dir):
    """Train stories260k on sixteen E2E rows and return the loss of every step: ``trained_on_e2e(method, targets)``."""
    from transformers import AutoTokenizer

    folder = str(data_dir / "models" / "stories260k")

    def train(method, targets=None, steps=8, lr=1e-2):
        model = CausalLMLoader(path=folder).load()
        inject(model, method, targets)
        with (data_dir / "e2e" / "train.jsonl").open() as file:
            rows = [json.loads(next(file)) for _ in range(16)]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [f"{row['mr']} => {row['ref']}" for row in rows]
        ids = torch.tensor([tokenizer(text)["input_ids"][:48] for text in texts])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        losses = []
        for _ in range(steps):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return train

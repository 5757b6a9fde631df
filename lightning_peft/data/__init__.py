"""Data modules: local text for causal language models, with a training order that resumes exactly."""

from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler
from lightning_peft.data.text import TextDataModule

__all__ = ["ResumableDataLoader", "ResumableSampler", "TextDataModule"]

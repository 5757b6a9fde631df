"""Data modules: files, folders and data sets of the hub for every task, with a training order that resumes exactly."""

from lightning_peft.data.choices import MultipleChoiceDataModule
from lightning_peft.data.classification import ClassificationDataModule, TokenClassificationDataModule
from lightning_peft.data.images import ImageFolderDataModule
from lightning_peft.data.instructions import InstructionDataModule
from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler
from lightning_peft.data.rows_module import RowsDataModule
from lightning_peft.data.text import TextDataModule
from lightning_peft.data.text_to_text import Seq2SeqDataModule

__all__ = [
    "ClassificationDataModule",
    "ImageFolderDataModule",
    "InstructionDataModule",
    "MultipleChoiceDataModule",
    "ResumableDataLoader",
    "ResumableSampler",
    "RowsDataModule",
    "Seq2SeqDataModule",
    "TextDataModule",
    "TokenClassificationDataModule",
]

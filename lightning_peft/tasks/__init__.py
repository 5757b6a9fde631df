"""What a model is trained for, and how good it is at that: metrics of torchmetrics, by task."""

from lightning_peft.tasks.classification import ClassificationTask, MultipleChoiceTask, TokenClassificationTask
from lightning_peft.tasks.language import CausalLMTask, Seq2SeqTask
from lightning_peft.tasks.task import Task

__all__ = [
    "CausalLMTask",
    "ClassificationTask",
    "MultipleChoiceTask",
    "Seq2SeqTask",
    "Task",
    "TokenClassificationTask",
]

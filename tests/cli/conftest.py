import importlib
import os
import sys
import textwrap
from unittest import mock

import lightning.pytorch  # noqa: F401  (its loggers keep the stderr they find when they are made: not that of a test)
import pytest
import torch

from lightning_peft.registry import get_registry

WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(61))]

ACME = """
from dataclasses import dataclass
from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule

from lightning_peft import LoRA, hookimpl


@dataclass(frozen=True, kw_only=True)
class AcmeLoRA(LoRA):
    \"\"\"LoRA of another company.\"\"\"

    name: ClassVar[str] = "acme_lora"
    peft_type: ClassVar[str | None] = None

    tilt: float = 0.0
    \"\"\"How far it leans.\"\"\"


@hookimpl
def register_methods():
    return [AcmeLoRA]


class AcmeData(LightningDataModule):
    def __init__(self, rows: int = 8, length: int = 6):
        super().__init__()
        self.rows, self.length = rows, length

    def loader(self):
        ids = torch.arange(self.rows * self.length).view(self.rows, self.length) % 61 + 3
        return torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)

    train_dataloader = val_dataloader = loader
"""
"""A package of somebody else: a method with its hook, and a data module."""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a Llama of 64 words and its tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _separate(tmp_path, monkeypatch):
    """Run in an empty folder, with the environment and the random state as they were afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    with mock.patch.dict(os.environ), torch.random.fork_rng():
        yield


@pytest.fixture
def acme(tmp_path_factory, monkeypatch):
    """The module of a third party, registered as a plugin for the time of the test."""
    folder = tmp_path_factory.mktemp("acme")
    (folder / "acme_peft.py").write_text(textwrap.dedent(ACME))
    monkeypatch.syspath_prepend(folder)
    get_registry.cache_clear()
    module = importlib.import_module("acme_peft")
    get_registry().register(module)
    yield module
    get_registry.cache_clear()
    del sys.modules["acme_peft"]

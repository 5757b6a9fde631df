"""The base model of the quickstart, made from what is on every machine that runs Python.

The documentation is the language reference and the docstrings of the standard library; the other domain is the code of that
library, without docstrings and comments. No module is imported: the files are parsed. Both domains are split by file into
training text and held-out text. Everything is made once and kept.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import platform
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CACHE = Path(".cache/quickstart")
BASE = CACHE / "base"

SIZES: dict[str, Any] = {
    "characters": 1_200_000,
    "vocabulary": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "block_size": 128,
    "batch_size": 8,
    "steps": 600,
    "learning_rate": 4e-3,
}
"""What the base depends on, together with the version of Python."""

LEFT_OUT = {
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}
"""Folders of the standard library that are not read."""


def make_base() -> bool:
    """Make the texts, the tokenizer and the pretrained model, unless they are there; tell whether they were made."""
    key = {"python": platform.python_version(), **SIZES}
    made_of = CACHE / "made_of.json"
    if made_of.is_file() and json.loads(made_of.read_text(encoding="utf-8")) == key:
        return False
    shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True)
    write_texts()
    train_tokenizer()
    pretrain()
    made_of.write_text(json.dumps(key, indent=2), encoding="utf-8")
    return True


# -- text --------------------------------------------------------------------------------------------------------------


def write_texts() -> None:
    """Write ``docs`` and ``code``, each as ``_train.txt`` and ``_valid.txt``."""
    from pydoc_data.topics import topics

    texts: dict[str, list[str]] = {f"{domain}_{part}": [] for domain in ("docs", "code") for part in ("train", "valid")}
    read = dict.fromkeys(("docs", "code"), 0)

    def add(domain: str, name: str, text: str) -> None:
        if read[domain] < SIZES["characters"] and text:
            texts[f"{domain}_{'valid' if _hash(name) % 16 == 0 else 'train'}"].append(text)
            read[domain] += len(text)

    for name, text in sorted(topics.items()):
        add("docs", name, text)
    for name, docstrings, code in library():
        add("docs", name, docstrings)
        add("code", name, code)
        if min(read.values()) >= SIZES["characters"]:
            break
    for name, parts in texts.items():
        (CACHE / f"{name}.txt").write_text("\n\n".join(parts), encoding="utf-8")


def library() -> Iterator[tuple[str, str, str]]:
    """Yield (file, docstrings, code) of the standard library, in an order that mixes its parts."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in folder.rglob("*.py") if not LEFT_OUT & set(file.relative_to(folder).parts)]
    for file in sorted(files, key=lambda file: _hash(file.relative_to(folder).as_posix())):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        docstrings = "\n\n".join(take_docstrings(tree))
        yield file.relative_to(folder).as_posix(), docstrings, ast.unparse(tree)


def take_docstrings(tree: ast.Module) -> list[str]:
    """Take the docstrings out of a module and return them."""
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                docstrings.append(text)
                node.body = node.body[1:] or [ast.Pass()]
    return docstrings


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


# -- model -------------------------------------------------------------------------------------------------------------


def train_tokenizer() -> None:
    """Train a byte-level BPE on the documentation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocabulary"],
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(CACHE / "docs_train.txt")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end).save_pretrained(
        BASE
    )


def pretrain() -> None:
    """Pretrain a tiny Llama from scratch on the documentation, with a plain Lightning Trainer."""
    import torch
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from lightning_peft import TextDataModule

    class Pretraining(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            shape = {name: size for name, size in SIZES.items() if name.startswith(("hidden", "intermediate", "num_"))}
            special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
            config = LlamaConfig(
                vocab_size=SIZES["vocabulary"],
                max_position_embeddings=512,
                tie_word_embeddings=True,
                **shape,
                **special,
            )
            self.model = LlamaForCausalLM(config)

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=SIZES["learning_rate"])
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=SIZES["learning_rate"], total_steps=SIZES["steps"], pct_start=0.1
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    disable_progress_bar()
    seed_everything(1)
    data = TextDataModule(
        tokenizer=str(BASE),
        train=str(CACHE / "docs_train.txt"),
        block_size=SIZES["block_size"],
        batch_size=SIZES["batch_size"],
    )
    data.setup("fit")
    module = Pretraining()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=SIZES["steps"],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data.train_dataloader())
    module.model.save_pretrained(BASE)

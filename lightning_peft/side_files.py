"""The files beside the weights of a model folder: tokenizer, processor, chat template, how to generate."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "*.py",
)
_FOLDERS = ("additional_chat_templates",)


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, processor, chat templates, generation settings and code of the model folder ``source`` as they are.

    What is in ``target`` already is left alone. Weights, the configuration and everything else are not copied.

    Args:
        source: a model folder.
        target: another one, which exists.

    Returns:
        The names of the files that were copied.
    """
    copied = []
    for file in sorted(source.iterdir()):
        place = target / file.name
        if place.exists():
            continue
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _PATTERNS):
            shutil.copyfile(file, place)
            copied.append(file.name)
        elif file.is_dir() and file.name in _FOLDERS:
            shutil.copytree(file, place)
            copied.append(file.name)
    return copied


def copy_tokenizer(source: str, target: Path) -> bool:
    """Write the tokenizer, and all else that belongs to it, of a model folder or hub id to the folder ``target``.

    Returns:
        Whether there was anything to copy.
    """
    if Path(source).is_dir():
        return bool(copy_side_files(Path(source), target))
    from transformers import AutoProcessor, AutoTokenizer

    found = False
    for kind in (AutoTokenizer, AutoProcessor):  # a processor brings what it needs beside the tokenizer
        try:
            kind.from_pretrained(source).save_pretrained(target)
            found = True
        except (OSError, ValueError, KeyError):
            continue
    return found

"""A LoRA folder written from updates, without a model: HF PEFT's two files and, where the base is known, ours."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lightning_peft import fingerprint as fp
from lightning_peft.adapter_files import (
    FORMAT_VERSION,
    HF_CONFIG,
    INDEX,
    OWN_CONFIG,
    WEIGHTS,
    AdapterFolder,
    to_json_bytes,
    write_file,
)
from lightning_peft.adapter_tools.updates import lora_for
from lightning_peft.errors import BaseMismatchError, ConfigError
from lightning_peft.interfaces import HF_PREFIX
from lightning_peft.low_rank_pairs import Pair


def write_lora(output: str | Path, pairs: Mapping[str, Mapping[str, Pair]], sources: Sequence[AdapterFolder]) -> Path:
    """Write ``pairs`` of scale one as a LoRA folder for the base of ``sources``.

    Each file is replaced atomically, and ``lightning_peft.json``, which vouches for the others, comes last.

    Raises:
        ConfigError: a value is not finite, or the output is one of the sources or holds several adapters. Nothing is written then.
    """
    folder = Path(output)
    for source in sources:
        if folder.resolve() == source.path.resolve():
            raise ConfigError(f"the output {str(folder)!r} is one of the adapters that are read; name another folder")
    if (folder / INDEX).exists():
        raise ConfigError(
            f"the output {str(folder)!r} was written for several or scaled adapters, and its {INDEX} would go on saying so; name another folder"
        )
    tensors = {}
    for path, here in pairs.items():
        for key, pair in here.items():
            partner = key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
            for name, tensor in ((key, pair.down), (partner, pair.up)):
                if not torch.isfinite(tensor).all():
                    raise ConfigError(f"{path}.{name} would be non-finite; nothing was written to {str(folder)!r}")
                tensors[f"{HF_PREFIX}{path}.{name}"] = (
                    tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                )
    files = {
        WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        HF_CONFIG: to_json_bytes(_hf_config(pairs, sources)),
    }
    own = next((source.own for source in sources if source.own is not None), None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWN_CONFIG).unlink(missing_ok=True)  # it does not vouch for the files that come now
    for file, content in files.items():
        write_file(folder / file, content)
    if own is not None:
        write_file(folder / OWN_CONFIG, to_json_bytes(_own_config(pairs, own, files)))
    return folder


def _hf_config(pairs: Mapping[str, Mapping[str, Pair]], sources: Sequence[AdapterFolder]) -> dict[str, Any]:
    method = lora_for(pairs)
    known = [source.hf or {} for source in sources]
    patterns = {
        field: {word.removeprefix("re:"): value for word, value in found.items()}
        for field, found in method.patterns().items()
    }
    return {
        "peft_type": method.peft_type,
        "task_type": next((hf["task_type"] for hf in known if hf.get("task_type")), None),
        "base_model_name_or_path": next((s.base_name_or_path for s in sources if s.base_name_or_path), None),
        "revision": next((hf["revision"] for hf in known if hf.get("revision")), None),
        "inference_mode": True,
        "target_modules": sorted(pairs),
        "r": method.rank,
        "lora_alpha": method.rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": all(hf.get("fan_in_fan_out") for hf in known),
        "rank_pattern": patterns["rank"],
        "alpha_pattern": patterns["alpha"],
    }


def _own_config(
    pairs: Mapping[str, Mapping[str, Pair]], own: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[str, Any]:
    method = lora_for(pairs)
    return {
        "format_version": FORMAT_VERSION,
        "method": {"name": method.name, "fields": method.to_config()},
        "family": own["family"],
        "places": {path: {"rule": re.escape(path), "slices": []} for path in pairs},
        "base": {key: value for key, value in own["base"].items() if key != "packed"},
        "files": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
        "versions": {
            "python": platform.python_version(),
            **{lib: metadata.version(lib) for lib in ("lightning-peft", "torch")},
        },
    }


def refuse_other_bases(folders: Sequence[AdapterFolder]) -> None:
    """Refuse folders that were not trained on one base: by their fingerprints, or by its name where one has none.

    Raises:
        BaseMismatchError: two bases differ.
    """
    first, *others = folders
    for other in others:
        bases = [(folder.own or {}).get("base") or {} for folder in (first, other)]
        if all(base.get("tensors") for base in bases):
            prints = [fp.Fingerprint(base["tensors"]) for base in bases]
            left_out = frozenset(name for base in bases for name in base.get("quantized") or ())
            different = prints[0].differences(prints[1], left_out)
            found = [f"fingerprint {one.digest}" for one in prints]
        else:
            names = [folder.base_name_or_path for folder in (first, other)]
            different = ["its name"] if all(names) and len(set(names)) > 1 else []
            found = [repr(name) for name in names]
        if different:
            raise BaseMismatchError(
                f"{str(first.path)!r} was trained on the base with {found[0]}, {str(other.path)!r} on that with {found[1]}: they differ in "
                f"{different[0]!r} first, and updates of different bases cannot be put together. Pass check_base=False if you know what you do"
            )

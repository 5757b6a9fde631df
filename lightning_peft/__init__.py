"""Parameter-efficient fine-tuning for PyTorch Lightning.

Names are imported when they are first used, so that ``import lightning_peft`` costs no more than ``import lightning``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_HOME = {
    "Adapter": "interfaces",
    "AdapterCheckpoint": "callbacks",
    "AdapterLayer": "adapter_layer",
    "AdapterNotFoundError": "errors",
    "CausalLMLoader": "loaders",
    "EvalTask": "interfaces",
    "Exporter": "interfaces",
    "Fused": "targets",
    "Injection": "surgery",
    "LightningPEFTError": "errors",
    "LoRA": "plugins.lora",
    "Method": "interfaces",
    "ModelFamily": "targets",
    "ModelLoader": "loaders",
    "NF4": "plugins.quantizers",
    "PEFTCLI": "cli",
    "PEFTMixin": "mixin",
    "PEFTModule": "module",
    "Perplexity": "plugins.eval_tasks",
    "Quantizer": "interfaces",
    "ResourceMonitor": "callbacks",
    "Slice": "interfaces",
    "Target": "interfaces",
    "Targets": "targets",
    "TextDataModule": "data",
    "active_adapters": "surgery",
    "adapter_layers": "adapter_layer",
    "adapter_names": "adapter_layer",
    "adapter_state_dict": "state",
    "adapters_disabled": "surgery",
    "delete_adapter": "surgery",
    "get_registry": "registry",
    "hookimpl": "hookspecs",
    "inject": "surgery",
    "load_adapter": "state",
    "materialize_adapters": "surgery",
    "merge_adapters": "merging",
    "resolve_targets": "targets",
    "save_adapter": "state",
    "set_active_adapters": "surgery",
    "trainable_summary": "summary",
    "unload_adapters": "surgery",
    "unmerge_adapters": "merging",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

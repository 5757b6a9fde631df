"""What is done with checkpoints: those that processes wrote together, put together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning_peft.errors import AdapterFileError, CheckpointMismatchError, ConfigError


def consolidate(folder: str, output: str, adapter: bool = False, base: str | None = None) -> None:
    """Put a sharded checkpoint folder together into one .ckpt file, or into an adapter folder.

    Args:
        folder: checkpoint folder of a sharded run.
        output: the .ckpt file to write, or with --adapter the folder.
        adapter: write an adapter folder to share instead of a .ckpt to resume from.
        base: local folder or hub id of the base; needed with --adapter where no adapter folder was saved beside the checkpoint.

    Raises:
        ConfigError: the output is there already, or the base is needed and not given.
        CheckpointMismatchError: the folder is no whole sharded checkpoint, or does not belong to the base.
    """
    from lightning_peft.callbacks.checkpoint import adapter_folder
    from lightning_peft.callbacks.durable_io import DurableCheckpointIO
    from lightning_peft.sharded_folders import read_folder

    if Path(output).exists():
        raise ConfigError(f"{output!r} is there already; name another place for what is put together")
    beside = adapter_folder(folder)
    checkpoint = read_folder(folder)
    if not adapter:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        DurableCheckpointIO().save_checkpoint(checkpoint, output)
        numbers = sum(value.numel() for value in checkpoint.get("state_dict", {}).values())
        print(f"{output}: {numbers:,} numbers of adapters, at step {checkpoint.get('global_step')}")
        if beside.is_dir():
            print(f"the adapter alone is in {beside}")
        return
    if beside.is_dir():
        shutil.copytree(beside, output)
        print(f"{output}: copied from {beside}, which was saved with the checkpoint")
        return
    _write_adapter(checkpoint, folder, output, base)


def _write_adapter(checkpoint: dict[str, Any], folder: str, output: str, base: str | None) -> None:
    from lightning_peft.activation import set_active_adapters
    from lightning_peft.callbacks.checkpoint import adapter_folder
    from lightning_peft.checkpoint_manifest import MANIFEST
    from lightning_peft.cli.model_verbs import _load_base
    from lightning_peft.composition import Adaptation, save_adapters
    from lightning_peft.interfaces import Method
    from lightning_peft.module import PEFTModule
    from lightning_peft.registry import get_registry

    adapters = (checkpoint.get(MANIFEST) or {}).get("adapters") or {}
    if not adapters or any(name.rpartition(":")[0] != "model" for name in adapters):
        raise AdapterFileError(
            f"{folder!r} holds the adapters {sorted(adapters)}; only those of a PEFTModule can be written without the module itself"
        )
    if base is None:
        raise ConfigError(
            f"no adapter was saved beside {folder!r} ({adapter_folder(folder).name}), so that its base is needed to write one: give --base"
        )
    plans: list[Adaptation | Method] = []
    for name, held in adapters.items():
        method = get_registry().get("method", held["method"]).from_config(held["fields"])
        plans.append(Adaptation(method, held["places"], name.rpartition(":")[2], held.get("modules_to_save")))
    module = PEFTModule(_load_base(base, "auto"), plans)
    module.configure_model()
    assert module.model is not None
    active = [name for name, held in adapters.items() if held["active"]]
    active.sort(key=lambda name: adapters[name].get("position", 0))
    set_active_adapters(module.model, [name.rpartition(":")[2] for name in active])
    try:
        module.on_load_checkpoint(checkpoint)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{folder!r} over the base {base!r}: {error}") from error
    module.load_state_dict(checkpoint["state_dict"])
    save_adapters(module.model, output)
    print(f"{output}: {', '.join(name.rpartition(':')[2] for name in adapters)}, over the base {base}")

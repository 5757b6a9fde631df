"""What can be told of a base: which one it is, and whether an adapter belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_peft.cli.model_verbs import Dtype, _base_of, _load_base
from lightning_peft.errors import AdapterFileError, BaseMismatchError, ConfigError


def fingerprint(
    base: str | None = None, adapter: str | None = None, complete: bool = False, dtype: Dtype = "auto"
) -> None:
    """Print the fingerprint of a base and of the one an adapter was trained on, and compare them.

    Args:
        base: local folder or hub id of the base; what the adapter was trained on if not given.
        adapter: adapter folder of ours, or a .ckpt; the base alone is told if not given.
        complete: hash every weight of the base too.
        dtype: precision the base is loaded in; auto is its own.

    Raises:
        ConfigError: neither is given, or no base can be loaded.
        AdapterFileError: the adapter says nothing about its base.
        BaseMismatchError: the base is not the one the adapter was trained on.
    """
    from lightning_peft import fingerprint as fp

    if base is None and (adapter is None or adapter.endswith(".ckpt")):
        raise ConfigError(
            "fingerprint needs a base: give --base FOLDER_OR_ID, or --adapter FOLDER of one that names its base"
        )
    stored = {} if adapter is None else _stored(adapter)
    base = base or _base_of(str(adapter))
    model = _load_base(base, dtype)
    here = fp.fingerprint(model)
    if here is None:
        raise ConfigError(f"the base {base!r} has no floating-point weights to take a fingerprint of")
    hashes = fp.full_digests(model) if complete or stored.get("complete") else {}
    print(f"base     {base}: sampled {here.digest}" + (f", full {fp.digest_of(hashes)}" if hashes else ""))
    if adapter is None:
        return
    before, exact = fp.Fingerprint(stored["tensors"]), stored.get("complete") or {}
    print(
        f"adapter  {adapter}: sampled {before.digest}"
        + (f", full {fp.digest_of(exact)}" if exact else ", full not stored")
    )
    left_out = fp.quantized_names(model) | frozenset(stored.get("quantized") or ())
    different = before.differences(here, left_out)
    different += fp.full_differences(exact, model, left_out | set(different)) if exact else []
    if different:
        raise BaseMismatchError(
            f"{adapter!r} was trained on another base than {base!r}: {len(different)} of {len(before.tensors)} parameters differ, first "
            f"{different[0]!r}"
        )
    print(f"the same: {len(before.tensors)} parameters by samples" + (f", {len(exact)} in full" if exact else ""))


def _stored(adapter: str) -> dict[str, Any]:
    """Return what an adapter folder or a checkpoint says about its base."""
    if adapter.endswith(".ckpt") and Path(adapter).is_file():
        from lightning_peft.checkpoint_manifest import MANIFEST
        from lightning_peft.weight_files import read_saved

        checkpoint = read_saved(Path(adapter), values=False)
        manifest = checkpoint.get(MANIFEST) if isinstance(checkpoint, dict) else None
        bases = list((manifest or {}).get("base", {}).values())
        if len(bases) != 1:
            raise AdapterFileError(f"{adapter!r} holds the fingerprints of {len(bases)} bases; one can be compared")
        found = bases[0]
    else:
        from lightning_peft.adapter_files import read_adapter
        from lightning_peft.composition import first_adapter

        found = (read_adapter(first_adapter(adapter)).own or {}).get("base") or {}
    if not isinstance(found, dict) or not isinstance(found.get("tensors"), dict) or not found["tensors"]:
        raise AdapterFileError(
            f"{adapter!r} holds no fingerprint of its base, as folders of HF PEFT do not; nothing can be compared"
        )
    return found

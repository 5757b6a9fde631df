"""Adapter-only checkpoints for any LightningModule, strict both ways.

Of all places where a checkpoint could be filtered, only a ``state_dict`` override on the LightningModule together with
``strict_loading = False`` is exact on one device, DDP and FSDP2 and for weights-only saves. That setting alone would also
hide missing and foreign keys, so names and shapes are stored beside the tensors and compared before anything loads.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import CheckpointMismatchError
from lightning_peft.fingerprint import Fingerprint, quantized_names, to_json
from lightning_peft.fingerprint import fingerprint as base_fingerprint
from lightning_peft.surgery import adapted_roots, records

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Host
else:
    _Host = object

MANIFEST = "lightning_peft"
"""Key of a ``.ckpt`` under which the names, shapes and settings of its adapters stand."""
_VERSION = 1


class PEFTMixin(_Host):
    """Makes checkpoints of a LightningModule hold adapters only, and resume exactly or not at all.

    Put it before ``LightningModule``, and call :func:`~lightning_peft.inject` in ``configure_model``::

        class MyModule(PEFTMixin, LightningModule):
            def configure_model(self):
                if self.model is None:
                    self.model = load_my_model()
                    inject(self.model, LoRA(rank=8), ["query", "value"])

    Left out of ``state_dict`` is the frozen base of every model that :func:`inject` was called on. What else the module
    holds, such as a head of its own, is saved as always.
    """

    _resume_rng: dict[str, Any] | None = None
    _resume_rng_mid_epoch = False

    @property
    def strict_loading(self) -> bool:
        """Always False: the base is not in the checkpoint. :meth:`on_load_checkpoint` compares everything else."""
        return False

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        if strict_loading:
            raise CheckpointMismatchError(
                "strict_loading=True was asked for, but an adapter checkpoint does not hold the base; leave it False: "
                "adapters are compared strictly in on_load_checkpoint"
            )

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the state without the frozen base of adapted models."""
        if args or destination is not None:  # a nested call, of a module around this one
            nested: dict[str, Any] = super().state_dict(
                *args, destination=destination, prefix=prefix, keep_vars=keep_vars
            )
            return nested
        state: dict[str, Any] = super().state_dict(prefix=prefix, keep_vars=True)
        base = {id(tensor) for root in adapted_roots(self) for tensor in _base_tensors(root)}
        kept = {key: value for key, value in state.items() if id(value) not in base}
        return (
            kept
            if keep_vars
            else {key: value.detach() if isinstance(value, Tensor) else value for key, value in kept.items()}
        )

    def full_state_dict(self) -> dict[str, Any]:
        """Return the whole state, the frozen base included."""
        full: dict[str, Any] = super().state_dict()
        return full

    # -- checkpoint ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what :meth:`on_load_checkpoint` compares, and the state of the random number generators."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[MANIFEST] = {
            "version": _VERSION,
            "tensors": self._shapes(),
            "adapters": self._adapters(),
            "base": {path: to_json(root) for path, root in self._roots().items()},
            "rng": _rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the adapters and the base with those of the checkpoint.

        Raises:
            CheckpointMismatchError: they are not the same; the message lists both sides.
        """
        super().on_load_checkpoint(checkpoint)
        manifest = checkpoint.get(MANIFEST)
        if not isinstance(manifest, dict):
            raise CheckpointMismatchError(
                f"the checkpoint has no {MANIFEST!r} entry, so it was not saved by a module with adapters; it holds {sorted(checkpoint)}"
            )
        if manifest.get("version") != _VERSION:
            raise CheckpointMismatchError(
                f"the checkpoint has manifest version {manifest.get('version')!r}; this version reads {_VERSION}"
            )
        _compare_adapters(manifest["adapters"], self._adapters())
        _compare_tensors(manifest["tensors"], self._shapes(), "the module")
        if "state_dict" in checkpoint:
            stored = {
                key: list(value.shape) for key, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)
            }
            _compare_tensors(manifest["tensors"], stored, "the checkpoint's own state_dict")
        for path, root in self._roots().items():
            _compare_base(manifest["base"].get(path) or {}, root)
        self._resume_rng = manifest["rng"]
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        self._resume_rng_mid_epoch = not progress.get("is_last_batch", True)

    def on_train_start(self) -> None:
        """Restore the random number generators when a run resumes between two epochs."""
        super().on_train_start()
        if not self._resume_rng_mid_epoch:
            self._restore_rng()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Restore the random number generators when a run resumes within an epoch.

        Starting the data loader anew draws random numbers that the uninterrupted run drew at the start of the epoch,
        so this comes after it.
        """
        if self._resume_rng is not None:
            self._restore_rng()
        return super().on_train_batch_start(batch, batch_idx)

    def _restore_rng(self) -> None:
        if self._resume_rng is not None:
            _set_rng_state(self._resume_rng)
            self._resume_rng = None

    def _shapes(self) -> dict[str, list[int]]:
        return {key: list(value.shape) for key, value in self.state_dict().items() if isinstance(value, Tensor)}

    def _roots(self) -> dict[str, nn.Module]:
        paths = {id(module): path for path, module in self.named_modules()}
        return {paths[id(root)]: root for root in adapted_roots(self)}

    def _adapters(self) -> dict[str, dict[str, Any]]:
        return {
            f"{path}:{name}": {
                "method": injection.method.name,
                "fields": injection.method.to_config(),
                "places": injection.paths,
            }
            for path, root in self._roots().items()
            for name, injection in records(root).items()
        }


def _base_tensors(root: nn.Module) -> list[Tensor]:
    """Return every parameter and buffer of the base of an adapted model."""
    return [
        tensor
        for _, module in base_modules(root)
        for tensor in [*unwrapped(module).parameters(recurse=False), *unwrapped(module).buffers(recurse=False)]
    ]


def _compare_adapters(stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if stored.keys() != here.keys():
        raise CheckpointMismatchError(
            f"the checkpoint holds the adapters {sorted(stored)}, the module holds {sorted(here)}"
        )
    for name, held in stored.items():
        for label in ("method", "fields", "places"):
            if held[label] != here[name][label]:
                both = _first_difference(held[label], here[name][label])
                raise CheckpointMismatchError(
                    f"adapter {name!r}: {label} of the checkpoint and of the module differ: {both}. Resume with the settings of the "
                    "checkpoint, or start a new run from its adapter folder"
                )


def _first_difference(stored: Any, here: Any) -> str:
    if isinstance(stored, dict) and isinstance(here, dict):
        key = next(key for key in sorted(stored.keys() | here.keys()) if stored.get(key) != here.get(key))
        return f"{key} was {stored.get(key)!r} and is {here.get(key)!r}"
    return f"was {stored!r} and is {here!r}"


def _compare_tensors(stored: Mapping[str, Any], here: Mapping[str, Any], whose: str) -> None:
    missing, extra = sorted(stored.keys() - here.keys()), sorted(here.keys() - stored.keys())
    shapes = [
        f"{key} {stored[key]} and {here[key]}"
        for key in sorted(stored.keys() & here.keys())
        if stored[key] != here[key]
    ]
    if missing or extra or shapes:
        raise CheckpointMismatchError(
            f"the tensors listed in the checkpoint and those of {whose} are not the same. Only listed: {missing[:5]} ({len(missing)}); "
            f"only in {whose}: {extra[:5]} ({len(extra)}); other shapes: {shapes[:5]} ({len(shapes)})"
        )


def _compare_base(stored: Mapping[str, Any], root: nn.Module) -> None:
    here = base_fingerprint(root)
    if here is None or not stored.get("tensors"):
        return
    before = Fingerprint(stored["tensors"])
    different = before.differences(here, quantized_names(root) | frozenset(stored["quantized"]))
    if different:
        raise CheckpointMismatchError(
            f"the checkpoint was trained over a base with fingerprint {before.digest}, this base has {here.digest}: "
            f"{len(different)} parameters differ, first {different[0]!r}"
        )


def _rng_state() -> dict[str, Any]:
    """Return the state of the generators of python, numpy and torch in types that a weights-only load accepts."""
    import numpy as np

    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state: Mapping[str, Any]) -> None:
    import numpy as np

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        for device, value in enumerate(state["cuda"]):
            torch.cuda.set_rng_state(value.cpu(), device)

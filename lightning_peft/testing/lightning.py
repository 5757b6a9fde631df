"""In Lightning: the checkpoint holds the adapter, and a resumed run ends where an uninterrupted one does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.adapter_layer import base_parameters
from lightning_peft.state import adapter_state_dict
from lightning_peft.testing.subject import Subject, adapter_parameters, differing, first_tensor


class LightningTests(Subject):
    """Tests with :class:`~lightning_peft.PEFTModule` in a Trainer."""

    def test_resumed_equals_uninterrupted(self, tmp_path: Path) -> None:
        """Stopped after two of four steps and resumed, training ends with the same tensors, bit for bit."""
        whole = self._fit(tmp_path / "whole", steps=4)
        self._fit(tmp_path / "part", steps=2)
        resumed = self._fit(tmp_path / "rest", steps=4, ckpt_path=str(tmp_path / "part" / "last.ckpt"))
        changed = differing(whole, resumed)
        assert not changed, (
            f"{changed[:3]} of a resumed run are not those of an uninterrupted one; is there hidden state?"
        )

    def test_checkpoints_hold_the_adapter_only(self, tmp_path: Path) -> None:
        """The base stays where it came from; an adapter folder stands beside the checkpoint."""
        self._fit(tmp_path, steps=1)
        held = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        tensors = [key for key in held if not key.startswith("metrics.")]
        base = {name for name, _ in base_parameters(self.base())}
        leaked = [key for key in tensors if key.removeprefix("model.") in base or _of_base(key)]
        assert not leaked, f"the checkpoint holds {leaked[:3]} of the base"
        again = self.base()
        self.load(again, tmp_path / "last.adapter")
        count = sum(held[key].numel() for key in tensors)
        own = sum(p.numel() for p in adapter_parameters(again).values())  # data or training may have decided how many
        assert count >= own, f"the checkpoint holds {count} values, the adapter has {own}"
        assert torch.isfinite(self.outputs(again)).all(), "loaded from the adapter folder, the output is not finite"

    def _fit(self, folder: Path, steps: int, ckpt_path: str | None = None) -> dict[str, Tensor]:
        """Train for some steps and return the adapter's tensors."""
        from lightning.pytorch import Trainer, seed_everything

        from lightning_peft.callbacks import AdapterCheckpoint
        from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler
        from lightning_peft.module import PEFTModule

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")  # about workers, logging and the like
            seed_everything(5, verbose=False)
            batches: list[Any] = [_with_target(self.inputs(seed)) for seed in range(4)]
            sampler = ResumableSampler(batches)
            loader = ResumableDataLoader(batches, batch_size=1, sampler=sampler, collate_fn=lambda items: items[0])  # type: ignore[arg-type]
            module = PEFTModule(
                self.model(),
                self.method,
                self.targets,
                optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
                loss=lambda outputs, target: self.loss(first_tensor(outputs)),
            )
            trainer = Trainer(
                max_steps=steps,
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
                callbacks=[AdapterCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=steps, save_top_k=0)],
            )
            with self.registered():
                trainer.fit(module, loader, ckpt_path=ckpt_path)
            assert module.model is not None
            return {key: tensor.clone() for key, tensor in adapter_state_dict(module.model).items()}


def _with_target(inputs: Any) -> Any:
    """Return a batch as :class:`PEFTModule` takes it: a tuple ends with a target."""
    return (*inputs, torch.zeros(len(inputs[0]))) if isinstance(inputs, tuple) else inputs


def _of_base(key: str) -> bool:
    """Tell whether a key of a checkpoint names a tensor of the base. An adapted place may lie inside another one."""
    return ".base_layer." in key and ".adapters." not in key.rpartition(".base_layer.")[2]

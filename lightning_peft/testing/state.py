"""On disk: what is saved comes back exactly, and what does not fit is refused without a trace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import adapter_names
from lightning_peft.errors import AdapterMismatchError, BaseMismatchError
from lightning_peft.interfaces import Method
from lightning_peft.state import adapter_state_dict, save_adapter
from lightning_peft.testing.subject import Subject, base_tensors, differing, refused

WEIGHTS, HF_CONFIG, OWN_CONFIG = "adapter_model.safetensors", "adapter_config.json", "lightning_peft.json"


def _without_one(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors)]


def _with_another(tensors: dict[str, Tensor]) -> None:
    place = min(tensors).rpartition(".")[0]
    tensors[f"{place}.no_such_tensor"] = torch.zeros(2, 2)


def _wrong_shape(tensors: dict[str, Tensor]) -> None:
    name = min(tensors)
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def _not_finite(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)].view(-1)[0] = torch.nan


class StateTests(Subject):
    """Tests of adapter folders."""

    def test_saved_and_loaded_is_the_same(self, tmp_path: Path) -> None:
        """Outputs and tensors of a saved adapter, loaded into a fresh base, are those of the one that was trained."""
        model, again = self.trained(), self.base()
        self.load(again, save_adapter(model, tmp_path))
        changed = differing(adapter_state_dict(model), adapter_state_dict(again))
        assert not changed, (
            f"{changed[:3]} are not the same after saving and loading; check export_state and import_state"
        )
        assert torch.equal(self.outputs(again), self.outputs(model)), (
            "saved and loaded, the adapter gives another output; does export_state hold everything that training changed?"
        )

    def test_loaded_method_is_the_same(self, tmp_path: Path) -> None:
        """The folder says with which hyperparameters the adapter was made."""
        loaded = self.load(self.base(), save_adapter(self.adapted(), tmp_path))
        assert loaded.method == self.method, f"{self.method!r} was saved, {loaded.method!r} came back"

    @pytest.mark.parametrize("spoil", [_without_one, _with_another, _wrong_shape, _not_finite])
    def test_a_file_that_does_not_fit_is_refused(
        self, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None]
    ) -> None:
        """A missing, extra, mis-shaped or non-finite tensor stops loading, and the model is what it was."""
        folder = save_adapter(self.trained(), tmp_path)
        _rewrite(folder, spoil)
        model = self.base()
        before, kinds, output = base_tensors(model), _kinds(model), self.outputs(model)
        with refused(
            AdapterMismatchError, f"a file spoiled by {spoil.__name__[1:]} was loaded; leave import_state strict"
        ):
            self.load(model, folder)
        assert not adapter_names(model), "after a refused load the model still holds the adapter"
        assert _kinds(model) == kinds, "after a refused load modules of the model are wrapped or replaced"
        assert not differing(before, base_tensors(model)), "a refused load changed the base"
        assert torch.equal(self.outputs(model), output), "after a refused load the output of the model is another"

    def test_another_base_is_refused(self, tmp_path: Path) -> None:
        """An adapter belongs to the base that it was trained over."""
        folder = save_adapter(self.adapted(), tmp_path)
        model = self.base()
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.is_floating_point()).add_(1.0)
        with refused(BaseMismatchError, "an adapter was loaded over another base than its own"):
            self.load(model, folder)
        assert not adapter_names(model), "after a refused load the model still holds the adapter"

    def test_hf_peft_reads_the_folder(self, tmp_path: Path) -> None:
        """With ``peft_type`` the folder is HF PEFT's, and read as such it gives the same outputs."""
        self.need("peft_type")
        model, again = self.trained(), self.base()
        folder = save_adapter(model, tmp_path)
        config = json.loads((folder / HF_CONFIG).read_text())
        assert config["peft_type"] == self.method.peft_type, f"{HF_CONFIG} has the peft_type {config['peft_type']!r}"
        keys = safetensors.torch.load_file(folder / WEIGHTS).keys()
        if type(self.method).file_tensors is Method.file_tensors:
            assert all(key.startswith("base_model.model.") for key in keys), (
                f"HF PEFT does not know the keys {sorted(keys)[:3]}"
            )
        (folder / OWN_CONFIG).unlink()
        self.load(again, folder)
        assert torch.equal(self.outputs(again), self.outputs(model)), (
            f"read from {HF_CONFIG} alone the adapter gives another output; check to_hf_config and from_hf_config"
        )


def _kinds(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def _rewrite(folder: Path, spoil: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder, and the hash beside them, so that only the tensors are wrong."""
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    spoil(tensors)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    own = json.loads((folder / OWN_CONFIG).read_text())
    own["files"][WEIGHTS] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / OWN_CONFIG).write_text(json.dumps(own))

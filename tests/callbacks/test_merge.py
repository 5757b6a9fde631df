import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_peft import (
    AdapterCheckpoint,
    Bottleneck,
    LoRA,
    MergeAdapters,
    PEFTModule,
    adapter_layers,
    load_adapter,
    unmerge_adapters,
)
from lightning_peft.errors import ConfigError, MergeError
from lightning_peft.merging import outputs

ROWS = torch.randint(3, 61, (8, 6), generator=torch.Generator().manual_seed(5))


def fit(llama, make_trainer, folder, callback, method=None):
    module = PEFTModule(llama, method or LoRA(rank=2))
    checkpoint = AdapterCheckpoint(dirpath=folder / "run", filename="last")
    # Named first, it still comes last.
    trainer = make_trainer(folder, max_steps=2, callbacks=[callback, checkpoint])
    trainer.fit(module, DataLoader(ROWS, batch_size=4))
    return module


def test_the_model_is_merged_after_its_adapter_was_saved(llama, llama_dir, make_trainer, tmp_path):
    module = fit(llama, make_trainer, tmp_path, MergeAdapters())
    assert all(layer.merged == ("default",) for layer in adapter_layers(module.model).values())
    unmerge_adapters(module.model)
    again = AutoModelForCausalLM.from_pretrained(llama_dir)
    load_adapter(again, tmp_path / "run" / "last.adapter")
    assert torch.equal(outputs(again, ROWS), outputs(module.model, ROWS))


def test_the_merged_model_is_written_and_the_live_one_stays(llama, make_trainer, tmp_path):
    module = fit(llama, make_trainer, tmp_path, MergeAdapters(export_to=str(tmp_path / "merged")))
    assert not any(layer.merged for layer in adapter_layers(module.model).values())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(written, ROWS), outputs(module.model, ROWS))


def test_what_cannot_be_merged_or_written_is_refused_before_training(llama, make_trainer, tmp_path):
    with pytest.raises(MergeError, match="MergeAdapters cannot merge 'bottleneck'"):
        fit(llama, make_trainer, tmp_path, MergeAdapters(), Bottleneck())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        fit(llama, make_trainer, tmp_path, MergeAdapters(export_to=str(tmp_path / "full")))
    assert not (tmp_path / "run").exists()

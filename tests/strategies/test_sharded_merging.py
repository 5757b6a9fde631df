"""Merging into a model whose weights are sharded: each process keeps its part of what one process would have merged."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from lightning_peft import (
    DoRA,
    LoRA,
    MergeAdapters,
    MoEUpcycling,
    NormTuning,
    PEFTFSDPStrategy,
    QLoRA,
    adapter_layers,
    load_adapter,
    merge_adapters,
    merged_copy,
    save_adapter,
    unload_adapters,
    unmerge_adapters,
)
from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import AdapterFileError, ExportError, MergeError
from lightning_peft.fingerprint import fingerprint, remembered
from lightning_peft.merging import outputs
from lightning_peft.plugins.exporters import AdapterFolder, MergedTransformers
from lightning_peft.plugins.gguf_format import GGUFAdapter
from lightning_peft.plugins.moe_exporters import Mixtral, MixtralPEFT, TransformersMoE
from lightning_peft.sharded_tensors import whole_adapters
from lightning_peft.testing import tiny_llama, token_batch


def base(model):
    """The whole weights of the base; all processes must ask."""
    held = {}
    for path, place in base_modules(model):
        for name, parameter in unwrapped(place).named_parameters(recurse=False):
            value = parameter.detach()
            held[f"{path}.{name}"] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return held


class Merging(Callback):
    """Merges at the end of a fit, looks at it, takes it back, and merges for good."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        model, batch = module.model, token_batch(seed=9)
        with remembered([model], full=False), whole_adapters(module, keep=True):
            if dist.get_rank() == 0:
                save_adapter(model, self.folder / "adapter")
        for unit in model.modules():
            if hasattr(unit, "reshard"):
                unit.reshard()
        before, active, known = base(model), outputs(model, batch), fingerprint(model)
        merge_adapters(model, probe=batch)
        for unit in model.modules():
            if hasattr(unit, "reshard"):
                unit.reshard()
        merged, found = base(model), outputs(model, batch)
        assert all(layer.merged for layer in adapter_layers(model).values())
        assert fingerprint(model) == known
        unmerge_adapters(model)
        again, restored = base(model), outputs(model, batch)
        merge_adapters(model, keep_originals=False)
        assert all(torch.equal(value, merged[name]) for name, value in base(model).items())
        unload_adapters(model)
        saved = {
            "before": before, "merged": merged, "again": again,
            "active": active, "found": found, "restored": restored, "unloaded": outputs(model, batch),
        }  # fmt: skip
        if dist.get_rank() == 0:
            torch.save(saved, self.folder / "saved.pt")
        dist.barrier()


@pytest.mark.filterwarnings("ignore:PEFTModule.configure_model does not make the model")  # it has no adapters any more
@pytest.mark.parametrize(
    ("method", "layout"),
    [
        (LoRA(rank=4, init="gaussian"), {}),
        (LoRA(rank=4, init="gaussian"), {"tensor_parallel": 2}),
        (DoRA(rank=4), {}),
        (NormTuning(), {}),
    ],
    ids=["lora", "lora 2 x 2", "dora", "norms"],
)
def test_each_process_merges_its_part_of_what_one_process_merges(run, tmp_path, method, layout):
    strategy = PEFTFSDPStrategy(start_method="fork", **layout)
    run(strategy, method=method, devices=4 if layout else 2, steps=2, callbacks=[Merging(tmp_path)])
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    model = tiny_llama()
    load_adapter(model, tmp_path / "adapter")
    merge_adapters(model)
    expected = base(model)
    assert expected.keys() == saved["merged"].keys()
    changed = [name for name, value in expected.items() if not torch.equal(value, saved["before"][name])]
    assert changed
    for name, value in expected.items():
        assert torch.equal(saved["merged"][name], value), name
        assert torch.equal(saved["again"][name], saved["before"][name]), name
    assert torch.equal(saved["restored"], saved["active"])
    assert torch.equal(saved["unloaded"], saved["found"])
    assert (saved["found"] - saved["active"]).norm() <= 1e-5 * saved["active"].norm()
    assert not torch.equal(saved["found"], outputs(tiny_llama(), token_batch(seed=9)))


class Refused(Callback):
    """Asks for what is refused."""

    def on_train_end(self, trainer, module):
        for ask in (lambda: merge_adapters(module.model, quantized="dequantize"), lambda: merged_copy(module.model)):
            with pytest.raises(MergeError, match="lightning-peft merge --out_of_core"):
                ask()


def test_packed_parts_and_copies_are_refused_with_what_to_do(run):
    run("fsdp", method=QLoRA(rank=4, compute_dtype="float32"), callbacks=[Refused()])


@pytest.mark.parametrize(
    ("method", "fields"),
    [(LoRA(rank=4), {"export_to": "somewhere"}), (QLoRA(rank=4, compute_dtype="float32"), {"quantized": "dequantize"})],
)
def test_a_run_that_would_merge_what_it_cannot_is_refused_before_it_trains(run, tmp_path, method, fields):
    fields = {**fields, **({"export_to": str(tmp_path / "out")} if "export_to" in fields else {})}
    with pytest.raises(Exception, match="lightning-peft merge --out_of_core"):
        run("fsdp", method=method, callbacks=[MergeAdapters(**fields)])


def test_the_callback_merges_in_place(run, tmp_path):
    class Look(MergeAdapters):
        def on_fit_end(self, trainer, module):
            active = outputs(module.model, token_batch())
            super().on_fit_end(trainer, module)
            assert (outputs(module.model, token_batch()) - active).norm() <= 1e-5 * active.norm()
            (tmp_path / f"{dist.get_rank()}").touch()

    run("fsdp", method=LoRA(rank=4, init="gaussian"), callbacks=[Look()])
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()


class Exports(Callback):
    """Asks every exporter for what no process holds whole, and for the adapter where it is made whole."""

    def __init__(self, exporters, folder):
        self.exporters, self.folder = exporters, folder

    def on_train_end(self, trainer, module):
        for exporter in self.exporters:
            with pytest.raises((MergeError, ExportError, AdapterFileError), match="is sharded|are sharded"):
                exporter.export(module.model, self.folder / exporter.name)
            assert not (self.folder / exporter.name).exists()
            if exporter.name in ("gguf_adapter", "adapter"):
                known = remembered([module.model], full=False)
                with known, whole_adapters(module, keep=trainer.is_global_zero):
                    if trainer.is_global_zero:
                        exporter.export(module.model, self.folder / exporter.name)
        dist.barrier()


def test_every_exporter_refuses_a_sharded_model_or_writes_whole_adapters(run, tmp_path):
    small = [AdapterFolder(), GGUFAdapter(), MergedTransformers()]
    run(
        "fsdp",
        method=LoRA(rank=4, init="gaussian"),
        callbacks=[Exports(small, tmp_path)],
        save=tmp_path / "run",
        steps=1,
    )
    model = tiny_llama()
    load_adapter(model, tmp_path / "run" / "step=1.adapter")
    for exporter in small[:2]:
        exporter.export(model, tmp_path / "alone")
        for file in (tmp_path / exporter.name).iterdir():
            if file.suffix in (".safetensors", ".gguf"):
                assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes()
    mixtures = [TransformersMoE(), Mixtral(), MixtralPEFT()]
    run("fsdp", method=MoEUpcycling(experts=4, top_k=2), callbacks=[Exports(mixtures, tmp_path)], steps=1)

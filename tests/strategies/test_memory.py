"""What is resident: saving costs rank 0 the adapter, whatever the size of the base, and loading in parts costs each process its part."""

import ctypes
import gc
import json
import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import CausalLMLoader, LoRA, PEFTModule
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="reads the memory of a process, as Linux tells it"
)


def resident(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


class PeakOfSaving(Callback):
    """Measures how far the resident memory rises above where it stood while a checkpoint is saved twice; the second time counts."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        for number in range(2):  # the first imports and allocates what stays
            with open("/proc/self/clear_refs", "w") as peak:
                peak.write("5")
            before = resident("VmRSS")
            trainer.save_checkpoint(self.folder / f"{number}.ckpt")
            rise = resident("VmHWM") - before
        base = sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
        if trainer.is_global_zero:
            torch.save({"rise": rise, "base": base}, self.folder / "peak.pt")
        dist.barrier()


def llama(layers, width=256):
    config = LlamaConfig(
        vocab_size=128, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4, use_cache=False
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_saving_takes_no_memory_for_the_base(run, tmp_path, folder):
    run(
        PEFTFSDPStrategy(start_method="fork", save_distributed_checkpoint=folder),
        method=LoRA(rank=1),
        model=lambda: llama(12),
        steps=1,
        rows=2,
        batches=1,
        callbacks=[PeakOfSaving(tmp_path)],
    )
    found = torch.load(tmp_path / "peak.pt")
    assert found["base"] > 48e6
    assert found["rise"] < 8e6, (
        f"saving took {found['rise'] / 1e6:.1f} MB beside a base of {found['base'] / 1e6:.1f} MB"
    )


class PeakOfLoading(Callback):
    """Measures how far the resident memory of each process rises, at most, until the model is sharded."""

    def __init__(self, folder):
        self.folder = folder

    def setup(self, trainer, module, stage):
        self.before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")

    def on_fit_start(self, trainer, module):
        rise = resident("VmHWM") - self.before
        (self.folder / f"{dist.get_rank()}.json").write_text(json.dumps(rise))


def test_a_base_in_parts_takes_each_process_its_part(run, tmp_path):
    model = llama(4, 512)
    model.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    base = sum(parameter.nbytes for parameter in model.parameters())
    del model
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # a forked process would use what this one has freed
    risen = {}
    for parts in (True, False):
        module = PEFTModule(CausalLMLoader(path=str(tmp_path / "base")), LoRA(rank=4))
        strategy = PEFTFSDPStrategy(start_method="fork", read_weights=parts)
        run(strategy, rows=2, batches=1, steps=1, module=module, callbacks=[PeakOfLoading(tmp_path)])
        risen[parts] = max(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert base > 65e6
    assert risen[False] > base
    assert risen[True] < base / 2 + 30e6, f"{risen[True] / 1e6:.0f} MB of a base of {base / 1e6:.0f} MB"

"""A quantised base over several processes: what one process trains, and a packed weight that no process may round."""

import functools
import json
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_peft import LightningPEFTWarning, LoRA, PEFTModule, QLoRA, load_adapter, merge_adapters
from lightning_peft.adapter_files import WEIGHTS
from lightning_peft.adapter_layer import unwrapped
from lightning_peft.errors import ConfigError
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy
from lightning_peft.strategies.sharding import bring_scales, refuse_unshardable
from lightning_peft.testing import tiny_llama, token_batch

METHOD = QLoRA(rank=4, compute_dtype="float32", init="gaussian", double_quantization=True)


def relative(one, other):
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def test_packed_weights_make_a_difference(run):
    assert run("fsdp", method=METHOD).losses != run("fsdp", method=LoRA(rank=4, init="gaussian")).losses


# -- checkpoints -------------------------------------------------------------------------------------------------------

STEPS = 4


@pytest.mark.parametrize(
    ("before", "after"), [("single", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp folder"), ("fsdp folder", "single")]
)
def test_adapters_over_packed_weights_go_on_in_another_layout(run, tmp_path, before, after):
    run(before, method=METHOD, steps=STEPS // 2, save=tmp_path, lr=1e-3)
    path = tmp_path / f"step={STEPS // 2}.ckpt"
    resumed = run(after, method=METHOD, steps=STEPS, resume=str(path), lr=1e-3)
    whole = run(after, method=METHOD, steps=STEPS, lr=1e-3).losses[STEPS // 2 :]
    if "single" in (before, after):
        assert relative(resumed.losses, whole) <= 1e-6
    else:
        assert resumed.losses == whole


def test_the_adapter_of_a_sharded_run_is_the_one_that_ddp_saves(run, tmp_path):
    for strategy in ("ddp", "fsdp"):
        run(strategy, method=METHOD, steps=2, save=tmp_path / strategy, lr=1e-3)
    ours, theirs = (load_file(tmp_path / kind / "step=2.adapter" / WEIGHTS) for kind in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == torch.float32 for key in ours)
    model = tiny_llama()
    load_adapter(model, tmp_path / "fsdp" / "step=2.adapter")  # over the base in full precision it is LoRA
    merge_adapters(model)


# -- the two faults of bitsandbytes on a CPU ---------------------------------------------------------------------------


class Validated(Callback):
    """Notes what the packed layers are before training and after it."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def note(self, module):
        layers = [layer for layer in module.modules() if type(layer).__name__ == "Linear4bit"]
        repacked = [getattr(layer.quant_state, "packing_format_for_cpu", False) for layer in layers]
        grads = [p.grad is not None for p in module.parameters() if p.requires_grad]
        self.seen.append({"layers": len(layers), "repacked": sum(repacked), "grads": grads})

    def on_validation_end(self, trainer, module):
        self.note(module)

    def on_after_backward(self, trainer, module):
        self.note(module)

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.seen))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_validation_before_training_repacks_nothing_and_drops_no_gradient(run, tmp_path, strategy, precision):
    plain = run(strategy, method=METHOD, precision=precision)
    rows = [{**{key: value[0] for key, value in token_batch().items()}, "labels": token_batch()["input_ids"][0]}] * 4
    seen = Validated(tmp_path / "seen.json")
    validated = run(
        strategy, method=METHOD, precision=precision, callbacks=[seen], val=DataLoader(rows, batch_size=2),
        num_sanity_val_steps=2, val_check_interval=2,
    )  # fmt: skip
    assert validated.losses == plain.losses
    notes = json.loads((tmp_path / "seen.json").read_text())
    assert len(notes) > 4
    assert all(note["layers"] == 14 and note["repacked"] == 0 for note in notes)
    assert all(all(note["grads"]) for note in notes if any(note["grads"]))
    assert any(notes[1]["grads"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_widths_off_the_block_size_stay_unpacked_and_the_rest_trains_as_in_one_process(run, strategy):
    model = functools.partial(tiny_llama, intermediate_size=96)  # the width of what down_proj takes
    with pytest.warns(
        LightningPEFTWarning, match="leaves 2 of 14 linear layers unquantised.*multiple of block_size=64"
    ):
        one = run("single", method=METHOD, model=model, lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LightningPEFTWarning)  # of the other processes
        two = run(strategy, method=METHOD, model=model, lr=1e-3)
    assert relative(two.losses, one.losses) <= 1e-6


# -- what is refused ---------------------------------------------------------------------------------------------------


def stored_as(storage):
    """A module over a base that transformers would have packed into another dtype."""
    module = PEFTModule(tiny_llama(), METHOD)
    module.configure_model()
    for layer in module.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.weight.data = layer.weight.data.flatten().view(storage).unsqueeze(1)
    return module


@pytest.mark.parametrize(
    ("storage", "casts", "refused"),
    [
        (torch.uint8, [torch.bfloat16], None),
        (torch.bfloat16, [torch.bfloat16], None),
        (torch.bfloat16, [], None),
        (torch.bfloat16, [torch.float16], r"stored as torch.bfloat16.*\(here to torch.float16\)"),
        (torch.float16, [torch.bfloat16], r"q_proj.*stored as torch.float16.*silently wrong.*bnb_4bit_quant_storage"),
        (torch.float32, [], r"stored as torch.float32"),
    ],
)
def test_packed_weights_that_a_cast_would_round_are_refused(storage, casts, refused):
    module = stored_as(storage)
    if refused is None:
        refuse_unshardable(module, casts)
        return
    with pytest.raises(ConfigError, match=refused):
        refuse_unshardable(module, casts)


@pytest.mark.parametrize("fields", [{"gather": "bf16"}, {"precision": "bf16-true"}, {}])
def test_storage_in_float16_is_refused_before_a_step(run, fields):
    strategy = PEFTFSDPStrategy(start_method="fork", gather_dtype=fields.pop("gather", None))
    with pytest.raises(Exception, match=r"holds packed weights stored as torch\.float16"):
        run(strategy, module=stored_as(torch.float16), **fields)


def test_bytes_survive_what_floats_are_cast_to(run):
    def strategy():
        return PEFTFSDPStrategy(start_method="fork", gather_dtype="bf16")

    packed, dense = (
        run(strategy(), method=method, lr=1e-3).losses for method in (METHOD, LoRA(rank=4, init="gaussian"))
    )
    assert relative(packed, run("single", method=METHOD, lr=1e-3).losses) <= 1e-3
    assert packed != dense


def test_layers_in_eight_bits_are_refused_sharded_and_train_under_ddp(run):
    method = QLoRA(rank=4, quantization="int8", init="gaussian")
    assert METHOD.fsdp_ready
    assert not method.fsdp_ready
    with pytest.raises(Exception, match=r"is quantised as 'int8', whose layers keep their weights outside.*peft_ddp"):
        run("fsdp", method=method)
    assert relative(run("ddp", method=method, lr=1e-3).losses, run("single", method=method, lr=1e-3).losses) <= 1e-3


def test_scales_follow_to_the_device_of_the_run():
    module = stored_as(torch.uint8)
    bring_scales(module, torch.device("meta"))
    layer = module.model.model.layers[0].self_attn.q_proj
    state = unwrapped(layer).weight.quant_state
    assert state.absmax.is_meta
    assert state.state2.absmax.is_meta
    assert not unwrapped(layer).weight.is_meta

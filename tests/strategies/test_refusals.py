"""What cannot be sharded is refused before the first step, by name and with what to do."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_peft import (
    Compacter,
    LoRA,
    PEFTDDPStrategy,
    PEFTFSDPStrategy,
    PEFTMixin,
    PEFTModule,
    inject,
    save_adapter,
)
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.strategies.sharding import blocks_of
from lightning_peft.testing import tiny_gpt2, tiny_llama


class Own(PEFTMixin, LightningModule):
    """A module with room for something that does not belong there."""

    def __init__(self, spoil=None):
        super().__init__()
        self.model, self.spoil = None, spoil

    def configure_model(self):
        if self.model is None:
            self.model = tiny_llama().train()
            inject(self.model, LoRA(rank=4))
            if self.spoil:
                self.spoil(self)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def loose(module):
    module.scale = nn.Parameter(torch.ones(3))


def scalar(module):
    module.temperature = nn.Sequential(nn.Identity())
    module.temperature.register_parameter("value", nn.Parameter(torch.tensor(1.0)))


def float_storage(module):
    packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.float16), requires_grad=False)
    packed.quant_state = object()
    module.model.model.norm.register_parameter("packed", packed)


def on_meta(module):
    with torch.device("meta"):
        module.model = LlamaForCausalLM(module.model.config)
    inject(module.model, LoRA(rank=4))


def head_on_meta(module):
    module.head = nn.Linear(2, 2, device="meta")


def shared(module):
    layers = module.model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def two_dtypes(module):
    norm = module.model.model.layers[0].input_layernorm.to(torch.bfloat16)
    norm.weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (on_meta, r"'model\.model\.embed_tokens\.weight' is on the meta device and has no values.*a loader such as"),
        (head_on_meta, r"'head\.weight' is on the meta device"),
        (
            shared,
            r"'model\.model\.layers\.0\.mlp\.up_proj\.\S+ and 'model\.model\.layers\.1\.mlp\.\S+ are one parameter.*units=\[\]",
        ),
        (
            two_dtypes,
            r"unit 'model\.model\.layers\.0' trains parameters of several dtypes.*input_layernorm\.weight' in torch\.bfloat16",
        ),
        (loose, r"Own holds the trained parameters \['scale'\] itself.*put them into a module with a forward"),
        (scalar, r"'temperature\.value' is a scalar, which FSDP2 does not shard; give it the shape \(1,\)"),
        (float_storage, r"'model\.model\.norm\.packed' holds packed weights stored as torch\.float16"),
    ],
)
def test_what_is_not_sharded_is_named(run, spoil, message):
    with pytest.raises(ProcessRaisedException, match=f"(?s)ConfigError: {message}"):
        run("fsdp", module=Own(spoil), devices=1, steps=1)


def test_offloading_to_where_it_is_already_is_refused(run):
    with pytest.raises(
        ProcessRaisedException, match="ConfigError: cpu_offload=True was asked for, but the run is on the CPU"
    ):
        run(PEFTFSDPStrategy(start_method="fork", cpu_offload=True), devices=1)


def test_groups_that_do_not_divide_the_processes_are_refused(run):
    with pytest.raises(ProcessRaisedException, match="ConfigError: replicate=2 does not divide the 1 processes"):
        run(PEFTFSDPStrategy(start_method="fork", replicate=2), devices=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"units": "LlamaMLP"}, "units must be a list.*got units='LlamaMLP'"),
        ({"replicate": 0}, "replicate=0"),
        ({"reduce_dtype": "int8"}, "reduce_dtype must be one of bf16, fp16, fp32 or None, got 'int8'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PEFTFSDPStrategy(**fields)


def test_searching_unused_parameters_is_refused():
    with pytest.raises(ConfigError, match="find_unused_parameters=True was asked for"):
        PEFTDDPStrategy(find_unused_parameters=True)


def test_a_unit_that_matches_nothing_is_named():
    with pytest.raises(
        TargetError,
        match=r"the policy asks for units 'LlamaLayer', but LlamaForCausalLM has no module .* classes are .*LlamaMLP",
    ):
        blocks_of(tiny_llama(), ["LlamaLayer"])
    assert list(blocks_of(tiny_llama(), ["LlamaMLP"])) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert list(blocks_of(tiny_llama(), ["*.1.mlp"])) == ["model.layers.1.mlp"]
    assert set(blocks_of(tiny_gpt2())) == {"transformer.h.0", "transformer.h.1"}


class OldOnCPU(FSDPStrategy):
    """FSDP1, which Lightning offers on accelerators only, as far as it gets on a CPU."""

    def _configure_launcher(self):
        self._launcher = _MultiProcessingLauncher(self, start_method="fork")


@pytest.mark.parametrize("kind", ["module", "mixin"])
def test_fsdp1_is_refused_before_the_model_is_made(forked, kind):
    def early(module):
        raise AssertionError("the model was made")

    module = PEFTModule(tiny_llama(), LoRA(rank=4)) if kind == "module" else Own(early)
    message = f"ConfigError: {type(module).__name__} was given OldOnCPU, which is FSDP1.*Use strategy='peft_fsdp'"
    with pytest.raises(ProcessRaisedException, match=message):
        forked(OldOnCPU(), devices=1, max_steps=1).fit(module, DataLoader([0]))


class Sharding(Own):
    """A module that shards its model itself."""

    def configure_model(self):
        if self.model is None:
            super().configure_model()
            fully_shard(self.model, mesh=self.device_mesh["shard"])

    def on_train_start(self):
        super().on_train_start()
        units = [name for name, inner in self.named_modules() if isinstance(inner, FSDPModule)]
        assert units == ["model"], units
        assert self.trainer.strategy.sharded_units == []


def test_a_module_that_shards_itself_is_left_as_it_is(run):
    own, plain = run("fsdp", module=Sharding(), steps=2), run("fsdp", module=Own(), steps=2)
    assert own.losses == plain.losses


def test_a_method_that_does_not_train_sharded_is_refused_by_name(run):
    with pytest.raises(
        ProcessRaisedException, match=r"(?s)ConfigError: adapter 'default' is Compacter\(.*fsdp_ready = False"
    ):
        run("fsdp", method=Compacter(), devices=1, steps=1)
    apart, alone = (run(kind, method=Compacter(share_rule=False), lr=1e-3) for kind in ("fsdp", "single"))
    assert apart.losses == pytest.approx(alone.losses, rel=1e-6)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_units_that_would_part_tied_weights_are_refused_and_one_unit_trains(run):
    def tied():
        return tiny_llama(tie_word_embeddings=True)

    parted = PEFTFSDPStrategy(start_method="fork", units=["LlamaDecoderLayer", "Embedding"])
    with pytest.raises(
        ProcessRaisedException, match="embed_tokens.weight' and 'model.lm_head.weight' are one parameter"
    ):
        run(parted, model=tied, devices=1, steps=1)
    whole, ddp = (run(kind, model=tied, steps=2) for kind in (PEFTFSDPStrategy(start_method="fork", units=[]), "ddp"))
    assert whole.losses == ddp.losses


def test_optimizers_of_bitsandbytes_are_refused_sharded(run):
    def optimizer(parameters):
        return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)

    bitsandbytes = pytest.importorskip("bitsandbytes")
    module = PEFTModule(tiny_llama(), LoRA(rank=4), optimizer=optimizer)
    with pytest.raises(
        ProcessRaisedException, match=r"ConfigError: bitsandbytes\.\S+AdamW8bit takes no sharded tensors"
    ):
        run("fsdp", module=module, devices=1, steps=1)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaging_of_weights_is_refused_sharded_and_with_checkpoints(run, tmp_path):
    with pytest.raises(ProcessRaisedException, match="ConfigError: EMAWeightAveraging copies the model"):
        run("fsdp", devices=1, steps=1, callbacks=[EMAWeightAveraging()])
    with pytest.raises(ConfigError, match="EMAWeightAveraging puts the whole averaged model, its base included"):
        run("single", steps=1, callbacks=[EMAWeightAveraging()], save=tmp_path)


@pytest.mark.parametrize("strategy", [PEFTDDPStrategy, PEFTFSDPStrategy])
def test_precision_that_quantises_adapters_is_refused(strategy):
    made = strategy()
    made.precision_plugin = object.__new__(BitsandbytesPrecision)  # which Lightning makes on CUDA only
    with pytest.raises(ConfigError, match="BitsandbytesPrecision quantises every linear layer, those of adapters too"):
        made.setup_environment()


class Odd:
    """Something that torch loads from trusted files only."""


class KeepsOdd(Callback):
    """Puts it into checkpoints."""

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["odd"] = Odd()


def test_a_file_that_is_to_be_trusted_is_refused_with_what_to_do(run, tmp_path):
    run("single", steps=1, save=tmp_path, callbacks=[KeepsOdd()])
    with pytest.raises(
        ProcessRaisedException, match=r"does not tell strategies that shard of weights_only=False.*add_safe_globals"
    ):
        run("fsdp", devices=1, steps=2, resume=str(tmp_path / "step=1.ckpt"))


class SavesAlone(Callback):
    """Saves an adapter by hand, where it is sharded."""

    def on_train_end(self, trainer, module):
        save_adapter(module.model, "nowhere")


def test_a_sharded_adapter_is_not_saved_by_one_process(run):
    with pytest.raises(
        ProcessRaisedException, match=r"(?s)AdapterFileError: .* is sharded.*save with AdapterCheckpoint"
    ):
        run("fsdp", steps=1, callbacks=[SavesAlone()])

"""Layers that are split over a group of processes, with adapters split as they are, train what one process trains."""

import json
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessRaisedException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Sampler
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightning_peft import (
    Bottleneck,
    CausalLMLoader,
    DoRA,
    FullFineTuning,
    LoRA,
    LoRAPlus,
    MoEUpcycling,
    NormTuning,
    PEFTFSDPStrategy,
    PEFTMixin,
    PEFTModule,
    PiSSA,
    QLoRA,
    inject,
    set_active_adapters,
)
from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import ConfigError
from lightning_peft.out_of_core.tensor_files import Entry
from lightning_peft.strategies.split_cost import tensor_parallel_bytes
from lightning_peft.strategies.tensor_parallel import check_splittable, plan_of, split_regions
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

LORA = LoRA(rank=4, init="gaussian")


def tensor(**fields):
    return PEFTFSDPStrategy(start_method="fork", tensor_parallel=2, **fields)


def relative(one, other):
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def biased():
    return with_biases(tiny_llama(attention_bias=True, mlp_bias=True))


def with_biases(model):
    numbers = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1, generator=numbers)
    return model


SETTINGS = {
    "accumulated": {
        "accumulate_grad_batches": 2, "batches": 12, "gradient_clip_val": 1e-2, "model": biased,
        "method": LoRAPlus(rank=4, init="gaussian", lr_ratio=4.0),
    },
    "dropout": {"method": LoRA(rank=4, dropout=0.3, init="gaussian")},
    "bf16": {"precision": "bf16-mixed"},
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_that_share_a_model_train_what_one_trains(run, setting):
    fields = {"method": LORA, "lr": 1e-3, "steps": 6, **SETTINGS[setting]}
    one, two = run("single", **fields), run("tensor", **fields)
    # In bfloat16 the parts of a sum over inputs are rounded before they are added.
    assert relative(two.losses, one.losses) <= (2e-4 if setting == "bf16" else 1e-6)
    assert len(set(one.losses)) >= 6


class Gradients(Callback):
    """Writes the gradients of the second step, whole, and how big the parts of this process are: in the first, those of A are zero."""

    def __init__(self, path):
        self.path = path

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step != 1:
            return
        found, parts = {}, {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                parts[name] = list(getattr(gradient, "_local_tensor", gradient).shape)
                found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()
        weight = module.model.get_submodule("model.layers.0.self_attn.k_proj").weight
        parts["k_proj"] = list(weight.to_local().shape) if isinstance(weight, DTensor) else list(weight.shape)
        if trainer.is_global_zero:
            torch.save((found, parts), self.path)


LAYOUTS = {
    "2": (2, {}),
    "2 x 2 by layers": (4, {"units": ["re:.*_proj"], "activation_checkpointing": True}),
}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(run, tmp_path, layout):
    devices, options = LAYOUTS[layout]
    fields = {"steps": 2, "method": LORA, "lr": 1e-3, "gradient_clip_val": 0.05}
    one = run("single", callbacks=[Gradients(tmp_path / "one.pt")], **fields)
    two = run(tensor(**options), devices=devices, callbacks=[Gradients(tmp_path / "two.pt")], **fields)
    assert relative(two.losses, one.losses) <= 1e-6
    (expected, whole), (found, parts) = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    same(found, expected)
    assert len(found) == 28
    data = devices // 2
    assert parts["k_proj"] == [whole["k_proj"][0] // 2 // data, 64]
    for name, shape in parts.items():
        if "lora" in name:
            rank, width = whole[name]
            split = ("lora_B" in name) != ("o_proj" in name or "down_proj" in name)
            assert shape == [rank // data, width // 2 if split else width], name


def same(found, expected):
    assert found.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        assert value.any(), name
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


class Sums(TorchDispatchMode):
    """Adds up the bytes that sums over processes send."""

    sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func.__name__.startswith("allreduce_"):
            self.sent += 2 * sum(tensor.nbytes for tensor in args[0]) * (2 - 1) / 2
        return func(*args, **(kwargs or {}))


class Sent(Callback):
    """Writes what the sums of forward and backward sent."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.mode = Sums()
        self.mode.__enter__()

    def on_after_backward(self, trainer, module):
        self.mode.__exit__(None, None, None)
        if trainer.is_global_zero:
            self.path.write_text(str(self.mode.sent))


def test_what_is_sent_is_what_the_cost_model_says(run, tmp_path):
    for again in (False, True):
        run(tensor(activation_checkpointing=again), method=LORA, steps=1, callbacks=[Sent(tmp_path / str(again))])
    tokens = token_batch(rows=8)["input_ids"].numel()
    factors = [(4, 64)] * 2 * (5 + 2)  # A of five colwise layers, B of two rowwise ones
    cost = {"tokens": tokens, "hidden": 64, "layers": 2, "activation_bytes": 4.0, "whole_factors": factors}
    for again in (False, True):
        expected = tensor_parallel_bytes(**cost, tensor_parallel=2, checkpointed=again)
        assert float((tmp_path / str(again)).read_text()) == expected


class Beside(PEFTMixin, LightningModule):
    """Beside adapters of split layers: an adapted embedding, norms before them, and within, norms of heads and the biases of the base."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            sizes = {
                "vocab_size": 128,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 1,
                "head_dim": 8,
                "attention_bias": True,
            }
            torch.manual_seed(0)
            self.model = Qwen3ForCausalLM(Qwen3Config(num_attention_heads=4, num_key_value_heads=2, **sizes)).train()
            inject(self.model, LORA, ["query", "down", "embedding"])
            inject(self.model, NormTuning(), ["re:.*layernorm"], name="norms")
            set_active_adapters(self.model, ["default", "norms"])
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or re.search("[qk]_norm|bias", name) is not None)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def test_what_is_trained_beside_split_layers_is_trained_too(run, tmp_path):
    fields = {"steps": 3, "gradient_clip_val": 0.05}
    one = run("single", module=Beside(), callbacks=[Gradients(tmp_path / "one.pt")], **fields)
    two = run("tensor", module=Beside(), callbacks=[Gradients(tmp_path / "two.pt")], **fields)
    assert relative(two.losses, one.losses) <= 1e-6
    (expected, _), (found, _) = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    same(found, expected)
    assert len(found) == 2 * 2 + 2 + 2 + 2 + 4


# -- files -------------------------------------------------------------------------------------------------------------


class Gathered(Callback):
    """Notes how many elements the tensors have that are made whole in a run."""

    def __init__(self, path):
        self.path, self.elements = path, []

    def on_fit_start(self, trainer, module):
        self.original = DTensor.full_tensor
        DTensor.full_tensor = lambda tensor, **kwargs: (
            self.elements.append(tensor.numel()),
            self.original(tensor, **kwargs),
        )[1]

    def on_train_end(self, trainer, module):
        DTensor.full_tensor = self.original
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.elements))


def test_the_saved_folder_is_that_of_one_process_and_no_weight_of_the_base_is_gathered_for_it(run, tmp_path):
    for kind in ("single", "tensor"):
        watch = [Gathered(tmp_path / "gathered")] if kind == "tensor" else []
        run(kind, method=LORA, steps=1, lr=1e-3, save=tmp_path / kind, callbacks=watch)
    one, two = (tmp_path / kind / "step=1.adapter" for kind in ("single", "tensor"))
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    same(found, expected)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    notes = [json.loads((folder / "lightning_peft.json").read_text()) for folder in (one, two)]
    assert notes[0]["base"]["tensors"] == notes[1]["base"]["tensors"]
    gathered = json.loads((tmp_path / "gathered").read_text())
    assert gathered
    assert max(gathered) <= 4 * 128


class Parts(Callback):
    """Notes what each process reads of the base, and holds of it."""

    def __init__(self, folder):
        self.folder, self.pieces = folder, []

    def setup(self, trainer, module, stage):  # before configure_model
        self.original = Entry._piece

        def piece(entry, shape, offset, size):
            found = self.original(entry, shape, offset, size)
            self.pieces.append(found.numel())
            return found

        Entry._piece = piece

    def on_fit_start(self, trainer, module):
        Entry._piece = self.original
        base = [p for _, place in base_modules(module.model) for p in unwrapped(place).parameters(recurse=False)]
        noted = {"read": sum(self.pieces), "held": sum(p.to_local().numel() for p in base)}
        (self.folder / f"{dist.get_rank()}.json").write_text(json.dumps(noted))


def test_each_process_reads_its_part_of_the_base_and_counts_tokens_once(run, tmp_path):
    """Two replicas, each of two processes, with very different numbers of tokens, as one process with all of these in one batch."""
    rows = [{"input_ids": row, "labels": row.clone()} for row in token_batch(seed=3, rows=16)["input_ids"]]
    for number, row in enumerate(rows):
        row["labels"][: 12 if number % 2 else 2] = -100
    tiny_llama().save_pretrained(tmp_path / "base")

    def train(strategy, weighting, **fields):
        base, sgd = CausalLMLoader(path=str(tmp_path / "base")), partial(torch.optim.SGD, lr=0.5)
        module = PEFTModule(base, LORA, optimizer=sgd, loss_weighting=weighting)
        return run(strategy, module=module, steps=2, data=rows, **fields)

    one = train("single", "batches")
    four = train(tensor(replicate=2), "tokens", devices=4, callbacks=[Parts(tmp_path)])
    same(four.state, one.state)
    model = tiny_llama()
    layers = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    rest = sum(p.numel() for p in model.parameters()) - layers
    by_columns = 2 * (64 * 64 + 64 * 128)  # rows of o_proj and down_proj are read whole, and half of each is kept
    for rank in range(4):
        noted = json.loads((tmp_path / f"{rank}.json").read_text())
        assert noted == {"held": layers // 2 + rest, "read": layers // 2 + rest + by_columns // 2}


# -- what is refused ---------------------------------------------------------------------------------------------------


def adapted(method, targets=None, **config):
    model = tiny_llama(**config)
    inject(model, method, targets)
    return model


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    )  # fmt: skip


def test_the_plan_comes_from_the_configuration():
    regions = split_regions(adapted(LORA))
    assert list(regions) == [f"model.layers.{n}.{part}" for part in ("self_attn", "mlp") for n in (0, 1)]
    names = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    assert regions["model.layers.1.mlp"] == {f"model.layers.1.mlp.{name}": style for name, style in names.items()}
    assert list(split_regions(mixtral())) == ["model.layers.0.self_attn"]  # fused experts stay whole
    assert plan_of(tiny_gpt2()) == {}


@pytest.mark.parametrize(
    ("model", "count", "message"),
    [
        (lambda: adapted(LORA), 4, "tensor_parallel=4 .*'model.layers.0.self_attn'.*num_attention_heads=4 and num_key_value_heads=2"),
        (lambda: adapted(LORA, intermediate_size=130), 4, "num_key_value_heads=2"),
        (lambda: adapted(LORA, intermediate_size=129), 2, "does not divide the 129 outputs of 'model.layers.0.mlp.gate_proj'"),
        (lambda: adapted(DoRA(rank=2)), 2, r"q_proj' is DoRA\(.*does not say how its tensors are split with a colwise layer"),
        (lambda: adapted(PiSSA(rank=2), "down"), 2, r"down_proj' is PiSSA\(.*with a rowwise layer"),
        (lambda: adapted(FullFineTuning(), "value"), 2, r"v_proj' is FullFineTuning\("),
        (lambda: adapted(Bottleneck()), 2, r"o_proj' is Bottleneck\(.*does not say how its tensors are split with a rowwise layer"),
        (lambda: adapted(MoEUpcycling(experts=2)), 2, r"is MoEUpcycling\(.*acts within 'model.layers.0.mlp'"),
        (lambda: adapted(QLoRA(rank=2)), 2, "is quantised .*packed weights are not split"),
        (lambda: adapted(LoRA(rank=2, bias="lora_only"), attention_bias=True), 2, "use LoRA without trained biases"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_named(model, count, message):
    made = model()
    with pytest.raises(ConfigError, match=message):
        check_splittable(made, split_regions(made), count, 0)


def test_a_model_without_a_plan_is_refused():
    model = tiny_gpt2()
    inject(model, LORA)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel it has no such plan.*Use tensor_parallel=1"):
        split_regions(model)


class AsIfAlone(Sampler):
    """Deals rows out to all processes, as if none shared a model."""

    def __iter__(self):
        return iter(range(dist.get_rank(), 16, dist.get_world_size()))

    def __len__(self):
        return 8


def test_different_batches_in_a_group_are_refused(forked):
    rows = [{"input_ids": row, "labels": row} for row in token_batch(rows=16)["input_ids"]]
    module = PEFTModule(tiny_llama(), LORA)
    with pytest.raises(
        ProcessRaisedException,
        match="(?s)ConfigError: the 2 processes of a tensor_parallel group got different batches",
    ):
        forked(tensor(), max_steps=1, use_distributed_sampler=False).fit(
            module, DataLoader(rows, batch_size=2, sampler=AsIfAlone())
        )


def test_groups_that_do_not_divide_the_processes_are_refused(run):
    with pytest.raises(
        ProcessRaisedException, match="ConfigError: replicate=2 times tensor_parallel=2 does not divide the 2 processes"
    ):
        run(tensor(replicate=2))
    with pytest.raises(ConfigError, match="tensor_parallel at least 1.*tensor_parallel=0"):
        PEFTFSDPStrategy(tensor_parallel=0)

"""Upcycled models in training: the optimizer state of the dense run, several processes, large models on the meta device, memory."""

import json
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import MoEUpcycling, adapter_layers, inject, trainable_summary
from lightning_peft.adapter_layer import base_parameters
from lightning_peft.errors import AdapterMismatchError, ConfigError
from lightning_peft.moe.mixture import MixtureOfExperts
from lightning_peft.moe.optimizer_state import named_optimizer_state, set_optimizer_state, upcycle_optimizer_state
from lightning_peft.moe.size import upcycled_size
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch


def dense_run(model, steps=2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model(**token_batch(step), labels=token_batch(step)["input_ids"]).loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("mode", ["copy", "scaled"])
@pytest.mark.parametrize("fields", [{"experts": 8, "top_k": 2}, {"experts": 4, "top_k": 4, "granularity": 2}])
def test_the_state_of_the_dense_run_goes_to_the_experts(make, mode, fields):
    model = make()
    dense = named_optimizer_state(model, dense_run(model))
    inject(model, MoEUpcycling(**fields))
    states = upcycle_optimizer_state(model, dense, mode)
    copies, chosen, shards = (
        fields["experts"],
        fields["top_k"] // fields.get("granularity", 1),
        fields.get("granularity", 1),
    )
    parameters = dict(model.named_parameters())
    assert {key.rsplit(".", 1)[-1] for key in states} == {
        name for name, _ in next(iter(mixtures(model).values())).named_parameters() if name != "router"
    }
    for key, state in states.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameters[key].shape
        assert state["step"] == 2
    for path, mixture in mixtures(model).items():
        down, turned = ("mlp.c_proj", True) if make is tiny_gpt2 else ("mlp.down_proj", False)
        for field, factor in (("exp_avg", 1 / copies), ("exp_avg_sq", 1 / (copies * chosen))):
            source = dense[f"{path.removesuffix('mlp')}{down}.weight"][field]
            source = source.t() if turned else source
            found = states[f"{path}.adapters.default.down_proj"][field]
            parts = torch.stack(source.chunk(shards, dim=1)).repeat(copies, 1, 1)
            assert torch.equal(found, parts * (factor if mode == "scaled" else 1.0))
        assert mixture.copies_per_token == chosen


def mixtures(model):
    found = {path: layer.adapters["default"] for path, layer in adapter_layers(model).items()}
    return {path: adapter for path, adapter in found.items() if isinstance(adapter, MixtureOfExperts)}


def test_adam_goes_on_with_that_state():
    model = tiny_llama()
    dense = named_optimizer_state(model, dense_run(model))
    inject(model, MoEUpcycling(experts=2, train="all"))
    states = upcycle_optimizer_state(model, dense, "scaled")
    attention = "model.layers.0.self_attn.base_layer.q_proj.adapters.default.trained_weight"
    assert torch.equal(states[attention]["exp_avg"], dense["model.layers.0.self_attn.q_proj.weight"]["exp_avg"])
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key in trained if key not in states} == {
        f"{path}.adapters.default.router" for path in mixtures(model)
    }
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    set_optimizer_state(optimizer, model, states)
    model(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()
    optimizer.step()
    assert optimizer.state[trained[attention]]["step"] == 3
    assert dense["model.layers.0.self_attn.q_proj.weight"]["step"] == 2


def test_scaled_moments_are_those_that_experts_gather():
    """After many batches Adam's moments of the dense model, scaled, are about those of an expert: g² by 1 / (E K)."""
    model, experts, squares, dense = tiny_llama(), 8, 0.0, 0.0
    inject(model, MoEUpcycling(experts=experts, top_k=2))
    mixture = mixtures(model)["model.layers.0.mlp"]
    for seed in range(20):
        model.zero_grad()
        ids = token_batch(seed, rows=8, length=32)["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        squares += float(mixture.down_proj.grad.square().sum(0).mean()) / experts
        dense += float(mixture.down_proj.grad.sum(0).square().mean())
    assert experts * squares / dense == pytest.approx(1 / 2, rel=0.3)


def test_states_that_do_not_fit_are_refused():
    model = tiny_llama()
    inject(model, MoEUpcycling(experts=2))
    assert upcycle_optimizer_state(model, {}, "fresh") == {}
    with pytest.raises(
        AdapterMismatchError, match="the dense optimizer state has nothing of 'model.layers.0.mlp.gate_proj.weight'"
    ):
        upcycle_optimizer_state(model, {"w": {}}, "copy")
    with pytest.raises(ConfigError, match="mode must be one of fresh, copy, scaled, got 'half'"):
        upcycle_optimizer_state(model, {}, "half")


# -- large models --------------------------------------------------------------------------------------------------------


def test_seven_billion_parameters_on_the_meta_device():
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig())
        inject(model, MoEUpcycling(experts=8, dtype="base"))
    size = upcycled_size(model)
    mlps, routers = 32 * 3 * 4096 * 14336, 32 * 8 * 4096
    assert size.dense == 7_241_732_096
    assert size.total == 7_241_732_096 + 7 * mlps + routers  # Mixtral 8x7B: 46.7 billion
    assert size.active == 7_241_732_096 + mlps + routers
    assert size.trained == trainable_summary(model).trainable == 8 * mlps + routers
    assert size.held_bytes == 4 * (7_241_732_096 + 8 * mlps + routers)
    assert size.training_bytes == 3 * 4 * (8 * mlps + routers)
    assert "7,241,732,096 parameters become 46,702,792,704, of which a token meets 12,879,925,248" in str(size)


class Peak(TorchDispatchMode):
    """Follows the bytes that tensors made inside hold."""

    def __init__(self, model):
        super().__init__()
        self.live = self.most = 0
        self.seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage):
        if storage._cdata in self.seen or not storage.nbytes():
            return
        size, key = storage.nbytes(), storage._cdata
        self.seen.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("fields", [{}, {"expert_noise": 0.1, "reinit": 0.5, "combine": "softmax"}])
def test_nothing_of_the_base_is_held_twice(fields):
    model = tiny_llama(num_hidden_layers=6, intermediate_size=512)
    before = {key: p.data_ptr() for key, p in model.named_parameters()}
    with Peak(model) as peak:
        inject(model, MoEUpcycling(experts=4, **fields))
    made = sum(p.numel() * 4 for adapter in mixtures(model).values() for p in adapter.parameters())
    one_mlp = 3 * 64 * 512 * 4
    assert made <= peak.most <= made + 2 * one_mlp
    assert {key: p.data_ptr() for key, p in base_parameters(model)} == before


# -- several processes ---------------------------------------------------------------------------------------------------

DISTRIBUTED = """
import json, os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from lightning_peft import MoEUpcycling, adapter_layers, inject
from lightning_peft.testing import tiny_llama

kind, rank = sys.argv[1], int(os.environ["RANK"])
dist.init_process_group("gloo")
torch.manual_seed(0)
model = tiny_llama().train()
inject(model, MoEUpcycling(experts=16, top_k=2, balance_coef=0.0))
whole = model
if kind == "ddp":
    model = DistributedDataParallel(model)
else:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(3):
    ids = torch.randint(0, 128, (1, 3), generator=torch.Generator().manual_seed(10 * step + rank))  # few tokens: experts stay idle
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
tensors = {
    f"{path}.{key}": getattr(p, "full_tensor", lambda p=p: p)().detach().double().sum().item()
    for path, layer in adapter_layers(whole).items() for key, p in layer.adapters["default"].named_parameters()
}
print(json.dumps(tensors))
dist.destroy_process_group()
"""


def alone():
    """Train as the two processes do together, in one: the mean of their losses."""
    torch.manual_seed(0)
    model = tiny_llama().train()
    inject(model, MoEUpcycling(experts=16, top_k=2, balance_coef=0.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        for rank in (0, 1):
            ids = torch.randint(0, 128, (1, 3), generator=torch.Generator().manual_seed(10 * step + rank))
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        optimizer.step()
    return {
        f"{path}.{key}": p.detach().double().sum().item()
        for path, layer in adapter_layers(model).items()
        for key, p in layer.adapters["default"].named_parameters()
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_with_idle_experts(kind, tmp_path):
    """Without a search for unused parameters: an expert without a token has a gradient of zeros."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), kind],
            env={
                **os.environ,
                **meeting,
                "RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [run.communicate(timeout=120) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], outputs[0][1][-2000:]
    found = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    wanted = alone()
    assert found[0] == found[1]
    assert found[0].keys() == wanted.keys()
    assert all(found[0][key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-2) for key in wanted)


def test_the_routers_can_be_watched(make_trainer, tmp_path):
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader

    from lightning_peft import PEFTModule, RouterMonitor

    ids = token_batch(rows=8)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": (torch.arange(12) < 9).long(), "labels": row} for row in ids]
    module = PEFTModule(tiny_llama(), MoEUpcycling(experts=4), optimizer=torch.optim.SGD)
    trainer = make_trainer(
        tmp_path,
        max_steps=2,
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
        callbacks=[RouterMonitor()],
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    figures = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("moe/")}
    loads = [value for key, value in figures.items() if "layers.0" in key and "/load/" in key]
    assert len(loads) == 4
    assert sum(loads) == pytest.approx(1.0)
    assert [value for key, value in figures.items() if key.endswith("uncovered")] == [
        0.0,
        0.0,
    ]  # padding is nobody's loss


def test_a_state_that_cannot_be_shared_out_is_refused():
    """Adafactor keeps sums over rows and columns, which belong to no expert."""
    from transformers import Adafactor

    model = tiny_llama()
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    model(**token_batch()).logits.square().mean().backward()
    optimizer.step()
    state = named_optimizer_state(model, optimizer)
    inject(model, MoEUpcycling(experts=4))
    with pytest.raises(
        AdapterMismatchError, match="'exp_avg_sq_row' of shape .* cannot be shared out among experts: use mode='fresh'"
    ):
        upcycle_optimizer_state(model, state, "scaled")

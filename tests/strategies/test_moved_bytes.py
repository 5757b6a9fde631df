"""What the cost model says is what torch moves: bytes of the collectives of real runs, and bytes on the wire below them."""

import json

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.multiprocessing import get_context
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import LoRA, TopLayers, VeRA, inject
from lightning_peft.strategies.cost import step_cost, tensors_of
from lightning_peft.strategies.ddp import PEFTDDPStrategy
from lightning_peft.strategies.expert_cost import expert_cost
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy
from lightning_peft.testing import tiny_llama

TURNS = {
    "allreduce_": ("reduced_bytes", 2),
    "_reduce_scatter_base_": ("reduced_bytes", 1),
    "_allgather_base_": ("gathered_bytes", 1),
}
"""Collective to the kind of cost, and how often what it moves goes around a ring."""


class Moved(TorchDispatchMode):
    """Adds up what each process sends, from the collectives that torch calls."""

    def __init__(self):
        super().__init__()
        self.sent = {"gathered_bytes": 0.0, "reduced_bytes": 0.0, "broadcast_bytes": 0.0, "collectives": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            tensors = [one for arg in args for one in (arg if isinstance(arg, list) else [arg])]
            sizes = [one.nbytes for one in tensors if isinstance(one, torch.Tensor)]
            self.sent["collectives"] += 1
            if name == "broadcast_":
                self.sent["broadcast_bytes"] += sum(sizes)
            else:
                kind, turns = TURNS[name]
                group = next(one for one in args if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one))
                size = dist.ProcessGroup.unbox(group).size()
                self.sent[kind] += turns * max(sizes) * (size - 1) / size
        return func(*args, **(kwargs or {}))


class Ledger(Callback):
    """Keeps what the forward and backward of the last batch sent; the first ones also settle things for good."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.mode = Moved()
        self.mode.__enter__()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.mode.__exit__(None, None, None)
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.mode.sent))


def half_llama():
    return tiny_llama().to(torch.bfloat16)


DDP = (PEFTDDPStrategy, {"strategy": "peft_ddp"})
FSDP = (PEFTFSDPStrategy, {})
KEPT = (PEFTFSDPStrategy, {"reshard_after_forward": False})
HSDP = (PEFTFSDPStrategy, {"replicate": 2})


@pytest.mark.parametrize(
    ("kind", "processes", "method", "model"),
    [
        pytest.param(DDP, 2, LoRA(rank=4), tiny_llama, id="ddp"),
        pytest.param(DDP, 4, LoRA(rank=3), half_llama, id="ddp, bf16 base"),
        pytest.param(DDP, 2, VeRA(rank=4), tiny_llama, id="ddp, frozen matrices in buffers"),
        pytest.param(FSDP, 2, LoRA(rank=4), tiny_llama, id="fsdp"),
        pytest.param(FSDP, 4, LoRA(rank=3), half_llama, id="fsdp, bf16 base, few rows cut by columns"),
        pytest.param(FSDP, 3, LoRA(rank=4), tiny_llama, id="fsdp, padded"),
        pytest.param(KEPT, 2, LoRA(rank=4), tiny_llama, id="fsdp, weights kept"),
        pytest.param(FSDP, 2, TopLayers(num_blocks=1), tiny_llama, id="fsdp, a block trained"),
        pytest.param(HSDP, 4, LoRA(rank=3), half_llama, id="hsdp"),
    ],
)
def test_the_model_counts_the_bytes_of_real_steps(run, tmp_path, kind, processes, method, model):
    strategy, fields = kind
    arguments = {key: value for key, value in fields.items() if key != "strategy"}
    run(
        strategy(start_method="fork", **arguments),
        devices=processes,
        method=method,
        model=model,
        steps=3,
        callbacks=[Ledger(tmp_path / "sent")],
    )
    adapted = model()
    inject(adapted, method)
    cost = step_cost(tensors_of(adapted), processes=processes, **fields)
    expected = {key: getattr(cost, key) for key in ("gathered_bytes", "reduced_bytes", "broadcast_bytes")}
    sent = json.loads((tmp_path / "sent").read_text())
    count = sent.pop("collectives")
    assert sent == pytest.approx(expected)
    if strategy is PEFTFSDPStrategy:
        assert count == cost.collectives


def _exchange(rank, processes, path, sizes, together):
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=processes)
    x = torch.randn(sizes["tokens"], sizes["hidden"], dtype=torch.bfloat16)
    sent = 0
    for _ in range(sizes["layers"]):
        # Experts in turn: every process gets as many copies of tokens. One way, and the same for outputs and both gradients.
        chosen = torch.arange(sizes["tokens"] * sizes["top_k"]) % sizes["experts"]
        owner = chosen * processes // sizes["experts"]
        order = owner.argsort(stable=True)
        copies = x[order // sizes["top_k"]]
        counts = owner.bincount(minlength=processes).tolist()
        for _ in range(4):
            back = torch.empty_like(copies)
            dist.all_to_all_single(back, copies, counts, counts)
            sent += sum(count for other, count in enumerate(counts) if other != rank) * x[0].nbytes
    if rank == 0:
        path.write_text(str(sent))
    together.wait(60)  # a process that hangs up while others listen makes them fail
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("processes", [2, 4])
def test_an_exchange_of_tokens_sends_what_the_model_says(tmp_path, processes):
    sizes = {"hidden": 16, "experts": 8, "top_k": 2, "layers": 3, "tokens": 32}
    context = get_context("fork")
    arguments = processes, tmp_path / "sent", sizes, context.Barrier(processes)
    started = [context.Process(target=_exchange, args=(rank, *arguments)) for rank in range(processes)]
    for one in started:
        one.start()
    for one in started:
        one.join(60)
        assert one.exitcode == 0
    cost = expert_cost(**sizes, intermediate=32, processes=processes, group=processes)
    assert float((tmp_path / "sent").read_text()) == cost.exchanged_bytes

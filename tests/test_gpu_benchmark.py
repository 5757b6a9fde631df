"""``benchmarks/gpu.py`` on the CPU: the code that a GPU runs, and what it says where there is none."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft.testing import tiny_llama, token_batch

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # of libraries, about kernels for GPUs and the like: it is a program of its own
def test_the_program_measures_and_writes(gpu, tmp_path, capsys):
    output = tmp_path / "found" / "gpu.json"
    small = [
        "--steps",
        "3",
        "--warm-up",
        "1",
        "--sequence",
        "16",
        "--rows",
        "2",
        "--rank",
        "4",
        "--peak",
        "1e12",
        "--checkpointing",
    ]
    assert gpu.main(["--device", "cpu", "--shape", "tiny", *small, "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert (written["device"], written["options"]["rank"]) == ("CPU", 4)
    assert [one["base"] for one in written["results"]] == ["bf16", "nf4"]
    for one in written["results"]:
        assert one["trained"] == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
        assert one["tokens_per_second"] == pytest.approx(32 / one["step_seconds"])
        assert 4.5 < one["loss"] < 6.5  # of 256 tokens, nothing learned
        assert 0 < one["mfu"] < 1
        assert all(one[f"{what}_seconds"] > 0 for what in ("checkpoint_save", "adapter_save", "adapter_load"))
        assert one["checkpoint_bytes"] > 3 * 4 * one["trained"]  # values and two moments
    printed = capsys.readouterr().out
    assert "| tiny | nf4 |" in printed
    assert printed.count("\n| ") == 3


def test_without_a_gpu_it_says_so_and_is_content(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 0
    assert "no GPU is here, so nothing was measured" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("trained", [False, True])
def test_operations_are_those_that_torch_counts(gpu, trained):
    model = tiny_llama(attn_implementation="eager").train().requires_grad_(trained)
    rows = model.get_input_embeddings()(token_batch(rows=2, length=16)["input_ids"]).detach().requires_grad_()
    with FlopCounterMode(display=False) as counted:
        model(inputs_embeds=rows).logits.sum().backward()
    # Eager attention computes what the mask hides, too: as much as rows of twice the length with half of it hidden.
    assert gpu.operations(model, 32, 2 * 16) == pytest.approx(counted.get_total_flops(), rel=1e-3)


def test_steps_that_are_all_warm_up_are_refused(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--steps", "3", "--warm-up", "3"])
    assert "--warm-up must leave some of the 3 steps, got 3" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["layer", "rows"])
def test_kernels_are_compared_on_the_cpu_too(what, monkeypatch):
    pytest.importorskip("triton", reason="needs triton: pip install 'lightning-peft[triton]'")
    monkeypatch.syspath_prepend(str(FILE.parent))
    spec = importlib.util.spec_from_file_location("gpu_kernels_benchmark", FILE.with_name("gpu_kernels.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from lightning_peft.arithmetic import triton_low_rank

    launched = []
    add = triton_low_rank.add
    monkeypatch.setattr(triton_low_rank, "add", lambda *args: (launched.append(what), add(*args))[1])
    options = argparse.Namespace(what=[what], widths=["32x48"], tokens=[4], rank=2, device="cpu", rounds=1)
    found = {row.arm: row for row in module.measure(options)}  # compares what kernels and the plain path return
    assert {"HF PEFT", "frozen", "plain", "kernels"} < found.keys()
    assert (
        len(launched) == (1 + 2 + 1 + 1) * {"layer": 2, "rows": 1}[what]
    )  # the comparison, two rounds, bytes, one round

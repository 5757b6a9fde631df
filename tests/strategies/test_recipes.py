"""The recipes of ``docs/scaling.md`` as they stand there, with two processes on the CPU; and its tables."""

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
LONGEST = 110
"""Seconds after which processes are ended; two programs of two processes share the cores of a small machine for most of it."""
pytestmark = pytest.mark.timeout(3 * LONGEST)
SMALL = (
    "--trainer.accelerator cpu --trainer.max_steps 6 --trainer.enable_progress_bar false --trainer.enable_model_summary false "
    "--data.init_args.block_size 16 --data.init_args.batch_size 2 --trainer.callbacks+ watching.Watching"
)
"""What a test changes: the size, and a callback that writes losses and may kill the second process."""
WATCHING = """
import json, os
from lightning.pytorch import Callback, Trainer

class Watching(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = float(trainer.strategy.reduce(outputs["loss"].detach().clone()))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if trainer.is_global_zero:
            with open("losses", "a") as file:
                file.write(json.dumps([attempt, trainer.global_step, loss]) + "\\n")
        if "DIES" in os.environ and (attempt, trainer.global_step, trainer.global_rank) == (0, 5, 1):
            os._exit(1)
"""


def command(heading):
    """Return the last command of a section, as words."""
    section = PAGE.split(f"### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL).group(1)
    return shlex.split(block.replace("\\\n", " ").strip().splitlines()[-1]), block


def option(words, name, value):
    """Return the words with another value of an option that is there."""
    words[words.index(name) + 1] = value
    return words


@pytest.fixture
def folder(tmp_path, llama_dir, monkeypatch):
    """A folder with the configuration of the page and what it names."""
    configuration = next(one for one in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "# scaling.yaml" in one)
    assert "every_n_train_steps: 100" in configuration
    few = configuration.replace("every_n_train_steps: 100", "every_n_train_steps: 2")
    (tmp_path / "scaling.yaml").write_text(few.replace("dtype: bfloat16", "dtype: float32"))
    (tmp_path / "watching.py").write_text(WATCHING)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"the number {number} is not {number + 1}." for number in range(200))
    )
    for name, value in {
        "BASE": llama_dir, "TEXT": str(tmp_path / "text.txt"), "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(*commands, **environment):
    """Run commands side by side, each in a session of its own, and end all that is left of them."""
    started = [
        subprocess.Popen(
            [*words, *SMALL.split()],
            env={**os.environ, **environment, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for words, own in commands
    ]
    try:
        said = [one.communicate(timeout=LONGEST)[0] for one in started]
    finally:
        for one in started:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
                one.wait(10)
    assert [one.returncode for one in started] == [0] * len(started), said


def torchrun(words):
    assert words[0] == "torchrun"
    return [sys.executable, "-m", "torch.distributed.run", *words[1:]]


def losses(folder):
    found = [json.loads(line) for line in (folder / "losses").read_text().splitlines()]
    (folder / "losses").unlink()
    return found


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.launched
def test_one_host_and_slurm_train_the_same(folder):
    words, _ = command("One host")
    words = option(option(words, "--nproc-per-node", "2"), "--trainer.devices", "2")
    ran((torchrun(words), {}))
    straight = losses(folder)
    assert [step for _, step, _ in straight] == [1, 2, 3, 4, 5, 6]
    assert (folder / "runs/scaling/last.ckpt").is_file()
    assert (folder / "runs/scaling/last.adapter/adapter_model.safetensors").is_file()

    words, block = command("SLURM")
    lines = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", block))
    assert words[words.index("--trainer.devices") + 1] == lines["ntasks-per-node"] == lines["gpus-per-node"]
    assert words[words.index("--trainer.num_nodes") + 1] == lines["nodes"]
    assert words[:3] == ["srun", "lightning-peft", "fit"]
    words = option(option(words[2:], "--trainer.devices", "2"), "--trainer.num_nodes", "1")
    slurm = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "adapter", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1",
        "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    words = [sys.executable, "-m", "lightning_peft.cli", *words, "--trainer.callbacks.dirpath", "runs/slurm"]
    ran(*((words, rank) for rank in ranks), **slurm)
    assert losses(folder) == straight


@pytest.mark.launched
def test_a_process_that_dies_is_started_again_and_goes_on(folder):
    words, block = command("Several hosts, and restarts")
    variable = re.search(r"export (\w+)=(\w+)", block).groups()
    for name, value in {
        "--nnodes": "1", "--nproc-per-node": "2", "--rdzv-endpoint": f"127.0.0.1:{free_port()}", "--trainer.devices": "2",
        "--trainer.num_nodes": "1",
    }.items():  # fmt: skip
        words = option(words, name, value)
    chosen = "--trainer.strategy.class_path lightning_peft.strategies.fsdp.PEFTFSDPStrategy --trainer.strategy.init_args.replicate 2"
    assert chosen.split()[:2] == shlex.split(re.search(r"`(--trainer.strategy.class_path\s[^`]+)`", PAGE).group(1))[:2]
    ran((torchrun([*words, *chosen.split()]), {}), DIES="1", **dict([variable]))
    found = losses(folder)
    first = {step: loss for attempt, step, loss in found if attempt == 0}
    again = {step: loss for attempt, step, loss in found if attempt > 0}
    assert sorted(first) == [1, 2, 3, 4, 5]
    assert sorted(again) == [5, 6]  # from the checkpoint after step 4
    assert again[5] == first[5]


def test_the_tables_are_those_of_the_cost_model():
    spec = importlib.util.spec_from_file_location("scaling_benchmark", ROOT / "benchmarks" / "scaling.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    tables = [*(benchmark.rows(base) for base in benchmark.BASES), benchmark.experts()]
    for lines in tables:
        assert "\n".join(lines) in PAGE, "put the output of python benchmarks/scaling.py table into docs/scaling.md"

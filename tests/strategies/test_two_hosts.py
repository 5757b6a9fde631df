"""Two hosts, simulated by network namespaces that a pair of virtual interfaces connects, train what one host trains.

::

    namespace 0                     namespace 1
      torchrun --node-rank 0          torchrun --node-rank 1
      10.213.7.1 ── veth ─────────── veth ── 10.213.7.2          no other way leads out of either
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

from lightning_peft.strategies.cost import Links, Tensors, step_cost

pytestmark = [pytest.mark.namespaces, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("train_both.py")
ADDRESSES = "10.213.7.1", "10.213.7.2"
LONGEST = 100
"""Seconds after which processes are ended."""


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10)


@pytest.fixture
def hosts():
    """Two names of namespaces, each with one end of a wire as its interface ``wire``."""
    if shutil.which("ip") is None:
        pytest.skip("needs the program 'ip' (iproute2)")
    names = [f"peft{os.getpid()}{end}" for end in "ab"]
    try:
        made = ip("netns", "add", names[0])
        if made.returncode:
            pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
        ip("netns", "add", names[1]).check_returncode()
        wire = ip("-n", names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", names[1])
        if wire.returncode:
            pytest.skip(f"virtual interfaces are not permitted here: {wire.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire").check_returncode()
            for link in ("wire", "lo"):
                ip("-n", name, "link", "set", link, "up").check_returncode()
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def received(host):
    """Return the bytes that came in through the wire of a host so far."""
    return json.loads(ip("-n", host, "-s", "-j", "link", "show", "wire").stdout)[0]["stats64"]["rx"]["bytes"]


def launched(host, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if host:
        environment["GLOO_SOCKET_IFNAME"] = "wire"
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    inside = ["ip", "netns", "exec", host] if host else []
    return subprocess.Popen(
        [*inside, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(processes):
    """Wait for all of them, end what is left, and return what they said."""
    try:
        return [process.communicate(timeout=LONGEST)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(20)


@pytest.mark.launched
def test_two_hosts_train_what_one_trains(hosts, tmp_path):
    there = []
    for rank, host in enumerate(hosts):
        where = ["--master-addr", ADDRESSES[0], "--master-port", "29613"]
        shape = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        there.append(launched(host, *shape, *where, str(SCRIPT), str(tmp_path / "two"), "1", "2"))
    said = ended(there)
    assert [process.returncode for process in there] == [0, 0], said
    here = launched(None, "--standalone", "--nproc-per-node", "2", str(SCRIPT), str(tmp_path / "one"), "2", "1")
    said = ended([here])
    assert here.returncode == 0, said
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two", "one"))
    assert two == one
    assert one["peft_ddp"] == one["peft_fsdp"]
    assert (len(set(one["peft_ddp"])), one["world"]) == (4, 2)
    assert min(map(received, hosts)) > 1_000_000  # FSDP2 gathered the base through the wire


SIZE = 2**22
NEW_NETWORK = 0x40000000
"""``CLONE_NEWNET`` of unshare(2); Python has it from 3.12."""
COLLECTIVES = {
    "all_reduce": (lambda whole, part: dist.all_reduce(whole), 2),
    "all_gather": (lambda whole, part: dist.all_gather_into_tensor(whole, part), 1),
    # Gloo has no reduce-scatter of its own: torch reduces everything everywhere. NCCL sends half of that.
    "reduce_scatter": (lambda whole, part: dist.reduce_scatter_tensor(part, whole), 2),
    "all_to_all": (lambda whole, part: dist.all_to_all_single(whole, whole.clone()), 1),
}
"""Collective to how it is called, and how often what it moves goes around a ring."""


def _collective(rank, processes, name, store, together):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    call, _ = COLLECTIVES[name]
    whole, part = torch.ones(SIZE // 4), torch.ones(SIZE // 4 // processes)
    for _ in range(4):
        call(whole, part)
    together.wait(LONGEST)  # a process that hangs up while others listen makes them fail
    dist.destroy_process_group()


def _on_a_wire_of_its_own(processes, name, store):
    """Move into a namespace, run a collective four times, and write what went over its loopback."""
    assert ctypes.CDLL(None).unshare(NEW_NETWORK) == 0
    ip("link", "set", "lo", "up").check_returncode()
    context = get_context("fork")
    arguments = processes, name, store, context.Barrier(processes)
    started = [context.Process(target=_collective, args=(rank, *arguments)) for rank in range(processes)]
    for one in started:
        one.start()
    for one in started:
        one.join(60)
        assert one.exitcode == 0
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    Path(f"{store}.bytes").write_text(line.split(":")[1].split()[8])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_the_wire_carries_what_rings_carry(hosts, tmp_path, name, processes):
    store = tmp_path / "store"
    context = get_context("fork")
    process = context.Process(target=_on_a_wire_of_its_own, args=(processes, name, store))
    process.start()
    process.join(LONGEST)
    assert process.exitcode == 0
    sent = int(Path(f"{store}.bytes").read_text()) / processes / 4
    turns = COLLECTIVES[name][1]
    assert sent == pytest.approx(turns * SIZE * (processes - 1) / processes, rel=0.05)  # headers and hand-shakes


RATE = 25_000_000
"""Bytes a second that leave a host whose wire is made slow: 200 Mbit/s."""


def _reducing(rank, host, store, together):
    with open(f"/var/run/netns/{host}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), NEW_NETWORK) == 0
    os.environ["GLOO_SOCKET_IFNAME"] = "wire"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gradients = torch.ones(SIZE // 4)
    dist.all_reduce(gradients)
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(gradients)
    if rank == 0:
        Path(f"{store}.seconds").write_text(str((time.perf_counter() - begin) / 3))
    together.wait(LONGEST)  # a process that hangs up while others listen makes them fail
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_slow_wire_takes_as_long_as_the_model_says(hosts, tmp_path):
    for host in hosts:
        shaping = [
            "tc",
            "-n",
            host,
            "qdisc",
            "add",
            "dev",
            "wire",
            "root",
            "tbf",
            "rate",
            f"{8 * RATE}bit",
            "burst",
            "64kb",
            "latency",
            "400ms",
        ]
        if shutil.which("tc") is None or subprocess.run(shaping, capture_output=True, timeout=10).returncode:
            pytest.skip("wires cannot be made slow here: needs the program 'tc' and its token buckets")
    context = get_context("fork")
    arguments = tmp_path / "store", context.Barrier(2)
    started = [context.Process(target=_reducing, args=(*one, *arguments)) for one in enumerate(hosts)]
    for one in started:
        one.start()
    for one in started:
        one.join(LONGEST)
        assert one.exitcode == 0
    trained = [Tensors(rows=SIZE // 4, bytes_per_element=4, role="trained")]
    links = Links(node=RATE, node_latency=0)
    expected = step_cost(trained, processes=2, per_node=1, strategy="peft_ddp", links=links).seconds
    taken = float((tmp_path / "store.seconds").read_text())
    assert 0.9 * expected <= taken <= 2 * expected  # headers and starts of TCP, and a burst for nothing

"""CNI: podwire's plugin and agent beside Debian's containernetworking-plugins, both executed as libcni executes them.

Once bridge + host-local against podwire alone, once with portmap, firewall and bandwidth chained against podwire with port
mappings and bandwidth; one after the other and eight at a time. Then a node with a thousand containers. All in namespaces of
their own; the agent is the whole one, with an API server beside it in its process.
"""

import asyncio
import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import Figures, main, percentiles, say, table
from podwire.cni.install import install_plugin
from podwire.kernel import syscalls
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns, enter_user_namespace
from podwire.model.addr import Family
from podwire.model.ids import HOST
from podwire.model.kernelstate import Address, Device, Link, Veth
from podwire.model.ops import AddAddress, AddLink, ChangeLink
from podwire.model.resources import NODES
from podwire.testing.memorycluster import Machine, memory_cluster, node_address

THEIRS = Path("/usr/lib/cni")
SEQUENTIAL = 60
PARALLEL, AT_A_TIME = 80, 8
MANY = 1000
SUBNET = "10.244.0.0/21"
READY_SECONDS = 30.0
LIMITS = {"ingressRate": 10_000_000, "ingressBurst": 1_000_000, "egressRate": 10_000_000, "egressBurst": 1_000_000}


def run() -> Figures:
    """Times in milliseconds; memory in MB."""
    enter_user_namespace(syscalls.CLONE_NEWNET, map_all=True)
    asyncio.run(_lo_up())
    with tempfile.TemporaryDirectory(prefix="podwire-bench-") as scratch:
        directory = Path(scratch)
        how = install_plugin(directory / "bin", directory / "cni.sock")
        figures: Figures = {"plugin": how}
        rows: list[list[object]] = [["", "", "ADD p50", "p95", "p99", "DEL p50", "p95", "p99"]]
        with _agent(directory) as pid:
            pairs = [("plain", _ours(directory), _theirs(directory))]
            pairs.append(("chained", _ours(directory, full=True), _chain(directory)))
            for kind, ours, theirs in pairs:
                figures[kind] = {"podwire": _measure(ours, f"{kind}: podwire", rows)}
                if theirs is not None:
                    figures[kind]["reference"] = _measure(theirs, f"{kind}: Debian's plugins", rows)
            figures["thousand"] = _thousand(_ours(directory), pid)
    table(rows)
    thousand = figures["thousand"]
    say(f"  plugin: {how}; {MANY} containers on one node: p50 {thousand['add_ms']['p50']:.3g} ms for the last 100 ADDs,")
    say(f"  {thousand['del_ms']['p50']:.3g} ms for the first 100 DELs;")
    say(f"  the agent has {thousand['agent_mb']:.3g} MB then, {thousand['agent_before_mb']:.3g} MB before")
    return figures


# --- what is executed ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """The plugins of a list, in order, with their configurations."""

    plugins: tuple[tuple[Path, dict[str, Any]], ...]
    runtime: dict[str, Any]
    ports: bool = False

    def add(self, container: str, netns: str, number: int) -> float:
        previous: dict[str, Any] = {}
        started = time.perf_counter()
        for path, document in self.plugins:
            out = self._execute(path, "ADD", container, netns, document | previous, number)
            previous = {"prevResult": json.loads(out)}
        return (time.perf_counter() - started) * 1000

    def delete(self, container: str, netns: str, number: int) -> float:
        started = time.perf_counter()
        for path, document in reversed(self.plugins):
            self._execute(path, "DEL", container, netns, document, number)
        return (time.perf_counter() - started) * 1000

    def _execute(self, path: Path, verb: str, container: str, netns: str, document: dict[str, Any], number: int) -> bytes:
        runtime = dict(self.runtime)
        if self.ports:
            runtime["portMappings"] = [{"hostPort": 20000 + number, "containerPort": 80, "protocol": "tcp"}]
        capable = document | ({"runtimeConfig": runtime} if runtime else {})
        variables = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": netns,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(THEIRS),
            "PATH": os.environ["PATH"],
        }
        done = subprocess.run([path], env=variables, input=json.dumps(capable).encode(), capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{path.name} {verb}: {done.stdout.decode()} {done.stderr.decode()}")
        return done.stdout


def _ours(directory: Path, *, full: bool = False) -> Setup:
    document = {"cniVersion": "1.0.0", "name": "podwire", "type": "podwire"}
    runtime: dict[str, Any] = {"bandwidth": LIMITS} if full else {}
    return Setup(((directory / "bin" / "podwire", document),), runtime, ports=full)


def _theirs(directory: Path, name: str = "plain", subnet: str = "10.88.0.0/16") -> Setup | None:
    if not (THEIRS / "bridge").exists():
        say("  containernetworking-plugins is not installed: podwire alone")
        return None
    bridge = {
        "cniVersion": "1.0.0",
        "name": name,
        "type": "bridge",
        "bridge": f"br{name}",
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "subnet": subnet, "dataDir": str(directory / "theirs")},
    }
    return Setup(((THEIRS / "bridge", bridge),), {})


def _chain(directory: Path) -> Setup | None:
    base = _theirs(directory, "chained", "10.89.0.0/16")
    if base is None or shutil.which("iptables") is None:
        return None
    more = tuple(
        (THEIRS / kind, {"cniVersion": "1.0.0", "name": "chained", "type": kind})
        for kind in ("portmap", "firewall", "bandwidth")
    )
    return Setup((*base.plugins, *more), {"bandwidth": LIMITS}, ports=True)


# --- measuring ----------------------------------------------------------------------------------------------------


def _measure(setup: Setup, title: str, rows: list[list[object]]) -> Figures:
    try:
        figures = {"sequential": _batch(setup, SEQUENTIAL, 1), "parallel": _batch(setup, PARALLEL, AT_A_TIME)}
    except RuntimeError as error:
        say(f"  {title}: cannot be measured here: {error}")
        return {"error": str(error)}
    for how, both in figures.items():
        rows.append([title, how, *(both[verb][p] for verb in ("add_ms", "del_ms") for p in ("p50", "p95", "p99"))])
    return figures


def _batch(setup: Setup, count: int, at_a_time: int) -> Figures:
    fds = [create_netns() for _ in range(count)]
    paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in fds]
    try:
        setup.add("warm", paths[0], 0)
        setup.delete("warm", paths[0], 0)
        with ThreadPoolExecutor(at_a_time) as pool:
            added = list(pool.map(lambda n: setup.add(f"c{n}", paths[n], n), range(count)))
            deleted = list(pool.map(lambda n: setup.delete(f"c{n}", paths[n], n), range(count)))
    finally:
        for fd in fds:
            os.close(fd)
    return {"add_ms": percentiles(added), "del_ms": percentiles(deleted)}


def _thousand(setup: Setup, agent: int) -> Figures:
    before = _memory(agent)
    fds = [create_netns() for _ in range(MANY)]
    paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in fds]
    try:
        added = [setup.add(f"m{n}", path, n) for n, path in enumerate(paths)]
        figures = {"add_ms": percentiles(added[-100:]), "agent_mb": _memory(agent), "agent_before_mb": before}
        deleted = [setup.delete(f"m{n}", path, n) for n, path in enumerate(paths)]
    finally:
        for fd in fds:
            os.close(fd)
    return figures | {"del_ms": percentiles(deleted[:100])}


def _memory(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


# --- the agent ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _agent(directory: Path) -> Iterator[int]:
    """An agent in a process of its own, in this network namespace; its pid."""
    process = subprocess.Popen([sys.executable, "-m", "bench.cni", "agent", str(directory)])
    try:
        probe = _ours(directory)
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                probe._execute(directory / "bin" / "podwire", "STATUS", "", "", {"cniVersion": "1.1.0", "name": "podwire"}, 0)
            except RuntimeError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.1)
            else:
                break
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


async def _serve(directory: Path) -> None:
    kernel = LinuxKernel()
    underlay = Link("eth0", Veth("wire"))
    await kernel.apply(
        (
            AddLink(underlay, Link("wire", Veth("eth0"))),
            AddAddress(Address("eth0", ipaddress.ip_interface(f"{node_address(1, Family.IPV4)}/15")), HOST),
        )
    )
    async with memory_cluster(directory) as cluster:
        config = cluster.config(1, (Family.IPV4,), cni_socket=directory / "cni.sock")
        async with cluster.agent(Machine(config, kernel), subnets=False) as agent:
            await cluster.until(lambda: cluster.exists(NODES, "n1"))
            await cluster.client.patch(NODES, "n1", {"spec": {"podCIDR": SUBNET, "podCIDRs": [SUBNET]}})
            await agent.ready()
            stop = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            await stop.wait()
    await kernel.close()


async def _lo_up() -> None:
    kernel = LinuxKernel()
    await kernel.apply((ChangeLink(Link("lo", Device(), up=True)),))
    await kernel.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["agent"]:
        asyncio.run(_serve(Path(sys.argv[2])))
    else:
        main(run)

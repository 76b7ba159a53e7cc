"""The overlay at scale: `podwire agent` with 5,000 leases in a real etcd, and a start-up storm of 500 nodes (`bench.storm`)."""

import asyncio
import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from bench.report import Figures, main, percentiles, say, table
from bench.storm import cpu_seconds, storm
from podwire.agent.repair import LAZY_SECONDS
from podwire.agent.subnets.registry import DEFAULT_PREFIX
from podwire.client.etcd import EtcdClient
from podwire.client.etcdmessages import (
    PutKey,
)
from podwire.kernel import netns
from podwire.kernel.linux import LinuxKernel
from podwire.lab.etcdmember import EtcdMember, client_url, write_config
from podwire.lab.topology import Place
from podwire.model.addr import Family
from podwire.model.kernelstate import Address, Device, Link, Veth
from podwire.model.ops import AddAddress, AddLink, ChangeLink
from podwire.plan.leases import LeaseAttrs, encode_attrs, subnet_key

LEASES = 5000
MORE = 50
STORM = 500
SAMPLE = 100
_UNDERLAY = "underlay"
_CONFIG = {"Network": "10.0.0.0/8", "SubnetLen": 24, "Backend": {"Type": "vxlan"}}
_DEADLINE = 180.0
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where etcd has its data: a disk's flushes are not what is measured here."""


def run() -> Figures:
    """In namespaces of its own; nothing leaves them. Seconds unless named otherwise."""
    if shutil.which("etcd") is None:
        say("  etcd is not installed (Debian package etcd-server): not measured")
        return {}
    netns.enter_user_namespace()
    return asyncio.run(_run())


async def _run() -> Figures:
    with tempfile.TemporaryDirectory(prefix="podwire-bench-", dir=_MEMORY) as folder:
        fd = netns.current_netns()
        kernel = LinuxKernel(fd)
        try:
            await _machine(kernel)
            figures = await _leases(Path(folder), fd, kernel)
            async with _etcd(Path(folder) / "storm", fd) as (etcd, member):
                figures |= await storm(etcd, member.pid)
        finally:
            await kernel.close()
            os.close(fd)
    return figures


# --- one agent, many leases ---------------------------------------------------------------------------------------------


async def _leases(folder: Path, fd: int, kernel: LinuxKernel) -> Figures:
    async with _etcd(folder / "leases", fd) as (etcd, _):
        await _fill(etcd, range(LEASES))
        figures = await _one_agent(etcd, kernel, folder)
    figures["ip_calls_s"] = await asyncio.to_thread(_ip_calls)
    say(f"  `podwire agent` with {LEASES} leases in etcd, VXLAN (a neighbour, a forwarding entry and a route each):")
    table(
        [
            ["", ""],
            ["all programmed after the process began", f"{figures['all_s']:.2f} s"],
            ["  … of it looking at the kernel, planning and applying", f"{figures['programmed_s']:.2f} s"],
            ["CPU of the agent for them: reading, planning, applying", f"{figures['cpu_s']:.2f} s"],
            ["one lease more: from etcd's answer to the route, p50", f"{figures['one_ms']['p50']:.1f} ms"],
            ["  … p99", f"{figures['one_ms']['p99']:.1f} ms"],
            ["  … CPU of the agent, mean", f"{figures['one_cpu_ms']:.1f} ms"],
            ["memory of the agent at rest: resident", f"{figures['memory_mb']['rss']:.1f} MB"],
            ["  … its share (files' pages divided by who maps them)", f"{figures['memory_mb']['pss']:.1f} MB"],
            ["  … resident after a comparison with the whole kernel", f"{figures['memory_later_mb']['rss']:.1f} MB"],
            [f"the same by one `ip` or `bridge` call an entry (measured with {SAMPLE})", f"{figures['ip_calls_s']:.0f} s"],
        ]
    )
    return figures


async def _machine(kernel: LinuxKernel) -> None:
    """One end of a cable stands for the network card."""
    plan = (
        ChangeLink(Link("lo", Device())),
        AddLink(Link(_UNDERLAY, Veth("cable")), Link("cable", Veth(_UNDERLAY))),
        AddAddress(Address(_UNDERLAY, ipaddress.ip_interface("198.18.0.10/15"))),
    )
    applied = await kernel.apply(plan)
    assert applied.ok, applied.failures


@asynccontextmanager
async def _etcd(folder: Path, fd: int) -> AsyncIterator[tuple[EtcdClient, EtcdMember]]:
    place = Place("etcd-1", {Family.IPV4: ipaddress.ip_address("127.0.0.1")})
    member = EtcdMember(place, fd, folder, [place])
    member.start()
    try:
        await write_config([member], f"{DEFAULT_PREFIX}/config", json.dumps(_CONFIG))
        async with EtcdClient([client_url(place)], timeout=30.0) as etcd:
            yield etcd, member
    finally:
        await member.stop()


def _lease(number: int) -> PutKey:
    """Lease `number` (from 0): its subnet is the one with this number from 10.16.0.0 on."""
    subnet = ipaddress.IPv4Network((int(ipaddress.IPv4Address("10.16.0.0")) + (number << 8), 24))
    mac = (b"\x0a\x58" + subnet.network_address.packed).hex(":")
    attrs = LeaseAttrs(
        public_ip=ipaddress.IPv4Address("198.18.0.20") + number,
        backend_type="vxlan",
        backend_data=json.dumps({"VNI": 1, "VtepMAC": mac}, separators=(",", ":")),
    )
    return PutKey(f"{DEFAULT_PREFIX}/subnets/{subnet_key([subnet])}", encode_attrs(attrs))


async def _fill(etcd: EtcdClient, numbers: Sequence[int]) -> None:
    """Reservations, as flannel calls leases that do not end."""
    for start in range(0, len(numbers), 100):
        await etcd.txn([], [_lease(number) for number in numbers[start : start + 100]])


async def _one_agent(etcd: EtcdClient, kernel: LinuxKernel, folder: Path) -> Figures:
    command = [
        sys.executable, "-P", "-m", "podwire.cli.main", "agent", "--etcd-endpoints", "http://127.0.0.1:2379",
        "--iface", _UNDERLAY, "--subnet-file", str(folder / "subnet.env"),
        "--iptables-forward-rules=false",
    ]  # fmt: skip
    with (folder / "agent.log").open("wb") as log:
        started = time.perf_counter()
        agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: ASYNC220
    try:
        await _until_logged(folder, agent, r"interface \S+ with")
        begun = cpu_seconds(agent.pid)
        await _until_routes(kernel, LEASES)
        everything = time.perf_counter() - started
        programmed = float(await _until_logged(folder, agent, r"peers programmed in ([0-9.]+) s"))
        cpu = cpu_seconds(agent.pid)
        await asyncio.sleep(3)  # at rest: what was made on the way has been let go
        memory = _memory_mb(agent.pid)
        before = cpu_seconds(agent.pid)
        one = [await _one_more(etcd, kernel, number) for number in range(LEASES, LEASES + MORE)]
        one_cpu = (cpu_seconds(agent.pid) - before) * 1000 / MORE
        await asyncio.sleep(LAZY_SECONDS + 2)  # by then it has compared everything with the kernel once more
        later = _memory_mb(agent.pid)
    finally:
        agent.terminate()
        await asyncio.to_thread(agent.wait)
    return {
        "leases": LEASES, "all_s": everything, "programmed_s": programmed, "cpu_s": cpu - begun,
        "memory_mb": memory, "memory_later_mb": later, "one_ms": percentiles(one), "one_cpu_ms": one_cpu,
    }  # fmt: skip


async def _until_logged(folder: Path, agent: "subprocess.Popen[bytes]", pattern: str) -> str:
    """The pattern's last group in the agent's log."""
    async with asyncio.timeout(_DEADLINE):
        while not (found := re.search(pattern, (folder / "agent.log").read_text())):
            if agent.poll() is not None:
                raise RuntimeError(f"the agent ended: {(folder / 'agent.log').read_text()[-2000:]}")
            await asyncio.sleep(0.01)
    return found[found.re.groups]


async def _until_routes(kernel: LinuxKernel, number: int) -> None:
    async with asyncio.timeout(_DEADLINE):
        while len((await kernel.observe()).routes) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def _one_more(etcd: EtcdClient, kernel: LinuxKernel, number: int) -> float:
    """Milliseconds from etcd's answer to the kernel's notice of the new route."""
    put = _lease(number)
    subnet = put.key.rpartition("/")[2].replace("-", "/")
    events = kernel.events()
    try:
        await etcd.put(put.key, put.value)
        started = time.perf_counter()
        async with asyncio.timeout(10):
            async for event in events:
                if event.what == "route" and event.subject.startswith(subnet):
                    break
        return max(0.0, (time.perf_counter() - started) * 1000)
    finally:
        await events.aclose()


def _memory_mb(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0].lower(): int(line.split()[1]) / 1024 for line in lines[1:]}
    return {"rss": sizes["rss"], "pss": sizes["pss"]}


def _ip_calls() -> float:
    """Seconds that LEASES peers would take: three programs for each, measured with SAMPLE of them."""
    started = time.perf_counter()
    for number in range(SAMPLE):
        net, mac = f"10.200.{number}.0", f"0a:59:0a:c8:{number:02x}:00"
        for call in (
            ["ip", "neigh", "replace", net, "lladdr", mac, "dev", "flannel.1", "nud", "permanent"],
            ["bridge", "fdb", "replace", mac, "dev", "flannel.1", "dst", "198.18.0.99", "self", "permanent"],
            ["ip", "route", "replace", f"{net}/24", "via", net, "dev", "flannel.1", "onlink"],
        ):
            subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) / SAMPLE * LEASES


if __name__ == "__main__":
    main(run)

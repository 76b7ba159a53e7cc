"""The udp back end's tunnel, beside a loop in C of one call a packet (flannel's proxy is such a one) and the kernel's VXLAN, on
the same link: bulk TCP and small packets between two hosts.

Each host's tunnel runs in a process of its own, as it would; the two hosts, iperf3 and the tunnels share this machine's cores.
"""

import asyncio
import ipaddress
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import Figures, main, say, table
from podwire.agent.overlayd.udpproxy import UdpProxy
from podwire.kernel import netns
from podwire.kernel.linux import LinuxKernel
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Device, FdbEntry, Link, Neighbour, NetState, Route, Tun, Veth, Vxlan
from podwire.plan.diff import diff

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SECONDS = 4
PORT = 8285
NETWORK = ipaddress.IPv4Network("10.5.0.0/16")
SUBNETS = (ipaddress.IPv4Network("10.5.1.0/24"), ipaddress.IPv4Network("10.5.2.0/24"))
ENDS = (ipaddress.IPv4Address("192.0.2.1"), ipaddress.IPv4Address("192.0.2.2"))
SMALL = 64


def run() -> Figures:
    """In new namespaces. Gbit/s of TCP, and thousands of packets a second of 64 bytes UDP that arrived."""
    if shutil.which("iperf3") is None:
        raise SystemExit("iperf3 is not installed")
    netns.enter_user_namespace()
    fds = (netns.create_netns(), netns.create_netns())
    figures: Figures = {}
    kinds = [("udp", 1472), ("c", 1472), ("vxlan", 1450)]
    with tempfile.TemporaryDirectory(prefix="podwire-bench-") as folder:
        loop = _compile(Path(folder))
        for name, mtu in kinds if loop else [kinds[0], kinds[2]]:
            asyncio.run(_prepare(fds, name, mtu))
            ends: list[_Worker | _Loop] = []
            if name != "vxlan":
                ends = [_Worker(fd, at) if name == "udp" else _Loop(loop, fd, at) for at, fd in enumerate(fds)]
            try:
                figures[f"{name}_tcp_gbits"] = _tcp(fds)
                figures[f"{name}_small_kpps"] = _small(fds)
            finally:
                costs = [end.end() for end in ends]
            if name == "udp":
                figures["udp_cpu_us_per_packet"] = max(costs)
    for fd in fds:
        os.close(fd)
    say(f"  Between two hosts, each way through both ends ({SECONDS} s each):")
    rows: list[list[object]] = [["", "TCP Gbit/s", f"{SMALL} byte UDP, 1000/s"]]
    words = {"udp": "udp", "c": "the same in C, a call a packet", "vxlan": "the kernel's vxlan"}
    measured = [name for name in words if f"{name}_tcp_gbits" in figures]
    rows += [[words[name], figures[f"{name}_tcp_gbits"], figures[f"{name}_small_kpps"]] for name in measured]
    table(rows)
    if not loop:
        say("  (there is no C compiler here to make the loop in C)")
    say(f"  CPU time of the udp tunnel: {figures['udp_cpu_us_per_packet']:.1f} µs a packet at each end")
    return figures


async def _prepare(fds: Sequence[int], name: str, mtu: int) -> None:
    """The link between the hosts, and the tunnel's devices."""
    kernel = LinuxKernel(fds[0])
    other = NetnsName("other")
    kernel.attach(other, fds[1])
    states = {HOST: _host(0, name, mtu, other), other: _host(1, name, mtu, HOST)}
    observed = {ns: await kernel.observe(ns) for ns in states}
    applied = await kernel.apply(diff(states, observed))
    assert applied.ok, applied.failures
    await kernel.close()


def _host(index: int, name: str, mtu: int, peer_ns: NetnsName) -> NetState:
    own, peer = SUBNETS[index], SUBNETS[1 - index]
    address = ipaddress.ip_interface(f"{own.network_address}/32")
    uplink = Link("eth0", Veth("eth0", peer_ns), alias="podwire")
    macs = [f"02:00:00:00:00:0{i}" for i in (1, 2)]
    entries = name == "vxlan"
    device = "flannel.1" if entries else "flannel0"
    kind = Vxlan(1, 8472, ENDS[index], "eth0") if entries else Tun()
    tunnel = Link(device, kind, mtu=mtu, mac=macs[index] if entries else None, alias="podwire")
    route = Route(peer, dev=device, via=peer.network_address, onlink=True) if entries else Route(NETWORK, dev=device)
    return NetState(
        links={"lo": Link("lo", Device()), "eth0": uplink, device: tunnel},
        addresses=frozenset({Address("eth0", ipaddress.ip_interface(f"{ENDS[index]}/24")), Address(device, address)}),
        routes=frozenset({route}),
        neighbours=frozenset({Neighbour(device, peer.network_address, macs[1 - index])} if entries else ()),
        fdb=frozenset({FdbEntry(device, macs[1 - index], ENDS[1 - index])} if entries else ()),
    )


def _compile(folder: Path) -> str:
    """The loop in C; "" where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return ""
    program = str(folder / "udploop")
    subprocess.run([compiler, "-O2", "-o", program, str(Path(__file__).with_name("udploop.c"))], check=True)
    return program


class _Loop:
    """One host's end of the loop in C."""

    def __init__(self, program: str, fd: int, index: int) -> None:
        command = [program, "flannel0", str(ENDS[index]), str(PORT), str(ENDS[1 - index])]
        self._process = netns.run_in_netns(fd, lambda: subprocess.Popen(command, stdout=subprocess.PIPE))
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def end(self) -> float:
        self._process.terminate()
        self._process.communicate()
        return 0.0


class _Worker:
    """One host's tunnel in a process of its own."""

    def __init__(self, fd: int, index: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(target=_work, args=(fd, index, theirs))
        self._process.start()
        self._pipe.recv()

    def end(self) -> float:
        """Microseconds of CPU time that a packet took."""
        self._pipe.send("end")
        cost: float = self._pipe.recv()
        self._process.join()
        return cost


def _work(fd: int, index: int, pipe: "Connection[Any, Any]") -> None:
    proxy = UdpProxy(fd, "flannel0", ENDS[index], PORT, lambda: None)
    proxy.set_route(SUBNETS[1 - index], ENDS[1 - index])
    pipe.send("ready")
    started = time.process_time()
    pipe.recv()
    pipe.send((time.process_time() - started) * 1e6 / max(proxy.sent + proxy.received, 1))


def _iperf(fds: Sequence[int], *arguments: str) -> dict[str, dict[str, dict[str, float]]]:
    target = str(SUBNETS[1].network_address)

    def serve() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["iperf3", "-s", "-1", "-B", target], stdout=subprocess.DEVNULL)

    def ask() -> str:
        for _ in range(50):
            done = subprocess.run(
                ["iperf3", "-c", target, "-J", "-t", str(SECONDS), *arguments], capture_output=True, text=True, check=False
            )
            if "unable to connect" not in done.stdout:
                return done.stdout
        raise SystemExit("iperf3 could not connect")

    server = netns.run_in_netns(fds[1], serve)
    try:
        answer: dict[str, dict[str, dict[str, float]]] = json.loads(netns.run_in_netns(fds[0], ask))
    finally:
        server.wait(30)
    return answer


def _tcp(fds: Sequence[int]) -> float:
    return _iperf(fds)["end"]["sum_received"]["bits_per_second"] / 1e9


def _small(fds: Sequence[int]) -> float:
    total = _iperf(fds, "-u", "-b", "0", "-l", str(SMALL))["end"]["sum"]
    return (total["packets"] - total["lost_packets"]) / total["seconds"] / 1e3


if __name__ == "__main__":
    main(run)

"""The kernel port: a node's overlay tables in netlink batches beside `ip -batch`, and what a pod's plumbing costs."""

import asyncio
import ipaddress
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator

from bench.report import Figures, main, percentiles, say, table
from podwire.kernel import netns
from podwire.kernel.linux import LinuxKernel
from podwire.model.ids import HOST, pod_netns
from podwire.model.kernelstate import Address, Bridge, Device, FdbEntry, Link, Neighbour, Route, Veth, Vxlan
from podwire.model.ops import AddAddress, AddLink, ChangeLink, Plan, SetFdb, SetNeighbour, SetRoute

PEERS = 5000
PODS = 100
BRIDGE = Link("cni0", Bridge(), mac="0a:58:0a:f4:01:01", alias="podwire")
UNDERLAY = ipaddress.IPv4Address("198.18.0.0")
OVERLAY = ipaddress.IPv4Address("10.0.0.0")


def run() -> Figures:
    """All in new namespaces. Times in milliseconds."""
    netns.enter_user_namespace()
    return asyncio.run(_run())


async def _run() -> Figures:
    return await _overlay() | await _pods()


# --- the overlay's tables -----------------------------------------------------------------------------------------


async def _overlay() -> Figures:
    plan = tuple(_peers())
    theirs = await _ip_batch(plan)
    fd = netns.create_netns()
    kernel = LinuxKernel(fd)
    try:
        await _apply(kernel, _device())
        figures: Figures = {
            "peers": PEERS,
            "overlay_ms": await _timed(lambda: _apply(kernel, plan)),
            "overlay_again_ms": await _timed(lambda: _apply(kernel, plan)),
            "overlay_observe_ms": await _timed(kernel.observe),
            "overlay_one_peer_ms": percentiles([await _timed(lambda: _apply(kernel, plan[:3])) for _ in range(PODS)]),
            "overlay_ip_batch_ms": theirs,
        }
    finally:
        await kernel.close()
        os.close(fd)
    say(f"  {PEERS} peers, a route, a neighbour and an FDB entry each:")
    table(
        [
            ["", "ms"],
            ["podwire, from scratch", figures["overlay_ms"]],
            ["podwire, all of it again", figures["overlay_again_ms"]],
            ["podwire, read it all back", figures["overlay_observe_ms"]],
            ["podwire, one peer (median)", figures["overlay_one_peer_ms"]["p50"]],
            ["ip -batch and bridge -batch", "no ip program" if theirs is None else theirs],
        ]
    )
    return figures


def _device() -> Plan:
    vxlan = Link("flannel.1", Vxlan(1, 8472, UNDERLAY + 10, "cni0"), alias="podwire")
    return (AddLink(BRIDGE), AddAddress(Address("cni0", ipaddress.ip_interface(f"{UNDERLAY + 10}/15"))), AddLink(vxlan))


def _peers() -> Iterator[SetNeighbour | SetFdb | SetRoute]:
    for peer in range(PEERS):
        subnet = ipaddress.ip_network((OVERLAY + (peer << 8), 24))
        mac = (b"\x0a\x58" + subnet.network_address.packed).hex(":")
        yield SetNeighbour(Neighbour("flannel.1", subnet.network_address, mac))
        yield SetFdb(FdbEntry("flannel.1", mac, UNDERLAY + 20 + peer))
        yield SetRoute(Route(subnet, "flannel.1", via=subnet.network_address, onlink=True))


async def _ip_batch(plan: Plan) -> float | None:
    """The same by iproute2: one process for routes and neighbours, one for FDB entries."""
    if shutil.which("ip") is None or shutil.which("bridge") is None:
        return None
    fd = netns.create_netns()
    kernel = LinuxKernel(fd)
    try:
        await _apply(kernel, _device())
        ip = "".join(_as_text(op) for op in plan if not isinstance(op, SetFdb))
        bridge = "".join(_as_text(op) for op in plan if isinstance(op, SetFdb))
        started = time.perf_counter()
        for program, text in (("ip", ip), ("bridge", bridge)):
            await netns.in_netns(fd, lambda p=program, t=text: subprocess.run([p, "-batch", "-"], input=t.encode(), check=True))  # type: ignore[misc]
        return (time.perf_counter() - started) * 1000
    finally:
        await kernel.close()
        os.close(fd)


def _as_text(op: object) -> str:
    match op:
        case SetRoute(route=r):
            return f"route replace {r.dst} via {r.via} dev {r.dev} onlink\n"
        case SetNeighbour(neighbour=n):
            return f"neigh replace {n.ip} lladdr {n.mac} dev {n.dev} nud permanent\n"
        case SetFdb(entry=e):
            return f"fdb replace {e.mac} dev {e.dev} dst {e.dst} self permanent\n"
        case _:
            raise AssertionError(op)


# --- pods ---------------------------------------------------------------------------------------------------------


async def _pods() -> Figures:
    """Namespace, veth pair, both addresses, both default routes: each pod's whole plumbing, one after another."""
    fd = netns.create_netns()
    kernel = LinuxKernel(fd)
    made: list[float] = []
    plumbed: list[float] = []
    cpu = time.process_time()
    try:
        gateways = (
            Address("cni0", ipaddress.ip_interface("10.244.0.1/20")),
            Address("cni0", ipaddress.ip_interface("fd00::1/64")),
        )
        await _apply(kernel, (AddLink(BRIDGE), *map(AddAddress, gateways)))
        for pod in range(PODS):
            started = time.perf_counter()
            pod_fd = netns.create_netns()
            kernel.attach(pod_netns(str(pod)), pod_fd)
            os.close(pod_fd)
            made.append((time.perf_counter() - started) * 1000)
            plumbed.append(await _timed(lambda p=pod: _apply(kernel, _plumbing(p))))  # type: ignore[misc]
        cpu_ms = (time.process_time() - cpu) * 1000 / PODS
        observed = await _timed(kernel.observe)
        for pod in range(PODS):
            kernel.detach(pod_netns(str(pod)))
    finally:
        await kernel.close()
        os.close(fd)
    figures: Figures = {"pod_netns_ms": percentiles(made), "pod_plumb_ms": percentiles(plumbed), "pod_cpu_ms": cpu_ms}
    say(f"  {PODS} pods on one bridge, dual-stack:")
    table(
        [
            ["", "p50 ms", "p99 ms"],
            ["network namespace", figures["pod_netns_ms"]["p50"], figures["pod_netns_ms"]["p99"]],
            ["veth, addresses, routes", figures["pod_plumb_ms"]["p50"], figures["pod_plumb_ms"]["p99"]],
            ["CPU of both, mean", cpu_ms, ""],
            [f"reading the node with {PODS} pods", observed, ""],
        ]
    )
    return figures | {"node_observe_ms": observed}


def _plumbing(pod: int) -> Plan:
    ns = pod_netns(str(pod))
    host = Link(f"veth{pod}", Veth("eth0", ns), mtu=1450, master="cni0", hairpin=True, alias=f"podwire:bench/{pod}")
    v4, v6 = ipaddress.IPv4Address("10.244.0.0") + 2 + pod, ipaddress.IPv6Address("fd00::") + 2 + pod
    return (
        AddLink(host, peer=Link("eth0", Veth(host.name, HOST), mtu=1450, alias="podwire")),
        ChangeLink(Link("lo", Device(), up=True), ns),
        AddAddress(Address("eth0", ipaddress.ip_interface((v4, 20))), ns),
        AddAddress(Address("eth0", ipaddress.ip_interface((v6, 64))), ns),
        SetRoute(Route(ipaddress.ip_network("0.0.0.0/0"), "eth0", ipaddress.ip_address("10.244.0.1")), ns),
        SetRoute(Route(ipaddress.ip_network("::/0"), "eth0", ipaddress.ip_address("fd00::1")), ns),
    )


async def _apply(kernel: LinuxKernel, plan: Plan) -> None:
    applied = await kernel.apply(plan)
    if not applied.ok:
        raise AssertionError(applied.failures[0])


async def _timed(fn: Callable[[], Awaitable[object]]) -> float:
    started = time.perf_counter()
    await fn()
    return (time.perf_counter() - started) * 1000


if __name__ == "__main__":
    main(run)

"""Two whole agents on the real kernel: namespaces as machines, a bridge as the underlay, packets between pods."""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from echoes import echo_server
from siterig import Site, call, two_nodes

from podwire.agent.node import NodeAgent
from podwire.agent.repair import CHECK_INTERVAL, SETTLE_SECONDS
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import run_in_netns
from podwire.model.addr import Family, IPAddress
from podwire.model.kernelstate import Address, Device, Link, NetState, Route
from podwire.model.nft import Batch, DelTable, TableRef
from podwire.model.ops import (
    ChangeLink,
    CommitNft,
    DelAddress,
    DelFdb,
    DelLink,
    DelNeighbour,
    DelRoute,
    Op,
    SetFdb,
    SetNeighbour,
    SetRoute,
    SetSysctl,
)
from podwire.model.resources import ENDPOINTSLICES, PODS, SERVICES
from podwire.plan.naming import host_veth
from podwire.plan.services import TABLE
from podwire.testing.memorycluster import DUAL, MemoryCluster

pytestmark = [pytest.mark.kernel, pytest.mark.needs("VXLAN devices", "bridge devices", "IPv6", "nftables")]


@pytest_asyncio.fixture
async def site(tmp_path: Path, make_netns: Callable[[], int]) -> AsyncIterator[Site]:
    async with two_nodes(tmp_path, (make_netns(), make_netns())) as made:
        yield made


@pytest.mark.parametrize("family", DUAL)
async def test_pods_reach_each_other_under_their_own_addresses(site: Site, family: Family) -> None:
    async with site.cluster.agent(site.nodes[0]), site.cluster.agent(site.nodes[1]):
        near, far = await site.pod("near", "n1"), await site.pod("far", "n2")
        beside = await site.pod("beside", "n1")
        await programmed(site)
        with echo_server(beside.netns, family), echo_server(far.netns, family):
            for server in (beside, far):
                seen = await asyncio.to_thread(call, near.netns, server.ips[family])
                assert seen == str(near.ips[family])


@pytest.mark.parametrize("family", DUAL)
async def test_service_address_leads_to_a_pod_on_another_node(site: Site, family: Family) -> None:
    address = ipaddress.ip_address("10.96.0.77" if family is Family.IPV4 else "fd00:10:96::77")
    async with site.cluster.agent(site.nodes[0]) as agent, site.cluster.agent(site.nodes[1]):
        near, far = await site.pod("near", "n1"), await site.pod("far", "n2")
        await programmed(site)
        before = agent.status().commits
        await publish(site.cluster, address, far.ips[family])
        await site.cluster.until(lambda: agent.status().commits > before)
        with echo_server(far.netns, family):
            await site.cluster.until(lambda: _reachable(near.netns, address, 80))
            assert await asyncio.to_thread(call, near.netns, address, 80) == str(near.ips[family])


@pytest.mark.parametrize("family", DUAL)
async def test_without_netfilter_on_bridges_a_service_still_answers_from_the_same_node(site: Site, family: Family) -> None:
    """Bridged, the answer would reach the client from the pod's own address, and be refused."""
    address = ipaddress.ip_address("10.96.0.77" if family is Family.IPV4 else "fd00:10:96::77")
    node = replace(site.nodes[0], config=replace(site.nodes[0].config, routed_pods=True))
    off = [SetSysctl(f"net/bridge/bridge-nf-call-{name}", "0") for name in ("iptables", "ip6tables")]
    async with site.cluster.agent(node) as agent:
        assert agent.status().routed_pods
        await node.kernel.apply(tuple(off))
        client, server = await site.pod("client", "n1"), await site.pod("server", "n1")
        await publish(site.cluster, address, server.ips[family])
        with echo_server(server.netns, family), echo_server(client.netns, family, 9090):
            await site.cluster.until(lambda: _reachable(client.netns, address, 80))
            for _ in range(3):  # in both directions, and again: no redirect may teach them a shorter way
                assert await asyncio.to_thread(call, client.netns, address, 80) == str(client.ips[family])
                assert await asyncio.to_thread(call, client.netns, server.ips[family]) == str(client.ips[family])
                assert await asyncio.to_thread(call, server.netns, client.ips[family], 9090) == str(server.ips[family])


@pytest.mark.parametrize("family", DUAL)
async def test_a_udp_client_is_led_away_from_an_endpoint_that_is_gone(site: Site, family: Family) -> None:
    """It keeps sending from one port, so its connection would never end by itself."""
    address = ipaddress.ip_address("10.96.0.77" if family is Family.IPV4 else "fd00:10:96::77")
    async with site.cluster.agent(site.nodes[0]), site.cluster.agent(site.nodes[1]):
        client, one, two = await site.pod("client", "n1"), await site.pod("one", "n1"), await site.pod("two", "n2")
        await programmed(site)
        with udp_socket(client.netns, family) as sock, udp_names(one.netns, "one"), udp_names(two.netns, "two"):
            sock.sendto(b"before the Service exists", (str(address), 80))
            await publish(site.cluster, address, one.ips[family], "UDP")
            await site.cluster.until(partial(_answers, sock, address, "one"))
            endpoints = {"endpoints": [{"addresses": [str(two.ips[family])]}]}
            await site.cluster.client.patch(ENDPOINTSLICES, "web-1", endpoints, "default")
            await site.cluster.until(partial(_answers, sock, address, "two"))


async def test_what_someone_else_breaks_is_put_back_within_a_second(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Each thing is named in the log and counted by its kind."""
    kernel = site.nodes[0].kernel
    async with site.cluster.agent(site.nodes[0]) as agent, site.cluster.agent(site.nodes[1]):
        near, far = await site.pod("near", "n1"), await site.pod("far", "n2")
        await programmed(site)
        whole = await everything(kernel)
        stranger = LinuxKernel(site.netns[0])
        try:
            for kind, name, broken in damages(await stranger.observe(), near.uid):
                caplog.clear()
                before = agent.status()
                assert (await stranger.apply(broken)).ok, name
                async with asyncio.timeout(REPAIR_SECONDS):
                    await site.cluster.until(partial(_repaired, agent, before.repairs))
                    await site.cluster.until(lambda: _is_whole(kernel, whole))
                assert agent.status().repaired[kind] > before.repaired.get(kind, 0)
                assert name in caplog.text
        finally:
            await stranger.close()
        with echo_server(far.netns, Family.IPV4):
            assert await asyncio.to_thread(call, near.netns, far.ips[Family.IPV4])


REPAIR_SECONDS = 1.5
"""A second, and something for a machine that does other things."""


def damages(state: NetState, pod: str) -> Iterator[tuple[str, str, tuple[Op, ...]]]:
    """(kind as counted, words of the log line, what a stranger does) of all that is put back."""
    route = next(r for r in state.routes if r.dst.version == 4)
    route6 = next(r for r in state.routes if r.dst.version == 6)
    entry = next(n for n in state.neighbours if n.dev == "flannel.1")
    forward = next(e for e in state.fdb if e.dev == "flannel.1")
    yield "route", f"route {route.dst}", (DelRoute(route),)
    yield "route", f"route {route.dst}", (SetRoute(Route(route.dst, dev="cni0", protocol=4)),)  # an administrator's
    yield "route", f"route {route6.dst}", (SetRoute(Route(route6.dst, dev="cni0", protocol=4)),)
    yield "neighbour", f"neighbour {entry.ip}", (DelNeighbour(entry),)
    yield "neighbour", f"neighbour {entry.ip}", (SetNeighbour(replace(entry, mac="02:00:00:00:00:01")),)
    yield "fdb", f"forwarding entry {forward.mac}", (DelFdb(forward),)
    elsewhere = replace(forward, dst=ipaddress.ip_address("198.18.0.99"))
    yield "fdb", f"forwarding entry {forward.mac}", (SetFdb(elsewhere),)
    yield "fdb", "stray forwarding entry", (SetFdb(replace(elsewhere, mac="02:00:00:00:00:02")),)
    yield "address", "address 10.244.1.1/24", (DelAddress(_address(state, "10.244.1.1/24")),)
    yield "device-setting", "link flannel.1", (ChangeLink(Link("flannel.1", Device(), mtu=1300)),)
    yield "device-setting", "link flannel.1", (ChangeLink(Link("flannel.1", Device(), mac="02:00:00:00:00:03")),)
    yield "device-setting", "link flannel.1", (ChangeLink(Link("flannel.1", Device(), up=False)),)
    yield "device-setting", "link cni0", (ChangeLink(Link("cni0", Device(), mtu=1000)),)
    yield (
        "device-setting",
        f"link {host_veth(pod)}",
        (ChangeLink(Link(host_veth(pod), Device(), master="cni0", hairpin=False)),),
    )
    yield "sysctl", "net/ipv4/ip_forward=1", (SetSysctl("net/ipv4/ip_forward", "0"),)
    yield "sysctl", "net/ipv6/conf/all/forwarding=1", (SetSysctl("net/ipv6/conf/all/forwarding", "0"),)
    yield "sysctl", "rp_filter=2", (SetSysctl("net/ipv4/conf/all/rp_filter", "1"),)
    yield "rules", "rules were not as left", tuple(CommitNft(Batch((DelTable(TableRef(f, TABLE)),))) for f in DUAL)
    yield "device", "link flannel.1", (DelLink("flannel.1"),)
    yield "device", f"link {host_veth(pod)}", (DelLink(host_veth(pod)),)
    yield "device", "link cni0", (DelLink("cni0"),)


async def everything(kernel: LinuxKernel) -> tuple[Any, ...]:
    """`content`, and what else a stranger may spoil."""
    state = await kernel.observe()
    fixed = {(link.name, link.mac) for link in state.links.values() if link.name.startswith(("flannel", "cni"))}
    ports = {(link.name, link.hairpin) for link in state.links.values() if link.master}
    return *content(state), fixed, ports, state.sysctls, (await kernel.observe_nft(TABLE)).tables.keys()


async def _is_whole(kernel: LinuxKernel, whole: tuple[Any, ...]) -> bool:
    return await everything(kernel) == whole


def _address(state: NetState, text: str) -> Address:
    return next(a for a in state.addresses if str(a.interface) == text)


async def test_pods_that_come_and_go_are_nobodys_fault(site: Site) -> None:
    """What the kernel changes by itself around them (a bridge's MTU and carrier, …) must not look like damage."""
    kernel = site.nodes[0].kernel
    async with site.cluster.agent(site.nodes[0]) as agent:
        whole = content(await kernel.observe())
        for name in ("one", "two"):
            await site.pod(name, "n1")
            await site.cluster.client.delete(PODS, name, "default", grace_period_seconds=0)
            await site.cluster.until(lambda: not site.nodes[0].runtime.boxes)
        await site.cluster.until(partial(_is, kernel, whole))
        await asyncio.sleep(SETTLE_SECONDS + CHECK_INTERVAL)  # a repair would come in this time
        assert agent.status().repairs == 0


async def test_an_agent_restarts_under_traffic_without_a_lost_byte(site: Site) -> None:
    async with site.cluster.agent(site.nodes[1]):
        async with site.cluster.agent(site.nodes[0]):
            near, far = await site.pod("near", "n1"), await site.pod("far", "n2")
            await programmed(site)
        with echo_server(far.netns, Family.IPV4), open_connection(near.netns, far.ips[Family.IPV4]) as exchange:
            events = site.nodes[0].kernel.events()
            for _ in range(3):
                async with site.cluster.agent(site.nodes[0]):
                    await asyncio.to_thread(exchange)
                await asyncio.to_thread(exchange)
            await events.aclose()
            # What the kernel learnt of neighbours on the wire it forgets by itself; that of an agent would be `ours`.
            changed = [event async for event in events if event.what != "nft" and (event.what != "neighbour" or event.ours)]
        assert [event for event in changed if event.removed] == []


@contextmanager
def open_connection(netns: int, target: IPAddress) -> Iterator[Callable[[], None]]:
    """A connection to an echo server; calling what is given sends and receives over it."""
    with run_in_netns(netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as client:
        client.settimeout(3)
        client.connect((str(target), 8080))
        with client.makefile("rwb") as stream:
            stream.readline()

            def exchange() -> None:
                stream.write(b"still there\n")
                stream.flush()
                assert stream.readline() == b"still there\n"

            yield exchange


def udp_socket(netns: int, family: Family) -> socket.socket:
    kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    return run_in_netns(netns, lambda: socket.socket(kind, socket.SOCK_DGRAM))


@contextmanager
def udp_names(netns: int, name: str) -> Iterator[None]:
    """Answers each datagram to port 8080, over both families, with `name`."""
    server = udp_socket(netns, Family.IPV6)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", 8080))
    loop = asyncio.get_running_loop()

    def answer() -> None:
        _, client = server.recvfrom(2048)
        server.sendto(name.encode(), client)

    loop.add_reader(server, answer)
    try:
        yield
    finally:
        loop.remove_reader(server)
        server.close()


async def ask(sock: socket.socket, address: IPAddress) -> str:
    """Who answers a datagram to port 80; empty: nobody."""
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendto(sock, b"who?", (str(address), 80))
    try:
        async with asyncio.timeout(0.2):
            return (await loop.sock_recv(sock, 2048)).decode()
    except (TimeoutError, ConnectionRefusedError):
        return ""


async def publish(cluster: MemoryCluster, address: IPAddress, endpoint: IPAddress, protocol: str = "TCP") -> None:
    """A Service at `address`, port 80, with one endpoint at port 8080."""
    family = DUAL[address.version == 6]
    port = {"port": 80, "targetPort": 8080, "protocol": protocol}
    spec = {"clusterIP": str(address), "ipFamilies": [family.value], "ports": [port]}
    await cluster.client.create(SERVICES, {"metadata": {"name": "web", "namespace": "default"}, "spec": spec})
    meta = {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}}
    body: dict[str, Any] = {"metadata": meta, "addressType": family.value, "ports": [{"port": 8080, "protocol": protocol}]}
    await cluster.client.create(ENDPOINTSLICES, body | {"endpoints": [{"addresses": [str(endpoint)]}]})


async def programmed(site: Site) -> None:
    """Each node has a route to the other's subnet of either family."""
    for node in site.nodes:
        await site.cluster.until(partial(_has_routes, node.kernel, 2))


def content(state: NetState) -> tuple[Any, ...]:
    """What a node holds of ours, without what the kernel chooses."""
    links = {(link.name, link.up, link.mtu, link.master) for link in state.links.values() if link.owned}
    addresses = {a for a in state.addresses if not a.interface.is_link_local}
    return links, addresses, state.routes, state.neighbours, state.fdb


async def _has_routes(kernel: LinuxKernel, number: int) -> bool:
    return len((await kernel.observe()).routes) == number


async def _is(kernel: LinuxKernel, whole: tuple[Any, ...]) -> bool:
    return content(await kernel.observe()) == whole


async def _answers(sock: socket.socket, address: IPAddress, name: str) -> bool:
    return await ask(sock, address) == name


def _repaired(agent: NodeAgent, before: int) -> bool:
    return agent.status().repairs > before


async def _reachable(netns: int, target: IPAddress, port: int) -> bool:
    try:
        await asyncio.to_thread(call, netns, target, port)
    except OSError:
        return False
    return True

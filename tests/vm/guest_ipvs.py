"""Services in IPVS, run inside the virtual machine by test_ipvs_vm.py."""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from packetrig import PacketRig, packet_rig, sendable
from promiserig import broken_promises, prepare
from proxysite import WEB as WEB_IP
from proxysite import proxy_site, until
from service_cases import FACTS, load_cases
from service_proof import by_the_device, disagreements, refused_where_bound
from service_worlds import change_to, some_clusters
from servicerig import ServiceRig, service_rig

from podwire.agent.proxymodes.ipvs import IpvsRules
from podwire.agent.proxymodes.modes import ProxyModes
from podwire.agent.proxymodes.nft import NftRules
from podwire.kernel.ipvs import IpvsClient, IpvsState
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.ipvs import DelVirtual, SetVirtual, VirtualKey
from podwire.model.objects import EndpointSlice, Service
from podwire.plan.ipvs import DEVICE, TABLE
from podwire.plan.services_maps import place_of
from podwire.trace.ipvs import IpvsNode, follow
from podwire.trace.oracle import Cluster, Connection, Outcome, Promise, promise

# Not marked `kernel`: IPVS' switches are not to be had in a user namespace. Here root has the machine for itself, and the rigs
# work in network namespaces that they make.
pytestmark = pytest.mark.timeout(400)

WEB = ObjectKey("shop", "web")
STRANGER = VirtualKey(bytes((192, 0, 2, 1)), 6, 4711)
CLUSTERS = 3
"""So many random ones: the machine is slow."""
CLUSTER_IP, NODE = "10.96.0.10", "198.18.0.11"


@pytest_asyncio.fixture
async def packets() -> AsyncIterator[PacketRig]:
    async with packet_rig(patience_s=1.0) as rig:
        yield rig


@pytest_asyncio.fixture
async def servers() -> AsyncIterator[ServiceRig]:
    async with service_rig(patience_s=15.0) as rig:  # the machine is slow
        yield rig


def _wanted(number: int, family: Family) -> bool:
    """All of IPv4 and a part of IPv6: the machine is slow."""
    return family is Family.IPV4 or number % 6 == 1


async def test_every_case(packets: PacketRig) -> None:
    wrong = []
    for number, case in enumerate(load_cases(special=True)):
        if not _wanted(number, case.family):
            continue
        rules = IpvsRules(packets.kernel, packets.node, case.facts)
        case.feed(rules)
        await rules.compare()
        for expected in (packet.in_ipvs for packet in case.packets if sendable(packet)):
            seen = packets.send(expected)
            if not packets.fits(expected, seen):
                wrong.append(f"{case.name}: {expected.label}: {seen}, not {expected.fate}")
        if await rules.compare():
            wrong.append(f"{case.name}: what is read back is not what was planned")
        await rules.remove(at_once=True)
    assert not wrong, "\n".join(wrong)


async def test_a_nodes_process_is_refused_at_once_in_nftables_too(packets: PacketRig) -> None:
    """This kernel (6.1) is the oldest that is tested: a reset by the node's own rules reaches its own process."""
    tried = 0
    for case in load_cases():
        wanted = [e for e in case.packets if sendable(e) and e.locally_made and e.fate == "tcp reset"]
        if not wanted:
            continue
        rules = NftRules(packets.kernel, case.facts)
        case.feed(rules)
        await rules.compare()
        for expected in wanted:
            assert packets.send(expected).fate == "tcp reset", f"{case.name}: {expected.label}"
            tried += 1
        await rules.remove()
    assert tried >= 4


def _promised(cluster: Cluster, connection: Connection) -> Promise:
    """What is promised, but for this mode's own way out; all that is no address of the node anyway is the device's."""
    found = promise(cluster, connection)
    nodes_own = connection.dst.is_loopback or connection.dst in cluster.node.node_ips
    return found if nodes_own else by_the_device(connection, found)


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
async def test_real_packets_meet_what_is_promised(servers: ServiceRig, family: Family) -> None:
    await prepare(servers)
    await NftRules(servers.kernel, FACTS).remove()
    servers.patience_s = 2.0
    rules = IpvsRules(servers.kernel, servers.fds["node"], FACTS)
    await rules.compare()
    wrong, tried = await broken_promises(servers, rules, some_clusters(family, CLUSTERS, real=True), _promised)
    assert not wrong, "\n".join(wrong)
    assert min(tried[kind] for kind in (Outcome.SERVED, Outcome.REFUSED, Outcome.DROPPED)) > 10, tried


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
async def test_what_is_read_back_keeps_every_promise(servers: ServiceRig, family: Family) -> None:
    await NftRules(servers.kernel, FACTS).remove()
    rules = IpvsRules(servers.kernel, servers.fds["node"], FACTS)
    before = None
    for cluster in some_clusters(family, CLUSTERS - 1):
        change_to(rules, before, cluster)
        rules.set_facts(cluster.node)
        await rules.compare()
        before = cluster
        network = await servers.kernel.observe()
        bound = frozenset(a.interface.ip.packed for a in network.addresses if a.dev == DEVICE)
        held = IpvsNode(await servers.kernel.observe_nft(TABLE), observed(servers).servers, bound)
        found = list(disagreements(cluster, partial(follow, held), refused_where_bound(bound)))
        assert not found, "\n".join(found)


def service(**spec: Any) -> Service:
    ports = [{"name": p.lower(), "port": 80, "protocol": p, "nodePort": 30080} for p in ("TCP", "UDP")]
    spec = {"type": "NodePort", "clusterIP": CLUSTER_IP, "ipFamilies": ["IPv4"], "ports": ports, **spec}
    return msgspec.convert({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec}, Service)


def slices(*names: str) -> tuple[EndpointSlice, ...]:
    document = {
        "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [f"10.244.1.{n[1:]}"], "nodeName": "n1"} for n in names],
        "ports": [{"name": p.lower(), "port": 8080, "protocol": p} for p in ("TCP", "UDP")],
    }
    return (msgspec.convert(document, EndpointSlice),)


async def talk(sock: socket.socket) -> str:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"who?\n")
    async with asyncio.timeout(20):
        return (await loop.sock_recv(sock, 200)).decode().split()[0]


def observed(servers: ServiceRig) -> IpvsState:
    with closing(IpvsClient(servers.fds["node"])) as client:
        return client.observe()


async def test_leaving_endpoints_are_drained_and_a_change_of_mode_drops_no_connection(servers: ServiceRig) -> None:
    loop = asyncio.get_running_loop()
    nft = NftRules(servers.kernel, FACTS)
    ipvs = IpvsRules(servers.kernel, servers.fds["node"], FACTS)
    for rules in (nft, ipvs):
        rules.set_service(WEB, service(), slices("p2", "p3"))
    await nft.compare()
    with (
        servers.open("p4", socket.SOCK_STREAM, CLUSTER_IP) as by_nft,
        servers.open("p4", socket.SOCK_STREAM, CLUSTER_IP) as by_ipvs,
        servers.open("world", socket.SOCK_STREAM, NODE) as outside,
    ):
        await loop.sock_connect(by_nft, (CLUSTER_IP, 80))
        first = await talk(by_nft)

        await ipvs.compare()
        await nft.remove()
        assert await talk(by_nft) == first, "made in nftables, alive in ipvs"
        await loop.sock_connect(by_ipvs, (CLUSTER_IP, 80))
        await loop.sock_connect(outside, (NODE, 30080))
        homes = [await talk(by_ipvs), await talk(outside)]
        assert sum(observed(servers).connections.values()) >= 2, "IPVS it was"
        assert await servers.who("p4", CLUSTER_IP, 80, times=4) == {"p2", "p3"}
        assert await servers.who("p4", CLUSTER_IP, 80, times=4, udp=True) == {"p2", "p3"}

        ipvs.set_service(WEB, service(), slices("p4"))
        await ipvs.program()
        assert await servers.who("p2", CLUSTER_IP, 80, times=4) == {"p4"}, "no new client goes to a server that leaves"
        assert [await talk(by_ipvs), await talk(outside)] == homes, "its old clients stay"

        nft.set_service(WEB, service(), slices("p4"))
        await nft.compare()
        leaving = asyncio.create_task(ipvs.remove())
        assert await servers.who("p2", CLUSTER_IP, 80, times=4) == {"p4"}
        assert [await talk(by_ipvs), await talk(outside)] == homes, "made in ipvs, alive in nftables"
        assert not leaving.done()
    leaving.cancel()  # the ends of connections are tracked for two minutes: too long for a test
    await asyncio.wait((leaving,))
    await ipvs.remove(at_once=True)
    assert not observed(servers).servers
    assert DEVICE not in (await servers.kernel.observe()).links
    assert not (await servers.kernel.observe_nft(TABLE)).tables


async def test_affinity_and_what_was_left_behind(servers: ServiceRig) -> None:
    await NftRules(servers.kernel, FACTS).remove()  # the rig's own: to it no Service has that ClusterIP
    rules = IpvsRules(servers.kernel, servers.fds["node"], FACTS)
    sticky = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
    rules.set_service(WEB, service(**sticky), slices("p2", "p3"))
    await rules.compare()
    (chosen,) = await servers.who("p4", CLUSTER_IP, 80, times=5)
    left = {"p2", "p3"} - {chosen}
    rules.set_service(WEB, service(**sticky), slices(*left))
    await rules.program()
    assert await servers.who("p4", CLUSTER_IP, 80, times=3) == left, "its endpoint left"

    with closing(IpvsClient(servers.fds["node"])) as client:
        client.execute([SetVirtual(STRANGER, "rr", 0, new=True)])
        again = IpvsRules(servers.kernel, servers.fds["node"], FACTS)
        again.set_service(WEB, service(**sticky), slices(*left))
        await again.compare()
        assert await again.compare() == 0, "a new life finds everything as it shall be"
        assert {key.port for key in client.observe().servers} == {80, 30080, STRANGER.port}
        client.execute([DelVirtual(VirtualKey(bytes((10, 96, 0, 10)), 6, 80))])
        async with asyncio.timeout(15):
            await again.changed()
        assert await again.compare() == 2, "what somebody took away is put back"

        modes = ProxyModes(servers.kernel, servers.fds["node"])
        known = map(place_of, await modes.served_by_others(NftRules(servers.kernel, FACTS)))
        asked = {(str(ipaddress.ip_address(p.address)), p.protocol, p.port) for p in known}
        assert {(CLUSTER_IP, 17, 80), (NODE, 17, 30080)} <= asked, "another mode reads what this one served"
        found = await modes.clean_up()
        assert "ipvs" in found
        assert client.observe().servers.keys() == {STRANGER}, "another's virtual server is left alone"
    assert DEVICE not in (await servers.kernel.observe()).links


async def test_a_proxy_counts_connections_and_puts_back_what_a_stranger_took(tmp_path: Path) -> None:
    async with proxy_site(tmp_path) as site:
        site.rig.patience_s = 15.0
        async with site.proxy("--proxy-mode", "ipvs", seconds=90) as process:
            assert await site.rig.who("p4", WEB_IP, 80, times=6) == {"p2", "p3", "far"}
            assert await site.metric('podwire_service_connections_total{namespace="default",service="web"') == 6

            async def counted() -> bool:
                return await site.metric("podwire_endpoint_connections_total", "/metrics/endpoints") == 6

            await until(counted, process)  # the kernel adds its real servers' counts up every two seconds
            key = VirtualKey(ipaddress.ip_address(WEB_IP).packed, 6, 80)
            with closing(IpvsClient(site.rig.fds["node"])) as client:
                client.execute([DelVirtual(key)])

                async def back() -> bool:
                    return await site.metric("podwire_proxy_repairs_total") == 1 and key in client.observe().servers

                await until(back, process)
            assert await site.answers()
            process.terminate()
            _, said = await asyncio.to_thread(process.communicate)
        assert "rules were not as left" in said

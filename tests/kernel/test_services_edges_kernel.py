"""Services where ordinary sockets do not reach: SCTP, node ports on 127.0.0.1 and those who may not use them. In each back
end."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from servicerig import FACTS, ServiceRig, neighbour_reaches, pick, service_rig, stranger_iptables

from podwire.agent.proxymodes.iptables import IptablesRules
from podwire.agent.proxymodes.nft import NftRules, remove_tables
from podwire.agent.proxymodes.port import ServiceRules
from podwire.kernel.iptables import Flavour, find_programs
from podwire.kernel.netns import run_in_netns
from podwire.model.addr import Family
from podwire.model.ids import HOST, ObjectKey
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.ops import SetSysctl
from podwire.model.servicetable import NodeFacts
from podwire.plan.services import TABLE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]

both = pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
SCTP = 132
PATIENCE_S = 0.5


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[ServiceRig]:
    """Without any rules so far."""
    async with service_rig() as made:
        await remove_tables(made.kernel, TABLE)
        yield made


def _iptables(flavour: Flavour, rig: ServiceRig, facts: NodeFacts) -> ServiceRules:
    if find_programs(flavour) is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    return IptablesRules(rig.fds["node"], facts, flavour=flavour)


Make = Callable[[ServiceRig, NodeFacts], ServiceRules]
BACK_ENDS: dict[str, Make] = {
    "nftables": lambda rig, facts: NftRules(rig.kernel, facts),
    "iptables-nft": partial(_iptables, Flavour.NFT),
    "iptables-legacy": partial(_iptables, Flavour.LEGACY),
}
each = pytest.mark.parametrize("make", BACK_ENDS.values(), ids=list(BACK_ENDS))


def service(family: Family, protocol: str, **spec: Any) -> Service:
    document = {
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "type": "NodePort",
            "clusterIP": pick(family, "10.96.0.10", "fd00:10:96::a"),
            "ipFamilies": [family.value],
            "ports": [{"port": 80, "protocol": protocol, "nodePort": 30080}],
            **spec,
        },
    }
    return msgspec.convert(document, Service)


def listing(family: Family, protocol: str, *addresses: str) -> tuple[EndpointSlice, ...]:
    document = {
        "metadata": {"name": "web-1", "namespace": "shop"},
        "addressType": family.value,
        "endpoints": [{"addresses": [ip], "nodeName": "n1"} for ip in addresses],
        "ports": [{"port": 8080, "protocol": protocol}],
    }
    return (msgspec.convert(document, EndpointSlice),)


# --- SCTP ---------------------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """The checksum of SCTP (RFC 9260, appendix A)."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def sctp_init(sport: int, dport: int) -> bytes:
    """An INIT, as a client sends it first."""
    chunk = struct.pack("!BBHIIHHI", 1, 0, 20, 0x1234, 65536, 1, 1, 1)
    unsigned = struct.pack("!HHII", sport, dport, 0, 0) + chunk
    return unsigned[:8] + crc32c(unsigned).to_bytes(4, "little") + unsigned[12:]


async def sctp_from(rig: ServiceRig, where: str, to: str, port: int, *, at: str) -> tuple[int, bool, str]:
    """Send an INIT; what comes out at `at`: (its port, whether its checksum is right, its source)."""
    loop = asyncio.get_running_loop()
    domain = socket.AF_INET6 if ":" in to else socket.AF_INET

    def opened() -> socket.socket:
        sock = socket.socket(domain, socket.SOCK_RAW, SCTP)
        sock.setblocking(False)
        return sock

    with run_in_netns(rig.fds[at], opened) as there, run_in_netns(rig.fds[where], opened) as here:
        here.connect((to, 0))
        await loop.sock_sendall(here, sctp_init(4000, port))
        async with asyncio.timeout(PATIENCE_S):
            data, source = await loop.sock_recvfrom(there, 2000)
    segment = data if domain == socket.AF_INET6 else data[20:]
    right = crc32c(segment[:8] + bytes(4) + segment[12:]).to_bytes(4, "little") == segment[8:12]
    return struct.unpack("!H", segment[2:4])[0], right, source[0]


@each
@both
async def test_sctp_is_led_to_an_endpoint(rig: ServiceRig, family: Family, make: Make) -> None:
    pod = pick(family, "10.244.1.2", "fd00:10:244:1::2")
    gateway = pick(family, "10.244.1.1", "fd00:10:244:1::1")
    client = pick(family, "10.244.1.4", "fd00:10:244:1::4")
    web = service(family, "SCTP")
    rules = make(rig, FACTS)
    rules.set_service(web.key, web, listing(family, "SCTP", pod))
    await rules.compare()
    cluster_ip, node = web.spec.cluster_ip, pick(family, "198.18.0.11", "2001:db8:1::b")
    assert await sctp_from(rig, "p4", cluster_ip, 80, at="p2") == (8080, True, client)
    assert await sctp_from(rig, "world", node, 30080, at="p2") == (8080, True, gateway)
    assert await sctp_from(rig, "node", cluster_ip, 80, at="p2") == (8080, True, gateway)
    with pytest.raises((TimeoutError, ConnectionRefusedError)):
        await sctp_from(rig, "p4", cluster_ip, 81, at="p2")


# --- 127.0.0.1 ----------------------------------------------------------------------------------------------------------


async def with_loopback(rig: ServiceRig, make: Make, *, loopback: bool) -> None:
    rules = make(rig, replace(FACTS, loopback=loopback))
    for protocol, name, cluster_ip in (("TCP", "web", "10.96.0.10"), ("UDP", "udp", "10.96.0.11")):
        made = service(Family.IPV4, protocol, clusterIP=cluster_ip)
        rules.set_service(ObjectKey("shop", name), made, listing(Family.IPV4, protocol, "10.244.1.2", "10.244.2.2"))
    document = {
        "metadata": {"name": "edge", "namespace": "shop", "uid": "edge"},
        "spec": {"containers": [{"name": "main", "ports": [{"containerPort": 8080, "hostPort": 8888}]}]},
        "status": {"podIPs": [{"ip": "10.244.1.3"}]},
    }
    rules.set_host_ports("edge", msgspec.convert(document, Pod))
    await rules.compare()
    applied = await rig.kernel.apply((SetSysctl("net/ipv4/conf/all/route_localnet", "1", HOST),))
    assert applied.ok, applied.failures


@each
async def test_node_ports_and_host_ports_on_localhost(rig: ServiceRig, make: Make) -> None:
    await with_loopback(rig, make, loopback=True)
    for udp in (False, True):
        assert await rig.who("node", "127.0.0.1", 30080, times=20, udp=udp) == {"p2", "far"}
    assert await rig.ask("node", "127.0.0.1", 8888) == ("p3", "10.244.1.1"), "they see no loopback address"
    with pytest.raises(ConnectionRefusedError):
        await rig.ask("node", "127.0.0.1", 30081)
    with rig.open("node", socket.SOCK_STREAM, "127.0.0.1", 7000) as own:
        own.listen()
        with rig.open("node", socket.SOCK_STREAM, "127.0.0.1") as client:
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", 7000))


@each
async def test_a_neighbour_does_not_reach_what_listens_on_localhost(rig: ServiceRig, make: Make) -> None:
    """CVE-2020-8558. Without the guard the same frame arrives, which shows that the test can fail."""
    with rig.open("node", socket.SOCK_DGRAM, "127.0.0.1", 7000) as listener:
        await with_loopback(rig, make, loopback=False)
        assert await neighbour_reaches(rig, listener)
        await rig.kernel.forget_flows(lambda flow: True)
        await with_loopback(rig, make, loopback=True)
        assert not await neighbour_reaches(rig, listener)


# --- others' rules, and packets of no connection ------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", Flavour)
async def test_services_work_where_docker_drops_what_is_forwarded(rig: ServiceRig, flavour: Flavour) -> None:
    """In nftables they do not: there, no table's accept outweighs another's drop."""
    rules = _iptables(flavour, rig, FACTS)
    web = service(Family.IPV4, "TCP")
    rules.set_service(web.key, web, listing(Family.IPV4, "TCP", "10.244.1.2"))
    await rules.compare()
    stranger_iptables(rig.fds["node"], "-P", "FORWARD", "DROP", program=f"/usr/sbin/iptables-{flavour}")
    assert await rig.ask("world", "198.18.0.11", 30080) == ("p2", "10.244.1.1")
    with pytest.raises(TimeoutError):
        await rig.ask("world", "10.244.1.2", 8080)


@pytest.mark.parametrize("flavour", Flavour)
async def test_a_firewall_that_drops_is_opened_for_health_checks(rig: ServiceRig, flavour: Flavour) -> None:
    if find_programs(flavour) is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    rules = IptablesRules(rig.fds["node"], FACTS, flavour=flavour)
    await rules.compare()
    program = f"/usr/sbin/iptables-{flavour}"
    for arguments in (("-P", "INPUT", "DROP"), ("-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")):
        stranger_iptables(rig.fds["node"], *arguments, program=program)
    await rig.serve("node", Family.IPV4, 32000, "198.18.0.11")
    with pytest.raises(TimeoutError):
        await rig.ask("world", "198.18.0.11", 32000)
    web = service(Family.IPV4, "TCP", type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=32000)
    rules.set_service(web.key, web, listing(Family.IPV4, "TCP", "10.244.1.2"))
    await rules.program()
    assert (await rig.ask("world", "198.18.0.11", 32000))[0] == "node"
    rules.set_service(web.key, None)
    await rules.program()
    with pytest.raises(TimeoutError):
        await rig.ask("world", "198.18.0.11", 32000)


@pytest.mark.parametrize("flavour", Flavour)
async def test_packets_of_no_connection_are_dropped_and_counted(rig: ServiceRig, flavour: Flavour) -> None:
    """kubernetes issue 74839. Without that rule the same packet arrives, which shows that the test can fail."""
    for drops in (False, True):
        if find_programs(flavour) is None:
            pytest.skip(f"iptables ({flavour}) is not installed")
        rules = IptablesRules(rig.fds["node"], FACTS, flavour=flavour, drop_invalid=drops)
        await rules.compare()
        assert await stray_arrives(rig) is not drops
        assert (await rules.connections(endpoints=False)).invalid_dropped == int(drops)


async def stray_arrives(rig: ServiceRig) -> bool:
    """Whether the pod gets an answer (SYN and ACK) that it never asked for, from the world."""
    segment = struct.pack("!HHIIBBHHH", 4000, 8080, 1, 1, 5 << 4, 0x12, 1024, 0, 0)

    def opened() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        sock.setblocking(False)
        return sock

    loop = asyncio.get_running_loop()
    with run_in_netns(rig.fds["p2"], opened) as there, run_in_netns(rig.fds["world"], opened) as here:
        here.connect(("10.244.1.2", 0))
        await loop.sock_sendall(here, segment)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await loop.sock_recv(there, 100)
        except TimeoutError:
            return False
    return True


# --- session affinity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back_end", ["nftables", "iptables-legacy"])
async def test_each_new_connection_keeps_affinity_alive(rig: ServiceRig, back_end: str) -> None:
    """With a time-out of 2 s a client that comes back sooner is known for as long as it does."""
    everyone = ("10.244.1.2", "10.244.1.3", "10.244.1.4", "10.244.2.2")
    brief = {"clientIP": {"timeoutSeconds": 2}}
    web = service(Family.IPV4, "TCP", sessionAffinity="ClientIP", sessionAffinityConfig=brief)
    rules = BACK_ENDS[back_end](rig, FACTS)
    rules.set_service(web.key, web, listing(Family.IPV4, "TCP", *everyone))
    await rules.compare()
    loop = asyncio.get_running_loop()
    end, seen = loop.time() + 4.2, set()
    while loop.time() < end:
        seen |= await rig.who("world", "198.18.0.11", 30080)
        await asyncio.sleep(0.4)
    assert len(seen) == 1

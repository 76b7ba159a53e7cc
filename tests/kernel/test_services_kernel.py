"""Services with real packets: who answers, whom they see as the client, who is refused. Both families."""

import asyncio
import dataclasses
import ipaddress
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from servicerig import FACTS, ServiceRig, pick, service_rig

from podwire.kernel.netns import run_in_netns
from podwire.kernel.nftclient import NftClient
from podwire.kernel.rtnlsocket import open_netlink
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.nft import (
    AddChain,
    AddElements,
    AddSet,
    AddTable,
    BaseHook,
    Batch,
    Chain,
    Command,
    DelElements,
    DelTable,
    FieldType,
    Hook,
    NftSet,
    ReplaceElements,
    Rule,
    SetRules,
    Sweep,
    TableRef,
)
from podwire.model.nftexpr import DROP, Cmp, CmpOp, Immediate, Meta, MetaKey, goto
from podwire.model.objects import EndpointPort, EndpointSlice, Pod, Service
from podwire.model.ops import CommitNft
from podwire.plan.services import TABLE, ServicePlanner
from podwire.plan.services_maps import frontend_key
from podwire.plan.services_rules import sets_of
from podwire.wire.netlink import NETLINK_NETFILTER

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]

both = pytest.mark.parametrize("family", Family, ids=lambda f: f.value)


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[ServiceRig]:
    async with service_rig() as made:
        yield made


WEB = ObjectKey("shop", "web")


class Plan:
    """Addresses by family."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.cluster_ip = pick(family, "10.96.0.10", "fd00:10:96::a")
        self.unused = pick(family, "10.96.0.99", "fd00:10:96::99")
        self.balancer = pick(family, "203.0.113.1", "2001:db8:2::1")
        self.node = pick(family, "198.18.0.11", "2001:db8:1::b")
        self.world = pick(family, "198.18.1.1", "2001:db8:1::1:1")
        self.gateway = pick(family, "10.244.1.1", "fd00:10:244:1::1")

    def pod(self, name: str) -> str:
        if name == "far":
            return pick(self.family, "10.244.2.2", "fd00:10:244:2::2")
        return pick(self.family, f"10.244.1.{name[1:]}", f"fd00:10:244:1::{name[1:]}")

    def service(self, **spec: Any) -> Service:
        ports = [
            {"name": "tcp", "port": 80, "protocol": "TCP", "nodePort": 30080},
            {"name": "udp", "port": 80, "protocol": "UDP", "nodePort": 30080},
        ]
        document = {
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": self.cluster_ip, "ipFamilies": [self.family.value], "ports": ports, **spec},
            "status": {"loadBalancer": {"ingress": [{"ip": self.balancer}]}},
        }
        return msgspec.convert(document, Service)

    def slices(self, *names: str) -> tuple[EndpointSlice, ...]:
        document = {
            "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": self.family.value,
            "endpoints": [{"addresses": [self.pod(n)], "nodeName": "n2" if n == "far" else "n1"} for n in names],
            "ports": [{"name": p.lower(), "port": 8080, "protocol": p} for p in ("TCP", "UDP")],
        }
        return (msgspec.convert(document, EndpointSlice),)


async def program(rig: ServiceRig, plan: Plan, *names: str, **spec: Any) -> None:
    rig.planner.set_service(WEB, plan.service(**spec), plan.slices(*names))
    await rig.program()


async def refused(rig: ServiceRig, where: str, address: str, port: int, *, udp: bool = False) -> None:
    with pytest.raises(ConnectionRefusedError):
        await rig.ask(where, address, port, udp=udp)


async def silent(rig: ServiceRig, where: str, address: str, port: int) -> None:
    with pytest.raises(TimeoutError):
        await rig.ask(where, address, port)


@both
async def test_cluster_ip_from_everywhere(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    await program(rig, plan, "p2", "p3", "far")
    for where in ("p4", "node"):
        for udp in (False, True):
            assert await rig.who(where, plan.cluster_ip, 80, times=40, udp=udp) == {"p2", "p3", "far"}
    assert await rig.who("world", plan.cluster_ip, 80, times=40) == {"p2", "p3", "far"}
    sources = {await rig.ask("p4", plan.cluster_ip, 80) for _ in range(20)}
    assert {source for name, source in sources if name != "far"} == {plan.pod("p4")}, "between pods nothing is rewritten"
    assert {s for n, s in [await rig.ask("node", plan.cluster_ip, 80) for _ in range(20)] if n == "p2"} == {plan.gateway}


@both
async def test_a_pod_reaches_itself_through_its_service(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    await program(rig, plan, "p2")
    for udp in (False, True):
        assert await rig.ask("p2", plan.cluster_ip, 80, udp=udp) == ("p2", plan.gateway)


@both
async def test_no_endpoints_and_closed_ports_are_refused_at_once(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    await program(rig, plan, type="LoadBalancer")
    for where in ("p4", "node", "world"):
        await refused(rig, where, plan.cluster_ip, 80)
        await refused(rig, where, plan.cluster_ip, 80, udp=True)
        await refused(rig, where, plan.cluster_ip, 4711)
        await refused(rig, where, plan.balancer, 80)
    await refused(rig, "world", plan.node, 30080)
    await silent(rig, "p4", plan.unused, 80)
    for _ in range(20):  # a TCP reset is not rate-limited as ICMP is
        await refused(rig, "p4", plan.cluster_ip, 80)


@both
async def test_node_port(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    await program(rig, plan, "p2", "far", type="NodePort")
    assert await rig.who("world", plan.node, 30080, times=20) == {"p2", "far"}
    assert await rig.who("world", plan.node, 30080, times=20, udp=True) == {"p2", "far"}
    assert await rig.who("p4", plan.node, 30080, times=20) == {"p2", "far"}
    assert await rig.who("node", plan.node, 30080, times=20) == {"p2", "far"}
    seen = {source for name, source in [await rig.ask("world", plan.node, 30080) for _ in range(10)] if name == "p2"}
    assert seen == {plan.gateway}, "externalTrafficPolicy Cluster: masqueraded"


@both
async def test_external_traffic_policy_local_keeps_the_source(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    await program(rig, plan, "p2", "far", type="LoadBalancer", externalTrafficPolicy="Local")
    for address, port in ((plan.node, 30080), (plan.balancer, 80)):
        assert {await rig.ask("world", address, port) for _ in range(20)} == {("p2", plan.world)}
        assert await rig.who("p4", address, port, times=20) == {"p2", "far"}, "from a pod: short-cut to all"
    await program(rig, plan, "far", type="LoadBalancer", externalTrafficPolicy="Local")
    await silent(rig, "world", plan.node, 30080)
    assert await rig.who("p4", plan.balancer, 80) == {"far"}


@both
async def test_internal_traffic_policy_local(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    await program(rig, plan, "p2", "far", internalTrafficPolicy="Local")
    assert await rig.who("p4", plan.cluster_ip, 80, times=20) == {"p2"}
    await program(rig, plan, "far", internalTrafficPolicy="Local")
    await silent(rig, "p4", plan.cluster_ip, 80)


@both
async def test_load_balancer_source_ranges(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    strangers, friends = pick(family, "192.0.2.0/24", "2001:db8:3::/64"), f"{plan.world}/{32 if family is Family.IPV4 else 128}"
    await program(rig, plan, "p2", type="LoadBalancer", loadBalancerSourceRanges=[strangers])
    await silent(rig, "world", plan.balancer, 80)
    assert await rig.who("world", plan.node, 30080) == {"p2"}, "the node port is not restricted"
    await program(rig, plan, "p2", type="LoadBalancer", loadBalancerSourceRanges=[strangers, friends])
    assert await rig.who("world", plan.balancer, 80) == {"p2"}


@both
async def test_host_port(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    ports = [{"containerPort": 8080, "hostPort": 8888, "protocol": p} for p in ("TCP", "UDP")]
    document = {
        "metadata": {"name": "edge", "namespace": "shop", "uid": "edge"},
        "spec": {"containers": [{"name": "main", "ports": ports}]},
        "status": {"podIPs": [{"ip": plan.pod("p3")}]},
    }
    rig.planner.set_host_ports("edge", msgspec.convert(document, Pod))
    await rig.program()
    for udp in (False, True):
        assert await rig.ask("world", plan.node, 8888, udp=udp) == ("p3", plan.world)
        assert await rig.ask("p2", plan.node, 8888, udp=udp) == ("p3", plan.pod("p2"))
        assert (await rig.ask("p3", plan.node, 8888, udp=udp))[0] == "p3"
        assert (await rig.ask("node", plan.node, 8888, udp=udp))[0] == "p3"
    rig.planner.set_host_ports("edge", None)
    await rig.program()
    await refused(rig, "world", plan.node, 8888)


@both
async def test_session_affinity(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    sticky: dict[str, Any] = {
        "type": "NodePort",
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
    }
    everyone = ("p2", "p3", "p4", "far")
    await program(rig, plan, *everyone, **sticky)
    chosen = await rig.who("p4", plan.cluster_ip, 80, times=20)
    assert len(chosen) == 1
    outside = await rig.who("world", plan.node, 30080, times=20)
    assert len(outside) == 1
    await program(rig, plan, *everyone[:3], *everyone[3:], **sticky)
    assert await rig.who("p4", plan.cluster_ip, 80, times=5) == chosen

    left = [name for name in everyone if name not in chosen]
    await program(rig, plan, *left, **sticky)
    second = await rig.who("p4", plan.cluster_ip, 80, times=20)
    assert len(second) == 1
    assert second <= set(left), "an endpoint that is gone is forgotten at once"
    await program(rig, plan, *everyone, **sticky)
    assert await rig.who("p4", plan.cluster_ip, 80, times=20) == second, "the others' affinity stays"


@both
async def test_a_client_is_known_by_every_address_also_after_a_restart(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    sticky: dict[str, Any] = {"type": "LoadBalancer", "sessionAffinity": "ClientIP"}
    everyone = ("p2", "p3", "p4", "far")
    await program(rig, plan, *everyone, **sticky)
    ways = ((plan.cluster_ip, 80), (plan.node, 30080), (plan.balancer, 80))
    chosen = await rig.who("world", *ways[0], times=1)
    for way in ways:
        assert await rig.who("world", *way, times=5) == chosen

    rig.planner = ServicePlanner(FACTS)
    rig.planner.set_service(WEB, plan.service(**sticky), plan.slices(*everyone[::-1]))
    batch = rig.planner.resync(await rig.kernel.observe_nft(TABLE))
    assert not batch
    left = [name for name in everyone if name in chosen or name == "far"]
    await program(rig, plan, *left, **sticky)
    for way in ways:
        assert await rig.who("world", *way, times=5) == chosen
    await program(rig, plan, *(name for name in everyone if name not in chosen), **sticky)
    second = await rig.who("world", *ways[2], times=1)
    for way in ways:
        assert await rig.who("world", *way, times=5) == second != chosen


@both
async def test_the_number_by_which_a_client_is_remembered_leaves_with_no_packet(rig: ServiceRig, family: Family) -> None:
    """Whoever shapes traffic by `meta priority` would read it."""
    plan, table = Plan(family), TableRef(family, "shaper")
    marked = (Meta(MetaKey.L4PROTO, 0), Cmp(CmpOp.EQ, 0, b"\6"), Meta(MetaKey.PRIORITY, 0), Cmp(CmpOp.NEQ, 0, bytes(4)))
    behind = {hook: Chain(hook.name.lower(), BaseHook("filter", hook, 300)) for hook in (Hook.INPUT, Hook.POSTROUTING)}
    commands: list[Command] = [AddTable(table), *(AddChain(table, chain) for chain in behind.values())]
    commands += [SetRules(table, chain.name, (Rule((*marked, Immediate(DROP))),)) for chain in behind.values()]
    applied = await rig.kernel.apply((CommitNft(Batch(tuple(commands))),))
    assert applied.ok, applied.failures
    await rig.serve("node", family, 8080, plan.gateway)
    sticky: dict[str, Any] = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP"}
    await program(rig, plan, "p2", "far", **sticky)
    for where in ("p4", "world", "node"):
        for way in ((plan.cluster_ip, 80), (plan.node, 30080), (plan.balancer, 80)):
            assert len(await rig.who(where, *way, times=3)) == 1
    node_itself = msgspec.structs.replace(plan.slices("p2")[0].endpoints[0], addresses=(plan.gateway,))
    pieces = tuple(msgspec.structs.replace(piece, endpoints=(node_itself,)) for piece in plan.slices("p2"))
    rig.planner.set_service(WEB, plan.service(**sticky), pieces)
    await rig.program()
    assert await rig.who("world", plan.node, 30080, times=3) == {"node"}, "an endpoint on the node itself: by the input hook"


@both
async def test_session_affinity_ends_with_its_time_out(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    brief: dict[str, Any] = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}}}
    await program(rig, plan, "p2", "p3", **brief)
    table, affinity = TableRef(family, TABLE), sets_of(family).affinity
    with open_netlink(rig.fds["node"], NETLINK_NETFILTER) as sock:
        client = NftClient(sock)

        async def forgotten() -> None:
            async with asyncio.timeout(5):
                while client.elements(table, affinity.name):  # noqa: ASYNC110 - the kernel tells nobody
                    await asyncio.sleep(0.05)

        assert len(await rig.who("p4", plan.cluster_ip, 80, times=10)) == 1
        assert len(client.elements(table, affinity.name)) == 1
        await forgotten()
        seen: set[str] = set()
        async with asyncio.timeout(20):
            while seen != {"p2", "p3"}:
                seen |= await rig.who("p4", plan.cluster_ip, 80)
                await forgotten()


@both
async def test_pods_go_out_with_the_nodes_address(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    assert await rig.ask("p2", plan.world, 8080) == ("world", plan.node)
    assert await rig.ask("p2", plan.pod("far"), 8080) == ("far", plan.pod("p2"))
    assert await rig.ask("p2", plan.pod("p3"), 8080) == ("p3", plan.pod("p2"))


async def talk(sock: socket.socket) -> str:
    """Who answers on a connection."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"who?\n")
    async with asyncio.timeout(5):
        return (await loop.sock_recv(sock, 200)).decode().split()[0]


@both
async def test_connections_outlive_every_change(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    await program(rig, plan, "p2")
    with rig.open("p4", socket.SOCK_STREAM, plan.cluster_ip) as sock:
        await asyncio.get_running_loop().sock_connect(sock, (plan.cluster_ip, 80))
        assert await talk(sock) == "p2"
        await program(rig, plan, "p2", "p3", "far", type="NodePort")
        assert await talk(sock) == "p2"
        await program(rig, plan, "p3")
        assert await talk(sock) == "p2", "an endpoint that leaves keeps the connections it has"
        rig.planner.set_service(WEB, None)
        await rig.program()
        assert await talk(sock) == "p2"
        fresh = ServicePlanner(FACTS)
        assert not fresh.resync(await rig.kernel.observe_nft(TABLE)), "a new agent finds nothing to do"


def counted(rig: ServiceRig, of: NftSet, family: Family = Family.IPV4) -> dict[bytes, int]:
    with open_netlink(rig.fds["node"], NETLINK_NETFILTER) as sock:
        return {key: packets for key, (_, (packets, _)) in NftClient(sock).elements(TableRef(family, TABLE), of.name).items()}


@both
@pytest.mark.parametrize("udp", [False, True], ids=["tcp", "udp"])
async def test_a_connection_is_counted_once_and_an_endpoint_from_its_first_one(
    rig: ServiceRig, family: Family, udp: bool
) -> None:
    plan, sets = Plan(family), sets_of(family)
    await program(rig, plan, "p2")
    (front,) = (frontend_key(f) for f in rig.planner.table(WEB).frontends if f.protocol == (17 if udp else 6))
    pair = front + (ipaddress.ip_address(plan.pod("p2")).packed + b"\x1f\x90\0\0")
    assert counted(rig, sets.connections, family) == {}
    for number, where in enumerate(("p4", "p4", "node", "p2", "world"), 1):
        if where == "world":
            await program(rig, plan, "p2", type="NodePort")
            await rig.ask(where, plan.node, 30080, udp=udp)
            continue
        await rig.ask(where, plan.cluster_ip, 80, udp=udp)
        assert counted(rig, sets.connections, family) == {pair: number}, where
        assert counted(rig, sets.services, family)[front] == number
    assert len(counted(rig, sets.connections, family)) == 2, "by the address that was asked"


async def test_who_follows_an_affinity_is_counted_too(rig: ServiceRig) -> None:
    plan = Plan(Family.IPV4)
    await program(rig, plan, "p2", "p3", "far", sessionAffinity="ClientIP")
    for _ in range(10):
        await rig.ask("p4", plan.cluster_ip, 80)
    assert list(counted(rig, sets_of(Family.IPV4).connections).values()) == [10]


async def test_counts_outlive_moves_and_the_agent_and_go_when_they_are_swept(rig: ServiceRig) -> None:
    plan, sets = Plan(Family.IPV4), sets_of(Family.IPV4)
    await program(rig, plan, "p2", "p3")
    for _ in range(20):
        await rig.ask("p4", plan.cluster_ip, 80)
    before = counted(rig, sets.connections)
    await program(rig, plan, "p3")
    await program(rig, plan, "p3", "p2", "far")
    rig.planner = ServicePlanner(FACTS)
    rig.planner.set_service(WEB, plan.service(), plan.slices("p3", "p2", "far"))
    assert not rig.planner.resync(await rig.kernel.observe_nft(TABLE))
    assert counted(rig, sets.connections) == before
    gone, *_ = before
    sweep = Sweep(TableRef(Family.IPV4, TABLE), sets.connections, (gone, bytes(len(gone)), gone))
    assert (await rig.kernel.apply((CommitNft(Batch((sweep,))),))).ok
    assert counted(rig, sets.connections) == {key: n for key, n in before.items() if key != gone}
    rig.planner = ServicePlanner(FACTS)
    rig.planner.set_service(WEB, plan.service(), plan.slices("far"))
    assert (await rig.kernel.apply((CommitNft(rig.planner.resync(await rig.kernel.observe_nft(TABLE))),))).ok
    assert counted(rig, sets.connections) == {}, "they left while there was no agent"


async def test_a_full_set_of_counts_stops_nobody(rig: ServiceRig) -> None:
    plan, sets = Plan(Family.IPV4), sets_of(Family.IPV4)
    planner = ServicePlanner(FACTS)
    planner.set_service(WEB, plan.service(), plan.slices("p2", "p3"))
    small = dataclasses.replace(sets.connections, size=1)
    anew = [DelTable(TableRef(family, TABLE)) for family in Family]
    commands = (
        AddSet(c.table, small) if isinstance(c, AddSet) and c.set == sets.connections else c
        for c in (*anew, *planner.take_batch().commands)
    )
    assert (await rig.kernel.apply((CommitNft(Batch(tuple(commands))),))).ok
    assert await rig.who("p4", plan.cluster_ip, 80, times=20) == {"p2", "p3"}
    assert len(counted(rig, sets.connections)) == 1


@both
async def test_a_large_pool_reaches_all_of_its_endpoints(rig: ServiceRig, family: Family) -> None:
    """18 endpoints: of 24 indices six are nobody's, and no connection may end there."""
    plan = Plan(family)
    ports = range(8081, 8087)
    for port in ports:
        for where in ("p2", "p3", "far"):
            await rig.serve(where, family, port)
    (piece,) = plan.slices("p2", "p3", "far")
    pieces = [msgspec.structs.replace(piece, ports=(EndpointPort(port=port, name="tcp"),)) for port in ports]
    rig.planner.set_service(WEB, plan.service(), pieces)
    await rig.program()
    for _ in range(300):
        await rig.ask("p4", plan.cluster_ip, 80)
    counts = counted(rig, sets_of(family).connections, family).values()
    assert (len(counts), sum(counts)) == (18, 300)
    assert min(counts) > 0


@both
async def test_damage_is_repaired_and_the_rest_keeps_its_counters(rig: ServiceRig, family: Family) -> None:
    plan = Plan(family)
    await program(rig, plan, "p2", "p3")
    table, sets = TableRef(family, TABLE), sets_of(family)
    observed = await rig.kernel.observe_nft(TABLE)
    services = observed.tables[table].sets[sets.services.name]
    await rig.kernel.apply((CommitNft(Batch((DelElements(table, sets.services, tuple(services.elements.items())),))),))
    await refused(rig, "p4", plan.cluster_ip, 80)
    repair = rig.planner.resync(await rig.kernel.observe_nft(TABLE))
    assert [type(c) for c in repair.commands if isinstance(c, AddElements | ReplaceElements | DelElements)] == [AddElements]
    await rig.kernel.apply((CommitNft(repair),))
    assert await rig.who("p4", plan.cluster_ip, 80, times=20) == {"p2", "p3"}

    await rig.kernel.apply((CommitNft(Batch((DelTable(table),))),))
    await rig.kernel.apply((CommitNft(rig.planner.resync(await rig.kernel.observe_nft(TABLE))),))
    assert await rig.kernel.observe_nft(TABLE) == rig.planner.desired()
    assert await rig.who("p4", plan.cluster_ip, 80, times=20) == {"p2", "p3"}


@pytest.mark.parametrize("harm", ["another type", "policy drop", "verdicts", "counters"])
async def test_a_table_of_another_shape_is_made_anew(rig: ServiceRig, harm: str) -> None:
    """`verdicts`, `counters`: as podwire once had it, with a chain for each number of endpoints, and with endpoints that count.
    Connections go on."""
    plan = Plan(Family.IPV4)
    await program(rig, plan, "p2")
    table, sets = TableRef(Family.IPV4, TABLE), sets_of(Family.IPV4)
    # Without any nat chain the kernel stops to translate what is established.
    nat = AddChain(table, Chain("prerouting", BaseHook("nat", Hook.PREROUTING, -100)))
    commands: tuple[Command, ...] = (DelTable(table), AddTable(table), nat)
    if harm == "another type":
        commands += (AddSet(table, NftSet(sets.services.name, (FieldType.PORT,))),)
    elif harm == "policy drop":
        commands += (AddChain(table, Chain("output", BaseHook("nat", Hook.OUTPUT, -100, drops=True))),)
    elif harm == "counters":
        commands += (AddSet(table, dataclasses.replace(sets.endpoints, counters=True)),)
    else:
        once = NftSet(sets.services.name, sets.services.key, verdicts=True, counters=True)
        lead = AddElements(table, once, ((frontend_key(rig.planner.table(WEB).frontends[0]), goto("pick-1")),))
        commands += (AddSet(table, once), AddChain(table, Chain("pick-1")), lead)
    with rig.open("p4", socket.SOCK_STREAM, plan.cluster_ip) as sock:
        await asyncio.get_running_loop().sock_connect(sock, (plan.cluster_ip, 80))
        for batch in (Batch(commands), None):
            batch = batch or rig.planner.resync(await rig.kernel.observe_nft(TABLE))
            assert (await rig.kernel.apply((CommitNft(batch),))).ok
            assert await talk(sock) == "p2"
    assert await rig.kernel.observe_nft(TABLE) == rig.planner.desired()
    assert await rig.who("node", plan.cluster_ip, 80) == {"p2"}


async def test_a_batch_larger_than_the_send_buffer_is_cut(rig: ServiceRig) -> None:
    """4,000 Services are about 1 MB; an ordinary user's socket may take no more than 416 KiB."""
    plan = Plan(Family.IPV4)
    keys = []
    for number in range(4000):
        document = msgspec.to_builtins(plan.service(clusterIP=f"10.97.{number >> 8}.{number & 255}"))
        document["metadata"]["name"] = f"s{number}"
        service = msgspec.convert(document, Service)
        keys.append(service.key)
        rig.planner.set_service(service.key, service, plan.slices("p2", "p3"))
    with open_netlink(rig.fds["node"], NETLINK_NETFILTER) as sock:
        client = NftClient(sock, most_bytes=100_000)
        client.commit(rig.planner.take_batch())
        assert client.observe(TABLE) == rig.planner.desired()
        assert await rig.who("p4", "10.97.9.9", 80, times=20) == {"p2", "p3"}
        for key in keys:
            rig.planner.set_service(key, None)
        client.commit(rig.planner.take_batch())
        assert client.observe(TABLE) == rig.planner.desired()


async def test_a_refused_command_is_named(rig: ServiceRig) -> None:
    table, sets = TableRef(Family.IPV4, TABLE), sets_of(Family.IPV4)
    key = bytes((10, 96, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0))
    applied = await rig.kernel.apply((CommitNft(Batch((DelElements(table, sets.services, ((key, None),)),))),))
    (failure,) = applied.failures
    assert "delete element ip podwire services { 10.96.0.1 . tcp . 80 }" in failure.message
    assert failure.errno == 2


@pytest.mark.skipif(shutil.which("nft") is None, reason="the nft program is not installed")
async def test_nft_shows_the_rules_to_a_human(rig: ServiceRig) -> None:
    plan = Plan(Family.IPV4)
    spec: dict[str, Any] = {"externalTrafficPolicy": "Local", "loadBalancerSourceRanges": ["192.0.2.0/24"]}
    await program(rig, plan, "p2", "far", type="LoadBalancer", sessionAffinity="ClientIP", **spec)
    ipv6 = Plan(Family.IPV6)
    rig.planner.set_service(ObjectKey("shop", "web6"), ipv6.service(type="NodePort"), ipv6.slices("p2"))
    await rig.program()

    def listing() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=False)

    shown = run_in_netns(rig.fds["node"], listing)
    assert shown.returncode == 0, shown.stderr
    for line in (
        '10.96.0.10 . tcp . 80 counter packets 0 bytes 0 comment "shop/web"',
        "10.96.0.10 . tcp . 80 : 2",
        "dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 2 map @endpoints",
        "ip saddr 10.244.1.0/24 goto inside",
        "ct status dnat jump rewritten",
        "add @connections { ct original ip daddr . meta l4proto . ct original proto-dst . ip daddr . th dport }",
        'masquerade fully-random comment "pod to outside the cluster"',
        "reject with tcp reset",
        'fd00:10:96::a . tcp . 80 counter packets 0 bytes 0 comment "shop/web6"',
        "fd00:10:96::a . tcp . 80 : 1",
        "meta priority set ip daddr . meta l4proto . th dport map @memories dnat ip to ip saddr . meta priority map @affinity",
        "update @affinity { ip saddr . meta priority timeout 3h : ip daddr . th dport }",
    ):
        assert line in shown.stdout, shown.stdout
    number = re.search(r"10.96.0.10 . tcp . 80 : ([0-9a-f]+:[0-9a-f]+)", shown.stdout)
    assert number is not None
    assert f"{number.group(1)} : 10800" in shown.stdout, "a number looks the same as data and as a key"

"""The proof in a real kernel: what is promised is what the rules read back would do, and what becomes of real packets."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, Phase, given, settings
from service_worlds import clusters, connections, disagreements
from servicerig import FACTS, ServiceRig, service_rig

from podwire.model.addr import Family
from podwire.model.ids import HOST
from podwire.model.ops import SetSysctl
from podwire.plan.services import TABLE
from podwire.trace.oracle import Cluster, Connection, Outcome, promise

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]

SOURCES = {"p2": "10.244.1.2", "p4": "10.244.1.4", "far": "10.244.2.2", "node": "198.18.0.11", "world": "198.18.1.1"}
NODE = replace(FACTS, zone="z1")
_EACH_REFUSAL_IS_SENT = {"net/ipv4/icmp_ratelimit": "0", "net/ipv6/icmp/ratelimit": "0"}


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[ServiceRig]:
    async with service_rig() as made:
        await made.kernel.apply(tuple(SetSysctl(name, value, HOST) for name, value in _EACH_REFUSAL_IS_SENT.items()))
        yield made


def some_clusters(family: Family, count: int, *, real: bool) -> list[Cluster]:
    """The same ones in each run, so that what the kernel is asked does not depend on luck."""
    found: list[Cluster] = []

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(clusters(family, real=real, facts=NODE))
    def gather(cluster: Cluster) -> None:
        found.append(cluster)

    gather()
    return found


async def change_to(rig: ServiceRig, before: Cluster | None, after: Cluster) -> None:
    """Program the cluster in place of the one before, by the smallest transaction. No old connection is remembered."""
    if before is not None:
        for key in {service.key for service, _ in before.services} - {service.key for service, _ in after.services}:
            rig.planner.set_service(key, None)
        for pod in before.pods:
            rig.planner.set_host_ports(pod.metadata.uid, None)
    for service, slices in after.services:
        rig.planner.set_service(service.key, service, slices)
    for pod in after.pods:
        rig.planner.set_host_ports(pod.metadata.uid, pod)
    await rig.program()
    await rig.kernel.forget_flows(lambda flow: True)


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
async def test_rules_read_back_keep_every_promise(rig: ServiceRig, family: Family) -> None:
    rig.planner.set_facts(NODE)
    before = None
    for cluster in some_clusters(family, 15, real=False):
        await change_to(rig, before, cluster)
        before = cluster
        observed = await rig.kernel.observe_nft(TABLE)
        assert not (found := disagreements(cluster, observed)), "\n".join(found)


async def outcome(rig: ServiceRig, where: str, connection: Connection) -> tuple[Outcome, str, str]:
    """(what became of it, who answered, whom they saw)"""
    try:
        who, seen = await rig.ask(where, str(connection.dst), connection.port, udp=connection.protocol == "UDP")
    except TimeoutError:
        return Outcome.DROPPED, "", ""
    except ConnectionRefusedError:
        return Outcome.REFUSED, "", ""
    return Outcome.SERVED, who, seen


ADDRESSES = {"p2": "10.244.1.2", "p3": "10.244.1.3", "p4": "10.244.1.4", "far": "10.244.2.2"}
ADDRESSES_V6 = {"p2": "fd00:10:244:1::2", "p3": "fd00:10:244:1::3", "p4": "fd00:10:244:1::4", "far": "fd00:10:244:2::2"}


async def kept(rig: ServiceRig, cluster: Cluster, where: str, connection: Connection) -> str:
    """What is wrong with the connection's end; empty if nothing is."""
    promised = promise(cluster, connection)
    got, who, seen = await outcome(rig, where, connection)
    label = f"{where}: {connection}\n  promised {promised}\n  got      {got} {who} {seen}"
    alike = connection.made_here and connection.protocol == "UDP" and promised.outcome is Outcome.DROPPED
    if got is not promised.outcome and not (alike and got is Outcome.REFUSED):
        return label  # a process of the node is told of either (EPERM) when it sends a datagram
    if got is Outcome.SERVED:
        address = ipaddress.ip_address((ADDRESSES if connection.dst.version == 4 else ADDRESSES_V6)[who])
        if (address, 8080) not in promised.targets:
            return label
        masqueraded = ipaddress.ip_address(seen) != connection.src
        if masqueraded is not ((address, 8080) in promised.masqueraded):
            return label
    return ""


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
async def test_real_packets_meet_what_is_promised(rig: ServiceRig, family: Family) -> None:
    rig.planner.set_facts(NODE)
    before = None
    tried = dict.fromkeys(Outcome, 0)
    for cluster in some_clusters(family, 12, real=True):
        await change_to(rig, before, cluster)
        before = cluster
        asked = []
        for index, connection in enumerate(connections(cluster, SOURCES)):
            if promise(cluster, connection).outcome is not Outcome.UNTOUCHED:
                tried[promise(cluster, connection).outcome] += 1
                asked.append(kept(rig, cluster, list(SOURCES)[index % len(SOURCES)], connection))
        wrong = [text for text in await asyncio.gather(*asked) if text]
        assert not wrong, "\n".join(wrong)
    assert min(tried[kind] for kind in (Outcome.SERVED, Outcome.REFUSED, Outcome.DROPPED)) > 20, tried

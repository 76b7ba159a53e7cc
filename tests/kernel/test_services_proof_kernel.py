"""The proof in a real kernel: what is promised is what the rules read back would do, and what becomes of real packets, in each
back end."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, Phase, given, settings
from service_cases import to_ipv6
from service_worlds import change_to, clusters, connections, disagreements
from servicerig import FACTS, ServiceRig, service_rig

from podwire.agent.proxymodes.iptables import IptablesRules
from podwire.agent.proxymodes.nft import NftRules, remove_tables
from podwire.agent.proxymodes.port import ServiceRules
from podwire.kernel.iptables import Flavour, find_programs
from podwire.model.addr import Family
from podwire.model.ids import HOST
from podwire.model.ops import CommitNft, SetSysctl
from podwire.plan.services import TABLE
from podwire.trace.oracle import Cluster, Connection, Outcome, promise

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]

SOURCES = {"p2": "10.244.1.2", "p4": "10.244.1.4", "far": "10.244.2.2", "node": "198.18.0.11", "world": "198.18.1.1"}
PLACES = {ipaddress.ip_address(turn(ip)): name for name, ip in SOURCES.items() for turn in (str, to_ipv6)}
_SWITCHES = {
    "net/ipv4/conf/all/route_localnet": "1",
    # Every refusal is sent.
    "net/ipv4/icmp_ratelimit": "0",
    "net/ipv6/icmp/ratelimit": "0",
}


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[ServiceRig]:
    async with service_rig() as made:
        await made.kernel.apply(tuple(SetSysctl(name, value, HOST) for name, value in _SWITCHES.items()))
        yield made


def some_clusters(family: Family, count: int, *, real: bool) -> list[Cluster]:
    """The same ones in each run, so that what the kernel is asked does not depend on luck."""
    found: list[Cluster] = []

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(clusters(family, real=real))
    def gather(cluster: Cluster) -> None:
        found.append(cluster)

    gather()
    return found


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
async def test_rules_read_back_keep_every_promise(rig: ServiceRig, family: Family) -> None:
    before = None
    for cluster in some_clusters(family, 15, real=False):
        change_to(rig.planner, before, cluster)
        rig.planner.set_facts(cluster.node)
        await rig.kernel.apply((CommitNft(rig.planner.resync(await rig.kernel.observe_nft(TABLE))),))
        before = cluster
        observed = await rig.kernel.observe_nft(TABLE)
        assert not (found := disagreements(cluster, observed)), "\n".join(found)


async def become_of(rig: ServiceRig, where: str, connection: Connection) -> tuple[Outcome, str, str]:
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
    got, who, seen = await become_of(rig, where, connection)
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


def _iptables(flavour: Flavour, rig: ServiceRig) -> ServiceRules:
    if find_programs(flavour) is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    return IptablesRules(rig.fds["node"], FACTS, flavour=flavour)


BACK_ENDS: dict[str, Callable[[ServiceRig], ServiceRules]] = {
    "nftables": lambda rig: NftRules(rig.kernel, FACTS),
    "iptables-nft": partial(_iptables, Flavour.NFT),
    "iptables-legacy": partial(_iptables, Flavour.LEGACY),
}


@pytest.mark.parametrize("family", Family, ids=lambda f: f.value)
@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_real_packets_meet_what_is_promised(rig: ServiceRig, family: Family, back_end: str) -> None:
    await remove_tables(rig.kernel, TABLE)
    rules = BACK_ENDS[back_end](rig)
    await rules.compare()
    before = None
    tried = dict.fromkeys(Outcome, 0)
    for cluster in some_clusters(family, 6, real=True):
        change_to(rules, before, cluster)
        await rules.program()
        before = cluster
        rules.set_facts(cluster.node)
        await rules.compare()
        await rig.kernel.forget_flows(lambda flow: True)
        asked = []
        for connection in connections(cluster, SOURCES):
            outcome = promise(cluster, connection).outcome
            if outcome is not Outcome.UNTOUCHED and (connection.made_here or not connection.dst.is_loopback):
                tried[outcome] += 1
                where = "node" if connection.made_here else PLACES[connection.src]
                asked.append(kept(rig, cluster, where, connection))
        wrong = [text for text in await asyncio.gather(*asked) if text]
        assert not wrong, "\n".join(wrong)
    assert min(tried[kind] for kind in (Outcome.SERVED, Outcome.REFUSED, Outcome.DROPPED)) > 10, tried

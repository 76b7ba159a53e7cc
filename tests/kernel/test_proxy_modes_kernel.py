"""Every back end gives the same verdict for the same packet: the case files, with real packets, in each of them."""

import functools
import ipaddress
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from packetrig import PacketRig, packet_rig, sendable
from service_cases import FACTS, SOURCES, Case, Expectation, key, load_cases, service_of, slice_of

from podwire.agent.proxymodes.iptables import IptablesRules
from podwire.agent.proxymodes.nft import NftRules
from podwire.agent.proxymodes.port import ServiceRules
from podwire.kernel.iptables import Flavour, find_programs
from podwire.model.addr import Family
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import NodeFacts
from podwire.trace.netfilter import Packet

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]

MakeHere = Callable[[PacketRig, NodeFacts], ServiceRules]


def _iptables(flavour: Flavour, rig: PacketRig, facts: NodeFacts) -> ServiceRules:
    if find_programs(flavour) is None:
        pytest.skip(f"iptables ({flavour}) is not installed")
    return IptablesRules(rig.node, facts, flavour=flavour)


BACK_ENDS: dict[str, MakeHere] = {
    "nftables": lambda rig, facts: NftRules(rig.kernel, facts),
    "iptables-nft": functools.partial(_iptables, Flavour.NFT),
    "iptables-legacy": functools.partial(_iptables, Flavour.LEGACY),
}


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[PacketRig]:
    async with packet_rig() as made:
        yield made


def failures(rig: PacketRig, case: Case) -> list[str]:
    found = []
    for expected in filter(sendable, case.packets):
        for _ in range(3 if len(expected.reaches) > 1 else 1):
            seen = rig.send(expected)
            if not rig.fits(expected, seen):
                found.append(f"{case.name}: {expected.label}: {seen}, not {expected.fate}")
    return found


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.timeout(90)
async def test_every_case(rig: PacketRig, back_end: str) -> None:
    wrong = []
    for case in load_cases(special=True):
        rules = BACK_ENDS[back_end](rig, case.facts)
        case.feed(rules)
        await rules.compare()
        wrong += failures(rig, case)
        assert await rules.compare() == 0, f"{case.name}: the rules read back are not those planned"
    await rules.remove()
    assert not wrong, "\n".join(wrong)


def web(*endpoints: str, **spec: Any) -> tuple[Service, tuple[EndpointSlice, ...]]:
    short = {"name": "web", "clusterIP": "10.96.0.10", "ports": [{"port": 80, "targetPort": 8080}], **spec}
    item = {"service": short, "endpoints": [{"ip": ip, "node": "n2"} for ip in endpoints]}
    return service_of(short, Family.IPV4), (slice_of(item, Family.IPV4),)


def reached(rig: PacketRig, times: int, source: str = "local-pod") -> Counter[str]:
    """Which endpoints new connections to the ClusterIP come to."""
    packet = Packet(ipaddress.ip_address(SOURCES[source]), ipaddress.ip_address("10.96.0.10"), 6, 0, 80)
    wanted = Expectation(source, packet, False, frozenset(), "pass", "")
    return Counter(rig.send(wanted).reached[0] for _ in range(times))


FOUR = ("10.244.2.2", "10.244.2.3", "10.244.2.4", "10.244.2.5")


@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_endpoints_get_the_same_share(rig: PacketRig, back_end: str) -> None:
    rules = BACK_ENDS[back_end](rig, FACTS)
    rules.set_service(key("web"), *web(*FOUR))
    await rules.compare()
    shares = reached(rig, 120)
    assert shares.keys() == set(FOUR)
    assert min(shares.values()) > 10, "one in four; less than 10 of 120 is a chance of 1 in 100,000"


@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_affinity_holds_through_changes_and_ends_with_its_endpoint(rig: PacketRig, back_end: str) -> None:
    rules = BACK_ENDS[back_end](rig, FACTS)
    sticky: dict[str, Any] = {
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
    }
    rules.set_service(key("web"), *web(*FOUR, **sticky))
    await rules.compare()
    (chosen,) = reached(rig, 8)
    assert len(reached(rig, 8, "other-local-pod")) == 1
    rules.set_service(key("web"), *web("10.244.2.1", *FOUR, **sticky))
    assert await rules.program() > 0
    assert reached(rig, 8).keys() == {chosen}, "more endpoints: those who know one stay with it"
    left = [ip for ip in FOUR if ip != chosen]
    rules.set_service(key("web"), *web(*left, **sticky))
    await rules.program()
    (second,) = reached(rig, 8)
    assert second in left
    rules.set_service(key("web"), *web(*FOUR, **sticky))
    await rules.program()
    assert reached(rig, 8).keys() == {second}
    assert await rules.compare() == 0

"""Every back end gives the same verdict for the same packet: the case files, with real packets, in each of them."""

import ipaddress
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from backends import BACK_ENDS
from packetrig import PacketRig, packet_rig, sendable
from service_cases import FACTS, SOURCES, Case, Expectation, key, load_cases, load_stories, service_of, slice_of
from service_checks import Objects, promised

from podwire.model.addr import Family, IPAddress
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import NodeFacts
from podwire.trace.journey import Packet
from podwire.trace.oracle import Promise, Target

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
]


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
@pytest.mark.timeout(180)
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


@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_a_service_with_a_thousand_endpoints(rig: PacketRig, back_end: str) -> None:
    """All on other nodes: the rig has a way there, and no neighbours to ask for their MACs."""
    rules = BACK_ENDS[back_end](rig, FACTS)
    many = [f"10.244.{2 + n // 250}.{1 + n % 250}" for n in range(1000)]
    rules.set_service(key("web"), *web(*many))
    await rules.compare()
    found = reached(rig, 40)
    assert found.keys() <= set(many)
    assert len(found) > 30, "of 1,000, 40 draws give as good as never less"
    gone = next(iter(found))
    rules.set_service(key("web"), *web(*(ip for ip in many if ip != gone)))
    assert await rules.program() > 0
    assert reached(rig, 10).keys() <= set(many) - {gone}


class Clients:
    """Where each client went, and where it may go next, by what the API promises."""

    def __init__(self, facts: NodeFacts) -> None:
        self._facts = facts
        self.objects = Objects()
        self._went: dict[tuple[IPAddress, str], dict[Expectation, Target]] = {}

    def _promised(self, packet: Expectation) -> Promise:
        return promised(self.objects.cluster(self._facts), packet)

    def changed(self) -> None:
        """Whoever went where the same packet cannot go any more is forgotten there."""
        for (_, memory), ways in self._went.items():
            for packet, target in list(ways.items()):
                now = self._promised(packet)
                if now.memory != memory or target not in now.targets:
                    del ways[packet]

    def choices(self, packet: Expectation) -> frozenset[Target]:
        now = self._promised(packet)
        return now.to_one_who_knows(self._went.get((packet.packet.src, now.memory), {}).values())

    def went(self, packet: Expectation, target: Target) -> None:
        self._went.setdefault((packet.packet.src, self._promised(packet).memory), {})[packet] = target


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.timeout(180)
async def test_clients_stay_as_the_stories_tell(rig: PacketRig, back_end: str) -> None:
    """The case files' stories of affinity. The kernel draws as it likes, so where a new client goes is looked at, not told."""
    wrong = []
    for story in load_stories():
        rules = BACK_ENDS[back_end](rig, story.facts)
        clients = Clients(story.facts)
        await rules.compare()
        for number, (objects, expected, _) in enumerate(story.steps):
            for item in objects:
                story.feed_one(rules, item)
                story.feed_one(clients.objects, item)
            await rules.program()
            clients.changed()
            if expected is None:
                continue
            where = f"{story.name}, step {number}: {expected.label}"
            if expected.fate != "pass":
                if (seen := rig.send(expected)).fate != expected.fate:
                    wrong.append(f"{where}: {seen}, not {expected.fate}")
                continue
            allowed = frozenset((str(ip), port) for ip, port in clients.choices(expected))
            seen = rig.send(replace(expected, reaches=allowed))
            if seen.fate != "pass" or seen.reached not in allowed:
                wrong.append(f"{where}: {seen}, not {sorted(allowed)}")
                break
            clients.went(expected, (ipaddress.ip_address(seen.reached[0]), seen.reached[1]))
        await rules.remove()
    assert not wrong, "\n".join(wrong)

"""Every back end gives the same verdict for the same packet: the case files, with real packets, in each of them."""

import ipaddress
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
from backends import BACK_ENDS
from packetrig import PacketRig, packet_rig, sendable
from service_cases import FACTS, SOURCES, Case, Expectation, key, load_cases, load_stories, service_of, slice_of

from podwire.agent.proxymodes.port import ServiceRules
from podwire.model.addr import Family
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import backend_address, backend_port
from podwire.plan.services_maps import frontend_key, place_key
from podwire.trace.journey import Packet

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


class Way(NamedTuple):
    """How a frontend serves a client now. `local`: by a policy of Local, which is another way with a memory of its own."""

    local: bool
    affinity_s: int
    endpoints: frozenset[tuple[str, int]]


class Homes:
    """Where each client of each frontend went, by the definition of affinity: as long as that is an endpoint for it."""

    def __init__(self, rules: ServiceRules) -> None:
        self._rules = rules
        self._homes: dict[tuple[str, bytes], tuple[bool, tuple[str, int]]] = {}

    def _way(self, client: str, place: bytes) -> Way:
        for frontend in self._rules.table(key("web")).frontends:
            if frontend_key(frontend) == place:
                local = client == "outside" and frontend.outside is not None
                pool = frontend.outside if local and frontend.outside is not None else frontend.inside
                ends = ((str(ipaddress.ip_address(backend_address(b))), backend_port(b)) for b in pool.backends)
                return Way(local, frontend.affinity_s, frozenset(ends))
        return Way(False, 0, frozenset())

    def changed(self) -> None:
        """Who has no home any more?"""
        for (client, place), (local, home) in list(self._homes.items()):
            way = self._way(client, place)
            if not way.affinity_s or way.local is not local or home not in way.endpoints:
                del self._homes[client, place]

    def choices(self, client: str, place: bytes) -> frozenset[tuple[str, int]]:
        """Where its next packet may go."""
        home = self._homes.get((client, place))
        return frozenset((home[1],)) if home else self._way(client, place).endpoints

    def went(self, client: str, place: bytes, target: tuple[str, int]) -> None:
        way = self._way(client, place)
        if way.affinity_s:
            self._homes[client, place] = way.local, target


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.timeout(90)
async def test_clients_stay_as_the_stories_tell(rig: PacketRig, back_end: str) -> None:
    """The case files' stories of affinity. The kernel draws as it likes, so where a new client goes is looked at, not told."""
    wrong = []
    for story in load_stories():
        rules = BACK_ENDS[back_end](rig, story.facts)
        homes = Homes(rules)
        await rules.compare()
        for number, (objects, expected, _) in enumerate(story.steps):
            for item in objects:
                story.feed_one(rules, item)
            await rules.program()
            homes.changed()
            if expected is None:
                continue
            where = f"{story.name}, step {number}: {expected.label}"
            if expected.fate != "pass":
                if (seen := rig.send(expected)).fate != expected.fate:
                    wrong.append(f"{where}: {seen}, not {expected.fate}")
                continue
            client, packet = expected.label.split()[0], expected.packet
            place = place_key(packet.dst.packed, packet.protocol, packet.dport)
            allowed = homes.choices(client, place)
            seen = rig.send(replace(expected, reaches=allowed))
            homes.went(client, place, seen.reached)
            if seen.fate != "pass" or seen.reached not in allowed:
                wrong.append(f"{where}: {seen}, not {sorted(allowed)}")
        await rules.remove()
    assert not wrong, "\n".join(wrong)

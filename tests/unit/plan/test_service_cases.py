"""The case files: objects → rules → what becomes of packets, by the evaluator; and the same asked of the oracle."""

import ipaddress
from collections.abc import Sequence
from typing import Any

import pytest
from service_cases import Case, Expectation, Story, load_cases, load_stories

from podwire.model.ids import ObjectKey
from podwire.model.nft import Prune, Ruleset
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.servicetable import NodeFacts
from podwire.plan.services import ServicePlanner
from podwire.plan.services_table import PROTOCOLS
from podwire.trace.journey import Fate, Learned, Machine, Result
from podwire.trace.netfilter import follow
from podwire.trace.oracle import Cluster, Connection, Outcome, promise

CASES = list(load_cases(special=True))
STORIES = list(load_stories())
LOOPBACK = ipaddress.ip_address("127.0.0.1")
NUMBERS = {number: name for name, number in PROTOCOLS.items()}


def outcomes(ruleset: Ruleset, expectation: Expectation, facts: NodeFacts) -> list[Result]:
    """The packet's fate for every number that `numgen` could draw."""
    sizes: list[int] = []

    def choose(n: int, draw: int) -> int:
        sizes.append(n)
        return draw % n

    results: list[Result] = []
    while not results or len(results) < max(sizes, default=1):
        draw = len(results)
        machine = Machine(frozenset((*facts.node_ips, LOOPBACK)), lambda n, draw=draw: choose(n, draw))  # type: ignore[misc]  # bound now
        results.append(follow(ruleset, expectation.packet, machine, locally_made=expectation.locally_made))
    return results


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packets_go_where_the_case_says(case: Case) -> None:
    planner = ServicePlanner(case.facts)
    case.feed(planner)
    ruleset = Ruleset().apply(planner.take_batch())
    assert ruleset == planner.desired()
    for expectation in case.packets:
        results = outcomes(ruleset, expectation, case.facts)
        why = f"{case.name}, {expectation.label}:\n" + "\n".join(str(step) for step in results[0].steps)
        assert {r.fate.value for r in results} == {expectation.fate}, why
        if expectation.fate == Fate.PASS.value:
            assert {(str(r.packet.dst), r.packet.dport) for r in results} == expectation.reaches, why
            sources = {"masqueraded" if r.masquerade else "kept" for r in results}
            assert not expectation.source or sources == {expectation.source}, why


class Objects:
    """A case's objects, as the oracle wants them."""

    def __init__(self) -> None:
        self.services: list[tuple[Service, tuple[EndpointSlice, ...]]] = []
        self.pods: list[Pod] = []

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None:
        assert service is not None
        self.services.append((service, tuple(slices)))

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        assert pod is not None
        self.pods.append(pod)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_oracle_promises_what_the_case_says(case: Case) -> None:
    objects = Objects()
    case.feed(objects)
    cluster = Cluster(case.facts, tuple(objects.services), tuple(objects.pods))
    for expectation in case.packets:
        packet = expectation.packet
        if packet.mark:
            continue  # another program's, not the API's
        protocol = NUMBERS[packet.protocol]
        made_here = expectation.locally_made
        connection = Connection(packet.src, packet.dst, protocol, packet.dport, made_here, packet.iif)
        promised = promise(cluster, connection)
        refused = "tcp reset" if protocol == "TCP" else "port unreachable"
        fate = {Outcome.DROPPED: "drop", Outcome.REFUSED: refused}.get(promised.outcome, "pass")
        assert fate == expectation.fate, promised
        if fate == "pass":
            assert {(str(ip), port) for ip, port in promised.targets} == expectation.reaches, promised
            sources = {"masqueraded" if t in promised.masqueraded else "kept" for t in promised.targets}
            assert not expectation.source or sources == {expectation.source}, promised


# --- sequences of packets and changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_clients_are_remembered_as_the_story_says(story: Story) -> None:
    """The rules' memory is that of the kernel: what a packet leaves in a dynamic set stays until it is pruned."""
    planner = ServicePlanner(story.facts)
    ruleset = Ruleset()
    learned: Learned = {}
    for number, (objects, expectation, draw) in enumerate(story.steps):
        for item in objects:
            story.feed_one(planner, item)
        batch = planner.take_batch()
        ruleset = ruleset.apply(batch)
        learned = _pruned(learned, [c for c in batch.commands if isinstance(c, Prune)])
        if expectation is None:
            continue
        machine = Machine(frozenset(story.facts.node_ips), lambda n, draw=draw: draw % n, learned)  # type: ignore[misc]  # bound now
        result = follow(ruleset, expectation.packet, machine, locally_made=expectation.locally_made)
        why = f"{story.name}, step {number}: {expectation.label}"
        assert result.fate.value == expectation.fate, why
        if expectation.fate == Fate.PASS.value:
            assert {(str(result.packet.dst), result.packet.dport)} == expectation.reaches, why
        for place, elements in result.learned.items():
            learned = {**learned, place: {**learned.get(place, {}), **elements}}


def _pruned(learned: Learned, prunes: list[Prune]) -> Learned:
    kept: Learned = {place: dict(elements) for place, elements in learned.items()}
    for prune in prunes:
        place: Any = (prune.table, prune.set.name)
        found = kept.get(place, {})
        kept[place] = {
            key: data
            for key, data in found.items()
            if not (isinstance(data, bytes) and prune.unwanted(key, data, prune.part_length))
        }
    return kept

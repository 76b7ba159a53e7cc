"""A case's packet held against rules, by the evaluator, and against the oracle."""

import ipaddress
from collections.abc import Sequence

from service_cases import Expectation

from podwire.model.ids import ObjectKey
from podwire.model.nft import Ruleset
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.servicetable import NodeFacts
from podwire.plan.services_table import PROTOCOLS
from podwire.trace.journey import Fate, Machine, Result
from podwire.trace.netfilter import follow
from podwire.trace.oracle import Cluster, Connection, Outcome, Promise, promise

LOOPBACK = ipaddress.ip_address("127.0.0.1")
_NUMBERS = {number: name for name, number in PROTOCOLS.items()}


class Objects:
    """A case's objects, as the oracle wants them."""

    def __init__(self) -> None:
        self._services: dict[ObjectKey, tuple[Service, tuple[EndpointSlice, ...]]] = {}
        self._pods: dict[str, Pod] = {}

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None:
        if service is None:
            self._services.pop(key, None)
        else:
            self._services[key] = (service, tuple(slices))

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        if pod is None:
            self._pods.pop(uid, None)
        else:
            self._pods[uid] = pod

    def cluster(self, facts: NodeFacts) -> Cluster:
        return Cluster(facts, tuple(self._services.values()), tuple(self._pods.values()))


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


def assert_rules_do(ruleset: Ruleset, expectation: Expectation, facts: NodeFacts, where: str) -> None:
    """Whatever is drawn, the packet meets its fate, and every place it may reach is drawn."""
    results = outcomes(ruleset, expectation, facts)
    why = f"{where}, {expectation.label}:\n" + "\n".join(str(step) for step in results[0].steps)
    assert {r.fate.value for r in results} == {expectation.fate}, why
    if expectation.fate == Fate.PASS.value:
        assert {(str(r.packet.dst), r.packet.dport) for r in results} == expectation.reaches, why
        sources = {"masqueraded" if r.masquerade else "kept" for r in results}
        assert not expectation.source or sources == {expectation.source}, why


def promised(cluster: Cluster, expectation: Expectation) -> Promise:
    """The oracle's word about it."""
    packet = expectation.packet
    protocol = _NUMBERS[packet.protocol]
    connection = Connection(packet.src, packet.dst, protocol, packet.dport, expectation.locally_made, packet.iif)
    return promise(cluster, connection)


def assert_oracle_says(cluster: Cluster, expectation: Expectation) -> None:
    if expectation.packet.mark:
        return  # another program's, not the API's
    found = promised(cluster, expectation)
    refused = "tcp reset" if expectation.packet.protocol == PROTOCOLS["TCP"] else "port unreachable"
    fate = {Outcome.DROPPED: "drop", Outcome.REFUSED: refused}.get(found.outcome, "pass")
    assert fate == expectation.fate, found
    if fate == "pass":
        assert {(str(ip), port) for ip, port in found.targets} == expectation.reaches, found
        sources = {"masqueraded" if t in found.masqueraded else "kept" for t in found.targets}
        assert not expectation.source or sources == {expectation.source}, found

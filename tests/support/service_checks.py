"""A case's packet held against rules, by the evaluator, and against the oracle."""

import ipaddress
from collections.abc import Iterator, Sequence

from draws import every_way, told
from service_cases import Expectation
from service_proof import Walk

from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.servicetable import NodeFacts
from podwire.plan.services_table import PROTOCOLS
from podwire.trace.journey import Fate, Machine, Result
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


_FEW = 100
"""More places than that are not all tried."""


def machine_of(facts: NodeFacts) -> Machine:
    return Machine(frozenset((*facts.node_ips, LOOPBACK)))


def outcomes(walk: Walk, expectation: Expectation, facts: NodeFacts) -> Iterator[Result]:
    """The packet's fate for everything that could be drawn; where that is much, for some."""

    def run(machine: Machine) -> Result:
        return walk(expectation.packet, machine, locally_made=expectation.locally_made)

    if len(expectation.reaches) <= _FEW:
        yield from (result for _, result in every_way(machine_of(facts), run))
        return
    for draw in range(0, len(expectation.reaches), len(expectation.reaches) // _FEW):
        yield run(told(machine_of(facts), draw))


def assert_kernel_does(walk: Walk, expectation: Expectation, facts: NodeFacts, where: str) -> None:
    """Whatever is drawn, the packet meets its fate, and every place it may reach is drawn."""
    results = list(outcomes(walk, expectation, facts))
    why = f"{where}, {expectation.label}:\n" + "\n".join(str(step) for step in results[0].steps)
    assert {r.fate.value for r in results} == {expectation.fate}, why
    if expectation.fate == Fate.PASS.value:
        reached = {(str(r.packet.dst), r.packet.dport) for r in results}
        assert reached <= expectation.reaches, why
        assert len(reached) == min(len(results), len(expectation.reaches)), why
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

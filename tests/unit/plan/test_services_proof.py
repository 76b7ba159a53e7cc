"""The proof: for random clusters, every kind of connection meets what the oracle promises, by what each back end plans."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from service_cases import FACTS, to_ipv6
from service_proof import walks
from service_worlds import IMAGINED, change_to, clusters, connections
from simulated import BACK_ENDS, SimulatedIpvs, broken_promises, remember, serving

from podwire.model.addr import Family, IPAddress
from podwire.model.objects import EndpointSlice
from podwire.trace.oracle import Cluster, Connection, Target

pytestmark = pytest.mark.timeout(120)

alike_clusters = st.sampled_from(Family).flatmap(lambda family: clusters(family, facts=FACTS))
some_clusters = st.sampled_from(Family).flatmap(lambda family: clusters(family))
each_back_end = pytest.mark.parametrize("back_end", BACK_ENDS)
unhurried = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
"""Without making an example smaller, which takes minutes: the walks are long."""


@each_back_end
@settings(unhurried, max_examples=20)
@given(cluster=some_clusters)
def test_what_is_planned_keeps_every_promise(back_end: str, cluster: Cluster) -> None:
    kernel = serving(back_end, cluster)
    assert kernel.held() == kernel.desired()
    found = list(broken_promises(kernel, cluster))
    assert not found, "\n".join(found)


@each_back_end
@settings(unhurried, max_examples=15)
@given(history=st.lists(some_clusters | alike_clusters, min_size=2, max_size=5))
def test_whatever_a_cluster_was_before_its_rules_are_those_from_scratch(back_end: str, history: list[Cluster]) -> None:
    kernel = serving(back_end, history[0])
    for before, after in pairwise(history):
        change_to(kernel, before, after)
        if before.node != after.node:
            kernel.set_facts(after.node)
            kernel.compare()
        else:
            kernel.program()
        assert kernel.held() == kernel.desired()
        assert kernel.held() == serving(back_end, after).held()


@settings(unhurried, max_examples=6)
@given(history=st.lists(alike_clusters, min_size=2, max_size=3))
def test_real_servers_that_are_drained_get_no_new_connections(history: list[Cluster]) -> None:
    """Nor does what is served meanwhile suffer."""
    kernel = SimulatedIpvs(FACTS, busy=True)
    for before, after in pairwise((None, *history)):
        assert after is not None
        change_to(kernel, before, after)
        kernel.program()
    found = list(broken_promises(kernel, history[-1]))
    assert not found, "\n".join(found)


def without(cluster: Cluster, away: Collection[str]) -> Cluster:
    """The cluster while the endpoints at some addresses are away."""

    def here(piece: EndpointSlice) -> EndpointSlice:
        left = tuple(endpoint for endpoint in piece.endpoints if endpoint.addresses[0] not in away)
        return msgspec.structs.replace(piece, endpoints=left)

    return replace(cluster, services=tuple((service, tuple(map(here, pieces))) for service, pieces in cluster.services))


@each_back_end
@settings(unhurried, max_examples=8)
@given(
    cluster=alike_clusters,
    absences=st.lists(st.sets(st.sampled_from([ip for ip, *_ in IMAGINED]), max_size=3), min_size=2, max_size=3),
)
def test_clients_stay_with_an_endpoint_that_stays_and_leave_one_that_goes(
    back_end: str, cluster: Cluster, absences: list[set[str]]
) -> None:
    """A client has visited several of a memory's endpoints if it came by addresses that lead to some of them only, as policies
    of Local do. It is led back to one of those as long as the first that this address may lead to has not left: of each pool,
    nftables remembers that one only, iptables all of them."""
    kernel = BACK_ENDS[back_end](FACTS)
    visited: defaultdict[tuple[IPAddress, str], set[Target]] = defaultdict(set)
    first: dict[Connection, Target] = {}
    before = None
    for away in absences:
        now = without(cluster, {turned for ip in away for turned in (ip, to_ipv6(ip))})
        change_to(kernel, before, now)
        before = now
        kernel.program()
        promised = ((connection, kernel.promised(now, connection)) for connection in connections(now))
        sticky = {connection: promise for connection, promise in promised if promise is not None and promise.memory}
        stay: defaultdict[tuple[IPAddress, str], set[Target]] = defaultdict(set)
        for connection, promise in sticky.items():
            stay[connection.src, promise.memory] |= promise.targets
        for client, targets in visited.items():
            targets &= stay[client]
        first = {c: target for c, target in first.items() if c in sticky and target in sticky[c].targets}
        for connection, promise in sticky.items():
            results = [result for _, result in walks(kernel.walk, connection, FACTS, kernel.memory)]
            reached = {(r.packet.dst, r.packet.dport) for r in results}
            known = visited[connection.src, promise.memory]
            expected = promise.to_one_who_knows(known) if connection in first else promise.targets
            assert reached <= expected, (connection, promise, known, first.get(connection))
            remember(kernel, results[-1])
            target = results[-1].packet.dst, results[-1].packet.dport
            known.add(target)
            for other, its in sticky.items():
                if (other.src, its.memory) == (connection.src, promise.memory) and target in its.targets:
                    first.setdefault(other, target)

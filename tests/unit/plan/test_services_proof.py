"""The proof: for random clusters, every kind of connection meets what the oracle promises, by the planned rules."""

from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from service_cases import FACTS, to_ipv6
from service_worlds import IMAGINED, canonical, change_to, clusters, connections, disagreements, planned, pruned, walks

from podwire.model.addr import Family
from podwire.model.nft import Ruleset, TableState
from podwire.model.objects import EndpointSlice
from podwire.plan.services import ServicePlanner
from podwire.trace.journey import Learned, both
from podwire.trace.oracle import Cluster, Connection, Target, promise

alike_clusters = st.sampled_from(Family).flatmap(lambda family: clusters(family, facts=FACTS))
some_clusters = st.sampled_from(Family).flatmap(lambda family: clusters(family))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(some_clusters)
def test_the_planned_rules_keep_every_promise(cluster: Cluster) -> None:
    planner = planned(cluster)
    ruleset = Ruleset().apply(planner.take_batch())
    assert ruleset == planner.desired()
    assert not (found := disagreements(cluster, ruleset)), "\n".join(found)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(st.lists(some_clusters | alike_clusters, min_size=2, max_size=5))
def test_whatever_a_cluster_was_before_its_rules_are_those_from_scratch(history: list[Cluster]) -> None:
    planner = planned(history[0])
    kernel = Ruleset().apply(planner.take_batch())
    for before, after in pairwise(history):
        change_to(planner, before, after)
        if before.node != after.node:
            planner.set_facts(after.node)
            kernel = kernel.apply(planner.resync(kernel))
        else:
            kernel = kernel.apply(planner.take_batch())
        assert kernel == planner.desired()
        assert canonical(kernel) == canonical(planned(after).desired())


def without(cluster: Cluster, away: Collection[str]) -> Cluster:
    """The cluster while the endpoints at some addresses are away."""

    def here(piece: EndpointSlice) -> EndpointSlice:
        left = tuple(endpoint for endpoint in piece.endpoints if endpoint.addresses[0] not in away)
        return msgspec.structs.replace(piece, endpoints=left)

    return replace(cluster, services=tuple((service, tuple(map(here, pieces))) for service, pieces in cluster.services))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=12)
@given(alike_clusters, st.lists(st.sets(st.sampled_from([ip for ip, *_ in IMAGINED]), max_size=3), min_size=2, max_size=3))
def test_clients_stay_with_an_endpoint_that_stays_and_leave_one_that_goes(cluster: Cluster, absences: list[set[str]]) -> None:
    planner = ServicePlanner(FACTS)
    kernel, learned = Ruleset(), Learned()
    went: dict[Connection, Target] = {}
    before = None
    for away in absences:
        now = without(cluster, {turned for ip in away for turned in (ip, to_ipv6(ip))})
        change_to(planner, before, now)
        before, batch = now, planner.take_batch()
        kernel, learned = kernel.apply(batch), pruned(learned, batch)
        for connection in connections(now):
            promised = promise(now, connection)
            if not promised.memory:
                went.pop(connection, None)
                continue
            results = walks(kernel, connection, FACTS, learned)
            reached = {(r.packet.dst, r.packet.dport) for r in results}
            stays = promised.targets.intersection([went[connection]] if connection in went else ())
            assert reached <= (stays or promised.targets), (connection, promised, went.get(connection))
            learned = both(learned, results[-1].learned)
            went[connection] = (results[-1].packet.dst, results[-1].packet.dport)


LIES: dict[str, dict[str, Any]] = {
    "no pod is of this node": {"pod_cidrs": ()},
    "another node": {"name": "n2"},
    "another zone": {"zone": "z4"},
    "everyone is masqueraded": {"masquerade_all": True},
    "no address": {"node_ips": ()},
    "no Service range": {"service_cidrs": ()},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
def test_a_planner_that_is_told_lies_is_found_out(lie: dict[str, Any]) -> None:
    """A proof that nothing can fail proves nothing."""

    def found_out(cluster: Cluster) -> bool:
        ruleset = planned(replace(cluster, node=replace(cluster.node, **lie))).desired()
        return bool(disagreements(cluster, ruleset))

    assert _found(found_out)


@pytest.mark.parametrize(
    "name",
    [
        "services",
        "outside",
        "pools",
        "local-pools",
        "endpoints",
        "local-endpoints",
        "sticky",
        "memories",
        "other-memories",
        "strangers",
        "masquerade",
        "keep-source",
        "cluster-ips",
        "hairpin",
        "restricted",
        "source-ranges",
    ],
)
def test_a_lost_element_is_found_out(name: str) -> None:
    def found_out(cluster: Cluster) -> bool:
        ruleset = planned(cluster).desired()
        damaged = Ruleset({ref: _without(table, name) for ref, table in ruleset.tables.items()})
        return damaged != ruleset and bool(disagreements(cluster, damaged))

    assert _found(found_out)


def test_clients_that_are_not_noted_on_the_way_to_the_node_itself_are_found_out() -> None:
    def found_out(cluster: Cluster) -> bool:
        ruleset = planned(cluster).desired()
        tables = {
            ref: replace(table, chains={name: chain for name, chain in table.chains.items() if name != "input"})
            for ref, table in ruleset.tables.items()
        }
        return bool(disagreements(cluster, Ruleset(tables)))

    assert _found(found_out)


def test_a_number_that_is_left_on_a_packet_is_found_out() -> None:
    def found_out(cluster: Cluster) -> bool:
        ruleset = planned(cluster).desired()
        tables = {}
        for ref, table in ruleset.tables.items():
            remember = replace(table.chains["remember-for"], rules=table.chains["remember-for"].rules[:-1])
            tables[ref] = replace(table, chains={**table.chains, "remember-for": remember})
        return bool(disagreements(cluster, Ruleset(tables)))

    assert _found(found_out)


def _without(table: TableState, name: str) -> TableState:
    state = table.sets[name]
    emptied = replace(state, elements={}, comments={})
    return replace(table, sets={**table.sets, name: emptied})


def _found(condition: Any) -> Cluster:
    """A cluster for which the condition holds; not the smallest, which would take long."""
    quick = settings(
        max_examples=300, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    return find(clusters(Family.IPV4), condition, settings=quick, random=Random(1))

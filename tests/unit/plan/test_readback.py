"""What is read back of a Service holds where the kernel is as planned, and not where an element that leads is gone or wrong."""

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from service_cases import FACTS, key, service_of, slice_of
from service_worlds import clusters, planned

from podwire.model.addr import Family
from podwire.model.nft import Data, Ruleset
from podwire.plan.readback import Question, questions
from podwire.plan.services import ServicePlanner
from podwire.trace.oracle import Cluster

LEADING = (
    "services",
    "outside",
    "pools",
    "local-pools",
    "endpoints",
    "local-endpoints",
    "memories",
    "other-memories",
    "sticky",
    "members",
)
SERVED = st.sampled_from(Family).flatmap(clusters)


def asked(planner: ServicePlanner, cluster: Cluster) -> list[Question]:
    return [q for service, _ in cluster.services for q in questions(planner.frontends(service.key), planner.memories)]


def held(question: Question, kernel: Ruleset) -> dict[bytes, Data]:
    """What the kernel answers: of the keys that it was asked for, those that it has."""
    elements = kernel.tables[question.table].sets[question.set.name].elements
    return {key: elements[key] for key in question.keys if key in elements}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(SERVED, st.data())
def test_it_holds_as_planned_and_not_with_any_element_gone_or_changed(cluster: Cluster, data: st.DataObject) -> None:
    planner = planned(cluster)
    kernel = planner.desired()
    found = asked(planner, cluster)
    assert all(question.holds(held(question, kernel)) for question in found)
    for question in found:
        right = held(question, kernel)
        lost = data.draw(st.sampled_from(question.keys))
        assert not question.holds({key: value for key, value in right.items() if key != lost})
        value = right[lost]
        assert not question.holds(
            {**right, lost: bytes(len(value)) if isinstance(value, bytes) and any(value) else b"\1\1\1\1"}
        )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(SERVED)
def test_every_element_that_leads_a_services_packets_is_asked_for(cluster: Cluster) -> None:
    cluster = Cluster(cluster.node, cluster.services)  # host ports are not acknowledged
    planner = planned(cluster)
    questioned = {(q.table, q.set.name, key) for q in asked(planner, cluster) for key in q.keys}
    leading = {
        (ref, name, key)
        for ref, table in planner.desired().tables.items()
        for name in LEADING
        for key in table.sets[name].elements
    }
    assert questioned == leading


def test_backends_may_stand_in_any_order() -> None:
    planner = ServicePlanner(FACTS)
    short = {"name": "web", "clusterIP": "10.96.0.10", "ports": [{"port": 80, "targetPort": 8080}]}
    pieces = slice_of({"service": short, "endpoints": [{"ip": f"10.244.2.{n}"} for n in (2, 3, 4)]}, Family.IPV4)
    planner.set_service(key("web"), service_of(short, Family.IPV4), (pieces,))
    (question,) = [q for q in questions(planner.frontends(key("web")), planner.memories) if len(q.keys) > 1]
    right = held(question, planner.desired())
    assert question.holds(dict(zip(right, reversed(right.values()), strict=True)))

"""IPVS: which frontends it serves, in which order servers come and go, whose they are."""

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from service_cases import FACTS, key, load_cases, pod_of, service_of, slice_of
from service_worlds import canonical

from podwire.model.addr import Family
from podwire.model.ipvs import DelReal, DelVirtual, IpvsOp, SetReal, SetVirtual, VirtualKey, VirtualServer
from podwire.model.nft import AddTable, Batch, DelTable, Prune, Ruleset, TableRef
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import backend
from podwire.plan.ipvs import TABLE, IpvsPlanner, after, introduce, ours, retire
from podwire.plan.nftexprs import destination_rewritten
from podwire.plan.services_maps import frontend_key
from podwire.plan.services_rules import LEFT, pack_number

A, B, C = (backend(bytes((10, 244, n, 2)), 8080) for n in (1, 2, 3))
CLUSTER_IP, BALANCER, NODE = bytes((10, 96, 0, 10)), bytes((203, 0, 113, 1)), bytes((198, 18, 0, 11))
WEB = VirtualKey(CLUSTER_IP, 6, 80)
LEFT_TO_IPVS = pack_number(LEFT)


def web(nodes: tuple[int, ...], **spec: Any) -> tuple[Service, tuple[EndpointSlice, ...]]:
    short = {"name": "web", "clusterIP": "10.96.0.10", "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}], **spec}
    endpoints = [{"ip": f"10.244.{n}.2", "node": f"n{n}"} for n in nodes]
    return service_of(short, Family.IPV4), (slice_of({"service": short, "endpoints": endpoints}, Family.IPV4),)


def planned(*nodes: int, **spec: Any) -> IpvsPlanner:
    planner = IpvsPlanner(FACTS)
    planner.set_service(key("web"), *web(nodes, **spec))
    return planner


def numbers(planner: IpvsPlanner, name: str) -> dict[bytes, object]:
    state = Ruleset().apply(planner.take().batch)
    return dict(state.tables[TableRef(Family.IPV4, TABLE)].sets[name].elements)


def test_a_pool_for_everyone_is_served_by_ipvs() -> None:
    planner = planned(1, 2, sessionAffinity="ClientIP")
    assert planner.servers() == {WEB: VirtualServer("rr", 10800, {A: 1, B: 1})}
    assert planner.bound() == {CLUSTER_IP}
    assert set(numbers(planner, "pools").values()) == {LEFT_TO_IPVS}


def test_where_pools_differ_ipvs_serves_those_outside() -> None:
    spec: dict[str, Any] = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ingress": [{"ip": "203.0.113.1"}]}
    planner = planned(1, 2, **spec)
    servers = planner.servers()
    assert servers[VirtualKey(BALANCER, 6, 80)].servers.keys() == {A}
    assert servers[VirtualKey(NODE, 6, 30080)].servers.keys() == {A}
    assert servers[WEB].servers.keys() == {A, B}
    assert planner.bound() == {CLUSTER_IP, BALANCER}, "the node's own address needs no device"
    table = Ruleset().apply(planner.take().batch).tables[TableRef(Family.IPV4, TABLE)]
    inside = {k: v for k, v in table.sets["pools"].elements.items() if v != LEFT_TO_IPVS}
    assert {k[:4] for k in inside} == {BALANCER, NODE}, "the node's own clients go to all, by the map"
    assert set(table.sets["local-pools"].elements.values()) == {LEFT_TO_IPVS}


def test_packets_for_ipvs_carry_no_number_of_the_maps_memory() -> None:
    planner = IpvsPlanner(replace(FACTS, loopback=True))
    planner.set_service(key("web"), *web((1, 2), type="NodePort", externalTrafficPolicy="Local", sessionAffinity="ClientIP"))
    table = Ruleset().apply(planner.take().batch).tables[TableRef(Family.IPV4, TABLE)]
    assert table.sets["memories"].elements, "of this node's own clients"
    assert not table.sets["other-memories"].elements, "of clients outside"


def test_nobody_to_serve_it_is_the_rules_business() -> None:
    planner = planned()
    assert planner.servers() == {}
    assert planner.bound() == frozenset()
    assert LEFT_TO_IPVS not in numbers(planner, "pools").values()


@pytest.mark.parametrize("known", [True, False])
def test_where_nothing_tells_pods_the_nodes_own_processes_leave_with_the_nodes_address_still(known: bool) -> None:
    """To a ClusterIP on the device they would go out with that ClusterIP."""
    planner = IpvsPlanner(FACTS if known else replace(FACTS, pod_cidrs=()))
    planner.set_service(key("web"), *web((1, 2)))
    table = Ruleset().apply(planner.take().batch).tables[TableRef(Family.IPV4, TABLE)]
    comments = [rule.comment for rule in table.chains["rewritten"].rules]
    assert ("to a ClusterIP, from no pod" in comments) is known
    assert ("from the node itself, by an address of the device" in comments) is not known


OUTSIDE_HERE: dict[str, Any] = {"type": "NodePort", "externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP"}


def test_clients_are_remembered_for_as_long_as_the_service_says() -> None:
    for_600_s: dict[str, Any] = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
    assert {server.persistence_s for server in planned(1, 2, **for_600_s).servers().values()} == {600}


def test_whom_ipvs_serves_the_maps_do_not_remember() -> None:
    planner = planned(1, 2, 3, **OUTSIDE_HERE)
    assert planner.servers()[VirtualKey(NODE, 6, 30080)].persistence_s == 10800
    table = Ruleset().apply(planner.take().batch).tables[TableRef(Family.IPV4, TABLE)]
    assert len(table.sets["memories"].elements) == 1, "the node's own clients of the node port"
    assert not table.sets["other-memories"].elements
    remembering = [rule for rule in table.chains["remember"].rules if "jump remember-for" in str(rule)]
    assert remembering
    assert all(rule.expressions[:3] == destination_rewritten() for rule in remembering), "what IPVS leads, nftables did not"


def test_after_a_restart_nobody_is_remembered_at_an_endpoint_that_left_meanwhile() -> None:
    before = Ruleset().apply(planned(1, 2, 3, **OUTSIDE_HERE).take().batch)
    batch = planned(1, 2, **OUTSIDE_HERE).resync(before)
    (prune, _) = [c for c in batch.commands if isinstance(c, Prune) and c.set.name == "affinity"]
    assert prune.table.family is Family.IPV4
    assert prune.others
    assert list(prune.keep.values()) == [frozenset((A, B))]


def test_what_ipvs_serves_is_in_no_map() -> None:
    everyone = planned(1, 2, sessionAffinity="ClientIP")
    assert not numbers(everyone, "endpoints")
    assert not numbers(planned(1, 2, sessionAffinity="ClientIP"), "sticky")
    outside: dict[str, Any] = {"type": "NodePort", "externalTrafficPolicy": "Local"}
    assert not numbers(planned(1, 2, **outside), "local-endpoints")
    assert {k[:4] for k in numbers(planned(1, 2, **outside), "endpoints")} == {NODE}, (
        "the node's own clients go to all, by the map"
    )


def test_host_ports_and_external_ips_that_are_the_nodes_own_need_no_virtual_address() -> None:
    planner = IpvsPlanner(FACTS)
    planner.set_host_ports(
        "edge", pod_of({"name": "edge", "ip": "10.244.1.9", "ports": [{"containerPort": 1, "hostPort": 80}]})
    )
    assert planner.servers() == {}
    own = planned(1, externalIPs=["198.18.0.11", "203.0.113.5"])
    assert own.bound() == {CLUSTER_IP, bytes((203, 0, 113, 5))}
    assert VirtualKey(NODE, 6, 80) in own.servers()


def test_a_change_of_either_half_is_a_change() -> None:
    planner = planned(1)
    assert planner.take()
    assert not planner.take()
    planner.set_service(key("web"), *web((1, 2)))
    changes = planner.take()
    assert (bool(changes), bool(changes.servers)) == (True, True)
    planner.set_service(key("nobody"), *web((), clusterIP="10.96.0.11", name="nobody"))
    changes = planner.take()
    assert (bool(changes), bool(changes.servers), bool(changes.batch)) == (True, False, True)


POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"type": "NodePort"},
    {"type": "NodePort", "externalTrafficPolicy": "Local"},
    {"type": "NodePort", "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"},
    {"sessionAffinity": "ClientIP", "externalIPs": ["198.18.0.11"]},
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sets(st.sampled_from((1, 2, 3))), st.sampled_from(POLICIES)), min_size=1, max_size=5))
def test_whatever_a_service_was_before_it_is_as_from_scratch(history: list[tuple[set[int], dict[str, Any]]]) -> None:
    planner, kernel, servers = IpvsPlanner(FACTS), Ruleset(), dict[VirtualKey, VirtualServer]()
    for nodes, policy in history:
        planner.set_service(key("web"), *web(tuple(sorted(nodes)), **policy))
        changes = planner.take()
        kernel = kernel.apply(changes.batch)
        servers = {k: v for k, v in {**servers, **changes.servers}.items() if v is not None}
        fresh = planned(*sorted(nodes), **policy)
        assert servers == planner.servers() == fresh.servers()
        assert planner.bound() == fresh.bound()
        assert canonical(kernel) == canonical(Ruleset().apply(fresh.take().batch))
        damaged = kernel.apply(Batch((DelTable(TableRef(Family.IPV6, TABLE)),)))
        assert damaged.apply(planner.resync(damaged)) == kernel


def test_every_case_comes_and_goes_without_a_trace() -> None:
    for case in load_cases(special=True):
        planner, held = IpvsPlanner(case.facts), Ruleset()
        held = held.apply(planner.take().batch)
        nothing = held
        case.feed(planner)
        changes = planner.take()
        held = held.apply(changes.batch)
        assert {k: v for k, v in changes.servers.items() if v} == planner.servers()
        assert not planner.resync(held), case.name
        for item in case.objects:
            if "service" in item:
                planner.set_service(key(item["service"]["name"]), None)
            elif "pod" in item:
                planner.set_host_ports(item["pod"]["name"], None)
        held = held.apply(planner.take().batch)
        assert planner.servers() == {}
        assert planner.bound() == frozenset()
        assert held == nothing, case.name


def test_servers_come_before_they_are_led_to_and_leave_by_draining() -> None:
    held: dict[VirtualKey, VirtualServer] = {}
    first = {WEB: VirtualServer("rr", 0, {A: 1, B: 1})}
    ops = introduce(first, held)
    assert ops == [SetVirtual(WEB, "rr", 0, new=True), SetReal(WEB, A, 1, new=True), SetReal(WEB, B, 1, new=True)]
    held = after(held, ops)
    second = {WEB: VirtualServer("rr", 0, {B: 1, C: 1})}
    held = after(held, introduce(second, held))
    assert retire(second, held) == [SetReal(WEB, A, 0, new=False)]
    held = after(held, retire(second, held))
    assert retire(second, held) == []
    assert retire(second, held, {(WEB, A): 2}) == []
    assert retire(second, held, {}) == [DelReal(WEB, A)]
    back = introduce(first, held)
    assert back == [SetReal(WEB, A, 1, new=False)], "one that returns before it is gone gets its weight again"
    assert retire({}, held, {(WEB, B): 1}) == [DelReal(WEB, A), SetReal(WEB, B, 0, new=False), DelReal(WEB, C)]
    assert retire({}, held, {})[-1] == DelVirtual(WEB)


def test_udp_has_no_end_to_wait_for() -> None:
    dns = VirtualKey(CLUSTER_IP, 17, 53)
    assert retire({}, {dns: VirtualServer("rr", 0, {A: 1})}) == [DelReal(dns, A), DelVirtual(dns)]


SERVERS = st.dictionaries(
    st.sampled_from((WEB, VirtualKey(CLUSTER_IP, 17, 53), VirtualKey(NODE, 6, 30080))),
    st.builds(
        VirtualServer,
        st.sampled_from(("rr", "lc")),
        st.sampled_from((0, 600)),
        st.dictionaries(st.sampled_from((A, B, C)), st.just(1)),
    ),
)


@given(st.lists(SERVERS, max_size=5))
def test_whatever_was_wanted_before_the_end_is_what_is_wanted_last(history: list[dict[VirtualKey, VirtualServer]]) -> None:
    held: dict[VirtualKey, VirtualServer] = {}
    for wanted in history:
        for ops in (introduce(wanted, held), retire(wanted, after(held, introduce(wanted, held)))):
            _possible(held, ops)
            held = after(held, ops)
        serving = {k: {b for b, w in s.servers.items() if w} for k, s in held.items()}
        assert {k: b for k, b in serving.items() if b} == {k: set(s.servers) for k, s in wanted.items() if s.servers}
    last = history[-1] if history else {}
    held = after(held, retire(last, held, {}))
    assert held == last


def _possible(held: dict[VirtualKey, VirtualServer], ops: list[IpvsOp]) -> None:
    """Whether IPVS would take them: nothing is made twice, nothing changed that is not there."""
    for op in ops:
        match op:
            case SetVirtual(at, _, _, new):
                assert (at in held) is not new
            case SetReal(at, server, _, new):
                assert (server in held[at].servers) is not new
            case DelReal(at, server):
                assert server in held[at].servers
            case DelVirtual(at):
                assert not held[at].servers
        held = after(held, [op])


def test_others_virtual_servers_are_not_ours() -> None:
    planner = planned(1)
    observed = Ruleset().apply(planner.take().batch)
    stranger, forgotten = VirtualKey(bytes((192, 0, 2, 1)), 6, 80), VirtualKey(bytes((10, 96, 0, 77)), 6, 80)
    nobody = IpvsPlanner(FACTS)
    assert ours([WEB, stranger, forgotten], nobody, observed, {forgotten.address}) == {WEB, forgotten}
    assert ours([WEB, stranger], nobody, Ruleset(), ()) == frozenset()
    assert ours([WEB, stranger], planned(1), Ruleset(), ()) == {WEB}, "what is wanted"
    other = Ruleset().apply(Batch((AddTable(TableRef(Family.IPV4, TABLE)),)))
    assert ours([WEB, stranger], nobody, other, ()) == frozenset(), "a table without our maps"
    frontend = planner.table(key("web")).frontends[0]
    assert frontend_key(frontend)[:4] == CLUSTER_IP

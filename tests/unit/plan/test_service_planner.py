"""The planner: incremental equals from scratch, one endpoint costs a few elements, nothing stays of what is gone."""

import ipaddress
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from service_cases import FACTS, key, pod_of, service_of, slice_of
from service_worlds import canonical

from podwire.model.addr import Family
from podwire.model.nft import (
    AddElements,
    Batch,
    Command,
    DelElements,
    DelTable,
    Prune,
    ReplaceElements,
    Ruleset,
    SetRules,
    Sweep,
    TableRef,
)
from podwire.model.nftexpr import Dynset
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import NodeFacts
from podwire.plan.elementbooks import arrange
from podwire.plan.services import TABLE, ServicePlanner
from podwire.plan.services_rules import EXACT, pack_number, pool_size, sets_of

IPV4, IPV6 = TableRef(Family.IPV4, TABLE), TableRef(Family.IPV6, TABLE)


def web(
    count: int, *, first: int = 1, family: Family = Family.IPV4, **spec: object
) -> tuple[Service, tuple[EndpointSlice, ...]]:
    """Service `web` with endpoints 10.244.<n>.2 on node n<n>, for n from `first` (10.245.0.2 comes after 10.244.255.2)."""
    cluster_ip = "10.96.0.10" if family is Family.IPV4 else "fd00:10:96::a"
    short = {"name": "web", "clusterIP": cluster_ip, "ports": [{"port": 80, "targetPort": 8080}], **spec}
    endpoints = [
        {"ip": f"10.{244 + n // 256}.{n % 256}.2" if family is Family.IPV4 else f"fd00:10:244:{n}::2", "node": f"n{n}"}
        for n in range(first, first + count)
    ]
    return service_of(short, family), (slice_of({"service": short, "endpoints": endpoints}, family),)


def elements(batch: Batch, kind: type[Command]) -> dict[str, list[str]]:
    """The texts of a batch's elements of one kind of command, by set."""
    found: dict[str, list[str]] = {}
    for command in batch.commands:
        if isinstance(command, kind) and isinstance(command, AddElements | ReplaceElements | DelElements):
            found.setdefault(command.set.name, []).extend(command.set.element_text(e) for e in command.elements)
    return found


def taken(planner: ServicePlanner) -> Ruleset:
    return Ruleset().apply(planner.take_batch())


def test_nothing_changed_is_an_empty_batch() -> None:
    planner = ServicePlanner(FACTS)
    service, slices = web(3)
    planner.set_service(service.key, service, slices)
    assert planner.take_batch()
    assert not planner.take_batch()
    planner.set_service(service.key, service, slices)
    assert not planner.take_batch()


def test_one_endpoint_more_adds_one_element_and_says_so() -> None:
    planner = ServicePlanner(FACTS)
    planner.set_service(key("web"), *web(3))
    planner.take_batch()
    planner.set_service(key("web"), *web(4))
    batch = planner.take_batch()
    assert elements(batch, AddElements) == {"endpoints": ["10.96.0.10 . tcp . 80 . 3 : 10.244.4.2 . 8080"]}
    assert elements(batch, ReplaceElements) == {"pools": ["10.96.0.10 . tcp . 80 : 4"]}
    assert len(batch.commands) == 2


def test_the_last_endpoint_fills_the_hole() -> None:
    planner = ServicePlanner(FACTS)
    planner.set_service(key("web"), *web(5, first=2))
    planner.take_batch()
    planner.set_service(key("web"), *web(4, first=3))
    batch = planner.take_batch()
    assert elements(batch, ReplaceElements) == {
        "endpoints": ["10.96.0.10 . tcp . 80 . 0 : 10.244.6.2 . 8080"],
        "pools": ["10.96.0.10 . tcp . 80 : 4"],
    }
    assert [c.set.name for c in batch.commands if isinstance(c, DelElements)] == ["endpoints"]


def test_no_element_holds_a_verdict() -> None:
    """One would make the kernel validate all of them whenever one changes."""
    assert not [of for family in Family for of in sets_of(family).all() if of.verdicts]


def test_commands_stand_in_an_order_that_is_safe_to_cut() -> None:
    """Endpoints come before the number that leads to them, and leave after it; rules for numbers are there all the while."""
    planner = ServicePlanner(FACTS)
    planner.set_service(key("web"), *web(2))
    planner.take_batch()
    planner.set_service(key("web"), *web(1200))
    change = planner.take_batch()
    assert heads(change) == [
        "flush chain ip podwire pick",
        "add element ip podwire endpoints",
        "replace element ip podwire pools",
    ]
    planner.set_service(key("web"), *web(1700))
    change = planner.take_batch()
    assert heads(change) == [
        "flush chain ip podwire pick",
        "add element ip podwire endpoints",
        "replace element ip podwire pools",
        "flush chain ip podwire pick",
    ]
    assert [large_pools(c) for c in change.commands if isinstance(c, SetRules)] == [{1536, 2048}, {2048}]
    planner.set_service(key("web"), *web(2))
    assert heads(planner.take_batch()) == [
        "replace element ip podwire pools",
        "delete element ip podwire endpoints",
        "flush chain ip podwire pick",
        "sweep set ip podwire connections (1698 keys)",
    ]


def test_what_leads_packets_goes_before_what_it_leads_to() -> None:
    planner = ServicePlanner(FACTS)
    spec: dict[str, Any] = {"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30080}]}
    planner.set_service(key("web"), *web(2, **spec))
    planner.take_batch()
    planner.set_service(key("web"), None)
    order = [c.set.name for c in planner.take_batch().commands if isinstance(c, DelElements)]
    for first, then in pairwise(("outside", "services", "local-pools", "local-endpoints")):
        assert order.index(first) < order.index(then)
    for first, then in pairwise(("services", "pools", "endpoints")):
        assert order.index(first) < order.index(then)


def test_usual_sizes_of_pools_find_their_rules_there() -> None:
    """A rule that comes would make the kernel look at every element."""
    planner = ServicePlanner(FACTS)
    local: dict[str, Any] = {
        "type": "NodePort",
        "externalTrafficPolicy": "Local",
        "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}],
    }
    planner.set_service(key("web"), *web(1, **local))
    rules = {ref: state.chains for ref, state in taken(planner).tables.items()}
    for count in (2, 16, 17, 24, 25, 100, 513, 1024, 3):
        planner.set_service(key("web"), *web(count, **local))
        assert not [c for c in planner.take_batch().commands if isinstance(c, SetRules)], count
    assert {ref: state.chains for ref, state in planner.desired().tables.items()} == rules


def heads(batch: Batch) -> list[str]:
    return [str(c).split("{")[0].split("\n")[0].strip() for c in batch.commands]


def large_pools(command: SetRules) -> set[int]:
    said = [rule.comment.removeprefix("one of up to ") for rule in command.rules]
    return {int(text) for text in said if text.isdecimal()}


def test_a_large_pool_has_an_endpoint_for_two_thirds_of_its_indices_and_for_all_of_the_next_smaller() -> None:
    sizes = sorted({pool_size(n) for n in range(1, 3000)})
    assert sizes[:20] == [*range(1, EXACT + 1), 24, 32, 48, 64]
    for n in range(1, 2000):
        at = sizes.index(pool_size(n))
        assert (sizes[at - 1] if at else 0) < n <= sizes[at]
        assert 3 * n >= 2 * sizes[at]


def test_every_prefix_of_a_batch_applies() -> None:
    planner = ServicePlanner(FACTS)
    planner.set_service(key("web"), *web(3, type="NodePort", externalTrafficPolicy="Local"))
    batch = planner.take_batch()
    for cut in range(len(batch.commands) + 1):
        Ruleset().apply(Batch(batch.commands[:cut]))


def test_a_deleted_service_leaves_nothing() -> None:
    planner = ServicePlanner(FACTS)
    empty = taken(planner)
    spec: dict[str, Any] = {
        "type": "LoadBalancer",
        "externalTrafficPolicy": "Local",
        "sessionAffinity": "ClientIP",
        "ingress": [{"ip": "203.0.113.1"}],
        "loadBalancerSourceRanges": ["192.0.2.0/24"],
    }
    service, slices = web(3, **spec)
    planner.set_service(service.key, service, slices)
    full = empty.apply(planner.take_batch())
    assert full != empty
    planner.set_service(service.key, None)
    assert full.apply(planner.take_batch()) == empty == planner.desired()


def test_affinity_notes_where_clients_go_and_forgets_what_is_gone() -> None:
    planner = ServicePlanner(FACTS)
    spec: dict[str, Any] = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
    planner.set_service(key("web"), *web(3, **spec))
    state = taken(planner).tables[IPV4]
    assert set(state.sets["sticky"].elements.values()) == {pack_number(600)}
    noted = [e for rule in state.chains["remember-for"].rules for e in rule.expressions if isinstance(e, Dynset)]
    assert [(e.set, e.timeout_s) for e in noted] == [("affinity", 600)]
    assert [rule.comment for rule in state.chains["remember-for"].rules] == ["where this client goes", "the number has served"]
    assert state.chains["pick"].rules[0].comment == "where this client went before"

    planner.set_service(key("web"), *web(4, **spec))
    assert not [c for c in planner.take_batch().commands if isinstance(c, Prune)]

    planner.set_service(key("web"), *web(3, first=2, **spec))
    (prune,) = [c for c in planner.take_batch().commands if isinstance(c, Prune)]
    client = ipaddress.ip_address("192.0.2.1").packed
    (front,) = prune.keep
    gone = bytes((10, 244, 1, 2)) + b"\x1f\x90\0\0"
    there = bytes((10, 244, 2, 2)) + b"\x1f\x90\0\0"
    assert prune.unwanted(client + front, gone, prune.part_length)
    assert not prune.unwanted(client + front, there, prune.part_length)
    assert not prune.unwanted(client + bytes(len(front)), gone, prune.part_length)


def test_counts_of_endpoints_that_left_go_in_lots_and_of_those_that_came_back_stay() -> None:
    planner = ServicePlanner(FACTS)
    whole, others = web(250), ("other", "another")
    planner.set_service(key("web"), *whole)
    for number, name in enumerate(others):
        planner.set_service(key(name), *web(80, clusterIP=f"10.96.1.{number}", name=name))
    planner.take_batch()
    planner.set_service(key("web"), *web(100, first=151))
    planner.take_batch()
    planner.set_service(key("web"), *whole)
    for name in others:
        planner.set_service(key(name), None)
    assert not sweeps(planner.take_batch()), "160 have left, 150 are back"
    planner.set_service(key("web"), *web(130, first=121))
    (sweep,) = sweeps(planner.take_batch())
    assert sweep.set == sets_of(Family.IPV4).connections
    assert len(sweep.keys) == 280
    front, port = bytes((10, 96, 0, 10, 6, 0, 0, 0, 0, 80, 0, 0)), b"\x1f\x90\0\0"
    assert front + bytes((10, 244, 1, 2)) + port in sweep.keys
    assert front + bytes((10, 244, 121, 2)) + port not in sweep.keys
    assert not sweeps(planner.take_batch())


def sweeps(batch: Batch) -> list[Sweep]:
    return [command for command in batch.commands if isinstance(command, Sweep)]


def test_a_comparison_that_finds_a_fault_drops_the_counts_of_what_nobody_serves() -> None:
    planner = ServicePlanner(FACTS)
    planner.set_service(key("web"), *web(2))
    kernel = taken(planner)
    state = kernel.tables[IPV4].sets["services"]
    repair = planner.resync(kernel.apply(Batch((DelElements(IPV4, state.set, tuple(state.elements.items())),))))
    counts = sets_of(Family.IPV4).connections
    (prune,) = [c for c in repair.commands if isinstance(c, Prune) and c.set == counts and c.table == IPV4]
    front, port = bytes((10, 96, 0, 10, 6, 0, 0, 0, 0, 80, 0, 0)), b"\x1f\x90\0\0"

    def goes(key: bytes) -> bool:
        return prune.unwanted(key, None, prune.part_length)

    assert not goes(front + bytes((10, 244, 1, 2)) + port)
    assert goes(front + bytes((10, 244, 3, 2)) + port)
    assert goes(bytes((10, 96, 0, 11)) + front[4:] + bytes((10, 244, 1, 2)) + port)


def test_two_owners_of_one_address_the_winner_does_not_depend_on_the_order() -> None:
    pod = pod_of({"name": "edge", "ip": "10.244.1.9", "ports": [{"containerPort": 1, "hostPort": 80}]})
    service, slices = web(1, first=2, externalIPs=["198.18.0.11"])
    one, other = ServicePlanner(FACTS), ServicePlanner(FACTS)
    one.set_host_ports("u", pod)
    one.set_service(service.key, service, slices)
    other.set_service(service.key, service, slices)
    other.set_host_ports("u", pod)
    assert one.desired() == other.desired()
    one.set_service(service.key, None)
    alone = ServicePlanner(FACTS)
    alone.set_host_ports("u", pod)
    assert one.desired() == alone.desired()


def test_resync_touches_only_what_differs_and_keeps_the_order_it_finds() -> None:
    planner = ServicePlanner(FACTS)
    for wanted in (web(5), web(4, first=2), web(5, first=2)):
        planner.set_service(key("web"), *wanted)
    kernel = taken(planner)

    fresh = ServicePlanner(FACTS)
    fresh.set_service(key("web"), *web(5, first=2))
    assert not fresh.resync(kernel)
    assert not fresh.take_batch()

    state = kernel.tables[IPV4].sets["services"]
    broken = kernel.apply(Batch((DelElements(IPV4, state.set, tuple(state.elements.items())),)))
    repair = fresh.resync(broken)
    assert elements(repair, AddElements) == {"services": ["10.96.0.10 . tcp . 80"]}
    assert broken.apply(repair) == fresh.desired()


def test_resync_has_the_rules_for_what_was_and_what_will_be_until_the_elements_have_changed() -> None:
    planner = ServicePlanner(FACTS)
    planner.set_service(key("web"), *web(1700))
    kernel = taken(planner)
    fresh = ServicePlanner(FACTS)
    fresh.set_service(key("web"), *web(1200))
    batch = Batch(tuple(c for c in fresh.resync(kernel).commands if not isinstance(c, Prune)))
    assert heads(batch)[0] == heads(batch)[-1] == "flush chain ip podwire pick"
    assert [large_pools(c) for c in batch.commands if isinstance(c, SetRules)] == [{1536, 2048}, {1536}]
    for cut in range(len(batch.commands) + 1):
        chain = kernel.apply(Batch(batch.commands[:cut])).tables[IPV4].chains["pick"]
        assert chain.rules[-1] == fresh.desired().tables[IPV4].chains["pick"].rules[-1], "who is nobody's is refused last"


def test_resync_builds_a_table_that_somebody_deleted() -> None:
    planner = ServicePlanner(FACTS)
    planner.set_service(key("web"), *web(2))
    kernel = taken(planner).apply(Batch((DelTable(IPV6),)))
    repair = planner.resync(kernel)
    assert {c.table for c in repair.commands if not isinstance(c, Prune)} == {IPV6}
    assert kernel.apply(repair) == planner.desired()


def test_new_facts_plan_everything_again() -> None:
    planner = ServicePlanner(FACTS)
    planner.set_service(key("web"), *web(2, type="NodePort", ports=[{"port": 80, "nodePort": 30080}]))
    kernel = taken(planner)
    moved = NodeFacts(
        FACTS.name, (ipaddress.ip_address("198.18.0.77"),), FACTS.pod_cidrs, FACTS.cluster_cidrs, FACTS.service_cidrs
    )
    planner.set_facts(moved)
    after = kernel.apply(planner.resync(kernel))
    fresh = ServicePlanner(moved)
    fresh.set_service(key("web"), *web(2, type="NodePort", ports=[{"port": 80, "nodePort": 30080}]))
    assert after == fresh.desired()


@given(st.lists(st.integers(0, 9), unique=True), st.lists(st.integers(0, 9), unique=True))
def test_arrange_moves_as_few_as_it_can(before: list[int], after: list[int]) -> None:
    order, wanted = [bytes((n,)) for n in before], [bytes((n,)) for n in after]
    arranged = arrange(order, wanted)
    assert sorted(arranged) == sorted(wanted)
    if order:
        moved = sum(1 for index, item in enumerate(arranged) if index >= len(order) or order[index] != item)
        leaving, coming = set(order) - set(wanted), set(wanted) - set(order)
        assert moved <= len(leaving) + len(coming)


# --- incremental == from scratch ------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")


@st.composite
def service_states(draw: st.DrawFn) -> tuple[Service, tuple[EndpointSlice, ...]] | None:
    """Some state of a Service that may clash with others' addresses; None: deleted."""
    if draw(st.integers(0, 5)) == 0:
        return None
    family = draw(st.sampled_from((Family.IPV4, Family.IPV4, Family.IPV6)))
    spec: dict[str, Any] = {
        "type": draw(st.sampled_from(("ClusterIP", "NodePort", "LoadBalancer"))),
        "externalTrafficPolicy": draw(st.sampled_from(("Cluster", "Local"))),
        "internalTrafficPolicy": draw(st.sampled_from(("Cluster", "Cluster", "Local"))),
        "sessionAffinity": draw(st.sampled_from(("None", "None", "ClientIP"))),
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": draw(st.sampled_from((60, 10800)))}},
        "ports": [{"port": draw(st.sampled_from((80, 81))), "targetPort": 8080, "nodePort": draw(st.sampled_from((0, 30080)))}],
    }
    if family is Family.IPV4:
        spec["clusterIP"] = draw(st.sampled_from(("10.96.0.10", "10.96.0.11")))
        spec["ingress"] = draw(st.sampled_from(([], [{"ip": "203.0.113.1"}])))
        spec["externalIPs"] = draw(st.sampled_from(([], ["203.0.113.1"], ["10.96.0.10"])))
        spec["loadBalancerSourceRanges"] = draw(st.sampled_from(([], ["192.0.2.0/24"], ["192.0.2.0/25", "198.18.0.0/15"])))
    count = draw(st.one_of(st.integers(0, 10), st.sampled_from((16, 17, 24, 25, 40))))
    return web(count, first=draw(st.integers(1, 4)), family=family, **spec)


Step = tuple[str, tuple[Service, tuple[EndpointSlice, ...]] | None]
steps = st.lists(st.tuples(st.sampled_from(NAMES), service_states()), max_size=12)


def from_scratch(states: dict[str, tuple[Service, tuple[EndpointSlice, ...]] | None]) -> ServicePlanner:
    planner = ServicePlanner(FACTS)
    for name, state in states.items():
        if state is not None:
            planner.set_service(key(name), *state)
    return planner


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(steps, st.data())
def test_incremental_equals_from_scratch(sequence: Sequence[Step], data: st.DataObject) -> None:
    planner = ServicePlanner(FACTS)
    kernel = taken(planner)
    states: dict[str, tuple[Service, tuple[EndpointSlice, ...]] | None] = {}
    for name, state in sequence:
        states[name] = state
        service, slices = state or (None, ())
        planner.set_service(key(name), service, slices)
        if data.draw(st.booleans()):
            kernel = kernel.apply(planner.take_batch())
            assert kernel == planner.desired()
    kernel = kernel.apply(planner.take_batch())
    assert kernel == planner.desired()
    scratch = from_scratch(states)
    assert canonical(kernel) == canonical(scratch.desired())
    assert not scratch.resync(kernel), "resync finds the same rules in another order"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(steps, steps)
def test_resync_reaches_the_plan_from_any_state(before: Sequence[Step], after: Sequence[Step]) -> None:
    kernel = taken(from_scratch(dict(before)))
    planner = from_scratch(dict(after))
    assert kernel.apply(planner.resync(kernel)) == planner.desired()

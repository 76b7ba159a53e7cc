"""iptables chains: the text does what it says, incremental equals from scratch, one change touches few chains."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from iptablestables import empty, execute, held
from service_cases import FACTS, key, load_cases, service_of, slice_of

from podwire.model.addr import Family
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import FrontendKind
from podwire.plan.iptables import Chains, IptablesPlanner, Restore, parse_save, restore
from podwire.plan.iptables_rules import PREFIX
from podwire.plan.services_maps import frontend_key


def web(endpoints: Iterable[int], name: str = "web", last: int = 10, **spec: Any) -> tuple[Service, tuple[EndpointSlice, ...]]:
    short = {"name": name, "clusterIP": f"10.96.0.{last}", "ports": [{"port": 80, "targetPort": 8080}], **spec}
    found = [{"ip": f"10.244.{n}.2", "node": f"n{n}"} for n in endpoints]
    return service_of(short, Family.IPV4), (slice_of({"service": short, "endpoints": found}, Family.IPV4),)


def ipv4(texts: list[Restore]) -> Restore:
    (text,) = [text for text in texts if text.family is Family.IPV4]
    return text


@pytest.mark.parametrize("case", list(load_cases(special=True)), ids=lambda c: c.name)
def test_a_case_is_built_at_once_and_in_parts_and_removed(case: Any) -> None:
    planner = IptablesPlanner(case.facts)
    case.feed(planner)
    for text in planner.take():
        whole = execute(empty(), text.text)
        wanted = planner.desired()[text.family]
        assert held(whole) == wanted
        step = empty()
        for part in text.parts(7):
            step = execute(step, part)
        assert held(step) == wanted
        gone = restore(text.family, Chains(), wanted)
        assert gone is not None
        assert execute(whole, gone.text) == empty()
    assert not planner.take()
    assert not planner.resync(planner.desired())


def test_one_endpoint_more_touches_one_chain() -> None:
    planner = IptablesPlanner(FACTS)
    for number in range(50):
        planner.set_service(key(f"s{number}"), *web((1, 2), f"s{number}", number))
    planner.take()
    planner.set_service(key("s7"), *web((1, 2, 3), "s7", 7))
    text = ipv4(planner.take())
    assert text.chains == 1
    assert text.text.count("-A ") == 4
    assert "--probability 0.33333333349 -j DNAT --to-destination 10.244.1.2:8080" in text.text


def test_the_firewall_is_opened_for_health_checks_while_there_are_any() -> None:
    planner = IptablesPlanner(FACTS)
    chain = "filter", PREFIX + "HEALTH"
    short = {"name": "web", "type": "LoadBalancer", "clusterIP": "10.96.0.10", "ports": [{"port": 80, "nodePort": 30080}]}
    local = {**short, "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000}
    for wanted, port in ((local, 32000), ({**local, "healthCheckNodePort": 32001}, 32001), (short, 0), (local, 32000)):
        planner.set_service(key("web"), service_of(wanted, Family.IPV4))
        for family in Family:
            rule = f'-p tcp -m tcp --dport {port} -m comment --comment "shop/web health check" -j ACCEPT'
            assert planner.desired()[family].rules[chain] == ((rule,) if port else ())
    planner.take()
    planner.set_service(key("web"), None)
    texts = {text.family: text for text in planner.take()}
    assert [list(table.changed) for table in texts[Family.IPV6].tables] == [[chain[1]]], "the other family has no more of it"
    planner.set_service(key("web"), service_of(local, Family.IPV4))
    planner.set_facts(replace(FACTS, zone="z9"))
    assert len(planner.desired()[Family.IPV6].rules[chain]) == 1


def test_a_service_that_goes_leaves_no_chain() -> None:
    planner = IptablesPlanner(FACTS)
    planner.take()
    nothing = planner.desired()
    sticky: dict[str, Any] = {"sessionAffinity": "ClientIP", "type": "LoadBalancer", "ingress": [{"ip": "203.0.113.1"}]}
    planner.set_service(key("web"), *web((1, 2), externalTrafficPolicy="Local", **sticky))
    assert planner.desired() != nothing
    planner.set_service(key("web"), None)
    assert planner.desired() == nothing


def test_a_chain_of_ours_that_nothing_leads_to_goes_and_no_other_is_touched() -> None:
    planner = IptablesPlanner(FACTS)
    planner.set_service(key("web"), *web((1, 2)))
    tables = execute(empty(), ipv4(planner.take()).text)
    forgotten = {**tables, ("nat", f"{PREFIX}SVC-OLD"): ["-j RETURN"]}
    observed = {Family.IPV4: held(forgotten), Family.IPV6: planner.desired()[Family.IPV6]}
    text = ipv4(planner.resync(observed))
    assert text.chains == 1
    assert execute(forgotten, text.text) == tables
    step = forgotten
    for part in text.parts(1):
        step = execute(step, part)
    assert step == tables


def test_jumps_alone_are_something_and_their_places_are_not() -> None:
    hook = ("nat", "PREROUTING")
    assert Chains({("nat", f"{PREFIX}X"): ()})
    assert Chains({}, {hook: ("-j X",)})
    assert not Chains({}, {hook: ()})


def test_connections_to_an_endpoint_are_those_of_clients_inside_and_outside() -> None:
    planner = IptablesPlanner(FACTS)
    spec: dict[str, Any] = {"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30080}]}
    planner.set_service(key("web"), *web((1, 2), **spec))
    (frontend,) = [f for f in planner.frontends(key("web")) if f.kind is FrontendKind.NODE_PORT]
    rules = planner.desired()[Family.IPV4].rules.items()
    text = "\n".join(
        ("*nat", *(f"[3:180] -A {name} {line}" for (table, name), lines in rules if table == "nat" for line in lines))
    )
    _, endpoints = planner.counted({Family.IPV4: text}, endpoints=True)
    here, elsewhere = sorted(frontend.inside.backends)
    assert frontend.outside is not None
    assert frontend.outside.backends == (here,)
    assert (endpoints[frontend_key(frontend), here], endpoints[frontend_key(frontend), elsewhere]) == (6, 3)


def test_another_masquerade_bit() -> None:
    planner = IptablesPlanner(FACTS, masquerade_bit=3)
    planner.set_service(key("web"), *web((1,), type="NodePort"))
    assert "0x8/0x8" in ipv4(planner.take()).text


def test_what_others_have_is_not_seen() -> None:
    strange = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n"
    assert not parse_save(strange)


WORLD = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sets(st.integers(1, 4), max_size=4),
        st.sampled_from(
            (
                {},
                {"type": "NodePort", "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}]},
                {"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30080}]},
                {"sessionAffinity": "ClientIP", "externalIPs": ["203.0.113.50"]},
                {"type": "LoadBalancer", "ingress": [{"ip": "203.0.113.1"}], "loadBalancerSourceRanges": ["192.0.2.0/24"]},
                None,
            )
        ),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(WORLD)
def test_incremental_equals_from_scratch(changes: list[tuple[int, set[int], dict[str, Any] | None]]) -> None:
    planner, tables = IptablesPlanner(FACTS), empty()
    final: dict[str, tuple[Service, tuple[EndpointSlice, ...]]] = {}
    for number, endpoints, spec in changes:
        name = f"s{number}"
        if spec is None:
            final.pop(name, None)
            planner.set_service(key(name), None)
        else:
            final[name] = web(sorted(endpoints), name, 10 + number, **spec)
            planner.set_service(key(name), *final[name])
        for text in planner.take():
            if text.family is Family.IPV4:
                tables = execute(tables, text.text)
    fresh = IptablesPlanner(FACTS)
    for name, (service, slices) in final.items():
        fresh.set_service(key(name), service, slices)
    for text in planner.take():
        if text.family is Family.IPV4:
            tables = execute(tables, text.text)
    wanted = fresh.desired()[Family.IPV4]
    assert planner.desired()[Family.IPV4] == wanted
    if changes:
        assert held(tables) == wanted


@pytest.mark.parametrize("spec", [{}, {"sessionAffinity": "ClientIP"}])
def test_counters_are_put_to_frontends_and_endpoints(spec: dict[str, Any]) -> None:
    planner = IptablesPlanner(FACTS)
    planner.set_service(key("web"), *web((1, 2), type="NodePort", ports=[{"port": 80, "nodePort": 30080}], **spec))
    (frontend,) = [f for f in planner.frontends(key("web")) if f.kind is FrontendKind.CLUSTER_IP]
    lines = [
        f"[{5 if ' -g ' in line else 2}:900] -A {name} {line}"
        for (table, name), rules in planner.desired()[Family.IPV4].rules.items()
        if table == "nat"
        for line in rules
    ]
    text = {Family.IPV4: "\n".join(("*nat", ":PREROUTING ACCEPT [7:420]", *lines, "COMMIT"))}
    frontends, nothing = planner.counted(text, endpoints=False)
    assert not nothing
    assert frontends[frontend_key(frontend)] == 5
    _, endpoints = planner.counted(text, endpoints=True)
    assert {packed: endpoints[frontend_key(frontend), packed] for packed in frontend.inside.backends} == dict.fromkeys(
        frontend.inside.backends, 2
    )
    counts = planner.rule_counts()
    assert counts[Family.IPV4, "nat"] == len(lines) + 3
    assert counts[Family.IPV6, "nat"] < counts[Family.IPV4, "nat"]


def client_lists(planner: IptablesPlanner) -> dict[tuple[str, str], set[str]]:
    """(chain of a frontend, list of clients) → what is asked or done there, of the whole nat table."""
    found: dict[tuple[str, str], set[str]] = {}
    for (_, name), lines in planner.desired()[Family.IPV4].rules.items():
        for line in lines:
            if matched := re.search(r"-m recent (--\w+).* --name (\S+)", line):
                found.setdefault((name, matched.group(2)), set()).add(matched.group(1))
    return found


def test_clients_are_remembered_for_as_long_as_the_service_says() -> None:
    planner = IptablesPlanner(FACTS)
    for_600_s: dict[str, Any] = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
    planner.set_service(key("web"), *web((1, 2), **for_600_s))
    lines = [line for rules in planner.desired()[Family.IPV4].rules.values() for line in rules if "--rcheck" in line]
    assert len(lines) == 2
    assert all(" --seconds 600 " in line for line in lines)


def test_all_frontends_of_a_port_share_the_list_of_an_endpoints_clients() -> None:
    planner = IptablesPlanner(FACTS)
    spec: dict[str, Any] = {"sessionAffinity": "ClientIP", "type": "NodePort", "externalTrafficPolicy": "Local"}
    ports = [{"name": f"p{port}", "port": port, "targetPort": 8080, "nodePort": 30000 + port} for port in (80, 81)]
    planner.set_service(key("web"), *web((1, 2), ports=ports, **spec))
    lists = client_lists(planner)
    names = {name for _, name in lists}
    assert len(names) == 4, "two ports, two endpoints"
    users = {name: Counter(word for (_, of), done in lists.items() if of == name for word in done) for name in names}
    here, elsewhere = Counter({"--rcheck": 3, "--set": 3}), Counter({"--rcheck": 2, "--set": 2})
    assert sorted(users.values(), key=Counter.total) == [elsewhere, elsewhere, here, here], (
        "the node port's clients outside stay here"
    )
    planner.set_service(key("other"), *web((1, 2), "other", 11, ports=ports, sessionAffinity="ClientIP"))
    assert len({name for _, name in client_lists(planner)}) == 8, "another Service with the same endpoints has its own"

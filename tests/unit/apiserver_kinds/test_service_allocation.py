"""Service addresses and node ports: bands, wishes, families, and never two holders of one key."""

import copy
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from podwire.apiserver.addressranges import Source, static_band
from podwire.apiserver.allocation import (
    IP_PREFIX,
    Allocation,
    AllocationFailed,
    RangeFull,
    ServiceAllocator,
    ServiceRanges,
    held,
    ip_key,
    port_key,
)
from podwire.apiserver.kinds.services import ServiceKind

V4, V6 = ip_network("10.96.0.0/12"), ip_network("fd00:10:96::/112")
PORTS = range(30000, 32768)
DEFAULT = Source("kubernetes", 7)


def first(span: int) -> int:
    return 0


def allocator(*networks: Any, ports: range = PORTS) -> ServiceAllocator:
    decide = ServiceAllocator(ServiceRanges(networks or (V4,), ports), first)
    decide.set_range(DEFAULT, networks or (V4,))
    return decide


def service(kind: str = "ClusterIP", ports: list[dict[str, Any]] | None = None, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "web"},
        "spec": {"type": kind, "selector": {"a": "b"}, "ports": ports or [{"port": 80}], **spec},
    }


def given_to(plan: Allocation) -> dict[str, Any]:
    spec: dict[str, Any] = plan.service["spec"]
    return spec


def refused(decide: ServiceAllocator, wanted: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    with pytest.raises(AllocationFailed) as caught:
        decide.plan(wanted, old)
    return str(caught.value.errors[0])


def test_the_bands_are_kubernetes_own() -> None:
    assert static_band(2**20 - 2, 16, 16, 256) == 256
    assert static_band(254, 16, 16, 256) == 16
    assert static_band(14, 16, 16, 256) == 0
    assert static_band(2768, 32, 16, 128) == 86


def test_dynamic_addresses_come_from_above_the_static_band() -> None:
    plan = allocator().plan(service())
    assert given_to(plan)["clusterIP"] == "10.96.1.1"
    assert given_to(plan)["clusterIPs"] == ["10.96.1.1"]
    assert given_to(plan)["ipFamilies"] == ["IPv4"]
    assert given_to(plan)["ipFamilyPolicy"] == "SingleStack"
    assert plan.acquire == (ip_key("10.96.1.1"),)


def test_when_the_upper_band_is_full_the_lower_one_serves_and_then_nothing() -> None:
    decide = allocator(ip_network("10.0.0.0/27"))
    addresses = [given_to(decide.plan(service()))["clusterIP"] for _ in range(30)]
    assert len(set(addresses)) == 30
    assert addresses[:14] == [f"10.0.0.{n}" for n in range(17, 31)]
    assert addresses[14:] == [f"10.0.0.{n}" for n in range(1, 17)]
    with pytest.raises(RangeFull, match="failed to allocate a serviceIP: range is full"):
        decide.plan(service())


def test_a_wished_address_is_given_once() -> None:
    decide = allocator()
    assert given_to(decide.plan(service(clusterIPs=["10.96.0.10"], clusterIP="10.96.0.10")))["clusterIP"] == "10.96.0.10"
    assert refused(decide, service(clusterIPs=["10.96.0.10"])) == (
        'spec.clusterIPs: Invalid value: ["10.96.0.10"]: failed to allocate IP 10.96.0.10: provided IP is already allocated'
    )
    assert "the provided IP (10.0.0.1) is not in the valid range. The range of valid IPs is 10.96.0.0/12" in refused(
        decide, service(clusterIPs=["10.0.0.1"])
    )


@pytest.mark.parametrize("address", ["10.96.0.0", "10.111.255.255"])
def test_network_and_broadcast_addresses_are_not_given(address: str) -> None:
    assert "is not in the valid range" in refused(allocator(), service(clusterIPs=[address]))


def test_what_a_failed_plan_took_is_free_again() -> None:
    decide = allocator()
    assert "nodePort" in refused(decide, service("NodePort", [{"port": 80, "nodePort": 80}], clusterIPs=["10.96.0.10"]))
    decide.plan(service(clusterIPs=["10.96.0.10"]))


def test_headless_and_external_names_take_nothing() -> None:
    assert allocator().plan(service(clusterIP="None", clusterIPs=["None"])).acquire == ()
    plan = allocator().plan(service("ExternalName", externalName="example.com", clusterIP="10.96.0.9"))
    assert plan.acquire == ()
    assert "clusterIP" not in given_to(plan)


def test_node_ports_are_given_above_the_static_band_and_wishes_are_kept() -> None:
    decide = allocator()
    plan = decide.plan(service("NodePort", [{"port": 80, "nodePort": 30080, "name": "a"}, {"port": 81, "name": "b"}]))
    assert [p["nodePort"] for p in given_to(plan)["ports"]] == [30080, 30086]
    assert refused(decide, service("NodePort", [{"port": 80, "nodePort": 30080}])) == (
        "spec.ports[0].nodePort: Invalid value: 30080: provided port is already allocated"
    )
    assert refused(decide, service("NodePort", [{"port": 80, "nodePort": 8080}])) == (
        "spec.ports[0].nodePort: Invalid value: 8080: provided port is not in the valid range. "
        "The range of valid ports is 30000-32767"
    )


def test_two_protocols_of_one_port_share_a_node_port() -> None:
    ports = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}, {"port": 54, "protocol": "TCP"}]
    given = [p["nodePort"] for p in given_to(allocator().plan(service("NodePort", ports)))["ports"]]
    assert given[0] == given[1] != given[2]


def test_a_load_balancer_without_node_ports_and_one_with_a_health_check() -> None:
    spec: dict[str, Any] = {"externalTrafficPolicy": "Local", "allocateLoadBalancerNodePorts": False}
    plan = allocator().plan(service("LoadBalancer", **spec))
    assert "nodePort" not in given_to(plan)["ports"][0]
    assert given_to(plan)["healthCheckNodePort"] == 30086
    assert port_key(30086) in plan.acquire


def test_full_node_ports_are_told() -> None:
    decide = allocator(ports=range(30000, 30001))
    decide.plan(service("NodePort"))
    with pytest.raises(RangeFull, match="failed to allocate a nodePort: range is full"):
        decide.plan(service("NodePort"))


def test_a_change_of_type_gives_the_node_ports_back() -> None:
    decide = allocator()
    old = decide.plan(service("NodePort")).service
    new = {**old, "spec": {**old["spec"], "type": "ClusterIP", "ports": [{"port": 80}]}}
    plan = decide.plan(new, old)
    assert plan.acquire == ()
    assert plan.release == (port_key(30086),)
    decide.settle(plan)
    assert given_to(decide.plan(service("NodePort")))["ports"][0]["nodePort"] == 30086


@pytest.mark.parametrize(
    ("networks", "spec", "families", "policy"),
    [
        ((V4,), {}, ["IPv4"], "SingleStack"),
        ((V6,), {}, ["IPv6"], "SingleStack"),
        ((V4, V6), {}, ["IPv4"], "SingleStack"),
        ((V6, V4), {}, ["IPv6"], "SingleStack"),
        ((V4, V6), {"ipFamilies": ["IPv6"]}, ["IPv6"], "SingleStack"),
        ((V4, V6), {"clusterIPs": ["fd00:10:96::a"]}, ["IPv6"], "SingleStack"),
        ((V4, V6), {"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"], "PreferDualStack"),
        ((V4, V6), {"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}, ["IPv6", "IPv4"], "RequireDualStack"),
        ((V4,), {"ipFamilyPolicy": "PreferDualStack"}, ["IPv4"], "PreferDualStack"),
        ((V4, V6), {"clusterIP": "None", "clusterIPs": ["None"]}, ["IPv4"], "SingleStack"),
        ((V4,), {"clusterIP": "None", "clusterIPs": ["None"], "selector": {}}, ["IPv4", "IPv6"], "RequireDualStack"),
    ],
)
def test_families_and_policy(networks: Any, spec: dict[str, Any], families: list[str], policy: str) -> None:
    given = given_to(allocator(*networks).plan(service(**spec)))
    assert given["ipFamilies"] == families
    assert given["ipFamilyPolicy"] == policy
    if given.get("clusterIP") != "None":
        assert [f"IPv{ip_address(a).version}" for a in given["clusterIPs"]] == families


@pytest.mark.parametrize(
    ("networks", "spec", "says"),
    [
        ((V4,), {"ipFamilyPolicy": "RequireDualStack"}, "this cluster is not configured for dual-stack services"),
        ((V4,), {"ipFamilies": ["IPv6"]}, 'spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster'),
        ((V4, V6), {"ipFamilies": ["IPv4", "IPv6"]}, "must be RequireDualStack or PreferDualStack when multiple ipFamilies"),
        (
            (V4, V6),
            {"ipFamilies": ["IPv6"], "clusterIPs": ["10.96.0.9"]},
            "expected an IPv6 value as indicated by `ipFamilies[0]`",
        ),
    ],
)
def test_families_that_cannot_be(networks: Any, spec: dict[str, Any], says: str) -> None:
    assert says in refused(allocator(*networks), service(**spec))


def test_upgrade_to_dual_stack_and_back() -> None:
    decide = allocator(V4, V6)
    single = decide.plan(service()).service
    dual = decide.plan({**single, "spec": {**single["spec"], "ipFamilyPolicy": "PreferDualStack"}}, single)
    assert given_to(dual)["clusterIPs"] == ["10.96.1.1", "fd00:10:96::101"]
    assert dual.acquire == (ip_key("fd00:10:96::101"),)
    back = {**dual.service, "spec": {**given_to(dual), "ipFamilyPolicy": "SingleStack"}}
    down = decide.plan(back, dual.service)
    assert given_to(down)["clusterIPs"] == ["10.96.1.1"]
    assert down.release == (ip_key("fd00:10:96::101"),)


def more(name: str, revision: int = 9) -> Source:
    return Source(name, revision, (True, "2026-11-24T12:00:00Z", name))


def test_a_second_range_serves_when_the_first_ones_dynamic_band_is_full() -> None:
    decide = allocator(ip_network("10.0.0.0/27"))
    decide.set_range(more("more"), [ip_network("10.9.0.0/28")])
    plans = [decide.plan(service()) for _ in range(14 + 14)]
    assert [str(given_to(plan)["clusterIP"]).rpartition(".")[0] for plan in plans] == ["10.0.0"] * 14 + ["10.9.0"] * 14
    assert [plan.sources for plan in plans[13:15]] == [(DEFAULT,), (more("more"),)], "the commit holds where it is from"
    assert given_to(decide.plan(service()))["clusterIP"] == "10.0.0.1", "the static band comes last"
    assert given_to(decide.plan(service(clusterIPs=["10.0.0.9"])))["clusterIP"] == "10.0.0.9"


def test_wishes_are_met_within_any_range_that_serves() -> None:
    decide = allocator(ip_network("10.0.0.0/27"))
    assert "The range of valid IPs is 10.0.0.0/27" in refused(decide, service(clusterIPs=["10.9.0.3"]))
    decide.set_range(more("more"), [ip_network("10.9.0.0/28"), V6])
    assert decide.plan(service(clusterIPs=["10.9.0.3"])).sources == (more("more"),)
    assert "The range of valid IPs is 10.0.0.0/27, 10.9.0.0/28" in refused(decide, service(clusterIPs=["10.8.0.3"]))
    decide.set_range(more("more", 10), [])
    assert "is not in the valid range" in refused(decide, service(clusterIPs=["10.9.0.4"]))
    assert decide.plan(service(ports=[{"port": 81}])).sources == (DEFAULT,)


def test_an_address_of_overlapping_ranges_is_taken_in_all_of_them() -> None:
    decide = allocator(ip_network("10.0.0.0/29"))
    decide.plan(service(clusterIPs=["10.0.0.3"]))
    decide.set_range(more("wider"), [ip_network("10.0.0.0/28")])
    decide.set_range(more("wider", 12), [ip_network("10.0.0.0/28")])
    rest = [given_to(decide.plan(service()))["clusterIP"] for _ in range(13)]
    assert sorted([*rest, "10.0.0.3"], key=ip_address) == [f"10.0.0.{n}" for n in range(1, 15)]
    with pytest.raises(RangeFull):
        decide.plan(service())
    decide.settle(decide.release(service(clusterIPs=["10.0.0.8"], clusterIP="10.0.0.8")))
    assert decide.plan(service()).sources == (more("wider", 12),)


def test_ranges_are_asked_in_their_own_order_whenever_they_came() -> None:
    decide = ServiceAllocator(ServiceRanges((V4,), PORTS), first)
    for source, network in (("b", "10.2.0.0/29"), ("a", "10.1.0.0/29")):
        decide.set_range(more(source), [ip_network(network)])
    decide.set_range(DEFAULT, [ip_network("10.0.0.0/29")])
    given = [str(given_to(decide.plan(service()))["clusterIP"])[:5] for _ in range(18)]
    assert given == ["10.0."] * 6 + ["10.1."] * 6 + ["10.2."] * 6


def test_all_of_a_range_is_to_be_had_after_the_store_was_read_anew() -> None:
    decide = allocator(ip_network("10.0.0.0/29"))
    held_before = [key for _ in range(4) for key in decide.plan(service()).acquire]
    decide.start_over(IP_PREFIX, held_before[:1])
    assert len({given_to(decide.plan(service()))["clusterIP"] for _ in range(5)}) == 5
    with pytest.raises(RangeFull):
        decide.plan(service())


def test_what_was_taken_before_its_range_came_is_taken() -> None:
    decide = ServiceAllocator(ServiceRanges((V4,), PORTS), first)
    with pytest.raises(RangeFull):
        decide.plan(service())
    decide.load([ip_key("10.0.0.1"), ip_key("10.0.0.2")])
    decide.set_range(DEFAULT, [ip_network("10.0.0.0/29")])
    assert [given_to(decide.plan(service()))["clusterIP"] for _ in range(4)] == [f"10.0.0.{n}" for n in range(3, 7)]
    decide.drop_ranges()
    with pytest.raises(RangeFull):
        decide.plan(service())


class Allocations(RuleBasedStateMachine):
    """Services come, change, fail to commit and go; the keys held are always the ones of the Services, each once."""

    services = Bundle("services")

    def __init__(self) -> None:
        super().__init__()
        self.decide = allocator(ip_network("10.0.0.0/27"), V6, ports=range(30000, 30020))
        self.wider = False
        self.live: dict[int, dict[str, Any]] = {}
        self.keys: set[str] = set()
        self.count = 0

    def commit(self, plan: Allocation) -> None:
        assert not self.keys & set(plan.acquire)
        assert set(plan.release) <= self.keys
        self.keys = (self.keys | set(plan.acquire)) - set(plan.release)
        self.decide.settle(plan)

    @rule(
        target=services,
        kind=st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]),
        policy=st.sampled_from(["SingleStack", "PreferDualStack"]),
        wish=st.none() | st.integers(1, 30),
        local=st.booleans(),
        fails=st.booleans(),
    )
    def create(self, kind: str, policy: str, wish: int | None, local: bool, fails: bool) -> int:
        wanted = service(kind, ipFamilyPolicy=policy, externalTrafficPolicy="Local" if local else "Cluster")
        if wish is not None:
            wanted["spec"]["clusterIPs"] = [f"10.0.0.{wish}"]
        self.count += 1
        before = copy.deepcopy(wanted)
        try:
            plan = self.decide.plan(wanted)
        except (AllocationFailed, RangeFull):
            return -1
        finally:
            assert wanted == before, "it may have to be planned again"
        if fails:
            self.decide.abandon(plan)
            return -1
        self.commit(plan)
        self.live[self.count] = plan.service
        return self.count

    @rule(
        one=services,
        kind=st.sampled_from(["ClusterIP", "NodePort"]),
        policy=st.sampled_from(["SingleStack", "PreferDualStack"]),
    )
    def change(self, one: int, kind: str, policy: str) -> None:
        old = self.live.get(one)
        if old is None or old["spec"]["type"] == "ExternalName":
            return
        new = copy.deepcopy({**old, "spec": {**old["spec"], "type": kind, "ipFamilyPolicy": policy}})
        new = ServiceKind().prepare_update(new, old)
        try:
            plan = self.decide.plan(new, old)
        except RangeFull:
            return
        self.commit(plan)
        self.live[one] = plan.service

    @rule(wider=st.booleans())
    def resize(self, wider: bool) -> None:
        self.wider = wider
        self.decide.set_range(more("more"), [ip_network("10.0.0.0/26")] if wider else [])

    @rule(one=consumes(services))
    def delete(self, one: int) -> None:
        old = self.live.pop(one, None)
        if old is not None:
            self.commit(self.decide.release(old))

    @invariant()
    def each_key_has_one_holder(self) -> None:
        every = [key for one in self.live.values() for key in held(one)]
        assert len(every) == len(set(every))
        assert set(every) == self.keys


Allocations.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestAllocations = Allocations.TestCase

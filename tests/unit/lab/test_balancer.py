"""Which nodes the outside balancer sends a LoadBalancer address to."""

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from podwire.lab.balancer import EXCLUDE_LABEL, plan_changes, plan_routes
from podwire.model.addr import IPNetwork
from podwire.model.ids import NetnsName
from podwire.model.kernelstate import NextHop, Route
from podwire.model.meta import ObjectMeta
from podwire.model.objects import (
    Condition,
    Endpoint,
    EndpointConditions,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    Node,
    NodeAddress,
    NodeStatus,
    Service,
    ServiceSpec,
    ServiceStatus,
)
from podwire.model.ops import DelRoute, SetRoute

NS = NetnsName("balancer")
VIP, VIP6 = "203.0.113.1", "2001:db8:2::1"


def node(index: int, *, ready: bool = True, labels: dict[str, str] | None = None) -> Node:
    texts = (f"198.18.0.{10 + index}", f"2001:db8:1::{10 + index}")
    addresses = tuple(NodeAddress(type="InternalIP", address=text) for text in texts)
    return Node(
        metadata=ObjectMeta(name=f"node{index}", labels=labels or {}),
        status=NodeStatus(addresses=addresses, conditions=(Condition(type="Ready", status="True" if ready else "Unknown"),)),
    )


def service(*ips: str, policy: str = "Cluster", kind: str = "LoadBalancer", name: str = "web") -> Service:
    ingress = tuple(LoadBalancerIngress(ip=ip) for ip in ips)
    return Service(
        metadata=ObjectMeta(namespace="shop", name=name),
        spec=ServiceSpec(type=kind, external_traffic_policy=policy),
        status=ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress)),
    )


def endpoints(*places: tuple[str, bool | None]) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(namespace="shop", name="web-1", labels={"kubernetes.io/service-name": "web"}),
        endpoints=tuple(
            Endpoint(addresses=("10.244.0.2",), node_name=where, conditions=EndpointConditions(ready=ready))
            for where, ready in places
        ),
    )


def hops(route: Route) -> list[str]:
    return [str(route.via)] if route.via else [str(hop.via) for hop in route.nexthops]


def only(routes: Mapping[IPNetwork, Route]) -> list[list[str]]:
    return [hops(route) for route in routes.values()]


def test_policy_cluster_uses_every_ready_node() -> None:
    nodes = [node(2), node(1), node(3, ready=False), node(4, labels={EXCLUDE_LABEL: ""})]
    routes = plan_routes([service(VIP)], [], nodes)
    assert routes == {
        ip_network(VIP): Route(
            ip_network(VIP),
            nexthops=(NextHop(ip_address("198.18.0.11"), "eth0"), NextHop(ip_address("198.18.0.12"), "eth0")),
        )
    }


def test_policy_local_uses_nodes_with_a_ready_endpoint() -> None:
    pods = endpoints(("node1", None), ("node2", False), ("node3", True), ("", True))
    routes = plan_routes([service(VIP, VIP6, policy="Local")], [pods], [node(1), node(2), node(3)])
    assert only(routes) == [["198.18.0.11", "198.18.0.13"], ["2001:db8:1::11", "2001:db8:1::13"]]


def test_a_single_node_is_a_plain_route_and_none_is_no_route() -> None:
    assert only(plan_routes([service(VIP)], [], [node(1)])) == [["198.18.0.11"]]
    assert only(plan_routes([service(VIP)], [], [])) == []
    assert only(plan_routes([service(VIP, policy="Local")], [endpoints(("node2", True))], [node(1)])) == []


def test_other_services_and_hostnames_have_no_route() -> None:
    by_name = Service(
        metadata=ObjectMeta(namespace="shop", name="named"),
        spec=ServiceSpec(type="LoadBalancer"),
        status=ServiceStatus(load_balancer=LoadBalancerStatus(ingress=(LoadBalancerIngress(hostname="lb.example"),))),
    )
    assert only(plan_routes([service(VIP, kind="ClusterIP"), by_name], [], [node(1)])) == []


tables = st.dictionaries(
    st.sampled_from([ip_network(f"203.0.113.{i}") for i in range(6)]),
    st.sampled_from([ip_address(f"198.18.0.{i}") for i in (11, 12)]),
).map(lambda chosen: {dst: Route(dst, dev="eth0", via=via) for dst, via in chosen.items()})


@given(tables, tables)
def test_changes_lead_from_one_table_to_the_other_and_touch_nothing_else(
    before: dict[IPNetwork, Route], after: dict[IPNetwork, Route]
) -> None:
    table, plan = dict(before), plan_changes(before, after, NS)
    for op in plan:
        assert isinstance(op, SetRoute | DelRoute)
        if isinstance(op, SetRoute):
            assert table.get(op.route.dst) != op.route
            table[op.route.dst] = op.route
        else:
            del table[op.route.dst]
    assert table == after

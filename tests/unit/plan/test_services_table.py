"""Service + slices → ServiceTable: what the case files do not say."""

import ipaddress
from typing import Any

import msgspec
import pytest
from service_cases import FACTS, pod_of

from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import FrontendKind, backend, backend_address, backend_port
from podwire.plan.services_table import (
    cluster_ips_of_others,
    host_port_table,
    pack_address,
    service_table,
    unreadable,
)


def service(**spec: Any) -> Service:
    document = {"metadata": {"name": "web", "namespace": "shop"}, "spec": {"ports": [{"port": 80}], **spec}}
    return msgspec.convert(document, Service)


def piece(family: str, *endpoints: dict[str, Any], port: int = 8080) -> EndpointSlice:
    document = {
        "metadata": {"name": "web-x", "namespace": "shop"},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"port": port}],
    }
    return msgspec.convert(document, EndpointSlice)


def at(*addresses: str, **fields: Any) -> dict[str, Any]:
    return {"addresses": list(addresses), **fields}


def pools(svc: Service, *slices: EndpointSlice) -> dict[str, list[str]]:
    """Frontend's address → its backends' addresses, for traffic from inside."""
    table = service_table(svc, slices, FACTS)
    return {
        str(ipaddress.ip_address(f.address)): [str(ipaddress.ip_address(backend_address(b))) for b in f.inside.backends]
        for f in table.frontends
    }


def test_dual_stack_each_family_has_its_own() -> None:
    dual = service(
        clusterIP="10.96.0.10",
        clusterIPs=["10.96.0.10", "fd00:10:96::a"],
        ipFamilies=["IPv4", "IPv6"],
        type="NodePort",
        ports=[{"port": 80, "nodePort": 30080}],
    )
    slices = (piece("IPv4", at("10.244.1.2")), piece("IPv6", at("fd00:10:244:1::2")))
    assert pools(dual, *slices) == {
        "10.96.0.10": ["10.244.1.2"],
        "198.18.0.11": ["10.244.1.2"],
        "fd00:10:96::a": ["fd00:10:244:1::2"],
        "2001:db8:1::b": ["fd00:10:244:1::2"],
    }


def test_a_pod_of_both_families_is_one_pod_to_the_balancer() -> None:
    dual = service(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=30999, ipFamilies=["IPv4", "IPv6"])
    slices = (
        piece("IPv4", at("10.244.1.2", nodeName="n1"), at("10.244.1.3", nodeName="n1"), at("10.244.2.2", nodeName="n2")),
        piece("IPv6", at("fd00:10:244:1::2", nodeName="n1"), at("fd00:10:244:1::3", nodeName="n1")),
    )
    table = service_table(dual, slices, FACTS)
    assert (table.health_check_port, table.local_ready) == (30999, 2)
    assert service_table(dual, slices[1:], FACTS).local_ready == 2
    assert service_table(dual, (), FACTS).local_ready == 0


def test_single_stack_has_nothing_in_the_other_family() -> None:
    single = service(clusterIP="10.96.0.10", type="NodePort", ports=[{"port": 80, "nodePort": 30080}])
    slices = (piece("IPv4", at("10.244.1.2")), piece("IPv6", at("fd00:10:244:1::2")))
    assert set(pools(single, *slices)) == {"10.96.0.10", "198.18.0.11"}


def test_what_is_no_address_is_left_out() -> None:
    odd = service(clusterIP="10.96.0.10", externalIPs=["nonsense", "2001:db8::1"])
    slices = (piece("IPv4", at("10.244.1.2"), at("not-an-ip"), at(), at("fd00::1")), piece("FQDN", at("example.com")))
    assert pools(odd, *slices) == {"10.96.0.10": ["10.244.1.2"]}


def test_a_protocol_that_nodes_do_not_know_is_left_out() -> None:
    assert pools(service(clusterIP="10.96.0.10", ports=[{"port": 80, "protocol": "DCCP"}])) == {}


def test_a_service_that_has_no_address_yet() -> None:
    assert service_table(service(), (), FACTS).frontends == ()
    assert service_table(service(type="ExternalName", externalName="example.com"), (), FACTS).frontends == ()
    assert service_table(None, (), FACTS).frontends == ()


def test_an_external_ip_that_is_also_the_balancers_counts_once() -> None:
    both = msgspec.structs.replace(
        service(clusterIP="10.96.0.10", type="LoadBalancer", externalIPs=["203.0.113.1"]),
        status=msgspec.convert({"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}, type(Service().status)),
    )
    kinds = [f.kind for f in service_table(both, (), FACTS).frontends]
    assert kinds == [FrontendKind.CLUSTER_IP, FrontendKind.LOAD_BALANCER]


def test_the_order_of_slices_does_not_matter() -> None:
    svc = service(clusterIP="10.96.0.10")
    one, two = piece("IPv4", at("10.244.3.1"), at("10.244.1.1")), piece("IPv4", at("10.244.2.1"))
    assert service_table(svc, (one, two), FACTS) == service_table(svc, (two, one), FACTS)


def test_who_is_listed_twice_is_as_likely_as_the_others() -> None:
    slices = (piece("IPv4", at("10.244.1.2"), at("10.244.2.2")), piece("IPv4", at("10.244.2.2"), at("10.244.2.2")))
    assert pools(service(clusterIP="10.96.0.10"), *slices) == {"10.96.0.10": ["10.244.1.2", "10.244.2.2"]}


def test_only_a_balancers_service_of_policy_local_has_its_health_asked_for() -> None:
    slices = (piece("IPv4", at("10.244.1.2", nodeName="n1")),)
    for spec in ({}, {"type": "NodePort", "externalTrafficPolicy": "Local"}, {"type": "LoadBalancer"}):
        table = service_table(service(clusterIP="10.96.0.10", healthCheckNodePort=30999, **spec), slices, FACTS)
        assert (table.health_check_port, table.local_ready) == (0, 1)


def test_ports_of_containers_that_are_no_host_ports_are_left_out() -> None:
    ports = [
        {"containerPort": 8080},
        {"containerPort": 8081, "hostPort": 81, "protocol": "ICMP"},
        {"containerPort": 8082, "hostPort": 82},
    ]
    table = host_port_table(pod_of({"name": "edge", "ip": "10.244.1.9", "ports": ports}), FACTS)
    assert [(f.port, [backend_port(b) for b in f.inside.backends]) for f in table.frontends] == [(82, [8082])]
    assert table.local_addresses == {bytes((10, 244, 1, 9))}
    nothing = host_port_table(pod_of({"name": "edge", "ip": "10.244.1.9", "ports": ports[:2]}), FACTS)
    assert (nothing.frontends, nothing.local_addresses) == ((), frozenset())


def test_addresses_and_backends_are_packed() -> None:
    assert pack_address("10.244.1.2") == bytes((10, 244, 1, 2))
    assert pack_address("::1") == bytes(15) + b"\1"
    for wrong in ("", "10.0.0", "10.0.0.256", " 10.0.0.1", "10.0.0.1.", "::g", "a.b.c.d", "1.2.3.4.5"):
        assert pack_address(wrong) is None, wrong
    packed = backend(bytes((10, 244, 1, 2)), 8080)
    assert (backend_address(packed), backend_port(packed)) == (bytes((10, 244, 1, 2)), 8080)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("010.000.00.08", "10.0.0.8"),
        ("::ffff:010.0.0.1", "::ffff:10.0.0.1"),
        ("0010.0.0.255", "10.0.0.255"),
        ("fd00::0010", "fd00::10"),
    ],
)
def test_leading_zeros_make_no_octal_number(text: str, plain: str) -> None:
    assert pack_address(text) == ipaddress.ip_address(plain).packed


@pytest.mark.parametrize("text", ["", "None", "0256.0.0.1", "10.0.0", "10..0.1", "10.0.0.", "10.0.0.0x1", "0.0.0.-1"])
def test_what_is_no_address_is_none_with_leading_zeros_either(text: str) -> None:
    assert pack_address(text) is None


def test_what_cannot_be_read_of_a_service_is_named() -> None:
    odd = service(
        clusterIP="10.96.0.10",
        externalIPs=["nonsense", "010.0.0.1"],
        loadBalancerSourceRanges=["010.0.0.0/8", "10.0.0/8", " 10.0.0.0/8"],
    )
    assert unreadable(odd) == ("externalIPs: 'nonsense'", "loadBalancerSourceRanges: '10.0.0/8'")
    assert unreadable(service(clusterIP="None")) == unreadable(service()) == ()


def test_another_proxys_cluster_ips_are_told_apart() -> None:
    labels = {"service.kubernetes.io/service-proxy-name": "other"}
    theirs = service(clusterIP="10.96.0.11", clusterIPs=["10.96.0.11", "fd00:10:96::b"])
    theirs = msgspec.structs.replace(theirs, metadata=msgspec.structs.replace(theirs.metadata, labels=labels))
    found = cluster_ips_of_others([service(clusterIP="10.96.0.10"), theirs, service(clusterIP="None")])
    assert found == {ipaddress.ip_address(ip).packed for ip in ("10.96.0.11", "fd00:10:96::b")}

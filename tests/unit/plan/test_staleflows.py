import ipaddress

import msgspec

from podwire.model.addr import IPAddress
from podwire.model.flow import DST_NAT, Flow, FlowTuple
from podwire.model.objects import Endpoint, EndpointConditions, EndpointPort, EndpointSlice
from podwire.model.servicetable import Frontend, FrontendKind, Pool, ServiceTable, backend
from podwire.plan.services_maps import frontend_key
from podwire.plan.staleflows import StaleFlows, serving_endpoints

CLIENT = ipaddress.ip_address("10.244.1.9")
DNS = ipaddress.ip_address("10.96.0.10")
OTHER = ipaddress.ip_address("198.18.0.11")
ONE, TWO, THREE = (ipaddress.ip_address(f"10.244.2.{n}") for n in (1, 2, 3))


def table(*endpoints: object, protocol: int = 17, port: int = 5353, at: IPAddress = DNS) -> ServiceTable:
    pool = Pool(tuple(backend(ipaddress.ip_address(str(ip)).packed, port) for ip in endpoints))
    return ServiceTable((Frontend(at.packed, protocol, 53, FrontendKind.CLUSTER_IP, pool),))


def flow(endpoint: object, protocol: int = 17, port: int = 53, at: IPAddress = DNS) -> Flow:
    target = ipaddress.ip_address(str(endpoint))
    original = FlowTuple(CLIENT, at, protocol, 4000, port)
    return Flow(original, FlowTuple(target, CLIENT, protocol, 5353, 4000), status=DST_NAT)


def test_only_connections_to_endpoints_that_are_gone_go() -> None:
    stale = StaleFlows()
    stale.note(table(ONE, TWO), table(TWO))
    assert stale
    assert stale.matches(flow(ONE))
    assert not stale.matches(flow(TWO))
    assert not stale.matches(flow(ONE, protocol=6))
    assert not stale.matches(flow(ONE, port=54))


def test_a_service_without_endpoints_or_gone_keeps_none() -> None:
    for after in (table(), ServiceTable()):
        stale = StaleFlows()
        stale.note(table(ONE), after)
        assert stale.matches(flow(ONE))


def test_connections_from_before_the_service_had_endpoints_go() -> None:
    stale = StaleFlows()
    stale.note(ServiceTable(), table(ONE))
    assert stale.matches(flow(DNS))  # never translated: the answer would come from the Service's own address
    assert not stale.matches(flow(ONE))


def test_an_endpoint_that_terminates_but_serves_keeps_its_clients() -> None:
    ending = Endpoint(addresses=(str(ONE),), conditions=EndpointConditions(ready=False, serving=True, terminating=True))
    stale = StaleFlows()
    stale.note(
        table(ONE, TWO), table(TWO), [EndpointSlice(endpoints=(ending,), ports=(EndpointPort(port=5353, protocol="UDP"),))]
    )
    assert not stale.matches(flow(ONE))


def test_nothing_is_noted_where_nothing_changed_or_all_is_tcp() -> None:
    stale = StaleFlows()
    stale.note(table(ONE), table(ONE))
    stale.note(table(ONE, protocol=6), table(TWO, protocol=6))
    assert not stale


def test_what_could_not_be_done_is_kept_but_newer_wins() -> None:
    stale = StaleFlows()
    stale.note(table(ONE), table())
    taken = stale.take()
    assert not stale
    stale.note(table(), table(ONE))
    stale.restore(taken)
    assert not stale.matches(flow(ONE))


def test_what_could_not_be_done_is_done_later() -> None:
    stale = StaleFlows()
    stale.note(table(ONE, TWO), table(TWO))
    stale.note_all([ipaddress.ip_network("10.96.0.0/12")])
    taken = stale.take()
    stale.note(table(TWO, at=OTHER), table(at=OTHER))
    stale.restore(taken)
    assert stale.matches(flow(ONE))
    assert not stale.matches(flow(TWO)), "by its endpoints, though it lies in the ranges"
    assert stale.matches(flow(ONE, port=54)), "and so are those to Services that went before"
    assert stale.matches(flow(TWO, at=OTHER))
    retaken = stale.take()
    stale.note_all([ipaddress.ip_network("10.112.0.0/16")])
    stale.restore(retaken)
    assert not stale.matches(flow(ONE, port=54)), "ranges that were noted since are newer"


def test_endpoints_for_those_outside_keep_their_connections() -> None:
    """Where externalTrafficPolicy sends clients outside to other endpoints than those inside."""

    def both(*outside: object) -> ServiceTable:
        (frontend,) = table(ONE).frontends
        return ServiceTable((msgspec.structs.replace(frontend, outside=table(*outside).frontends[0].inside),))

    stale = StaleFlows()
    stale.note(both(TWO, THREE), both(TWO))
    assert not stale.matches(flow(ONE))
    assert not stale.matches(flow(TWO))
    assert stale.matches(flow(THREE))


def test_whoever_has_the_address_in_the_end_keeps_its_clients() -> None:
    stale = StaleFlows()
    stale.note(table(ONE), ServiceTable())
    (other,) = table(ONE, TWO).frontends
    asked: list[bytes] = []

    def served_at(key: bytes) -> Frontend | None:
        asked.append(key)
        return other

    stale.settle(served_at)
    assert asked == [frontend_key(other)]
    assert not stale.matches(flow(ONE))
    assert not stale.matches(flow(TWO))
    assert stale.matches(flow(THREE))
    stale.note(table(ONE), table(TWO))
    stale.settle(lambda key: None)
    assert not stale.matches(flow(TWO)), "as far as is known"
    assert stale.matches(flow(ONE))


def test_ranges_alone_are_worth_a_look() -> None:
    stale = StaleFlows()
    stale.note_all(iter([ipaddress.ip_network("10.96.0.0/12")]))
    assert stale
    assert stale.matches(flow(ONE))
    assert stale.matches(flow(TWO)), "each of many"


def test_serving_follows_ready_where_it_is_not_said() -> None:
    def endpoint(number: int, **conditions: bool) -> Endpoint:
        return Endpoint(addresses=(f"10.0.0.{number}",), conditions=EndpointConditions(**conditions))

    part = EndpointSlice(
        endpoints=(endpoint(1), endpoint(2, ready=False), endpoint(3, ready=False, serving=True)),
        ports=(
            EndpointPort(name="dns", port=53, protocol="UDP"),
            EndpointPort(name="dns-tcp", port=53),
            EndpointPort(name="any", protocol="UDP"),  # every port: nobody's in particular
        ),
    )
    odd = EndpointSlice(endpoints=(Endpoint(addresses=("example.com",)),), ports=part.ports)
    expected = frozenset(backend(ipaddress.ip_address(f"10.0.0.{n}").packed, 53) for n in (1, 3))
    assert serving_endpoints([part, odd]) == {"dns": expected}


def test_an_endpoint_whose_port_changed_is_another() -> None:
    stale = StaleFlows()
    stale.note(table(ONE, port=5353), table(ONE, port=9999))
    assert stale.matches(flow(ONE))


def test_what_was_served_before_and_is_no_more_keeps_none() -> None:
    """Node ports and balancers' addresses of Services that went while nobody looked."""
    stale = StaleFlows()
    stale.note(ServiceTable(), table(ONE))
    node = ipaddress.ip_address("198.18.0.11")
    stale.note_all((), [(DNS.packed, 53), (node.packed, 30053)])
    gone = FlowTuple(CLIENT, node, 17, 4000, 30053)
    assert stale.matches(Flow(gone, FlowTuple(ONE, CLIENT, 17, 5353, 4000), status=DST_NAT))
    assert not stale.matches(flow(ONE)), "what is planned is told by its endpoints"
    assert not stale.matches(Flow(gone._replace(dport=30054), FlowTuple(ONE, CLIENT, 17, 5353, 4000), status=DST_NAT))


def test_at_the_start_connections_to_services_that_are_gone_go() -> None:
    stale = StaleFlows()
    stale.note(ServiceTable(), table(ONE))
    stale.note_all([ipaddress.ip_network("10.96.0.0/12")])
    assert not stale.matches(flow(ONE))
    assert stale.matches(flow(ONE, port=54))
    assert not stale.matches(flow(ONE, port=54, protocol=6))
    taken = stale.take()
    assert not stale
    assert not stale.matches(flow(ONE, port=54))
    stale.restore(taken)
    assert stale.matches(flow(ONE, port=54))
    elsewhere = StaleFlows()
    elsewhere.note_all([ipaddress.ip_network("10.112.0.0/16")])
    assert not elsewhere.matches(flow(ONE))


def test_at_the_start_connections_to_another_proxys_services_stay() -> None:
    stale = StaleFlows()
    stale.note_all([ipaddress.ip_network("10.96.0.0/12")], others=frozenset((DNS.packed,)))
    assert not stale.matches(flow(ONE))
    assert stale.matches(flow(ONE, at=ipaddress.ip_address("10.96.0.11")))
    taken = stale.take()
    stale.restore(taken)
    assert not taken.matches(flow(ONE))
    assert not stale.matches(flow(ONE))

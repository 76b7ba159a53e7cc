"""New connections by Service and by endpoint, as metrics: what a back end's kernel has counted, put to names."""

import socket
from collections.abc import Iterator, Mapping

from podwire.agent.exposition import Samples, family
from podwire.agent.proxymodes.port import Connections
from podwire.model.ids import ObjectKey
from podwire.model.servicetable import Frontend, ServiceTable, backend_address, backend_port
from podwire.plan.services_maps import frontend_key
from podwire.plan.services_table import LOOPBACK

_PROTOCOLS = {6: "TCP", 17: "UDP", 132: "SCTP"}


def service_connections(counted: Connections, tables: Mapping[ObjectKey, ServiceTable]) -> str:
    """Connections by Service and frontend."""
    samples: Samples = [
        (_labels(service, frontend), counted.frontends[key])
        for service, frontend, key in _frontends(tables)
        if key in counted.frontends
    ]
    return family("podwire_service_connections_total", "counter", "New connections to a Service's addresses.", samples)


def localhost_connections(counted: Connections, tables: Mapping[ObjectKey, ServiceTable]) -> str:
    """kube-proxy's metric of its iptables mode: who still relies on node ports at 127.0.0.1."""
    count = sum(counted.frontends.get(key, 0) for _, frontend, key in _frontends(tables) if frontend.address == LOOPBACK)
    name = "kubeproxy_iptables_localhost_nodeports_accepted_packets_total"
    return family(name, "counter", "Connections to node ports on 127.0.0.1.", [({}, count)])


def invalid_packets(counted: Connections) -> str:
    """kube-proxy's metric of its iptables mode."""
    name = "kubeproxy_iptables_ct_state_invalid_dropped_packets_total"
    return family(name, "counter", "Forwarded packets of no known connection.", [({}, counted.invalid_dropped)])


def endpoint_connections(counted: Connections, tables: Mapping[ObjectKey, ServiceTable]) -> str:
    """Connections by Service, frontend and endpoint."""
    samples = []
    for service, frontend, key in _frontends(tables):
        for packed in dict.fromkeys(frontend.backends):
            endpoint = f"{_address(backend_address(packed))}:{backend_port(packed)}"
            samples.append(({**_labels(service, frontend), "endpoint": endpoint}, counted.endpoints.get((key, packed), 0)))
    return family("podwire_endpoint_connections_total", "counter", "New connections to an endpoint.", samples)


def _frontends(tables: Mapping[ObjectKey, ServiceTable]) -> Iterator[tuple[ObjectKey, Frontend, bytes]]:
    for service, table in sorted(tables.items()):
        for frontend in table.frontends:
            yield service, frontend, frontend_key(frontend)


def _labels(key: ObjectKey, frontend: Frontend) -> dict[str, str]:
    return {
        "namespace": key.namespace,
        "service": key.name,
        "port_name": frontend.port_name,
        "protocol": _PROTOCOLS.get(frontend.protocol, str(frontend.protocol)),
        "kind": frontend.kind.value,
        "address": f"{_address(frontend.address)}:{frontend.port}",
    }


def _address(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET, packed) if len(packed) == 4 else f"[{socket.inet_ntop(socket.AF_INET6, packed)}]"

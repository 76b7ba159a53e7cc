"""The Services that benchmarks are made with, as API documents: number n has five endpoints, on nodes that have some hundred
pods each, as the 500 nodes would that 50,000 endpoints need."""

import ipaddress
from typing import Any, NamedTuple

import msgspec

from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import NodeFacts

ENDPOINTS = 5
NODE = "node-1"
"""The node that is planned for."""
_PODS_PER_NODE = 100

FACTS = NodeFacts(
    name=NODE,
    node_ips=(ipaddress.ip_address("198.18.0.11"),),
    pod_cidrs=(ipaddress.ip_network("10.244.1.0/24"),),
    cluster_cidrs=(ipaddress.ip_network("10.244.0.0/16"),),
    service_cidrs=(ipaddress.ip_network("10.96.0.0/12"),),
)


class Item(NamedTuple):
    key: ObjectKey
    service: Service
    piece: EndpointSlice


def item(number: int) -> Item:
    """Service number `number` and its slice, decoded from JSON as a watch would."""
    decoded = msgspec.json.decode(msgspec.json.encode(service_object(number)), type=Service)
    piece = msgspec.json.decode(msgspec.json.encode(slice_object(number)), type=EndpointSlice)
    return Item(decoded.key, decoded, piece)


def service_object(number: int) -> dict[str, Any]:
    address = cluster_ip(number)
    return {
        "metadata": {"name": f"web-{number}", "namespace": "shop", "uid": f"uid-{number}", "resourceVersion": "1"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
        },
    }


def slice_object(number: int) -> dict[str, Any]:
    first = ipaddress.ip_address("10.244.0.2") + number * ENDPOINTS
    ready = {"ready": True, "serving": True, "terminating": False}
    endpoints = [
        {"addresses": [str(first + n)], "nodeName": f"node-{(number * ENDPOINTS + n) // _PODS_PER_NODE}", "conditions": ready}
        for n in range(ENDPOINTS)
    ]
    name = f"web-{number}"
    labels = {"kubernetes.io/service-name": name}
    return {
        "metadata": {"name": f"{name}-x", "namespace": "shop", "labels": labels, "resourceVersion": "1"},
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def cluster_ip(number: int) -> str:
    return str(ipaddress.ip_address("10.96.0.16") + number)

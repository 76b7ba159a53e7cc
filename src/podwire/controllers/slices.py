"""A Service and its pods → the EndpointSlices they need, with as few writes as possible. Pure.

Follows kube-controller-manager's EndpointSlice controller: endpoints that share their resolved ports (and address family)
share slices of at most 100; a slice is only rewritten if its content changes; a Service without endpoints has one empty slice
a family.
"""

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from podwire.controllers.documents import SliceDoc, owner_reference
from podwire.model.meta import Json
from podwire.model.objects import Pod, Service, ServicePort
from podwire.model.resources import ENDPOINTSLICES, SERVICES

MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
MANAGER = "endpointslice-controller.k8s.io"
SERVICE_NAME = "kubernetes.io/service-name"
HEADLESS = "service.kubernetes.io/headless"
LAST_CHANGE = "endpoints.kubernetes.io/last-change-trigger-time"
ZONE = "topology.kubernetes.io/zone"
MAX_ENDPOINTS = 100

Ports = tuple[tuple[tuple[str, Any], ...], ...]
"""A slice's ports as a value that can be compared and hashed: each port's fields, sorted."""


@dataclass(slots=True)
class SliceWrites:
    """What to do. `update` pairs a slice as it is with the merge patch that makes it right."""

    create: list[Json] = field(default_factory=list)
    update: list[tuple[SliceDoc, Json]] = field(default_factory=list)
    delete: list[SliceDoc] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.create or self.update or self.delete)


def plan_slices(
    service: Service, pods: Iterable[Pod], existing: Iterable[SliceDoc], zones: Mapping[str, str], triggered: str
) -> SliceWrites:
    """`pods` are those that the selector matches, `existing` the Service's slices that this controller manages.

    `zones` maps node → zone; `triggered` is the time of the change that led here, for the last-change annotation.
    """
    writes = SliceWrites()
    mine: list[SliceDoc] = []
    for item in existing:
        owner = item.metadata.controller
        stale = owner is not None and owner.uid != service.metadata.uid
        (writes.delete if stale or item.address_type not in families(service) else mine).append(item)
    listed = sorted(pods, key=lambda pod: pod.key)
    for family in families(service):
        wanted: dict[Ports, dict[str, Json]] = {}
        for pod in listed:
            endpoint = endpoint_of(service, pod, family, zones)
            if endpoint is not None:
                ports = resolved_ports(service, pod)
                wanted.setdefault(ports, {})[endpoint["addresses"][0]] = endpoint
        if not wanted:
            wanted[()] = {}
        _plan_family(service, family, wanted, [s for s in mine if s.address_type == family], writes, triggered)
    return writes


def families(service: Service) -> tuple[str, ...]:
    """`IPv4`, `IPv6` in the Service's order."""
    if service.spec.ip_families:
        return service.spec.ip_families
    addresses = [ip for ip in service.spec.cluster_ips or (service.spec.cluster_ip,) if ip and ip != "None"]
    return tuple(f"IPv{ipaddress.ip_address(ip).version}" for ip in addresses) or ("IPv4",)


def endpoint_of(service: Service, pod: Pod, family: str, zones: Mapping[str, str]) -> Json | None:
    """The pod as an endpoint; None for a pod that has ended or has no address of that family."""
    version = 4 if family == "IPv4" else 6
    address = next((ip for ip in pod.ips if ipaddress.ip_address(ip).version == version), None)
    if address is None or pod.finished:
        return None
    terminating = pod.metadata.deletion_timestamp is not None
    publish = service.spec.publish_not_ready_addresses
    endpoint: Json = {
        "addresses": [address],
        "conditions": {
            "ready": publish or (pod.ready and not terminating),
            "serving": publish or pod.ready,
            "terminating": terminating,
        },
        "targetRef": {
            "kind": "Pod",
            "namespace": pod.metadata.namespace,
            "name": pod.metadata.name,
            "uid": pod.metadata.uid,
        },
    }
    if pod.spec.node_name:
        endpoint["nodeName"] = pod.spec.node_name
        if zone := zones.get(pod.spec.node_name):
            endpoint["zone"] = zone
    if hints := _hints(service, endpoint):
        endpoint["hints"] = hints
    if pod.spec.hostname and pod.spec.subdomain == service.metadata.name:
        endpoint["hostname"] = pod.spec.hostname
    return endpoint


def _hints(service: Service, endpoint: Json) -> Json:
    """Service.spec.trafficDistribution: whom a Ready endpoint is meant for, its own zone or node first."""
    if not endpoint["conditions"]["ready"]:
        return {}
    hints: Json = {}
    wish = service.spec.traffic_distribution
    if wish in ("PreferClose", "PreferSameZone", "PreferSameNode") and "zone" in endpoint:
        hints["forZones"] = [{"name": endpoint["zone"]}]
    if wish == "PreferSameNode" and "nodeName" in endpoint:
        hints["forNodes"] = [{"name": endpoint["nodeName"]}]
    return hints


def resolved_ports(service: Service, pod: Pod) -> Ports:
    """The Service's ports as this pod has them; a port whose name the pod does not know is left out."""
    ports: list[tuple[tuple[str, Any], ...]] = []
    for port in service.spec.ports:
        number = _target_number(port, pod)
        if number is None:
            continue
        fields: Json = {"name": port.name, "port": number, "protocol": port.protocol}
        if port.app_protocol is not None:
            fields["appProtocol"] = port.app_protocol
        ports.append(tuple(sorted(fields.items())))
    return tuple(sorted(ports))


def _target_number(port: ServicePort, pod: Pod) -> int | None:
    target = port.target_port
    if isinstance(target, int):
        return target or port.port
    if not target:
        return port.port
    sidecars = tuple(c for c in pod.spec.init_containers if c.restart_policy == "Always")
    for container in pod.spec.containers + sidecars:
        for candidate in container.ports:
            if candidate.name == target and candidate.protocol == port.protocol:
                return candidate.container_port
    return None


def _plan_family(
    service: Service,
    family: str,
    wanted: Mapping[Ports, dict[str, Json]],
    existing: Sequence[SliceDoc],
    writes: SliceWrites,
    triggered: str,
) -> None:
    by_ports: dict[Ports, list[SliceDoc]] = {}
    for item in existing:
        by_ports.setdefault(_ports_of(item), []).append(item)
    spare = [item for ports, items in by_ports.items() if ports not in wanted for item in items]
    for ports, endpoints in wanted.items():
        unused = list(by_ports.get(ports, ()))
        for content, present in _distribute(endpoints, tuple(unused)):
            target = present
            if present is not None:
                unused.remove(present)
            elif spare:
                # A slice whose ports have all changed is rewritten, not deleted beside a new one: watchers see one step.
                target = spare.pop()
            _write_slice(service, family, (ports, content), target, writes, triggered)
        writes.delete += unused
    writes.delete += spare


def _distribute(wanted: Mapping[str, Json], existing: Sequence[SliceDoc]) -> list[tuple[list[Json], SliceDoc | None]]:
    """Spread endpoints over slices: where each is already it stays; new ones fill slices that change anyway, then one with
    room for all the rest, then new slices. Slices left without endpoints are not in the result (one is kept if all are)."""
    kept: list[tuple[list[Json], SliceDoc, bool]] = []
    left = dict(wanted)
    for item in existing:
        stay = [left.pop(e["addresses"][0]) for e in item.endpoints if e["addresses"][0] in left]
        kept.append((stay, item, stay != list(item.endpoints)))
    rest = list(left.values())
    for stay, _, changed in kept:
        if changed and stay:
            room = MAX_ENDPOINTS - len(stay)
            stay += rest[:room]
            rest = rest[room:]
    if rest:
        for stay, _, _ in sorted(kept, key=lambda entry: -len(entry[0])):
            if len(stay) + len(rest) <= MAX_ENDPOINTS:
                stay += rest
                rest = []
                break
    result: list[tuple[list[Json], SliceDoc | None]] = [(stay, item) for stay, item, _ in kept if stay]
    while rest:
        reusable = next((item for stay, item, _ in kept if not stay and all(item is not r for _, r in result)), None)
        result.append((rest[:MAX_ENDPOINTS], reusable))
        rest = rest[MAX_ENDPOINTS:]
    if not result:
        result.append(([], existing[0] if existing else None))
    return result


def _ports_of(item: SliceDoc) -> Ports:
    normal = ({"name": "", "protocol": "TCP"} | port for port in item.ports)
    return tuple(sorted(tuple(sorted(port.items())) for port in normal))


def _write_slice(
    service: Service,
    family: str,
    content: tuple[Ports, list[Json]],
    item: SliceDoc | None,
    writes: SliceWrites,
    triggered: str,
) -> None:
    ports, endpoints = content
    labels = _labels(service)
    port_documents = [dict(port) for port in ports]
    if item is None:
        meta: Json = {
            "generateName": f"{service.metadata.name}-",
            "namespace": service.metadata.namespace,
            "labels": labels,
            "annotations": {LAST_CHANGE: triggered},
            "ownerReferences": [owner_reference(SERVICES, service.metadata)],
        }
        head: Json = {"apiVersion": ENDPOINTSLICES.api_version, "kind": "EndpointSlice", "metadata": meta}
        writes.create.append(head | {"addressType": family, "endpoints": endpoints, "ports": port_documents})
        return
    if list(item.endpoints) == endpoints and _ports_of(item) == ports and item.metadata.labels == labels:
        return
    gone: Json = {key: None for key in item.metadata.labels if key not in labels}
    patch_meta: Json = {
        "resourceVersion": item.metadata.resource_version,
        "labels": gone | labels,
        "annotations": {LAST_CHANGE: triggered},
    }
    writes.update.append((item, {"metadata": patch_meta, "endpoints": endpoints, "ports": port_documents}))


def _labels(service: Service) -> dict[str, str]:
    """The Service's own labels, and those by which slices are found."""
    labels = {key: value for key, value in service.metadata.labels.items() if key not in (MANAGED_BY, SERVICE_NAME, HEADLESS)}
    labels |= {SERVICE_NAME: service.metadata.name, MANAGED_BY: MANAGER}
    if service.headless:
        labels[HEADLESS] = ""
    return labels

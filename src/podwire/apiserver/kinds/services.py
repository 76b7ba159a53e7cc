"""Service and EndpointSlice. Address and port allocation is in allocation.py."""

from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import AGE, NAME, STATUS, Column, Kind
from podwire.apiserver.tables import age, labels_cell
from podwire.model import resources
from podwire.model.meta import Json


class ServiceKind(Kind):
    resource = resources.SERVICES
    message = "k8s.io.api.core.v1.Service"
    short_names = ("svc",)
    categories = ("all",)
    subresources = (STATUS,)
    columns = (
        NAME,
        Column("Type", "type determines how the Service is exposed."),
        Column("Cluster-IP", "The address of the Service inside the cluster."),
        Column("External-IP", "Addresses at which the Service is reached from outside."),
        Column("Port(s)", "The ports that the Service exposes, with their node ports."),
        AGE,
        Column("Selector", "Labels of the pods that traffic goes to.", priority=1),
    )

    def selectable_fields(self, obj: Json) -> dict[str, str]:
        spec = obj.get("spec") or {}
        fields = {"spec.clusterIP": spec.get("clusterIP", ""), "spec.type": spec.get("type", "")}
        return {**super().selectable_fields(obj), **fields}

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta, spec = obj.get("metadata", {}), obj.get("spec") or {}
        return [
            meta.get("name", ""),
            spec.get("type", ""),
            (spec.get("clusterIPs") or [spec.get("clusterIP")])[0] or "<none>",
            _external(obj),
            ",".join(_port(p) for p in spec.get("ports") or []) or "<none>",
            age(meta.get("creationTimestamp"), now),
            labels_cell(spec.get("selector")),
        ]


def _port(port: Json) -> str:
    node = f":{port['nodePort']}" if port.get("nodePort") else ""
    return f"{port.get('port')}{node}/{port.get('protocol', 'TCP')}"


def _external(obj: Json) -> str:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    given = list(spec.get("externalIPs") or [])
    if spec.get("type") == "ExternalName":
        return str(spec.get("externalName") or "<none>")
    if spec.get("type") != "LoadBalancer":
        return ",".join(given) or "<none>"
    ingress = (status.get("loadBalancer") or {}).get("ingress") or []
    addresses = [i.get("ip") or i.get("hostname") for i in ingress if i.get("ip") or i.get("hostname")]
    return ",".join([*addresses, *given]) or "<pending>"


class EndpointSliceKind(Kind):
    resource = resources.ENDPOINTSLICES
    message = "k8s.io.api.discovery.v1.EndpointSlice"
    columns = (
        NAME,
        Column("AddressType", "addressType specifies the type of address carried by this EndpointSlice."),
        Column("Ports", "ports specifies the list of network ports exposed by each endpoint in this slice."),
        Column("Endpoints", "endpoints is a list of unique endpoints in this slice."),
        AGE,
    )
    counts_generation = True

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta = obj.get("metadata", {})
        addresses = [a for e in obj.get("endpoints") or [] for a in e.get("addresses") or []]
        return [
            meta.get("name", ""),
            obj.get("addressType", ""),
            _few([str(p.get("port")) if p.get("port") else "*" for p in obj.get("ports") or []], "<unset>"),
            _few(addresses, "<unset>"),
            age(meta.get("creationTimestamp"), now),
        ]


def _few(values: list[str], empty: str) -> str:
    """Three at most, and how many more there are."""
    if not values:
        return empty
    more = f" + {len(values) - 3} more..." if len(values) > 3 else ""
    return ",".join(values[:3]) + more

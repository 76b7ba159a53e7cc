"""Service: defaults, what an update keeps, columns. Rules are in servicerules.py, allocation in allocation.py."""

from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import AGE, NAME, STATUS, Column, Kind
from podwire.apiserver.kinds.servicerules import check_ingress, check_ports, check_spec, check_unchanged
from podwire.apiserver.tables import age, labels_cell
from podwire.apiserver.validation import FieldError, Path, dns_1035_label
from podwire.model import resources
from podwire.model.meta import Json

NODE_PORT_TYPES = ("NodePort", "LoadBalancer")


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

    def name_problems(self, name: str) -> list[str]:
        return dns_1035_label(name)

    def initialise(self, obj: Json, now: datetime) -> None:
        obj["status"] = {"loadBalancer": {}}
        spec = obj["spec"]
        if spec.get("clusterIP") and not spec.get("clusterIPs"):
            spec["clusterIPs"] = [spec["clusterIP"]]
        if spec["type"] == "ExternalName":
            for key in ("clusterIP", "clusterIPs"):
                spec.pop(key, None)

    def default(self, obj: Json) -> None:
        spec = obj.setdefault("spec", {})
        kind = spec.setdefault("type", "ClusterIP")
        spec.setdefault("sessionAffinity", "None")
        if spec["sessionAffinity"] == "None":
            spec.pop("sessionAffinityConfig", None)
        elif spec["sessionAffinity"] == "ClientIP":
            client = spec.setdefault("sessionAffinityConfig", {}).setdefault("clientIP", {})
            client.setdefault("timeoutSeconds", 10800)
        for port in spec.get("ports") or []:
            port.setdefault("protocol", "TCP")
            if port.get("targetPort") in (None, 0, ""):
                port["targetPort"] = port.get("port", 0)
        if kind in NODE_PORT_TYPES or (spec.get("externalIPs") and kind == "ClusterIP"):
            spec.setdefault("externalTrafficPolicy", "Cluster")
        if kind != "ExternalName":
            spec.setdefault("internalTrafficPolicy", "Cluster")
        if kind == "LoadBalancer":
            spec.setdefault("allocateLoadBalancerNodePorts", True)

    def retain(self, new: Json, old: Json) -> None:
        after, before = new.setdefault("spec", {}), old.get("spec") or {}
        _keep_allocated(after, before)
        _match_cluster_ips(after, before)
        _drop_dependent(after, before)

    def take_status(self, new: Json, old: Json) -> Json:
        merged = super().take_status(new, old)
        if (old.get("spec") or {}).get("type") != "LoadBalancer":
            merged["status"] = {**(merged.get("status") or {}), "loadBalancer": {}}
        return merged

    def prepare_update(self, new: Json, old: Json, *, subresource: str = "") -> Json:
        merged = super().prepare_update(new, old, subresource=subresource)
        if not subresource and merged["spec"]["type"] != "LoadBalancer" and old["spec"].get("type") == "LoadBalancer":
            merged["status"] = {**(merged.get("status") or {}), "loadBalancer": {}}
        return merged

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        spec = obj.get("spec") or {}
        return check_ports(spec, root / "spec") + check_spec(spec, root / "spec")

    def check_status(self, obj: Json, root: Path) -> list[FieldError]:
        ingress = ((obj.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
        return check_ingress(ingress, root / "status" / "loadBalancer" / "ingress")

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        return check_unchanged(new.get("spec") or {}, old.get("spec") or {}, root / "spec")

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


def _keep_allocated(after: Json, before: Json) -> None:
    """An update that leaves out what was allocated keeps it: addresses, node ports, the health check's port."""
    if "ExternalName" not in (after.get("type"), before.get("type")) and not (
        after.get("clusterIP") or after.get("clusterIPs")
    ):
        for key in ("clusterIP", "clusterIPs"):
            if before.get(key):
                after[key] = before[key]
    for key in ("ipFamilies", "ipFamilyPolicy"):
        if "ExternalName" not in (after.get("type"), before.get("type")) and not after.get(key) and before.get(key):
            after[key] = before[key]
    if after.get("type") in NODE_PORT_TYPES and before.get("type") in NODE_PORT_TYPES:
        known = {(p.get("protocol", "TCP"), p.get("port")): p.get("nodePort") for p in before.get("ports") or []}
        taken = {p.get("nodePort") for p in after.get("ports") or []}
        for port in after.get("ports") or []:
            node_port = known.get((port.get("protocol", "TCP"), port.get("port")))
            if node_port and not port.get("nodePort") and node_port not in taken:
                port["nodePort"] = node_port
    if _has_health_port(after) and _has_health_port(before) and before.get("healthCheckNodePort"):
        after.setdefault("healthCheckNodePort", before["healthCheckNodePort"])


def _has_health_port(spec: Json) -> bool:
    return spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"


def _match_cluster_ips(after: Json, before: Json) -> None:
    """clusterIP is clusterIPs[0]; whoever knows only the one changes only the one."""
    one, many = after.get("clusterIP", ""), list(after.get("clusterIPs") or [])
    if one != before.get("clusterIP", "") and many == list(before.get("clusterIPs") or []):
        many = [one, *many[1:]] if one else []
    elif one and not many:
        many = [one]
    elif not one and many and not before.get("clusterIP"):
        one = many[0]
    for key, value in (("clusterIP", one), ("clusterIPs", many)):
        if value:
            after[key] = value
        else:
            after.pop(key, None)


def _drop_dependent(after: Json, before: Json) -> None:
    """A change of type drops what only the old type had, unless the client set it anew."""
    kind, was = after.get("type", "ClusterIP"), before.get("type", "ClusterIP")
    if was != "ExternalName" and kind == "ExternalName":
        for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
            if after.get(key) == before.get(key):
                after.pop(key, None)
    if was == "ExternalName" and kind != "ExternalName" and after.get("externalName") == before.get("externalName"):
        after.pop("externalName", None)
    if was in NODE_PORT_TYPES and kind not in NODE_PORT_TYPES:
        old_ports = {p.get("nodePort") for p in before.get("ports") or []}
        for port in after.get("ports") or []:
            if port.get("nodePort") in old_ports:
                port.pop("nodePort", None)
        if not after.get("externalIPs") and after.get("externalTrafficPolicy") == before.get("externalTrafficPolicy"):
            after.pop("externalTrafficPolicy", None)
    same = after.get("healthCheckNodePort") == before.get("healthCheckNodePort")
    if same and _has_health_port(before) and not _has_health_port(after):
        after.pop("healthCheckNodePort", None)
    if was == "LoadBalancer" and kind != "LoadBalancer":
        for key in ("allocateLoadBalancerNodePorts", "loadBalancerClass"):
            if after.get(key) == before.get(key):
                after.pop(key, None)


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

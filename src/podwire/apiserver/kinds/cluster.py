"""Namespace, Node, Lease."""

from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import AGE, NAME, STATUS, Column, Kind, Subresource
from podwire.apiserver.tables import age, join
from podwire.apiserver.validation import FieldError, Path, cidr, dns_label, each, forbidden, invalid, one_of, required
from podwire.model import resources
from podwire.model.meta import Json

NAMESPACE_LABEL = "kubernetes.io/metadata.name"
ROLE_LABEL = "node-role.kubernetes.io/"


class NamespaceKind(Kind):
    resource = resources.NAMESPACES
    message = "k8s.io.api.core.v1.Namespace"
    short_names = ("ns",)
    subresources = (STATUS, Subresource("finalize", ("update",)))
    columns = (NAME, Column("Status", "The status of the namespace"), AGE)
    verbs = ("create", "delete", "get", "list", "patch", "update", "watch")

    def name_problems(self, name: str) -> list[str]:
        return dns_label(name)

    def initialise(self, obj: Json, now: datetime) -> None:
        obj["status"] = {"phase": "Active"}
        finalizers = obj.setdefault("spec", {}).setdefault("finalizers", [])
        if "kubernetes" not in finalizers:
            finalizers.append("kubernetes")

    def default(self, obj: Json) -> None:
        meta = obj.setdefault("metadata", {})
        if meta.get("name"):
            meta["labels"] = {**(meta.get("labels") or {}), NAMESPACE_LABEL: meta["name"]}

    def retain(self, new: Json, old: Json) -> None:
        new["spec"] = {**(new.get("spec") or {}), "finalizers": (old.get("spec") or {}).get("finalizers", [])}

    def selectable_fields(self, obj: Json) -> dict[str, str]:
        phase = (obj.get("status") or {}).get("phase", "")
        return {**super().selectable_fields(obj), "status.phase": phase}

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta = obj.get("metadata", {})
        return [meta.get("name", ""), (obj.get("status") or {}).get("phase", ""), age(meta.get("creationTimestamp"), now)]


class NodeKind(Kind):
    resource = resources.NODES
    message = "k8s.io.api.core.v1.Node"
    short_names = ("no",)
    subresources = (STATUS,)
    columns = (
        NAME,
        Column("Status", "The status of the node"),
        Column("Roles", "The roles of the node"),
        AGE,
        Column("Version", "Kubelet Version reported by the node."),
        Column("Internal-IP", "List of addresses reachable to the node.", priority=1),
        Column("External-IP", "List of addresses reachable to the node.", priority=1),
        Column("OS-Image", "OS Image reported by the node from /etc/os-release.", priority=1),
        Column("Kernel-Version", "Kernel Version reported by the node from 'uname -r'.", priority=1),
        Column("Container-Runtime", "ContainerRuntime Version reported by the node.", priority=1),
    )

    def default(self, obj: Json) -> None:
        spec = obj.setdefault("spec", {})
        if spec.get("podCIDR") and not spec.get("podCIDRs"):
            spec["podCIDRs"] = [spec["podCIDR"]]
        elif spec.get("podCIDRs") and not spec.get("podCIDR"):
            spec["podCIDR"] = spec["podCIDRs"][0]

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        spec, at = obj.get("spec") or {}, root / "spec"
        errors: list[FieldError] = []
        for i, value in enumerate(spec.get("podCIDRs") or []):
            errors += each(at / "podCIDRs" @ i, value, cidr(str(value)))
        if spec.get("podCIDRs") and spec.get("podCIDR") != spec["podCIDRs"][0]:
            errors.append(invalid(at / "podCIDRs" @ 0, spec["podCIDRs"][0], "must match `podCIDR`"))
        for i, taint in enumerate(spec.get("taints") or []):
            if not taint.get("key"):
                errors.append(required(at / "taints" @ i / "key"))
            effects = ("NoSchedule", "PreferNoSchedule", "NoExecute")
            errors += one_of(at / "taints" @ i / "effect", taint.get("effect", ""), effects)
        return errors

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        before, after = (old.get("spec") or {}), (new.get("spec") or {})
        errors: list[FieldError] = []
        if before.get("podCIDRs") and before["podCIDRs"] != after.get("podCIDRs"):
            text = 'node updates may not change podCIDR except from "" to valid'
            errors.append(forbidden(root / "spec" / "podCIDRs", text))
        if before.get("providerID") and before["providerID"] != after.get("providerID"):
            text = 'node updates may not change providerID except from "" to valid'
            errors.append(forbidden(root / "spec" / "providerID", text))
        return errors

    def selectable_fields(self, obj: Json) -> dict[str, str]:
        unschedulable = "true" if (obj.get("spec") or {}).get("unschedulable") else "false"
        return {**super().selectable_fields(obj), "spec.unschedulable": unschedulable}

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta, spec, status = obj.get("metadata", {}), obj.get("spec") or {}, obj.get("status") or {}
        info = status.get("nodeInfo") or {}
        return [
            meta.get("name", ""),
            _node_status(spec, status),
            join(_roles(meta.get("labels") or {})),
            age(meta.get("creationTimestamp"), now),
            info.get("kubeletVersion", ""),
            _address(status, "InternalIP"),
            _address(status, "ExternalIP"),
            info.get("osImage") or "<unknown>",
            info.get("kernelVersion") or "<unknown>",
            info.get("containerRuntimeVersion") or "<unknown>",
        ]


def _node_status(spec: Json, status: Json) -> str:
    ready = next((c for c in status.get("conditions") or [] if c.get("type") == "Ready"), None)
    words = ["Unknown" if ready is None else "Ready" if ready.get("status") == "True" else "NotReady"]
    if spec.get("unschedulable"):
        words.append("SchedulingDisabled")
    return ",".join(words)


def _roles(labels: Json) -> list[str]:
    roles = {key.removeprefix(ROLE_LABEL) for key in labels if key.startswith(ROLE_LABEL) and key != ROLE_LABEL}
    if labels.get("kubernetes.io/role"):
        roles.add(labels["kubernetes.io/role"])
    return sorted(roles)


def _address(status: Json, kind: str) -> str:
    return next((a.get("address", "") for a in status.get("addresses") or [] if a.get("type") == kind), "<none>")


class LeaseKind(Kind):
    resource = resources.LEASES
    message = "k8s.io.api.coordination.v1.Lease"
    columns = (NAME, Column("Holder", "holderIdentity contains the identity of the holder of a current lease."), AGE)

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        spec, at = obj.get("spec") or {}, root / "spec"
        errors: list[FieldError] = []
        duration = spec.get("leaseDurationSeconds")
        if duration is not None and duration <= 0:
            errors.append(invalid(at / "leaseDurationSeconds", duration, "must be greater than 0"))
        transitions = spec.get("leaseTransitions")
        if transitions is not None and transitions < 0:
            errors.append(invalid(at / "leaseTransitions", transitions, "must be greater than or equal to 0"))
        return errors

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta = obj.get("metadata", {})
        holder = (obj.get("spec") or {}).get("holderIdentity") or ""
        return [meta.get("name", ""), holder, age(meta.get("creationTimestamp"), now)]


__all__ = ["LeaseKind", "NamespaceKind", "NodeKind"]

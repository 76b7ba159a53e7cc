"""A container of an engine as the Pod that shows it in the API. Pure.

As with a kubelet's static pods: the name ends with the node's, and the annotation kubernetes.io/config.mirror says that the
API only shows it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from podwire.agent.attachrecord import AttachmentRecord
from podwire.model.addr import IPAddress
from podwire.model.cni import LABELS
from podwire.model.meta import Json
from podwire.model.objects import Pod

MIRROR = "kubernetes.io/config.mirror"
CONTAINER, NETWORK = "podwire.io/container", "podwire.io/network"
DEFAULT_NAMESPACE = "default"
FIRST_INTERFACE = "eth0"

_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


@dataclass(frozen=True, slots=True)
class Mirrored:
    """An attachment with its addresses."""

    record: AttachmentRecord
    ips: tuple[IPAddress, ...]


def mirror_uid(pod: Pod) -> str:
    """The uid of what `pod` only shows, an attachment or a kubelet's static pod; empty for a pod that is one."""
    return pod.metadata.annotations.get(MIRROR, "")


def claimed_uid(record: AttachmentRecord) -> str:
    """The uid that the engine says its pod has; a Pod's where a kubelet asked for it, else anything."""
    return record.args.get("K8S_POD_UID", "")


def stands_for(pod: Pod, uid: str) -> bool:
    """Whether `pod` is the one that a kubelet calls `uid`: that of a static pod is in the annotation of its mirror."""
    return bool(uid) and uid in (pod.metadata.uid, mirror_uid(pod))


def namespace_of(record: AttachmentRecord) -> str:
    """The engine's, if it has any: podman says the container's name in its place."""
    return record.namespace if record.namespace and record.namespace != record.name else DEFAULT_NAMESPACE


def name_of(record: AttachmentRecord, node: str) -> str:
    base = record.name or record.container[:12]
    interface = "" if record.ifname == FIRST_INTERFACE else f"-{record.ifname}"
    text = re.sub(r"[^a-z0-9]+", "-", f"{base}{interface}".lower()).strip("-") or "container"
    return f"{text[: 252 - len(node)]}-{node}"


def labels_of(record: AttachmentRecord) -> dict[str, str]:
    """Those that are labels as Kubernetes has them; others cannot be shown."""
    pairs = (entry.strip().partition("=") for entry in record.annotations.get(LABELS, "").split(","))
    given = {key.strip(): value.strip() for key, equals, value in pairs if equals}
    return {key: value for key, value in given.items() if _LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value)}


def pod_document(mirrored: Mirrored, node: str, namespace: str = "") -> Json:
    """The Pod to create."""
    record = mirrored.record
    ports = [
        {"containerPort": inside, "hostPort": outside, "protocol": protocol} for outside, inside, protocol, _ in record.ports
    ]
    container = {"name": "container", "image": record.network, **({"ports": ports} if ports else {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name_of(record, node),
            "namespace": namespace or namespace_of(record),
            "labels": labels_of(record),
            "annotations": {MIRROR: record.uid, CONTAINER: record.container, NETWORK: record.network},
        },
        "spec": {
            "nodeName": node,
            "containers": [container],
            "enableServiceLinks": False,
            "automountServiceAccountToken": False,
            "tolerations": [{"operator": "Exists"}],
        },
    }


def pod_status(mirrored: Mirrored, node_ips: Iterable[IPAddress], now: str) -> Json:
    """A merge patch for pods/status: the container has its addresses, and that is all that is known of it. `now`: RFC 3339."""
    record = mirrored.record
    ips = [{"ip": str(ip)} for ip in mirrored.ips]
    hosts = [{"ip": str(ip)} for ip in node_ips]
    state = {
        "name": "container",
        "ready": True,
        "started": True,
        "restartCount": 0,
        "image": record.network,
        "imageID": "",
        "containerID": f"cni://{record.container}",
        "state": {"running": {"startedAt": now}},
    }
    types = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    return {
        "status": {
            "phase": "Running",
            "startTime": now,
            "hostIP": hosts[0]["ip"] if hosts else "",
            "hostIPs": hosts,
            "podIP": ips[0]["ip"] if ips else "",
            "podIPs": ips,
            "conditions": [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in types],
            "containerStatuses": [state],
        }
    }


def says(pod: Pod, mirrored: Mirrored) -> bool:
    """Whether the API's Pod says what is so."""
    right = pod.ready and pod.status.phase == "Running" and pod.ips == tuple(map(str, mirrored.ips))
    return right and dict(pod.metadata.labels) == labels_of(mirrored.record)

"""What passes between a node's agent and its pod runtime: sandboxes, their network, and what becomes of the pods."""

from dataclasses import dataclass, field

from podwire.model.addr import IPAddress
from podwire.model.meta import Json


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A pod's pause process and thereby its namespaces. `pid` as this process sees it; `netns` is a path to open,
    e.g. `/proc/123/ns/net`. A hostNetwork pod's is the node's own."""

    uid: str
    namespace: str
    name: str
    pid: int
    netns: str


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """What a pod's containers see of the network: addresses (IPv4 first where dual), and the resolver's settings."""

    ips: tuple[IPAddress, ...]
    host_ips: tuple[IPAddress, ...]
    nameservers: tuple[IPAddress, ...] = ()
    cluster_domain: str = "cluster.local"


@dataclass(frozen=True, slots=True)
class PodReport:
    """A pod's state as the runtime knows it. `container_statuses` are corev1.ContainerStatus documents, in spec order;
    `ready` is the readiness of all containers."""

    uid: str
    phase: str
    ready: bool
    container_statuses: tuple[Json, ...] = ()
    init_container_statuses: tuple[Json, ...] = ()
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class PodEvent:
    """Something to tell as a core/v1 Event about a pod: type "Normal" or "Warning", reason as kubelet's ("BackOff", …)."""

    uid: str
    type: str
    reason: str
    message: str
    container: str = field(default="")

"""What the agent needs from a pod runtime. `podwire.runtime` implements it; the composition root joins the two."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from podwire.model.addr import IPAddress
from podwire.model.meta import Json
from podwire.model.objects import ConfigMap, Pod, Secret


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


class ConfigSource(Protocol):
    """Where a runtime gets what pods refer to. None: there is no such object."""

    async def config_map(self, namespace: str, name: str) -> ConfigMap | None: ...

    async def secret(self, namespace: str, name: str) -> Secret | None: ...


class PodRuntime(Protocol):
    """Pods as processes on one node. Pods and their containers outlive the agent: a new agent finds them by `sandboxes`."""

    async def sandboxes(self) -> tuple[Sandbox, ...]:
        """All that exist on this node, also those made before this agent started."""
        ...

    async def create_sandbox(self, pod: Pod) -> Sandbox:
        """The pod's namespaces and pause process; returns the existing one on repeat. The network is the caller's to plumb."""
        ...

    async def start(self, pod: Pod, network: PodNetwork, source: ConfigSource) -> None:
        """Supervise the pod's containers from now on (init containers, restarts, probes); adopts those that run already.
        Returns at once; what happens comes from `reports`."""
        ...

    async def stop(self, uid: str, grace_seconds: int) -> None:
        """preStop, SIGTERM, after the grace SIGKILL; returns when all containers have ended. Unknown uid: nothing."""
        ...

    async def remove(self, uid: str) -> None:
        """End the pause process and delete the pod's files. Unknown uid: nothing."""
        ...

    def reports(self) -> AsyncIterator[PodReport | PodEvent]:
        """Every change of every pod, latest state first for those that exist."""
        ...

    async def close(self) -> None:
        """Let go without touching the pods."""
        ...

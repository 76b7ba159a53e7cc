"""What the agent needs from a pod runtime. `podwire.runtime` implements it; the composition root joins the two."""

from collections.abc import AsyncIterator
from typing import Protocol

from podwire.model.objects import ConfigMap, Pod, Secret
from podwire.model.podruntime import PodEvent, PodNetwork, PodReport, Sandbox


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

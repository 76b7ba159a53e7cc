"""The agent on a node that is somebody else's: a kubelet has registered it and runs its pods; podwire is its network only."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from random import Random

from podwire.agent.config import AgentConfig
from podwire.agent.ports import ConfigSource
from podwire.agent.registration import NodeState, node_annotations
from podwire.client.api import ApiClient, PatchKind
from podwire.client.backoff import Backoff
from podwire.client.errors import ApiError, NotFound
from podwire.model.meta import Json
from podwire.model.objects import Node, Pod
from podwire.model.podruntime import PodEvent, PodNetwork, PodReport, Sandbox
from podwire.model.resources import NODES
from podwire.model.timestamps import format_time

log = logging.getLogger(__name__)

STARTUP_TAINT = "podwire.io/agent-not-ready"
"""A taint with which nodes may be registered (kubelet --register-with-taints), so that no pod comes before its network."""

NODE_SECONDS = 1.0
"""Between looks for a Node that the kubelet has not registered yet."""


class GuestPresence:
    """What of a Node is the network's: its annotations, the condition NetworkUnavailable, and the taint of the start.

    Everything is written through nodes/status, but for the taint, which needs the right to patch nodes and is optional."""

    def __init__(self, config: AgentConfig, client: ApiClient, clock: Callable[[], datetime], rng: Random) -> None:
        self._config, self._client, self._clock, self._rng = config, client, clock, rng
        self._state = NodeState()
        self._written: bool | None = None
        self._taints: list[Json] | None = None
        self._wake = asyncio.Event()

    def set_state(self, state: NodeState) -> None:
        if state != self._state:
            self._state = state
            self._wake.set()

    def seen(self, node: Node) -> None:
        """Others may say that the network is unavailable (clouds' controllers do, when a node comes): ours is the last word."""
        said = next((c.status for c in node.status.conditions if c.type == "NetworkUnavailable"), None)
        annotations = node_annotations(self._config)
        wrong = any(node.metadata.annotations.get(key) != value for key, value in annotations.items())
        tainted = any(taint.key == STARTUP_TAINT for taint in node.spec.taints)
        if self._written is not None and (wrong or tainted or said != ("False" if self._written else "True")):
            self._written = None
            self._wake.set()

    def gone(self) -> None:
        self._written = None

    async def register(self) -> None:
        """Wait for the Node, and say on it how peers reach this one."""
        backoff = Backoff(self._rng, initial=0.1, maximum=5.0)
        while True:
            try:
                await self._client.get(NODES, self._config.node_name)
                await self._patch({"metadata": {"annotations": node_annotations(self._config)}})
            except NotFound:
                log.info("node %s is not registered yet", self._config.node_name)
                await asyncio.sleep(NODE_SECONDS)
            except ApiError as error:
                log.warning("node %s cannot be annotated: %s", self._config.node_name, error)
                await asyncio.sleep(backoff.next())
            else:
                return

    async def run(self) -> None:
        """Write what changed, until cancelled."""
        backoff = Backoff(self._rng, initial=0.1, maximum=30.0)
        while True:
            self._wake.clear()
            try:
                if self._written != self._state.network:
                    await self._write(self._state)
            except ApiError as error:
                delay = backoff.next()
                log.warning(
                    "node %s: its condition cannot be written: %s; again in %.1f s", self._config.node_name, error, delay
                )
                await asyncio.sleep(delay)
                continue
            backoff.reset()
            await self._wake.wait()

    async def _write(self, state: NodeState) -> None:
        now = format_time(self._clock())
        condition = {
            "type": "NetworkUnavailable",
            "status": "False" if state.network else "True",
            "reason": "PodwireIsUp" if state.network else "PodwireIsDown",
            "message": "the overlay is programmed" if state.network else state.message,
            "lastTransitionTime": now,
            "lastHeartbeatTime": now,
        }
        annotations = node_annotations(self._config)
        self._written = state.network  # before the request: its echo may come before its answer
        try:
            await self._patch({"metadata": {"annotations": annotations}, "status": {"conditions": [condition]}})
            if state.network:
                await self._untaint()
        except ApiError:
            self._written = None
            raise

    async def _patch(self, patch: Json) -> None:
        await self._client.patch(NODES, self._config.node_name, patch, subresource="status", kind=PatchKind.STRATEGIC)

    async def _untaint(self) -> None:
        node = await self._client.get(NODES, self._config.node_name)
        taints = (node.get("spec") or {}).get("taints") or []
        kept = [taint for taint in taints if taint.get("key") != STARTUP_TAINT]
        if len(kept) == len(taints):
            return
        patch = {"metadata": {"resourceVersion": node["metadata"]["resourceVersion"]}, "spec": {"taints": kept or None}}
        await self._client.patch(NODES, self._config.node_name, patch)
        log.info("node %s: the taint %s is removed", self._config.node_name, STARTUP_TAINT)


class NoRuntime:
    """`ports.PodRuntime` of an agent that runs no pods."""

    async def sandboxes(self) -> tuple[Sandbox, ...]:
        return ()

    async def create_sandbox(self, pod: Pod) -> Sandbox:
        raise LookupError(f"pod {pod.key} is the kubelet's")

    async def start(self, pod: Pod, network: PodNetwork, source: ConfigSource) -> None:
        raise LookupError(f"pod {pod.key} is the kubelet's")

    async def stop(self, uid: str, grace_seconds: int) -> None:
        pass

    async def remove(self, uid: str) -> None:
        pass

    async def reports(self) -> AsyncIterator[PodReport | PodEvent]:
        await asyncio.get_running_loop().create_future()
        nothing: tuple[PodReport, ...] = ()
        for report in nothing:
            yield report

    async def close(self) -> None:
        pass
